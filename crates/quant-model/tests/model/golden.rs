//! Logits of tiny models against those of transformers.

use crate::support::{Tensors, config, exact};
use std::fs;
use std::path::Path;

use ndarray::{Array2, Ix2, s};
use quant_core::{ActSpec, DenseTensor, Groups, WeightSource};
use quant_formats::Checkpoint;
use quant_model::{ArchSpec, Decoder, Encoder};
use quant_testkit::{Golden, fixtures_dir};
use serde_json::Value;

/// Every architecture with a reference file.
const MODELS: [&str; 5] = ["base-llama", "base-mistral", "base-qwen2", "base-qwen3", "base-gpt2"];

fn max_difference(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The bound is the reference's own rounding error. Both programs evaluate the same formula in f32, with sums of the
/// same lengths, so that their errors against f64 have one distribution; the largest of thousands of errors of one may
/// exceed that of the other, for which a factor of four is allowed. A wrong formula is off by orders of magnitude: in
/// these files the largest error is near 1e-6 of the scale.
fn assert_as_exact_as(reference: &Array2<f64>, name: &str, config: &Value, src: &Tensors, ids: &[u32]) {
    let spec = ArchSpec::from_config(config).unwrap();
    let exact = exact::logits(&spec, src, ids);
    let ours = run(&spec, config, src, ids).mapv(f64::from);
    let scale = exact.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    let (theirs, error) = (max_difference(reference, &exact), max_difference(&ours, &exact));
    eprintln!("{name}: scale {scale:.2}, error {error:.1e}, of the reference {theirs:.1e}");
    assert!(theirs < 1e-5 * scale, "{name}: the f64 pass is another formula ({theirs:.1e})");
    assert!(error < 4.0 * theirs, "{name}: {error:.3e} against {theirs:.3e}");
}

/// Logits of a decoder, the last hidden state of an encoder.
fn run(spec: &ArchSpec, config: &Value, src: &dyn WeightSource, ids: &[u32]) -> Array2<f32> {
    match spec.causal {
        true => Decoder::load(config, src).unwrap().logits(ids).unwrap(),
        false => Encoder::load(config, src).unwrap().hidden_states(ids).unwrap(),
    }
}

fn logits(golden: &Golden, name: &str) -> Array2<f64> {
    golden.f32(name).into_dimensionality::<Ix2>().unwrap().mapv(f64::from)
}

#[test]
fn logits_are_as_exact_as_the_reference() {
    for name in MODELS {
        let golden = Golden::open(name);
        let (config, src) = (config(golden.dir()), Tensors::read(golden.dir()));
        let ids = golden.ids("input_ids");
        assert_as_exact_as(&logits(&golden, "logits"), name, &config, &src, &ids);
    }
}

#[test]
fn hidden_states_of_an_encoder_too() {
    let golden = Golden::open("base-bert");
    let (config, src) = (config(golden.dir()), Tensors::read(golden.dir()));
    let reference = logits(&golden, "last_hidden_state");
    assert_as_exact_as(&reference, "base-bert", &config, &src, &golden.ids("input_ids"));
    assert!(Decoder::load(&config, &src).err().unwrap().to_string().contains("encoder"));

    // Files of a whole model have a prefix, the first ones other names for the parts of a norm.
    let old = |name: &str| {
        let norm = name.contains("LayerNorm");
        let name =
            if norm { name.replace(".weight", ".gamma").replace(".bias", ".beta") } else { name.into() };
        format!("bert.{name}")
    };
    let renamed = Tensors(src.0.iter().map(|(name, tensor)| (old(name), tensor.clone())).collect());
    let ids = golden.ids("input_ids");
    let spec = ArchSpec::from_config(&config).unwrap();
    assert_eq!(run(&spec, &config, &renamed, &ids), run(&spec, &config, &src, &ids));
}

/// Every option of a configuration that changes the forward pass, each in a tiny model
/// (`tests/data/make_variants.py`).
#[test]
fn variants_of_every_architecture_too() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let golden = Golden::read(&data.join("variants.safetensors"));
    let all = Tensors::read(&data.join("variants.safetensors"));
    let meta: Value = serde_json::from_slice(&fs::read(data.join("variants.json")).unwrap()).unwrap();
    let configs = meta["configs"].as_object().unwrap();
    assert_eq!(configs.len(), 15);
    for (name, config) in configs {
        let own = all.0.iter().filter_map(|(key, t)| Some((key.strip_prefix(name)?.strip_prefix('/')?, t)));
        let src = Tensors(own.map(|(key, tensor)| (key.to_owned(), tensor.clone())).collect());
        let ids = golden.ids(&format!("{name}/input_ids"));
        assert_as_exact_as(&logits(&golden, &format!("{name}/logits")), name, config, &src, &ids);
    }
}

/// Files of quantizing libraries, with the weights as the library itself dequantizes them.
#[test]
fn quantized_checkpoints_too() {
    let mut count = 0;
    for entry in fs::read_dir(fixtures_dir().join("golden")).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let gguf = dir.join("model.gguf");
        if name.starts_with("base-") || !(dir.join("config.json").is_file() || gguf.is_file()) {
            continue;
        }
        let checkpoint = Checkpoint::open(if gguf.is_file() { &gguf } else { &dir }).unwrap();
        let spec = ArchSpec::from_config(checkpoint.config()).unwrap();
        let layout = checkpoint.reader().unwrap().unwrap().layout();
        let mut src = Tensors::default();
        for module in checkpoint.quantized_modules() {
            let linear = checkpoint.quantized_linear(module).unwrap().unwrap();
            let weight = layout.dequantize_like_peer(&linear.weight);
            let stored = if spec.conv1d { weight.t().to_owned() } else { weight };
            let values: Vec<f32> = stored.iter().copied().collect();
            src.0.insert(format!("{module}.weight"), DenseTensor::from_f32(stored.shape(), &values));
            src.0.extend(linear.bias.map(|bias| (format!("{module}.bias"), bias)));
        }
        for (tensor, _) in checkpoint.tensor_infos() {
            src.0.entry(tensor.to_owned()).or_insert_with(|| checkpoint.tensor(tensor).unwrap());
        }
        let golden = Golden::open(&name);
        let ids = golden.ids("input_ids");
        assert_as_exact_as(&logits(&golden, "logits"), &name, checkpoint.config(), &src, &ids);

        count += 1;
        if checkpoint.reader().unwrap().unwrap().input() != ActSpec::Float {
            let native = logits(&golden, "logits_native");
            let ours = run(&spec, checkpoint.config(), &checkpoint, &ids).mapv(f64::from);
            // A rounding of activations that falls the other way moves a logit by a small part of what all of them
            // together do; leaving them out, or another rule, misses by the whole of it.
            let all = max_difference(&native, &logits(&golden, "logits"));
            let apart = max_difference(&native, &ours);
            eprintln!(
                "{name}: {apart:.1e} from the library's own forward pass; rounding inputs does {all:.1e}"
            );
            assert!(apart < 0.1 * all, "{name}: {apart:.3e} of {all:.3e}");
            continue;
        }
        // The same weights without the library's rounding, packed: equal to dense ones bit for bit. Sums over columns
        // sorted by group have another order: then the difference is two rounding errors of the size of the reference's.
        let mut sorted = false;
        for module in checkpoint.quantized_modules() {
            let matrix = checkpoint.quantized_linear(module).unwrap().unwrap().weight;
            sorted |= matrix.input_perm.is_some() || matches!(matrix.groups, Groups::Index { .. });
            let weight = matrix.dequantize();
            let stored = if spec.conv1d { weight.t().to_owned() } else { weight };
            let values: Vec<f32> = stored.iter().copied().collect();
            src.0.insert(format!("{module}.weight"), DenseTensor::from_f32(stored.shape(), &values));
        }
        let packed = run(&spec, checkpoint.config(), &checkpoint, &ids);
        let dense = run(&spec, checkpoint.config(), &src, &ids);
        if sorted {
            let (packed, dense) = (packed.mapv(f64::from), dense.mapv(f64::from));
            let scale = dense.iter().fold(0.0f64, |max, x| max.max(x.abs()));
            assert!(max_difference(&packed, &dense) < 1e-5 * scale, "{name}");
        } else {
            assert_eq!(packed, dense, "{name}");
        }
    }
    assert!(count >= 42, "{count} checkpoints");
}

#[test]
fn cached_steps_have_the_bits_of_the_whole_pass() {
    for name in MODELS {
        let golden = Golden::open(name);
        let model = Decoder::load(&config(golden.dir()), &Tensors::read(golden.dir())).unwrap();
        // Long enough for several blocks of every inner loop, unless the positions end before.
        let len = if name == "base-gpt2" { 256 } else { 900 };
        let ids: Vec<u32> = golden.i32("calib_input_ids").iter().take(len).map(|&id| id as u32).collect();
        let whole = model.logits(&ids).unwrap();
        let mut cache = model.new_cache();
        // A prompt, then single tokens, then a few together.
        let cuts: Vec<usize> = [0, 40].into_iter().chain(41..=100).chain([103, 200, len - 1, len]).collect();
        for cut in cuts.windows(2) {
            let last = model.next_logits(&ids[cut[0]..cut[1]], &mut cache).unwrap();
            let equal = last.iter().zip(whole.row(cut[1] - 1)).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(equal, "{name} at {}..{}", cut[0], cut[1]);
        }
    }
}

/// This rope depends on the length of the whole text, also for the pieces in which a long prompt is run.
#[test]
fn pieces_of_a_prompt_share_their_dynamic_rope() {
    let golden = Golden::open("base-llama");
    let mut config = config(golden.dir());
    config["max_position_embeddings"] = 64.into();
    config["rope_scaling"] = serde_json::json!({"rope_type": "dynamic", "factor": 2.0});
    let model = Decoder::load(&config, &Tensors::read(golden.dir())).unwrap();
    let ids: Vec<u32> = golden.i32("calib_input_ids").iter().take(1200).map(|&id| id as u32).collect();
    let pieces = model.forward(&ids, &mut model.new_cache()).unwrap();
    let whole = model.forward_batch(ndarray::ArrayView2::from_shape((1, 1200), &ids).unwrap()).unwrap();
    assert_eq!(pieces, whole);
}

#[test]
fn sequences_side_by_side_have_the_bits_of_each_alone() {
    for name in MODELS {
        let golden = Golden::open(name);
        let model = Decoder::load(&config(golden.dir()), &Tensors::read(golden.dir())).unwrap();
        let ids = golden.i32("calib_input_ids").into_dimensionality::<Ix2>().unwrap();
        let ids = ids.slice(s![..3, ..]).mapv(|id| id as u32);
        let together = model.forward_batch(ids.view()).unwrap();
        for (n, row) in ids.rows().into_iter().enumerate() {
            let alone = model.forward(&row.to_vec(), &mut model.new_cache()).unwrap();
            assert_eq!(together.slice(s![n * 64..(n + 1) * 64, ..]), alone, "{name}, sequence {n}");
        }
    }
}
