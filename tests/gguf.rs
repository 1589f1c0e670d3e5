//! GGUF files from a float model, and models from GGUF files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::Array2;
use quant::{GenerateOptions, Model, QuantizeConfig, Silent};
use quant_core::{DType, QuantizedLinear};
use quant_formats::{Checkpoint, Container, ModelWriter, PlannedTensor, WriteOptions, layout};
use quant_methods::{LayerStats, LayerWeights, MethodOptions, quantizer};
use quant_testkit::{Golden, fixtures_dir};

fn golden(name: &str) -> PathBuf {
    fixtures_dir().join("golden").join(name)
}

/// The quantizers of llama.cpp's simple types give its bytes.
#[test]
fn encoders_give_the_bytes_of_llama_cpp() {
    let base = Checkpoint::open(golden("base-llama256")).unwrap();
    for ty in ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"] {
        let method = quantizer(ty, &MethodOptions::default()).unwrap();
        let layout = layout(&format!("gguf:{ty}")).unwrap();
        let theirs = Checkpoint::open(golden(&format!("gguf-llama256-{ty}")).join("model.gguf")).unwrap();
        let mut compared = 0;
        for module in theirs.quantized_modules() {
            let float = base.tensor(&format!("{module}.weight")).unwrap();
            let (rows, cols) = (float.shape()[0], float.shape()[1]);
            let w = Array2::from_shape_vec((rows, cols), float.to_f32().unwrap()).unwrap();
            let layers = vec![LayerWeights { w, spec: method.default_spec() }];
            let made = method.quantize(layers, LayerStats::default()).unwrap().remove(0);
            let written = layout.write(&QuantizedLinear::new(made.matrix), module).unwrap();
            let (name, tensor) = &written[0];
            let stored = theirs.tensor(name).unwrap();
            let differ = tensor.bytes().iter().zip(stored.bytes()).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{ty} {module}: {differ} of {} bytes differ", stored.bytes().len());
            compared += tensor.bytes().len();
        }
        assert!(compared > 300_000, "{ty}: only {compared} bytes were compared");
    }
}

/// All tensors of a float checkpoint in one GGUF file.
fn write_floats(source: &Checkpoint, out: &Path) {
    let plan: Vec<_> =
        source.tensor_infos().map(|(name, info)| PlannedTensor::new(name, info.dtype, &info.shape)).collect();
    let options = WriteOptions::default();
    let writer = ModelWriter::create(Container::Gguf, out, &plan, || source.model_files(), &options).unwrap();
    for tensor in &plan {
        writer.write(&tensor.name, &source.tensor(&tensor.name).unwrap()).unwrap();
    }
    assert_eq!(writer.finish().unwrap().files, [out.file_name().unwrap().to_str().unwrap()]);
}

/// Names, orders and types are undone when the file is read. What is f32 in every GGUF file is compared as f32.
#[test]
fn every_architecture_survives() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["base-llama", "base-llama256", "base-qwen2", "base-qwen3", "base-gpt2", "base-bert"] {
        let base = Checkpoint::open(golden(name)).unwrap();
        let out = dir.path().join(format!("{name}.gguf"));
        write_floats(&base, &out);
        let back = Checkpoint::open(&out).unwrap();
        assert!(back.reader().unwrap().is_none());
        let dropped = |name: &str| name.contains("pooler") || name.contains("position_ids");
        let named = |c: &Checkpoint| c.tensor_infos().map(|(n, _)| n.to_owned()).collect::<Vec<_>>();
        let expected: Vec<_> = named(&base).into_iter().filter(|n| !dropped(n)).collect();
        assert_eq!(named(&back), expected, "{name}");
        for tensor in expected {
            let (ours, theirs) = (back.tensor(&tensor).unwrap(), base.tensor(&tensor).unwrap());
            assert_eq!(ours.shape(), theirs.shape(), "{name} {tensor}");
            assert_eq!(ours.to_f32().unwrap(), theirs.to_f32().unwrap(), "{name} {tensor}");
            assert!(ours.dtype() == theirs.dtype() || ours.dtype() == DType::F32);
        }
        assert_eq!(back.config()["model_type"], base.config()["model_type"]);
        if name != "base-bert" {
            let (model, twin) = (Model::open(&golden(name)).unwrap(), Model::open(&out).unwrap());
            let ids = [1u32, 5, 9, 300, 2];
            assert_eq!(twin.logits(&ids).unwrap(), model.logits(&ids).unwrap(), "{name}");
        }
    }
    let error = Checkpoint::open(golden("base-mistral")).and_then(|source| {
        let files = || source.model_files();
        ModelWriter::create(Container::Gguf, &dir.path().join("x.gguf"), &[], files, &WriteOptions::default())
    });
    let text = error.unwrap_err().to_string();
    assert!(text.contains("sliding_window is 8"), "{text}");
}

#[test]
fn a_file_tokenizes_and_speaks_like_its_checkpoint() {
    let path = fixtures_dir().join("models/ts-llama-3.7M");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("stories.gguf");
    write_floats(&Checkpoint::open(&path).unwrap(), &out);
    let verification = quant::verify(&out).unwrap();
    assert!(verification.ok && verification.findings.is_empty(), "{:?}", verification.findings);

    let (model, twin) = (Model::open(&path).unwrap(), Model::open(&out).unwrap());
    let (ours, theirs) = (twin.tokenizer().unwrap(), model.tokenizer().unwrap());
    for text in
        ["once upon a time", "", "  two  spaces\n\nand 123 lines", "naïve — 東京 🙂", "<|endoftext|>the end"]
    {
        assert_eq!(ours.encode(text, true).unwrap(), theirs.encode(text, true).unwrap(), "{text:?}");
        let ids = theirs.encode(text, false).unwrap();
        assert_eq!(ours.decode(&ids, true).unwrap(), theirs.decode(&ids, true).unwrap());
    }
    let options = GenerateOptions { max_new_tokens: 12, ..Default::default() };
    let (a, b) = (model.generate("once upon a time", &options), twin.generate("once upon a time", &options));
    assert_eq!(a.unwrap().text, b.unwrap().text);
}

/// Quantizing into a GGUF file: the layers are blocks, the rest is as it was.
#[test]
fn quantize_writes_gguf_files() {
    let dir = tempfile::tempdir().unwrap();
    let base = fixtures_dir().join("models/ts-llama-3.7M");
    let text = "once upon a time there was a little dog";
    let float = Model::open(&base).unwrap();
    let ids = float.tokenizer().unwrap().encode(text, true).unwrap();
    let exact = float.logits(&ids).unwrap();
    let scale = exact.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let mut errors = BTreeMap::new();
    for (method, layout) in [("q4_0", "gguf:q4_0"), ("q4_1", "gguf:q4_1"), ("q8_0", "gguf"), ("rtn", "gguf")]
    {
        let out = dir.path().join(format!("{method}.gguf"));
        let config =
            QuantizeConfig { layout: Some(layout.to_owned()), ..QuantizeConfig::new(method).unwrap() };
        let summary = quant::quantize(&base, &out, &config, &Silent).unwrap();
        assert_eq!(summary.sha256.keys().collect::<Vec<_>>(), [&format!("{method}.gguf")]);
        assert!(quant::verify(&out).unwrap().ok);
        let model = Model::open(&out).unwrap();
        let logits = model.logits(&ids).unwrap();
        let error = (&logits - &exact).iter().fold(0.0f32, |max, x| max.max(x.abs())) / scale;
        let again = quant::quantize(&base, &out, &config, &Silent).unwrap_err();
        assert!(again.to_string().contains("exists already"), "{again}");
        errors.insert(method, error);
    }
    // Eight bits are near the float model and nearer than four.
    assert!(errors["q8_0"] < 0.02 && errors["q4_0"] > errors["q8_0"], "{errors:?}");
    assert!(errors.values().all(|&e| e < 0.6), "{errors:?}");
}

#[test]
fn golden_files_run() {
    let dir = golden("gguf-llama256-q4_k_m");
    let model = Model::open(&dir.join("model.gguf")).unwrap();
    let expected = Golden::open("gguf-llama256-q4_k_m");
    let ids = expected.ids("input_ids");
    assert_eq!(model.logits(&ids).unwrap().shape(), expected.f32("logits").shape());
    assert!(model.tokenizer().unwrap().vocab_size() <= 512);
    let inspection = quant::inspect(&dir.join("model.gguf")).unwrap();
    assert_eq!((inspection.layout.as_deref(), inspection.quantized_layers), (Some("gguf"), 16));
    assert!(inspection.notes.is_empty(), "{:?}", inspection.notes);
}

/// Codes of another layout go into blocks and back without a change.
#[test]
fn gptq_converts_to_gguf_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let (out, back) = (dir.path().join("model.gguf"), dir.path().join("back"));
    let gptq = golden("gptq-b4-g128-sym");
    let there = quant::convert(&gptq, &out, &quant::ConvertConfig::new("gguf"), &Silent).unwrap();
    assert_eq!((there.identical, there.layout_out), (there.tensors.len(), "gguf"));
    let returned = quant::convert(&out, &back, &quant::ConvertConfig::new("gptq"), &Silent).unwrap();
    assert_eq!(returned.identical, returned.tensors.len());
    let ids = [3u32, 7, 11, 200];
    let (a, b, c) = (Model::open(&gptq).unwrap(), Model::open(&out).unwrap(), Model::open(&back).unwrap());
    assert_eq!(a.logits(&ids).unwrap(), b.logits(&ids).unwrap());
    assert_eq!(a.logits(&ids).unwrap(), c.logits(&ids).unwrap());
}
