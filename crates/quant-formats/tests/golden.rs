//! GPTQ checkpoints made by GPTQModel: what it makes of them, and the bytes it wrote, are ours to the bit.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use quant_core::ActSpec;
use quant_formats::{Checkpoint, Layout, PlannedLayer, SafetensorsFile, StoredModel};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden")
}

fn gptq_checkpoints() -> Vec<PathBuf> {
    let dirs = fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path());
    let name = |p: &PathBuf| p.file_name().unwrap().to_string_lossy().into_owned();
    let mut found: Vec<_> =
        dirs.filter(|p| name(p).starts_with("gptq-") && p.join("model.safetensors").exists()).collect();
    found.sort();
    assert_eq!(found.len(), 11, "golden checkpoints are missing");
    found
}

fn layout_of(checkpoint: &Checkpoint) -> &'static dyn Layout {
    checkpoint.reader().unwrap().expect("quantized").layout()
}

/// Compares `dequant.*` of expected.safetensors, which hold the first rows of some layers.
fn check_dequantized(dir: &Path) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let layout = layout_of(&checkpoint);
    let expected = SafetensorsFile::open(dir.join("expected.safetensors")).unwrap();
    let mut compared = 0;
    for name in expected.names().filter(|n| n.starts_with("dequant.")) {
        let module = name.strip_prefix("dequant.").unwrap();
        let linear = checkpoint.quantized_linear(module).unwrap().expect("quantized");
        let weights = layout.dequantize_like_peer(&linear.weight);
        let peer = expected.read(name).unwrap();
        assert_eq!(peer.shape()[1], linear.weight.cols());
        let ours = weights.as_slice().unwrap();
        for (i, (a, b)) in ours.iter().zip(peer.to_f32().unwrap()).enumerate() {
            assert_eq!(a.to_bits(), b.to_bits(), "{}: {module}, element {i}: {a} and {b}", dir.display());
            compared += 1;
        }
    }
    assert!(compared > 1000, "{}: only {compared} weights were compared", dir.display());
}

#[test]
fn dequantized_weights_equal_the_peers() {
    gptq_checkpoints().iter().for_each(|dir| check_dequantized(dir));
}

#[test]
fn reading_and_writing_gives_the_same_bytes() {
    for dir in gptq_checkpoints() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let layout = layout_of(&checkpoint);
        let modules: Vec<_> = checkpoint.quantized_modules().map(str::to_owned).collect();
        assert!(modules.len() >= 8);
        for module in modules {
            let linear = checkpoint.quantized_linear(&module).unwrap().unwrap();
            for (name, tensor) in layout.write(&linear, &module).unwrap() {
                let stored = checkpoint.tensor(&name).unwrap();
                assert_eq!((tensor.dtype(), tensor.shape()), (stored.dtype(), stored.shape()), "{name}");
                assert!(tensor.bytes() == stored.bytes(), "{}: {name} differs", dir.display());
            }
        }
    }
}

#[test]
fn a_plan_is_what_is_written_and_a_config_reads_back() {
    for dir in gptq_checkpoints() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let reader = checkpoint.reader().unwrap().unwrap();
        let (layout, spec) = (reader.layout(), reader.spec().unwrap());
        for module in checkpoint.quantized_modules() {
            let linear = checkpoint.quantized_linear(module).unwrap().unwrap();
            let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
            let bias = linear.bias.as_ref().map(|b| b.dtype());
            let layer = PlannedLayer { bias, ..PlannedLayer::new(module, &spec, rows, cols) };
            let plan = layout.planned(&layer);
            let written = layout.write(&linear, module).unwrap();
            let names: Vec<_> = plan.iter().map(|p| (p.name.clone(), p.dtype, p.shape.clone())).collect();
            let made: Vec<_> = written.into_iter().map(|(n, t)| (n, t.dtype(), t.shape().to_vec())).collect();
            assert_eq!(names, made);
        }
        let stored =
            StoredModel { spec: &spec, input: &ActSpec::Float, exceptions: &[], meta: &Default::default() };
        let config = layout.config(&stored);
        let theirs = &checkpoint.config()["quantization_config"];
        for (field, value) in config.as_object().unwrap().iter().filter(|(f, _)| *f != "meta") {
            assert_eq!(value, &theirs[field], "{}: {field}", dir.display());
        }
        assert_eq!(layout.reader(&config).unwrap().spec(), Some(spec));
    }
}

/// Checkpoints of other tools in the same layout, which lie outside the repository.
#[test]
fn autoround_gptq_files_read_like_gptq() {
    let Some(assets) = std::env::var_os("QUANT_TEST_ASSETS") else {
        eprintln!("skipped: QUANT_TEST_ASSETS is not set");
        return;
    };
    check_dequantized(&Path::new(&assets).join("golden/autoround-b2-g32-asym-gptq"));
}

/// The float checkpoints hold no quantized layer, and everything in them is finite.
#[test]
fn float_checkpoints_open_clean() {
    let mut seen = BTreeMap::new();
    for dir in fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path()) {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("base-") {
            continue;
        }
        let checkpoint = Checkpoint::open(&dir).unwrap();
        assert!(checkpoint.reader().unwrap().is_none());
        assert_eq!(checkpoint.verify(), []);
        assert!(checkpoint.files_to_carry().iter().any(|(n, _)| *n == "tokenizer.json"));
        seen.insert(name, checkpoint.tensor_bytes());
    }
    assert_eq!(seen.len(), 6, "{seen:?}");
}
