//! What is done with hostile bytes: everything a program does that opens such a file. Whatever the bytes are, the
//! result is a value or an error.
//!
//! Shared by the fuzz targets and by the test that runs a fixed set of mutants (`tests/mutants.rs`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use quant_core::{DType, DenseTensor};
use quant_formats::{Checkpoint, SafetensorsFile, layout};
use quant_model::{ArchSpec, Tokenizer};

/// A kind of input.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Uses the bytes; the folder is the target's own. `true` if they were accepted.
    pub run: fn(&Path, &[u8]) -> bool,
}

/// All kinds of input.
pub const TARGETS: [Target; 6] = [
    Target { name: "safetensors", run: safetensors },
    Target { name: "gguf", run: gguf },
    Target { name: "config", run: config },
    Target { name: "index", run: index },
    Target { name: "quant_state", run: quant_state },
    Target { name: "tokenizer", run: tokenizer },
];

/// A file of weights, alone.
fn safetensors(folder: &Path, bytes: &[u8]) -> bool {
    let path = folder.join("x.safetensors");
    write(&path, bytes);
    let Ok(file) = SafetensorsFile::open(&path) else { return false };
    let names: Vec<_> = file.names().map(str::to_owned).collect();
    let read = names.iter().filter(|name| file.read(name).is_ok()).count();
    assert_eq!(read, names.len(), "the header has been checked against the file");
    whole(&path)
}

/// A GGUF file.
fn gguf(folder: &Path, bytes: &[u8]) -> bool {
    let path = folder.join("x.gguf");
    write(&path, bytes);
    whole(&path)
}

/// `config.json` beside the weights of each kind of tiny model.
fn config(folder: &Path, bytes: &[u8]) -> bool {
    if let Ok(config) = serde_json::from_slice(bytes) {
        let _ = ArchSpec::from_config(&config);
    }
    models(folder, &["config-ok-tiny", "gptq-ok-tiny", "bnb-ok-nf4", "awq-ok-tiny", "ct-ok-tiny"])
        .iter()
        .filter(|model| {
            write(&model.join("config.json"), bytes);
            whole(model)
        })
        .count()
        > 0
}

/// The index of a model in two files.
fn index(folder: &Path, bytes: &[u8]) -> bool {
    let model = &models(folder, &["index-ok-two"])[0];
    write(&model.join("model.safetensors.index.json"), bytes);
    whole(model)
}

/// The JSON text in which a 4-bit layer of bitsandbytes says what it is.
fn quant_state(_folder: &Path, bytes: &[u8]) -> bool {
    let tensor = |dtype: DType, shape: &[usize]| {
        let len = dtype.byte_len(shape).expect("a small shape");
        DenseTensor::new(dtype, shape.to_vec(), vec![0; len]).expect("the bytes fit")
    };
    let text = DenseTensor::new(DType::U8, vec![bytes.len()], bytes.to_vec()).expect("the bytes fit");
    let mut accepted = false;
    for nested in [false, true] {
        let mut parts = vec![
            ("weight", tensor(DType::U8, &[512, 1])),
            ("weight.absmax", tensor(if nested { DType::U8 } else { DType::F32 }, &[16])),
            ("weight.quant_map", tensor(DType::F32, &[16])),
            ("weight.quant_state.bitsandbytes__nf4", text.clone()),
        ];
        if nested {
            parts.push(("weight.nested_absmax", tensor(DType::F32, &[1])));
            parts.push(("weight.nested_quant_map", tensor(DType::F32, &[256])));
        }
        let source: BTreeMap<_, _> = parts.into_iter().map(|(part, t)| (format!("m.{part}"), t)).collect();
        let reader =
            layout("bnb_nf4").and_then(|l| l.reader(&serde_json::Value::Null)).expect("the layout exists");
        let Ok(linear) = reader.read(&source, "m") else { continue };
        assert_eq!(linear.weight.rows() * linear.weight.cols(), 1024, "the shape fits the packed codes");
        linear.weight.dequantize();
        accepted = true;
    }
    accepted
}

/// `tokenizer.json`, and a text through it.
fn tokenizer(_folder: &Path, bytes: &[u8]) -> bool {
    let Ok(tokenizer) = Tokenizer::from_bytes(bytes) else { return false };
    let Ok(ids) = tokenizer.encode("t3 hello wörld \u{0}\u{10ffff} aaaaaaaaaaaaaaaa", true) else {
        return false;
    };
    tokenizer.decode(&ids, false).is_ok()
}

/// Opens a model, reads every tensor and every layer. `true` if nothing is wrong with it.
fn whole(path: &Path) -> bool {
    let Ok(checkpoint) = Checkpoint::open_container(path) else { return false };
    let healthy = checkpoint.verify().is_empty();
    healthy && checkpoint.reader().is_ok()
}

/// Copies of valid tiny models, made once.
fn models(folder: &Path, names: &[&str]) -> Vec<PathBuf> {
    let controls =
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|d| d.join("fixtures/malformed/controls"));
    let controls = controls.into_iter().find(|d| d.is_dir()).expect("the fixtures are there");
    let copy = |name: &&str| {
        let target = folder.join(name);
        if !target.exists() {
            fs::create_dir_all(&target).expect("the folder can be made");
            for entry in fs::read_dir(controls.join(name)).expect("the control is there").flatten() {
                fs::copy(entry.path(), target.join(entry.file_name())).expect("the file can be copied");
            }
        }
        target
    };
    names.iter().map(copy).collect()
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("the folder can be written");
}
