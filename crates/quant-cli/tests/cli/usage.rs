//! Help, lists, wrong usage, and what happens at the edges of a process.

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{QUANT, finish, has_keys, quant, wait};

const COMMANDS: [&str; 10] =
    ["quantize", "plan", "eval", "generate", "logits", "dequantize", "inspect", "verify", "list", "info"];

#[test]
fn every_command_shows_two_examples() {
    let top = quant(&["--help"]).ok();
    for command in COMMANDS {
        assert!(top.stdout.contains(&format!("\n  {command} ")), "{command} is not listed");
        let help = quant(&[command, "--help"]).ok();
        let (_, examples) = help.stdout.split_once("Examples:\n").expect(command);
        let shown = examples.lines().filter(|l| l.trim_start().starts_with(&format!("quant {command}")));
        assert_eq!(shown.count(), 2, "{command}: {examples}");
    }
}

#[test]
fn wrong_usage_is_code_2() {
    quant(&[]).ends(2, &["Usage"]);
    quant(&["fly"]).ends(2, &["fly"]);
    quant(&["quantize"]).ends(2, &["MODEL"]);
    quant(&["quantize", "m"]).ends(2, &["--out"]);
    quant(&["quantize", "m", "--out", "o", "--sym", "--asym"]).ends(2, &["--asym"]);
    quant(&["quantize", "m", "--out", "o", "--method", "magic"]).ends(2, &["magic", "gptq", "rtn"]);
    quant(&["quantize", "m", "--out", "o", "--bits", "9"]).ends(2, &["bits", "9"]);
    quant(&["quantize", "m", "--out", "o", "--group-size", "0"]).ends(2, &["group"]);
    quant(&["quantize", "m", "--out", "o", "--max-memory", "many"]).ends(2, &["3.2GiB"]);
    quant(&["quantize", "m", "--out", "o", "--include", "("]).ends(2, &["include"]);
    quant(&["quantize", "m", "--out", "o", "--max-fallbacks", "7"]).ends(2, &["between 0 and 1"]);
    quant(&["--threads", "0", "info"]).ends(2, &["threads"]);
    quant(&["logits", "m"]).ends(2, &["--ids"]);
}

#[test]
fn lists_and_info_are_json_too() {
    let lists = quant(&["list", "--json"]).ok().json();
    for (list, name) in [
        ("methods", "gptq"),
        ("methods", "rtn"),
        ("layouts", "gptq"),
        ("kernels", "scalar"),
        ("architectures", "llama"),
    ] {
        let entries = lists[list].as_array().expect(list);
        let entry = entries.iter().find(|e| e["name"] == name).unwrap_or_else(|| panic!("no {name}"));
        has_keys(entry, &[("description", 's'), ("available", 'b')]);
    }
    let methods = quant(&["list", "methods"]).ok().stdout;
    assert!(methods.contains("gptq") && !methods.contains("llama"));
    let info = quant(&["info", "--json", "--threads", "3"]).ok().json();
    assert_eq!(info["threads"], 3);
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn the_instruction_set_can_be_capped() {
    let capped = finish(Command::new(QUANT).args(["info", "--json"]).env("QUANT_ISA", "scalar"));
    assert_eq!(capped.ok().json()["isa"], "scalar");
    let bad = finish(Command::new(QUANT).arg("info").env("QUANT_ISA", "mmx"));
    bad.ends(2, &["QUANT_ISA", "mmx", "scalar"]);
}

/// Both happen to programs in pipes, and neither is a panic.
#[cfg(target_os = "linux")]
#[test]
fn closed_and_full_outputs_are_survived() {
    let mut child =
        Command::new(QUANT).arg("list").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(child.stdout.take());
    let status = wait(child, Duration::from_secs(20));
    assert_eq!(status.code(), Some(0));

    let full = File::options().write(true).open("/dev/full").unwrap();
    let child = Command::new(QUANT).arg("list").stdout(full).stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(wait(child, Duration::from_secs(20)).code(), Some(1));
}
