//! Methods that rewrite the model before they quantize it.

use quant_testkit::Golden;
use quant_testkit::synthetic::Arch;

use crate::support::{TinyModel, quant, text};

#[test]
fn every_architecture_is_rewritten_and_runs() {
    for arch in Arch::ALL {
        let model = TinyModel::new(arch);
        let float = model.path();
        let ids = model.ids();
        for (method, layout) in [("awq", "awq"), ("w8a8", "ct_int")] {
            let out = model.beside(method);
            let done = model.quantize(&out, &["--method", method, "--json"]).ok().json();
            assert_eq!((&done["layout"], &done["fallbacks"]), (&layout.into(), &0.into()), "{arch:?}");
            quant(&["verify", text(&out)]).ok();
            let eval = quant(&[
                "eval",
                text(&out),
                "--tokens",
                text(&ids),
                "--reference",
                text(&float),
                "--seq-len",
                "32",
                "--json",
            ]);
            // Rewriting that is not undone gives a model that knows nothing: with 8 bits almost nothing may be lost.
            let limit = if method == "w8a8" { 0.05 } else { 0.5 };
            let kl = eval.ok().json()["kl_mean"].as_f64().unwrap();
            assert!(kl < limit, "{arch:?} {method}: {kl}");
        }
    }
}

#[test]
fn stages_that_are_not_quantized_whole_stay_as_they_are() {
    let model = TinyModel::new(Arch::Llama);
    let out = model.beside("out");
    model
        .quantize(&out, &["--method", "w8a8", "--exclude", "layers.0.self_attn.q_proj", "--smooth", "0.7"])
        .ok();
    let before = Golden::read(&model.weights());
    let after = Golden::read(&out.join("model.safetensors"));
    for (name, same) in [
        ("model.layers.0.input_layernorm.weight", true),
        ("model.layers.0.self_attn.q_proj.weight", true),
        ("model.layers.0.post_attention_layernorm.weight", false),
        ("model.layers.1.input_layernorm.weight", false),
        ("model.norm.weight", true),
    ] {
        assert_eq!(before.f32(name) == after.f32(name), same, "{name}");
    }
    // Only one layer is left: its norms are still written, and the others' too.
    let few = model.beside("few");
    model.quantize(&few, &["--method", "awq", "--include", "layers.0.mlp.down_proj"]).ok();
    let few = Golden::read(&few.join("model.safetensors"));
    let norms = before.names().into_iter().filter(|name| name.contains("norm"));
    norms.for_each(|name| assert_eq!(before.f32(&name), few.f32(&name), "{name}"));
}

/// Any method may stand behind any transform, and one that has its own may go without.
#[test]
fn transforms_are_chosen_apart_from_methods() {
    let model = TinyModel::new(Arch::Qwen2);
    let before = Golden::read(&model.weights());
    let changed = |name: &str, options: &[&str]| {
        let out = model.beside(name);
        model.quantize(&out, options).ok();
        let norm = "model.layers.1.post_attention_layernorm.weight";
        let config = std::fs::read_to_string(out.join("config.json")).unwrap();
        let changed = before.f32(norm) != Golden::read(&out.join("model.safetensors")).f32(norm);
        (changed, config.contains("smoothquant"))
    };
    assert_eq!(changed("plain", &["--method", "rtn"]), (false, false));
    assert_eq!(changed("rtn", &["--method", "rtn", "--transform", "smoothquant"]), (true, true));
    let both = ["--method", "gptq", "--transform", "smoothquant", "--transform", "awq-scale"];
    assert_eq!(changed("gptq", &both), (true, true));
    assert_eq!(changed("awq", &["--method", "awq", "--transform", "none"]), (false, false));
}

#[test]
fn options_are_checked() {
    let model = TinyModel::new(Arch::Llama);
    let out = model.beside("out");
    for (options, word) in [
        (&["--method", "w8a8", "--smooth", "1.5"][..], "smooth"),
        (&["--method", "w8a8", "--bits", "4"], "bits"),
        (&["--method", "w8a8", "--static-activations", "percentile", "--percentile", "0"], "percentile"),
        (&["--method", "awq", "--transform", "awk"], "awq-scale"),
        (&["--method", "awq", "--n-grid", "0"], "n_grid"),
        (&["--method", "awq", "--search-tokens", "0"], "search_tokens"),
    ] {
        let run = model.quantize(&out, options);
        assert_ne!(run.code, Some(0), "{options:?}");
        assert!(run.stderr.contains(word), "{options:?}: {}", run.stderr);
    }
}
