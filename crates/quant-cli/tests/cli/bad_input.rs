//! Inputs that are wrong without malice: clear errors, the old output untouched, nothing left behind.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use quant_testkit::synthetic::{Arch, Checkpoint, Shape, Storage};

use crate::support::{QUANT, TinyModel, finish, names, quant, text, trained_model, wait};

/// Replaces one element of an f32 weight file.
fn poke(file: &Path, tensor: &str, element: usize, value: f32) {
    let mut bytes = fs::read(file).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let begin = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    let at = 8 + len + begin + 4 * element;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(file, bytes).unwrap();
}

fn f32_model() -> TinyModel {
    TinyModel::of(Checkpoint { storage: Storage::F32, ..Checkpoint::new(Shape::tiny(Arch::Llama)) })
}

#[test]
fn missing_files_are_named() {
    for command in ["inspect", "verify"] {
        quant(&[command, "/no/such/model"]).fails(&["/no/such/model"]);
    }
    quant(&["generate", "no-such-model", "--prompt", "x"]).fails(&["no-such-model", "cache"]);
    let model = TinyModel::new(Arch::Llama);
    let out = model.beside("out");
    let run = model.quantize(&out, &["--calibration", "/no/such/text.txt"]);
    // Given twice, the last counts.
    run.ends(2, &["--calibration"]);
    let path = model.path();
    let run = quant(&["quantize", text(&path), "--out", text(&out), "--calibration", "/no/such/text.txt"]);
    run.fails(&["/no/such/text.txt"]);
    assert!(model.left_behind().is_empty());
}

#[test]
fn non_finite_weights_are_refused_or_counted() {
    let tensor = "model.layers.1.mlp.up_proj.weight";
    for method in ["rtn", "gptq"] {
        let model = f32_model();
        poke(&model.weights(), tensor, 67, f32::NAN);
        poke(&model.weights(), tensor, 70, f32::INFINITY);
        let out = model.beside("out");
        // Row 1, column 3 of 64.
        let run = model.quantize(&out, &["--method", method]).fails(&["model.layers.1.mlp.up_proj", "NaN"]);
        assert!(run.stderr.contains("[1, 3]") || run.stderr.contains("67"), "{}", run.stderr);
        assert!(model.left_behind().is_empty(), "{:?}", model.left_behind());
        let done = model.quantize(&out, &["--method", method, "--nan", "zero", "--json"]).ok().json();
        assert_eq!(done["zeroed"], 2);
        quant(&["verify", text(&out)]).ok();
        quant(&["verify", text(&model.path())]).fails(&[tensor, "67"]);
    }
}

/// A norm so large that the inputs of a layer overflow: GPTQ has no statistics there, and says so.
#[test]
fn too_many_fallbacks_are_code_3() {
    let model = f32_model();
    poke(&model.weights(), "model.layers.0.input_layernorm.weight", 5, 3e38);
    let out = model.beside("out");
    let run =
        model.quantize(&out, &["--json", "--exclude", r"layers\.1"]).ends(3, &["fell back", "max-fallbacks"]);
    let done = run.json();
    assert!(done["fallbacks"].as_u64().unwrap() >= 3, "{done}");
    assert!(done["layers"][0]["fallback"].is_string(), "{done}");
    quant(&["inspect", text(&out)]).ok();
    model.quantize(&out, &["--exclude", r"layers\.1", "--max-fallbacks", "1", "--force"]).ok();
}

#[test]
fn sizes_that_do_not_fit_are_all_listed_at_once() {
    // No group of 32 divides 172, the width of a well-known tiny model.
    let shape = Shape { ffn: 172, ..Shape::tiny(Arch::Llama) };
    let model = TinyModel::of(Checkpoint::new(shape));
    let out = model.beside("out");
    let start = Instant::now();
    let run = model.quantize(&out, &[]);
    if run.code == Some(0) {
        // Short groups at the end of a row are possible too, if the result can be used.
        quant(&["verify", text(&out)]).ok();
        return;
    }
    let run = run.fails(&["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "32", "172"]);
    // It takes hundredths of a second; machines that run many tests at once are slow.
    assert!(start.elapsed() < Duration::from_secs(5), "before any work");
    let offered = ["--exclude", "row", "-1"].iter().any(|choice| run.stderr.contains(choice));
    assert!(offered, "choices are offered: {}", run.stderr);
    assert!(model.left_behind().is_empty());
    let path = model.path();
    let plan = quant(&["plan", text(&path), "--group-size", "32", "--json"]).ends(1, &["down_proj"]).json();
    let problems = plan["problems"].as_array().unwrap();
    assert!(problems.len() >= 2 && problems.iter().all(|p| p["message"].is_string()), "{plan}");
}

#[test]
fn bits_that_the_layout_lacks_are_refused() {
    let model = TinyModel::new(Arch::Llama);
    let run = model.quantize(&model.beside("out"), &["--bits", "5", "--format", "gptq"]);
    assert!([Some(1), Some(2)].contains(&run.code), "{run:?}");
    assert!(run.stderr.contains("bits") && run.stderr.contains('5') && run.stderr.contains('4'));
    assert!(model.left_behind().is_empty());
}

#[test]
fn an_existing_output_is_kept_without_force() {
    let model = TinyModel::new(Arch::Llama);
    let out = model.beside("out");
    model.quantize(&out, &["--method", "rtn"]).ok();
    let before = fs::read(out.join("model.safetensors")).unwrap();
    model.quantize(&out, &["--method", "rtn", "--bits", "8"]).fails(&["exists", text(&out)]);
    assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), before);
    model.quantize(&out, &["--method", "rtn", "--bits", "8", "--force"]).ok();
    assert_ne!(fs::read(out.join("model.safetensors")).unwrap(), before);

    let precious = model.beside("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("thesis.txt"), "ten years").unwrap();
    model.quantize(&precious, &["--method", "rtn", "--force"]).fails(&["precious"]);
    assert_eq!(names(&precious), ["thesis.txt"]);
    assert_eq!(model.left_behind(), ["out", "precious"]);
}

#[test]
fn the_input_is_not_overwritten() {
    let model = TinyModel::new(Arch::Llama);
    let weights = model.weights();
    let before = fs::read(&weights).unwrap();
    quant(&["dequantize", text(&model.path()), "--out", text(&weights)]).fails(&["model.safetensors"]);
    assert_eq!(fs::read(&weights).unwrap(), before);
}

/// A folder in which nobody, not even the superuser, can create files.
#[cfg(target_os = "linux")]
#[test]
fn a_read_only_target_is_an_error() {
    let model = TinyModel::new(Arch::Llama);
    for method in ["rtn", "gptq"] {
        model.quantize(Path::new("/proc/quant-test"), &["--method", method]).fails(&["/proc"]);
    }
    let path = model.path();
    quant(&["dequantize", text(&path), "--out", "/proc/quant-test.safetensors"]).fails(&["/proc"]);
    quant(&["logits", text(&path), "--ids", "1", "--out", "/proc/quant-test.safetensors"]).fails(&["/proc"]);
}

/// A limit on the size of files stands in for a full disk: the write fails in the same way.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_the_old_output() {
    let model = TinyModel::new(Arch::Llama);
    let (path, ids, out) = (model.path(), model.ids(), model.beside("out"));
    model.quantize(&out, &["--method", "rtn"]).ok();
    let before = fs::read(out.join("model.safetensors")).unwrap();
    let limited = |arguments: &[&str]| {
        let script = "ulimit -f 16; exec \"$0\" \"$@\"";
        finish(Command::new("bash").args(["-c", script, QUANT]).args(arguments))
    };
    for method in ["rtn", "gptq"] {
        let run = limited(&[
            "quantize",
            text(&path),
            "--out",
            text(&out),
            "--force",
            "--group-size",
            "32",
            "--method",
            method,
            "--calibration",
            text(&ids),
        ]);
        run.fails(&["model.safetensors", "File too large"]);
        assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), before);
    }
    let file = model.beside("float.safetensors");
    limited(&["dequantize", text(&path), "--out", text(&file)]).fails(&["float.safetensors"]);
    assert_eq!(model.left_behind(), ["out"]);
}

#[test]
fn quantized_models_are_not_quantized_again() {
    let model = TinyModel::new(Arch::Llama);
    let (once, twice) = (model.beside("once"), model.beside("twice"));
    model.quantize(&once, &["--method", "rtn"]).ok();
    quant(&["quantize", text(&once), "--out", text(&twice), "--method", "rtn"]).fails(&["quantized already"]);
    assert_eq!(model.left_behind(), ["once"]);
}

#[test]
fn token_ids_beyond_the_vocabulary_are_refused() {
    let model = TinyModel::new(Arch::Llama);
    let path = model.path();
    let id = model.vocab().to_string();
    quant(&["logits", text(&path), "--ids", &id]).fails(&[&id]);
    quant(&["logits", text(&path), "--ids", "1,x"]).ends(2, &["x"]);
}

#[test]
fn a_memory_limit_that_cannot_be_kept_is_refused() {
    let model = TinyModel::new(Arch::Llama);
    model.quantize(&model.beside("out"), &["--max-memory", "1MB"]).fails(&["MiB"]);
    assert!(model.left_behind().is_empty());
}

/// Interrupts a run in the middle: the exit code tells the signal and nothing is left behind.
#[cfg(unix)]
#[test]
fn interrupted_runs_clean_up() {
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let child = Command::new(QUANT)
            .args(["quantize", text(&trained_model()), "--out", text(&out), "--threads", "1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while names(folder.path()).is_empty() {
            assert!(start.elapsed() < Duration::from_secs(60), "the output was never begun");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        assert_eq!(wait(child, Duration::from_secs(20)).code(), Some(code));
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
    }
}
