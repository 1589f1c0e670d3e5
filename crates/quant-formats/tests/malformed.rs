//! The hostile files of `fixtures/malformed`, as far as this crate can judge them: kinds safetensors, index,
//! gptq, gguf, awq, bnb and ct. Every case of these kinds gets the verdict that its manifest asks for.

use std::fs;
use std::path::{Path, PathBuf};

use quant_formats::{Checkpoint, GgufFile, SafetensorsFile, Severity};
use serde_json::Value;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/malformed")
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    // Directories that git cannot carry because they are empty are simply absent.
    for entry in fs::read_dir(from).into_iter().flatten() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &target)
        } else {
            drop(fs::copy(entry.path(), target))
        }
    }
}

/// Builds the case in `dir`: base, overlay, removals, special files. Gives the path to open.
fn materialize(case: &Value, dir: &Path) -> PathBuf {
    let relative = case["path"].as_str().unwrap();
    let source = corpus().join(relative);
    let target = dir.join(Path::new(relative).file_name().unwrap());
    let is_file = source.is_file();
    if is_file {
        fs::copy(&source, &target).unwrap();
    } else {
        if let Some(base) = case["base"].as_str() {
            copy_tree(&corpus().join(base), &target);
        }
        copy_tree(&source, &target);
        for name in case["remove"].as_array().into_iter().flatten() {
            fs::remove_file(target.join(name.as_str().unwrap())).unwrap();
        }
    }
    let special = &case["materialize"];
    if let Some(kind) = special["type"].as_str() {
        let at = special["at"].as_str().map_or(target.clone(), |name| target.join(name));
        let _ = fs::remove_file(&at);
        match kind {
            "absent" => {}
            "dir" => fs::create_dir(&at).unwrap(),
            "symlink" => {
                assert_eq!(special["target"], "@self");
                std::os::unix::fs::symlink(at.file_name().unwrap(), &at).unwrap();
            }
            other => panic!("unknown special file {other}"),
        }
    }
    target
}

/// What a program does with the case up to its stage. `Err` holds the text for the user.
fn run(case: &Value, path: &Path) -> Result<(), String> {
    if case["kind"] == "gguf" && case["stage"] == "header" {
        let file = GgufFile::open(path).map_err(|e| e.to_string())?;
        return file.tensors().iter().try_for_each(|t| file.read(t).map(drop)).map_err(|e| e.to_string());
    }
    if case["stage"] == "header" {
        let file = SafetensorsFile::open(path).map_err(|e| e.to_string())?;
        for name in file.names() {
            file.read(name).map_err(|e| e.to_string())?;
        }
        return Ok(());
    }
    let checkpoint = Checkpoint::open(path).map_err(|e| e.to_string())?;
    let errors = checkpoint.verify().into_iter().filter(|f| f.severity == Severity::Error);
    match errors.map(|f| format!("{}: {}", f.tensor, f.message)).reduce(|a, b| format!("{a}\n{b}")) {
        None => Ok(()),
        Some(text) => Err(text),
    }
}

fn check_kind(kind: &str) -> usize {
    let manifest = fs::read_to_string(corpus().join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    let mut failures = Vec::new();
    let mut count = 0;
    // What is wrong with the keys of a GGUF file as a model shows when the model is loaded.
    let judged = |c: &&Value| c["kind"] == kind && !(kind == "gguf" && c["stage"] == "load");
    for case in manifest["cases"].as_array().unwrap().iter().filter(judged) {
        count += 1;
        let dir = tempfile::tempdir().unwrap();
        let result = run(case, &materialize(case, dir.path()));
        let words: Vec<_> = case["mention"].as_array().unwrap().iter().map(|w| w.as_str().unwrap()).collect();
        let problem = match (case["expected"].as_str().unwrap(), &result) {
            ("accept", Err(text)) => format!("refused: {text}"),
            ("reject", Ok(())) => "accepted".to_owned(),
            (_, Err(text)) if text.chars().any(|c| c.is_control() && c != '\n') => {
                format!("raw text {text:?}")
            }
            (_, Err(text)) if !words.is_empty() && !words.iter().any(|w| text.contains(w)) => {
                format!("{text:?} mentions none of {words:?}")
            }
            // Nothing is written here, so what is not finite must be refused.
            ("finite_or_reject", Ok(())) => "accepted".to_owned(),
            _ => continue,
        };
        failures.push(format!("{}: {problem}", case["id"]));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    count
}

#[test]
fn safetensors() {
    assert_eq!(check_kind("safetensors"), 45);
}

#[test]
fn index() {
    assert_eq!(check_kind("index"), 14);
}

#[test]
fn gptq() {
    assert_eq!(check_kind("gptq"), 16);
}

#[test]
fn awq() {
    assert_eq!(check_kind("awq"), 4);
}

#[test]
fn ct() {
    assert_eq!(check_kind("ct"), 3);
}

#[test]
fn gguf() {
    assert_eq!(check_kind("gguf"), 41);
}

#[test]
fn bitsandbytes() {
    assert_eq!(check_kind("bnb"), 9);
}

/// Opening a pipe for reading would wait for a writer for ever.
#[test]
fn a_pipe_is_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("model.safetensors");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().is_ok_and(|s| s.success());
    if !made {
        eprintln!("skipped: no mkfifo here");
        return;
    }
    let error = SafetensorsFile::open(&pipe).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}
