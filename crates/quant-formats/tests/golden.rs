//! Checkpoints made by the libraries that define the layouts: what they make of them, and the bytes they wrote, are
//! ours to the bit.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use quant_core::{GridKind, ParamsKind, QuantizedLinear};
use quant_formats::{Checkpoint, Layout, PlannedLayer, StoredModel};
use quant_testkit::Golden;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden")
}

/// All quantized checkpoints of a layout that is read, with the number of its golden files.
fn checkpoints() -> Vec<PathBuf> {
    let dirs = fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<_> =
        dirs.filter(|p| !name(p).starts_with("base-") && p.join("config.json").exists()).collect();
    found.sort();
    for (family, count) in FAMILIES {
        let here = found.iter().filter(|p| name(p).starts_with(family)).count();
        assert_eq!(here, count, "golden checkpoints of {family} are missing");
    }
    found.retain(|p| FAMILIES.iter().any(|(family, _)| name(p).starts_with(family)));
    found
}

fn name(dir: &Path) -> String {
    dir.file_name().unwrap().to_string_lossy().into_owned()
}

/// The layout of one module: the checkpoint's, or in a mixed one the relative that stores integers of 8 bits in bytes,
/// FP8 as it is, and everything else packed.
fn layout_of_module(layout: &'static dyn Layout, linear: &QuantizedLinear) -> &'static dyn Layout {
    let spec = linear.weight.spec();
    let id = match (layout.id(), spec.grid, spec.bits) {
        (id, ..) if !id.starts_with("ct_") => id,
        (_, GridKind::Int, 8) => "ct_int",
        (_, GridKind::Int, _) => "ct_pack",
        (_, GridKind::E4M3, _) if spec.scales == ParamsKind::F32 => "ct_float",
        (_, GridKind::E4M3, _) => "ct_mxfp8",
        (_, GridKind::E2M3, _) => "ct_mxfp6",
        _ if spec.scales == ParamsKind::E4M3 => "ct_nvfp4",
        _ => "ct_mxfp4",
    };
    quant_formats::layout(id).unwrap()
}

fn layout_of(checkpoint: &Checkpoint) -> &'static dyn Layout {
    checkpoint.reader().unwrap().expect("quantized").layout()
}

/// Beginnings of the names of golden checkpoints, and how many there are.
const FAMILIES: [(&str, usize); 9] = [
    ("gptq-", 12),
    ("awq-", 4),
    ("autoround-", 2),
    ("ct-", 4),
    ("torchao-", 2),
    ("bnb-", 6),
    ("hqq-", 4),
    ("quanto-", 5),
    ("sinq-", 3),
];

/// Checkpoints that are not written as they are, and why.
const NOT_WRITTEN: [(&str, &str); 1] = [(
    "autoround-b2-g32-asym-gptq",
    "version 1 with zero points of 0, which only version 2 can tell from damage",
)];

fn is_written(dir: &Path) -> bool {
    !NOT_WRITTEN.iter().any(|(name, _)| dir.ends_with(name))
}

/// Compares what the library makes of some layers, or of their first rows.
fn check_dequantized(dir: &Path) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let layout = layout_of(&checkpoint);
    let mut compared = 0;
    for expected in Golden::open(&name(dir)).dequantized() {
        let linear = checkpoint.quantized_linear(&expected.name).unwrap().expect("quantized");
        let mut weights = layout.dequantize_like_peer(&linear.weight);
        if layout.id().starts_with("ct_") {
            // compressed-tensors kept the signs of negative weights with code 0, which its files do not hold.
            weights.mapv_inplace(|w| w + 0.0);
        }
        expected.check(weights.view());
        compared += expected.shape[0] * expected.shape[1];
    }
    assert!(compared > 1000, "{}: only {compared} weights were compared", dir.display());
}

#[test]
fn dequantized_weights_equal_the_peers() {
    checkpoints().iter().for_each(|dir| check_dequantized(dir));
}

/// One exception: bitsandbytes writes the offset of nested scales as text of any length; ours is padded with spaces, so
/// that sizes are known before the offset is.
#[test]
fn reading_and_writing_gives_the_same_bytes() {
    for dir in checkpoints().into_iter().filter(|dir| is_written(dir)) {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let layout = layout_of(&checkpoint);
        let modules: Vec<_> = checkpoint.quantized_modules().map(str::to_owned).collect();
        assert!(modules.len() >= 8);
        for module in modules {
            let linear = checkpoint.quantized_linear(&module).unwrap().unwrap();
            let written = layout_of_module(layout, &linear).write(&linear, &module).unwrap();
            let written: BTreeMap<_, _> = written.into_iter().collect();
            let parts = checkpoint.tensor_infos().map(|(name, _)| name);
            let parts: Vec<_> = parts.filter(|name| checkpoint.part_of(name) == Some(&module)).collect();
            let bias = linear.bias.is_some().then(|| format!("{module}.bias"));
            let mut expected: Vec<_> = parts.into_iter().chain(bias.as_deref()).collect();
            expected.sort_unstable();
            assert_eq!(written.keys().collect::<Vec<_>>(), expected, "{}", dir.display());
            for (name, tensor) in written {
                let stored = checkpoint.tensor(&name).unwrap();
                let padded = name.contains("quant_state") && tensor.len() != stored.len();
                if padded {
                    assert_eq!(tensor.bytes().trim_ascii_end(), stored.bytes(), "{name}");
                    continue;
                }
                assert_eq!((tensor.dtype(), tensor.shape()), (stored.dtype(), stored.shape()), "{name}");
                assert!(tensor.bytes() == stored.bytes(), "{}: {name} differs", dir.display());
            }
        }
    }
}

#[test]
fn a_plan_is_what_is_written_and_a_config_reads_back() {
    for dir in checkpoints().into_iter().filter(|dir| is_written(dir)) {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let reader = checkpoint.reader().unwrap().unwrap();
        let layout = reader.layout();
        for module in checkpoint.quantized_modules() {
            let linear = checkpoint.quantized_linear(module).unwrap().unwrap();
            let (spec, rows, cols) = (linear.weight.spec(), linear.weight.rows(), linear.weight.cols());
            let (bias, dtype) = (linear.bias.as_ref().map(|b| b.dtype()), linear.weight.dtype);
            let layer = PlannedLayer { bias, dtype, ..PlannedLayer::new(module, &spec, rows, cols) };
            let layout = layout_of_module(layout, &linear);
            let plan = layout.planned(&PlannedLayer { input: &linear.input, ..layer });
            let written = layout.write(&linear, module).unwrap();
            let names: Vec<_> = plan.iter().map(|p| (p.name.clone(), p.dtype, p.shape.clone())).collect();
            let made: Vec<_> = written.into_iter().map(|(n, t)| (n, t.dtype(), t.shape().to_vec())).collect();
            assert_eq!(names, made, "{}", dir.display());
        }
        let Some(spec) = reader.spec() else { continue };
        let input = reader.input();
        let stored = StoredModel { spec: &spec, input: &input, exceptions: &[], meta: &Default::default() };
        let config = layout.config(&stored);
        let again = layout.reader(&config).unwrap();
        assert_eq!((again.spec(), again.input()), (Some(spec), input), "{}", dir.display());
        if ["gptq", "bnb"].iter().any(|family| layout.id().starts_with(family)) {
            let theirs = &checkpoint.config()["quantization_config"];
            for (field, value) in config.as_object().unwrap().iter().filter(|(f, _)| *f != "meta") {
                assert_eq!(value, &theirs[field], "{}: {field}", dir.display());
            }
        }
    }
}

/// What the tensors of every checkpoint say is enough where the configuration says nothing.
#[test]
fn layouts_are_recognised_by_their_tensors() {
    // The sizes of Quanto's narrow codes follow from the configuration, SINQ's methods from another file.
    let described = |dir: &PathBuf| name(dir).starts_with("quanto-") || name(dir).starts_with("sinq-");
    for dir in checkpoints().into_iter().filter(|dir| !described(dir)) {
        let file = dir.join("model.safetensors");
        let scratch = tempfile::tempdir().unwrap();
        let bare = scratch.path().join("model.safetensors");
        fs::copy(file, &bare).unwrap();
        let known = Checkpoint::open(&dir).unwrap();
        // GPTQModel and AutoRound pack 5 to 7 bits differently, and only the configuration tells.
        if dir.ends_with("gptq-p-b5-g64-asym") {
            assert!(Checkpoint::open(&bare).unwrap_err().to_string().contains("bits is 5"));
            continue;
        }
        let alone = Checkpoint::open(&bare).unwrap();
        assert!(alone.quantized_modules().eq(known.quantized_modules()), "{}", dir.display());
        let module = known.quantized_modules().next().unwrap();
        let weights = |c: &Checkpoint| c.quantized_linear(module).unwrap().unwrap().weight.codes;
        assert_eq!(weights(&alone), weights(&known), "{}", dir.display());
    }
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
        let tokenizer = checkpoint.files_to_carry().iter().any(|(n, _)| *n == "tokenizer.json");
        assert!(tokenizer || name == "base-llama256", "{name}");
        seen.insert(name, checkpoint.tensor_bytes());
    }
    assert_eq!(seen.len(), 7, "{seen:?}");
}
