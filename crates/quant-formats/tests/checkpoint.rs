//! Directories of every form, and what is noticed in them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use quant_core::{DType, DenseTensor, LinearWeights, WeightError, WeightSource};
use quant_formats::{Checkpoint, Finding, Severity, resolve_model, write_safetensors};

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn save(path: PathBuf, tensors: &[(&str, &[f32])]) {
    let tensors: Vec<_> =
        tensors.iter().map(|(n, v)| ((*n).to_owned(), DenseTensor::from_f32(&[1, v.len()], v))).collect();
    write_safetensors(path, &tensors, &BTreeMap::new()).unwrap();
}

fn with_config(config: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    dir
}

fn error(dir: &Path) -> String {
    Checkpoint::open(dir).unwrap_err().to_string()
}

#[test]
fn weights_are_found_by_index_by_base_name_or_by_ending() {
    let dir = with_config(r#"{"quantization_config": {"model_file_base_name": "gptq_model-4bit"}}"#);
    save(dir.path().join("gptq_model-4bit-00001-of-00002.safetensors"), &[("a.weight", &[1.0])]);
    save(dir.path().join("gptq_model-4bit-00002-of-00002.safetensors"), &[("b.weight", &[2.0])]);
    save(dir.path().join("other.safetensors"), &[("a.weight", &[3.0])]);
    let checkpoint = Checkpoint::open_container(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor_infos().map(|(n, _)| n).collect::<Vec<_>>(), ["a.weight", "b.weight"]);

    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let text = error(dir.path());
    assert!(text.contains("a.weight is in") && text.contains("other.safetensors"), "{text}");

    let index = r#"{"weight_map": {"a.weight": "other.safetensors"}}"#;
    fs::write(dir.path().join("x.safetensors.index.json"), index).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor("a.weight").unwrap().to_f32().unwrap(), [3.0]);

    // One plain file goes before all.
    save(dir.path().join("model.safetensors"), &[("c.weight", &[4.0])]);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensor_infos().count(), 1);
}

#[test]
fn missing_weights_are_explained() {
    let dir = with_config("{}");
    assert!(error(dir.path()).contains("no safetensors files"));
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(error(dir.path()).contains("pickled"));
    fs::write(dir.path().join("config.json"), "[1]").unwrap();
    assert!(error(dir.path()).contains("config"));
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(error(dir.path()).contains("config.json: No such file"));
    assert!(error(&dir.path().join("absent")).contains("absent"));
    assert!(resolve_model("no/such-model-here").unwrap_err().to_string().contains("not found"));
    assert!(resolve_model("./absent/x/y").unwrap_err().to_string().contains("No such file"));
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_noted() {
    let dir = with_config("{}");
    save(dir.path().join("1.safetensors"), &[("a", &[1.0]), ("b", &[2.0])]);
    save(dir.path().join("2.safetensors"), &[("b", &[3.0]), ("c", &[4.0])]);
    let index = r#"{"metadata": {"total_size": 8},
        "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let code = |f: &Finding| (f.severity, f.code, f.tensor.clone());
    let findings: Vec<_> = checkpoint.verify().iter().map(code).collect();
    let warning = |code, tensor: &str| (Severity::Warning, code, tensor.to_owned());
    let expected = [warning("tensor-twice", "b"), warning("unlisted-tensor", "c"), warning("total-size", "")];
    assert_eq!(findings, expected);
    assert_eq!(checkpoint.tensor("b").unwrap().to_f32().unwrap(), [3.0]);
}

#[test]
fn values_that_are_not_finite_are_found_by_name_and_index() {
    let dir = with_config("{}");
    save(dir.path().join("model.safetensors"), &[("a", &[1.0, f32::NAN, f32::INFINITY]), ("b", &[1.0])]);
    let findings = Checkpoint::open(dir.path()).unwrap().verify();
    assert_eq!(findings.len(), 1);
    assert_eq!((findings[0].code, &findings[0].tensor[..]), ("non-finite", "a"));
    assert_eq!(findings[0].message, "element 1 is NaN; 2 elements are not finite");
}

#[test]
fn layouts_that_are_only_known_are_named() {
    for (id, part) in [("exl2", "q_weight"), ("exl3", "trellis")] {
        let dir = with_config(&format!(r#"{{"quantization_config": {{"quant_method": "{id}"}}}}"#));
        save(dir.path().join("model.safetensors"), &[(&format!("a.{part}"), &[1.0]), ("a.weight", &[1.0])]);
        let text = error(dir.path());
        assert!(text.contains(id) && text.contains("not supported by this version"), "{text}");
        let checkpoint = Checkpoint::open_container(dir.path()).unwrap();
        assert!(checkpoint.tensor_infos().count() == 2 && checkpoint.reader().is_err());
        // Without its configuration the tensors tell.
        let file = Checkpoint::open_container(dir.path().join("model.safetensors")).unwrap();
        assert!(file.reader().is_err(), "{id}");
        assert_eq!(checkpoint.verify().last().map(|f| f.code), Some("quantization"));
        let linear = checkpoint.linear("a").unwrap_err();
        assert!(matches!(linear, WeightError::Layout { .. }), "{linear}");
    }
}

/// One file of a version 2 checkpoint: the version is in the configuration beside it.
#[test]
fn a_file_uses_the_configuration_beside_it() {
    let dir = fixtures("golden/gptq-b2-g32-asym-v2");
    let file = Checkpoint::open(dir.join("model.safetensors")).unwrap();
    assert_eq!(file.reader().unwrap().unwrap().layout().id(), "gptq_v2");
    let plain = Checkpoint::open(dir.join("expected.safetensors")).unwrap();
    assert!(plain.reader().unwrap().is_none());
}

#[test]
fn a_model_sees_dense_and_quantized_layers() {
    let checkpoint = Checkpoint::open(fixtures("golden/gptq-gpt2-b4-g32-sym")).unwrap();
    let module = "transformer.h.0.mlp.c_fc";
    assert_eq!(checkpoint.linear_shape(module).unwrap(), (256, 128));
    let LinearWeights::Quantized(linear) = checkpoint.linear(module).unwrap() else { panic!("dense") };
    assert_eq!(linear.bias.unwrap().dtype(), DType::F16);
    let dense = checkpoint.linear("transformer.wte").unwrap();
    assert!(matches!(dense, LinearWeights::Dense { bias: None, .. }));
    assert_eq!(checkpoint.linear_shape("transformer.wte").unwrap(), (512, 128));
    assert!(
        matches!(checkpoint.linear("no.such"), Err(WeightError::Missing { name }) if name == "no.such.weight")
    );
    assert!(checkpoint.linear_shape("transformer.ln_f").unwrap_err().to_string().contains("two dimensions"));
    assert!(checkpoint.contains("transformer.ln_f.weight") && !checkpoint.contains("transformer.ln_f"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Texts of configurations and indices with random damage: an error or a checkpoint, never a panic.
    #[test]
    fn damaged_texts_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..5),
        sharded in any::<bool>(),
    ) {
        let (control, name) = match sharded {
            true => ("index-ok-two", "model.safetensors.index.json"),
            false => ("gptq-ok-tiny", "config.json"),
        };
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(fixtures("malformed/controls").join(control)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        let mut text = fs::read(dir.path().join(name)).unwrap();
        // The end of the configuration is what this crate reads.
        let from = if sharded { 0 } else { text.len().saturating_sub(180) };
        for (at, with, kind) in edits {
            let at = from + at.index(text.len() - from);
            match kind {
                0 => text[at] = with,
                1 => text[at] = b"0123456789[]{},:\"-e."[usize::from(with) % 20],
                2 => text.insert(at, with),
                _ => drop(text.remove(at)),
            }
        }
        fs::write(dir.path().join(name), text).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            checkpoint.verify();
        }
    }
}
