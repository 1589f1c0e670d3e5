//! From a float model to a quantized one, and everything that can be done with it.

use std::collections::BTreeMap;
use std::fs;

use quant_testkit::synthetic::Arch;
use quant_testkit::{Golden, fixtures_dir};
use serde_json::Value;

use crate::support::{TinyModel, has_keys, quant, text, trained_model};

/// The story of the README on the trained model of the fixtures.
#[test]
fn a_trained_model_is_quantized_measured_and_run() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (trained_model(), folder.path().join("out"));
    let stories = fixtures_dir().join("text/stories.txt");
    let done = quant(&[
        "quantize",
        text(&model),
        "--out",
        text(&out),
        "--bits",
        "4",
        "--group-size",
        "128",
        "--samples",
        "8",
        "--json",
    ]);
    let done = done.ok().json();
    has_keys(
        &done,
        &[
            ("method", 's'),
            ("bits", 'n'),
            ("group_size", 'n'),
            ("layout", 's'),
            ("layers", 'a'),
            ("fallbacks", 'n'),
            ("bytes_in", 'n'),
            ("bytes_out", 'n'),
            ("bits_per_weight", 'n'),
            ("seconds", 'n'),
            ("peak_rss_bytes", 'n'),
            ("sha256", 'o'),
        ],
    );
    let layers = done["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 28);
    for layer in layers {
        has_keys(
            layer,
            &[
                ("name", 's'),
                ("shape", 'a'),
                ("method", 's'),
                ("bits", 'n'),
                ("group_size", 'n'),
                ("rel_error", 'n'),
                ("loss", 'n'),
                ("damp", 'n'),
                ("seconds", 'n'),
                ("fallback", '?'),
            ],
        );
    }
    // 4-bit codes, an f16 scale and a 4-bit zero per 128, a 32-bit index per column.
    let bits = done["bits_per_weight"].as_f64().unwrap();
    assert!((4.15..4.4).contains(&bits), "{bits}");
    let written = fs::metadata(out.join("model.safetensors")).unwrap().len();
    assert_eq!(done["bytes_out"].as_u64(), Some(written));
    for name in ["config.json", "tokenizer.json", "generation_config.json"] {
        assert!(out.join(name).exists() && done["sha256"][name].is_string(), "{name}");
    }

    let eval = quant(&[
        "eval",
        text(&out),
        "--text",
        text(&stories),
        "--reference",
        text(&model),
        "--seq-len",
        "128",
        "--max-tokens",
        "2048",
        "--json",
    ]);
    let eval = eval.ok().json();
    has_keys(
        &eval,
        &[
            ("tokens", 'n'),
            ("nll", 'n'),
            ("perplexity", 'n'),
            ("seconds", 'n'),
            ("tokens_per_second", 'n'),
            ("bytes", 'n'),
            ("bits_per_weight", 'n'),
            ("peak_rss_bytes", 'n'),
            ("compute", 's'),
            ("kl_mean", 'n'),
            ("kl_p99", 'n'),
            ("kl_max", 'n'),
            ("top1_agreement", 'n'),
            ("reference_perplexity", 'n'),
        ],
    );
    let number = |key: &str| eval[key].as_f64().unwrap();
    assert!((number("perplexity") - number("nll").exp()).abs() < 1e-6 * number("perplexity"));
    assert!(number("kl_mean") > 0.0 && number("kl_mean") < 0.1, "{eval}");
    assert!(number("top1_agreement") > 0.8 && number("top1_agreement") < 1.0, "{eval}");
    let ratio = number("perplexity") / number("reference_perplexity");
    assert!((0.95..1.1).contains(&ratio), "{eval}");

    let prompt = "once upon a time there was a little";
    let generate = |more: &[&str]| {
        let mut arguments = vec!["generate", text(&out), "--prompt", prompt, "--max-new-tokens", "12"];
        arguments.extend(more);
        quant(&arguments).ok()
    };
    let story = generate(&["--json"]).json();
    has_keys(&story, &[("text", 's'), ("generated_tokens", 'n'), ("generate_tokens_per_second", 'n')]);
    let streamed = generate(&["-q"]);
    assert_eq!(streamed.stdout, format!("{prompt}{}\n", story["text"].as_str().unwrap()));
    assert_eq!(streamed.stderr, "");
    let seeded =
        |seed: &str| generate(&["--temperature", "0.9", "--seed", seed, "--json"]).json()["text"].clone();
    assert_eq!(seeded("1"), seeded("1"));

    quant(&["verify", text(&out), "--json"]).ok();
    let floats = folder.path().join("floats.safetensors");
    quant(&["dequantize", text(&out), "--out", text(&floats)]).ok();
    let (ours, theirs) = (Golden::read(&floats), Golden::read(&model.join("model.safetensors")));
    assert_eq!(ours.names(), theirs.names());
    let name = "model.layers.0.mlp.up_proj.weight";
    let (q, w) = (ours.f32(name), theirs.f32(name));
    let norm = |a: &ndarray::ArrayD<f32>| a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let relative = norm(&(&q - &w)) / norm(&w);
    let reported = layers.iter().find(|l| l["name"] == "model.layers.0.mlp.up_proj").unwrap();
    let reported = reported["rel_error"].as_f64().unwrap();
    // Sums of 196608 squares in f32 at worst.
    assert!((relative - reported).abs() < 1e-3 * relative, "{relative} {reported}");
}

/// Files of a run with their hashes.
fn hashes(model: &TinyModel, name: &str, more: &[&str]) -> BTreeMap<String, Value> {
    let out = model.beside(name);
    let mut arguments = vec!["--json"];
    arguments.extend(more);
    let done = model.quantize(&out, &arguments).ok().json();
    serde_json::from_value(done["sha256"].clone()).unwrap()
}

#[test]
fn bytes_do_not_depend_on_threads() {
    for arch in [Arch::Llama, Arch::Gpt2] {
        for options in [
            &["--method", "gptq", "--desc-act"][..],
            &["--method", "gptq", "--bits", "3"],
            &["--method", "awq"],
            &["--method", "w8a8", "--static-activations", "entropy"],
        ] {
            let model = TinyModel::new(arch);
            let with = |threads: &'static str| {
                let mut arguments = options.to_vec();
                arguments.extend(["--threads", threads]);
                hashes(&model, threads, &arguments)
            };
            let one = with("1");
            assert!(one.contains_key("model.safetensors"));
            for threads in ["2", "3", "7"] {
                assert_eq!(with(threads), one, "{arch:?} {options:?} {threads} threads");
            }
        }
    }
}

#[test]
fn every_architecture_goes_all_the_way() {
    for arch in Arch::ALL {
        let model = TinyModel::new(arch);
        let out = model.beside("out");
        let done = model.quantize(&out, &["--json", "--asym"]).ok().json();
        let per_block = if arch == Arch::Gpt2 { 4 } else { 7 };
        assert_eq!(done["layers"].as_array().unwrap().len(), 2 * per_block, "{arch:?}");
        quant(&["verify", text(&out)]).ok();
        let inspected = quant(&["inspect", text(&out), "--json"]).ok().json();
        assert_eq!(inspected["architecture"]["model_type"], arch.model_type());
        assert_eq!(inspected["quantized_layers"], 2 * per_block);
        assert_eq!(inspected["bits_per_weight"], done["bits_per_weight"]);

        let file = model.beside("logits.safetensors");
        quant(&["logits", text(&out), "--ids", "1,2,3", "--out", text(&file)]).ok();
        let logits = Golden::read(&file).f32("logits");
        assert_eq!(logits.shape(), [3, model.vocab()]);
        assert!(logits.iter().all(|v| v.is_finite()));
    }
}

#[test]
fn plans_are_exact() {
    let model = TinyModel::new(Arch::Qwen2);
    let (path, ids) = (model.path(), model.ids());
    let plan = quant(&["plan", text(&path), "--group-size", "32", "--calibration", text(&ids), "--json"]);
    let plan = plan.ok().json();
    has_keys(
        &plan,
        &[
            ("tensors", 'a'),
            ("bytes_out", 'n'),
            ("bits_per_weight", 'n'),
            ("peak_rss_bytes", 'n'),
            ("seconds", 'n'),
            ("problems", 'a'),
        ],
    );
    has_keys(
        &plan["tensors"][0],
        &[("name", 's'), ("shape", 'a'), ("method", 's'), ("bits", 'n'), ("bytes", 'n')],
    );
    let out = model.beside("out");
    let done = model.quantize(&out, &["--json"]).ok().json();
    assert_eq!(plan["bytes_out"], done["bytes_out"]);
    assert_eq!(plan["bits_per_weight"], done["bits_per_weight"]);
    let dry = model.quantize(&model.beside("dry"), &["--json", "--dry-run"]).ok().json();
    assert_eq!(dry["bytes_out"], plan["bytes_out"]);
    assert_eq!(model.left_behind(), ["out"]);
}

#[test]
fn layers_are_chosen_by_name() {
    let model = TinyModel::new(Arch::Llama);
    let out = model.beside("out");
    let done = model
        .quantize(&out, &["--json", "--include", "mlp", "--exclude", r"\.1\.mlp\.down_proj$"])
        .ok()
        .json();
    let names: Vec<&str> =
        done["layers"].as_array().unwrap().iter().map(|l| l["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 5, "{names:?}");
    assert!(names.iter().all(|n| n.contains("mlp") && *n != "model.layers.1.mlp.down_proj"));
    quant(&["verify", text(&out)]).ok();
    quant(&["logits", text(&out), "--ids", "1"]).ok();
}

#[test]
fn bare_files_are_quantized_without_calibration() {
    let model = TinyModel::new(Arch::Llama);
    let (file, out) = (model.weights(), model.beside("out"));
    quant(&["quantize", text(&file), "--out", text(&out), "--method", "rtn", "--group-size", "32"]).ok();
    quant(&["verify", text(&out.join("model.safetensors"))]).ok();
    quant(&["quantize", text(&file), "--out", text(&out), "--method", "gptq", "--force"])
        .fails(&["calibration", "rtn"]);
    let inspected = quant(&["inspect", text(&file), "--tensors", "--json"]).ok().json();
    assert_eq!(inspected["tensors"].as_array().unwrap().len(), 21);
    assert_eq!(inspected["bits_per_weight"], 16.0);
}

/// What the library that wrote a file computes is reproduced bit for bit.
#[test]
fn golden_files_dequantize_like_their_library() {
    for name in ["gptq-b4-g128-sym-actorder", "gptq-b3-g32-asym-v2", "gptq-gpt2-b4-g32-sym"] {
        let golden = Golden::open(name);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("floats.safetensors");
        quant(&["dequantize", text(golden.dir()), "--out", text(&out), "--like-peer"]).ok();
        let ours = Golden::read(&out);
        for expected in golden.dequantized() {
            let ours = ours.f32(&format!("{}.weight", expected.name));
            expected.check(ours.view().into_dimensionality::<ndarray::Ix2>().unwrap());
        }
    }
    // Otherwise the shapes are those of the float checkpoint, which has them `[in, out]` here.
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("floats.safetensors");
    let golden = Golden::open("gptq-gpt2-b4-g32-sym");
    let module = "transformer.h.0.attn.c_attn";
    quant(&["dequantize", text(golden.dir()), "--out", text(&out), "--tensor", module]).ok();
    assert_eq!(Golden::read(&out).names(), [format!("{module}.weight")]);
    assert_eq!(Golden::read(&out).f32(&format!("{module}.weight")).shape(), [128, 384]);
    quant(&["dequantize", text(golden.dir()), "--out", text(&out), "--tensor", "nowhere"])
        .fails(&["nowhere"]);
}

#[test]
fn text_results_end_in_a_table() {
    let model = TinyModel::new(Arch::Mistral);
    let out = model.beside("out");
    let run = model.quantize(&out, &["--method", "rtn", "-v"]).ok();
    for word in ["bits per weight", "model.layers.0.self_attn.q_proj", "written", "rtn, 4 bits, groups of 32"]
    {
        assert!(run.stdout.contains(word), "no {word:?} in {}", run.stdout);
    }
    assert!(run.stderr.contains("quantizing"), "{}", run.stderr);
    let quiet = model.quantize(&model.beside("quiet"), &["--method", "rtn", "-q"]).ok();
    assert_eq!(quiet.stderr, "");
}
