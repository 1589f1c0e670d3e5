//! Hostile files: each gets its verdict at its stage, in bounded time and memory, and never a panic or a signal.

use std::path::Path;
use std::time::Duration;

use quant_testkit::Golden;
use quant_testkit::malformed::{Case, Stage, Verdict, cases, limits};

use crate::support::{Run, names, quant_within, text};

/// Judges a run by the verdict of its case.
fn judge(case: &Case, run: &Run) -> Result<(), String> {
    let fail = |why: &str| Err(format!("{} ({}): {why}; {run:?}", case.id, case.wrong));
    let Some(code) = run.code else { return fail("a signal or the time limit ended it") };
    if code > 100 {
        return fail("panic");
    }
    let raw = |c: char| c.is_control() && c != '\n' && c != '\t';
    if run.stdout.contains(raw) || run.stderr.contains(raw) {
        return fail("raw control characters in the output");
    }
    if run.stderr.contains("internal error") {
        return fail("a panic that was caught");
    }
    match (case.expected, code) {
        (Verdict::Accept, 0) => Ok(()),
        (Verdict::Accept, _) => fail("a valid file was refused"),
        (Verdict::Reject, 0) => fail("accepted"),
        (_, 0) => Ok(()),
        (_, _) if run.stderr.trim().is_empty() => fail("refused without a text"),
        (_, _) if !case.mention.is_empty() && !case.mention.iter().any(|m| run.stderr.contains(m)) => {
            fail(&format!("none of {:?} in the text", case.mention))
        }
        _ => Ok(()),
    }
}

/// No number in a written file may be NaN or infinite.
fn check_finite(case: &Case, file: &Path) -> Result<(), String> {
    let written = Golden::read(file);
    for name in written.names().iter().filter(|n| !n.ends_with("g_idx") && !n.contains(".q")) {
        if written.f32(name).iter().any(|v| !v.is_finite()) {
            return Err(format!("{}: {name} is not finite", case.id));
        }
    }
    Ok(())
}

/// Runs a case at its stage.
fn run_case(case: &Case) -> Result<(), String> {
    let scratch = tempfile::tempdir().unwrap();
    let model = case.materialize(scratch.path());
    let out_folder = tempfile::tempdir().unwrap();
    let out = out_folder.path().join("out.safetensors");
    let (model, out_text) = (text(&model), text(&out));
    let arguments = match case.stage {
        Stage::Header => vec!["inspect", model, "--tensors"],
        Stage::Load => vec!["verify", model],
        Stage::Values => vec!["dequantize", model, "--out", out_text],
        Stage::Tokenize => vec!["logits", model, "--prompt", "t3 hello", "--out", out_text],
        Stage::Template => vec!["chat", model, "--once", "hello", "--max-new-tokens", "4"],
    };
    let run = |arguments: &[&str]| {
        let limits = limits();
        quant_within(limits.max_rss_mib, Duration::from_secs(limits.max_seconds), arguments)
    };
    judge(case, &run(&arguments))?;
    if out.exists() {
        check_finite(case, &out)?;
    }
    if case.kind == "numeric" {
        let quantized = out_folder.path().join("quantized");
        let arguments =
            ["quantize", model, "--out", text(&quantized), "--method", "rtn", "--group-size", "32"];
        judge(case, &run(&arguments))?;
        if quantized.exists() {
            check_finite(case, &quantized.join("model.safetensors"))?;
        }
    }
    let left: Vec<String> = names(out_folder.path()).into_iter().filter(|n| n.starts_with('.')).collect();
    if left.is_empty() { Ok(()) } else { Err(format!("{}: {left:?} left behind", case.id)) }
}

fn all(kind: &str) {
    let failures: Vec<String> = cases(&[kind]).iter().filter_map(|case| run_case(case).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn safetensors() {
    all("safetensors");
}

#[test]
fn config() {
    all("config");
}

#[test]
fn gptq() {
    all("gptq");
}

#[test]
fn bitsandbytes() {
    all("bnb");
}

#[test]
fn index() {
    all("index");
}

#[test]
fn tokenizer() {
    all("tokenizer");
}

#[test]
fn template() {
    all("template");
}

#[test]
fn numeric() {
    all("numeric");
}

#[test]
fn gguf() {
    all("gguf");
}
