//! Configurations: what they mean and what is refused.

use quant_model::{ArchSpec, Decoder, WindowSpec};
use quant_testkit::Golden;
use serde_json::{Value, json};

use crate::support::{Tensors, config};

fn read(base: &str, edits: Value) -> Result<ArchSpec, String> {
    let mut value = config(Golden::open(base).dir());
    for (name, edit) in edits.as_object().unwrap() {
        value[name] = edit.clone();
    }
    ArchSpec::from_config(&value).map_err(|e| e.to_string())
}

#[test]
fn windows_follow_the_rules_of_each_architecture() {
    let window = |base, edits| read(base, edits).unwrap().window;
    assert_eq!(window("base-mistral", json!({})), WindowSpec::From { first: 0, len: 8 });
    assert_eq!(window("base-mistral", json!({"sliding_window": null})), WindowSpec::Full);
    assert_eq!(window("base-llama", json!({"sliding_window": 8})), WindowSpec::Full);
    assert_eq!(window("base-qwen2", json!({"sliding_window": 8})), WindowSpec::Full);
    let on =
        json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1, "layer_types": null});
    assert_eq!(window("base-qwen2", on), WindowSpec::From { first: 1, len: 8 });
    let types = json!(["sliding_attention", "full_attention"]);
    let on = json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": types});
    let layers = window("base-qwen3", on);
    assert_eq!((layers.of_layer(0), layers.of_layer(1), layers.of_layer(2)), (Some(8), None, None));
}

#[test]
fn errors_name_field_expected_and_found() {
    for (base, edits, words) in [
        (
            "base-qwen3",
            json!({"use_sliding_window": true, "layer_types": ["full_attention"]}),
            ["layer_types", "2"],
        ),
        ("base-gpt2", json!({"n_head": 5}), ["n_head", "128"]),
        ("base-gpt2", json!({"add_cross_attention": true}), ["add_cross_attention", "decoders"]),
        ("base-llama", json!({"head_dim": 31}), ["head_dim", "even"]),
        ("base-llama", json!({"hidden_size": 1e30}), ["hidden_size", "1e+30"]),
        ("base-llama", json!({"rms_norm_eps": -1}), ["rms_norm_eps", "above 0"]),
        ("base-llama", json!({"model_type": null, "architectures": ["\u{1b}[31m"]}), ["model_type", "llama"]),
        ("base-llama", json!({"hidden_act": "\u{1b}[31m\u{9b}"}), ["hidden_act", "\\u{9b}"]),
        ("base-llama", json!({"rope_parameters": {"rope_theta": 0.5}}), ["rope_theta", "at least 1"]),
        ("base-llama", json!({"rope_parameters": {"rope_type": "linear"}}), ["factor", "missing"]),
        (
            "base-llama",
            json!({"rope_scaling": {"type": "linear", "factor": 1e-300}}),
            ["rope_scaling", "finite"],
        ),
        ("base-llama", json!({"partial_rotary_factor": 0.5}), ["partial_rotary_factor", "0.5"]),
    ] {
        let text = read(base, edits).unwrap_err();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert!(!text.chars().any(char::is_control), "{text:?}");
    }
    assert!(ArchSpec::from_config(&json!([1])).is_err());
}

#[test]
fn a_class_stands_in_for_a_missing_model_type() {
    assert_eq!(read("base-mistral", json!({"model_type": null})).unwrap().model_type, "mistral");
}

/// Files of a bare decoder name their tensors without the prefix.
#[test]
fn prefixes_are_optional() {
    for name in ["base-llama", "base-gpt2"] {
        let golden = Golden::open(name);
        let (config, src) = (config(golden.dir()), Tensors::read(golden.dir()));
        let strip = |name: String| {
            name.strip_prefix("model.").or(name.strip_prefix("transformer.")).unwrap_or(&name).to_owned()
        };
        let bare = Tensors(src.0.clone().into_iter().map(|(name, tensor)| (strip(name), tensor)).collect());
        let ids = golden.ids("input_ids");
        let with = Decoder::load(&config, &src).unwrap();
        let without = Decoder::load(&config, &bare).unwrap();
        assert_eq!(with.logits(&ids).unwrap(), without.logits(&ids).unwrap(), "{name}");
        assert!(
            !without.blocks()[1].module(0).contains("model.") && with.blocks()[1].module(0).contains('.')
        );
    }
}

#[test]
fn biases_must_be_there_and_fit() {
    let golden = Golden::open("base-qwen2");
    let (config, src) = (config(golden.dir()), Tensors::read(golden.dir()));
    let name = "model.layers.1.self_attn.k_proj.bias";
    let mut without = src.clone();
    without.0.remove(name);
    let text = Decoder::load(&config, &without).err().unwrap().to_string();
    assert!(text.contains(name) && text.contains("missing"), "{text}");
    let mut short = src;
    short.0.insert(name.to_owned(), quant_core::DenseTensor::from_f32(&[3], &[0.0; 3]));
    let text = Decoder::load(&config, &short).err().unwrap().to_string();
    assert!(text.contains(name) && text.contains("[64]") && text.contains("[3]"), "{text}");
}

#[test]
fn memory_counts_a_tied_head_once() {
    let golden = Golden::open("base-llama");
    let model = Decoder::load(&config(golden.dir()), &Tensors::read(golden.dir())).unwrap();
    let memory = model.memory_footprint();
    // 16-bit linears, norms in f32.
    let block = 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256) + 4 * 2 * 128;
    assert_eq!((memory.embedding, memory.blocks, memory.head), (2 * 512 * 128, 2 * block, 4 * 128));
}
