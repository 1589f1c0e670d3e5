//! The architecture's rules as tests: who may depend on whom, and what no source file may contain.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Every crate with all crates of this workspace it may depend on. Arrows point only towards `quant-core`.
const ALLOWED: [(&str, &[&str]); 10] = [
    ("quant-core", &[]),
    ("quant-kernels", &["quant-core"]),
    ("quant-math", &["quant-core", "quant-kernels"]),
    ("quant-formats", &["quant-core"]),
    ("quant-methods", &["quant-core", "quant-math"]),
    ("quant-model", &["quant-core", "quant-kernels"]),
    ("quant-eval", &["quant-core", "quant-kernels", "quant-model"]),
    (
        "quant",
        &[
            "quant-core",
            "quant-eval",
            "quant-formats",
            "quant-kernels",
            "quant-math",
            "quant-methods",
            "quant-model",
        ],
    ),
    ("quant-cli", &["quant", "quant-core", "quant-eval"]),
    ("quant-testkit", &["quant-core"]),
];
/// For tests only: nothing that is released may depend on it.
const TESTS_ONLY: &str = "quant-testkit";
/// The one crate that may contain unsafe code; all others forbid it.
const MAY_BE_UNSAFE: &str = "quant-kernels";
/// Longest source file. Tests in files of their own count too.
const MAX_LINES: usize = 1000;
/// The one file that asks the CPU for its features.
const CPU_FEATURES: &str = "crates/quant-kernels/src/isa.rs";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Name of each package of the workspace, with what `cargo metadata` says about it.
fn packages() -> BTreeMap<String, Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    packages.iter().map(|p| (p["name"].as_str().expect("a name").to_string(), p.clone())).collect()
}

/// The rule that a dependency of `from` on `to` breaks, if any. `kind` is as in `cargo metadata`.
fn violation(from: &str, to: &str, kind: Option<&str>) -> Option<String> {
    if kind == Some("dev") {
        return None;
    }
    if to == TESTS_ONLY {
        return Some(format!("{from} depends on {to}, which is for tests only"));
    }
    let row = ALLOWED.iter().find(|(name, _)| *name == from);
    match row {
        None => Some(format!("{from} is in no layer; give it a row in tests/layering.rs")),
        Some((_, allowed)) if allowed.contains(&to) => None,
        Some((_, allowed)) => Some(format!("{from} may not depend on {to}, only on {allowed:?}")),
    }
}

#[test]
fn dependencies_point_towards_the_core() {
    let packages = packages();
    let mut broken = Vec::new();
    for (from, package) in &packages {
        assert!(ALLOWED.iter().any(|(name, _)| name == from), "{from} has no row in tests/layering.rs");
        for dependency in package["dependencies"].as_array().expect("a list of dependencies") {
            let to = dependency["name"].as_str().expect("a name");
            if packages.contains_key(to) {
                broken.extend(violation(from, to, dependency["kind"].as_str()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn the_rule_finds_forbidden_edges() {
    assert!(violation("quant-core", "quant-math", None).is_some());
    assert!(violation("quant-formats", "quant-kernels", Some("build")).is_some());
    assert!(violation("quant-methods", "quant-model", None).is_some());
    assert!(violation("quant-cli", "quant-testkit", None).is_some());
    assert!(violation("quant-new", "quant-core", None).is_some());
    assert!(violation("quant-cli", "quant-testkit", Some("dev")).is_none());
    assert!(violation("quant-eval", "quant-model", None).is_none());
}

/// All Rust files below the `src` folders of the workspace, with their text.
fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    collect(&root().join("src"), &mut files);
    for entry in fs::read_dir(root().join("crates")).expect("crates/ exists") {
        collect(&entry.expect("crates/ can be listed").path().join("src"), &mut files);
    }
    assert!(files.len() > 10, "source files are found");
    files.sort();
    let named = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let name = path.strip_prefix(root()).expect("below the root").to_string_lossy().replace('\\', "/");
        (name, text)
    };
    files.into_iter().map(named).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("the folder can be listed").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn safe_crates_forbid_unsafe_code() {
    for (name, package) in packages() {
        for target in package["targets"].as_array().expect("a list of targets") {
            let kind = target["kind"][0].as_str().expect("a kind");
            let file = target["src_path"].as_str().expect("a path");
            if !["lib", "bin"].contains(&kind) || name == MAY_BE_UNSAFE {
                continue;
            }
            let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{file}: {e}"));
            assert!(text.contains("#![forbid(unsafe_code)]"), "{file}: add #![forbid(unsafe_code)]");
        }
    }
}

/// Lines (from 1) with unsafe code that no `SAFETY` comment justifies: on the line, or in the lines of the same
/// statement and the comment above it.
fn unjustified(text: &str) -> Vec<usize> {
    /// A statement that ends in an unsafe block may begin this many lines above it.
    const REACH: usize = 4;
    let lines: Vec<&str> = text.lines().collect();
    let is_comment = |line: &str| line.trim_start().starts_with("//");
    let is_unsafe = |line: &str| {
        let code = line.split("//").next().unwrap_or("");
        ["unsafe {", "unsafe impl", "unsafe extern"].iter().any(|word| code.contains(word))
    };
    let justified = |at: usize| {
        let mut code_lines = 0;
        for line in lines[..=at].iter().rev() {
            if line.contains("SAFETY:") {
                return true;
            }
            code_lines += usize::from(!is_comment(line));
            if code_lines > REACH {
                break;
            }
        }
        false
    };
    let bare = |&i: &usize| !is_comment(lines[i]) && is_unsafe(lines[i]) && !justified(i);
    (0..lines.len()).filter(bare).map(|i| i + 1).collect()
}

#[test]
fn unsafe_code_states_why_it_is_sound() {
    for (file, text) in sources() {
        let lines = unjustified(&text);
        assert!(lines.is_empty(), "{file}: say // SAFETY: why above lines {lines:?}");
    }
}

#[test]
fn the_safety_rule_finds_bare_blocks() {
    assert_eq!(unjustified("fn f() {\n    unsafe { g() }\n}"), [2]);
    assert!(unjustified("// SAFETY: g has no condition\nlet x =\n    unsafe { g() };").is_empty());
    assert!(unjustified("// unsafe { in words }").is_empty());
}

#[test]
fn files_stay_short() {
    for (file, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= MAX_LINES, "{file}: {lines} lines, at most {MAX_LINES}");
    }
}

#[test]
fn one_file_asks_the_cpu() {
    for (file, text) in sources().iter().filter(|(file, _)| file != CPU_FEATURES) {
        let asks =
            ["is_x86_feature_detected", "is_aarch64_feature_detected"].iter().any(|m| text.contains(m));
        assert!(!asks, "{file}: ask {CPU_FEATURES} instead");
    }
}

#[test]
fn libraries_do_not_print() {
    const PRINTS: [&str; 5] = ["println!", "eprintln!", "print!(", "eprint!(", "dbg!"];
    let may_print = ["crates/quant-cli/", "crates/quant-testkit/"];
    for (file, text) in sources().iter().filter(|(file, _)| !may_print.iter().any(|m| file.starts_with(m))) {
        let code = text.split("#[cfg(test)]").next().unwrap_or("");
        let mut lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        let found = lines.find(|line| PRINTS.iter().any(|macro_name| line.contains(macro_name)));
        assert!(found.is_none() || file.contains("tests"), "{file}: {found:?}");
    }
}
