//! GGUF files that llama.cpp quantized: its weights, and its bytes, are ours to the bit.

use std::fs;
use std::path::{Path, PathBuf};

use quant_formats::{Checkpoint, GgmlType, GgufFile, GgufWriter, Metadata};
use quant_testkit::Golden;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden")
}

fn folders() -> Vec<PathBuf> {
    let all = fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<_> =
        all.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("gguf-")).collect();
    found.sort();
    assert_eq!(found.len(), 13, "golden files are missing");
    found
}

#[test]
fn dequantized_weights_equal_those_of_gguf_py() {
    for dir in folders() {
        let checkpoint = Checkpoint::open(dir.join("model.gguf")).unwrap();
        let layout = checkpoint.reader().unwrap().unwrap().layout();
        let mut compared = 0;
        for expected in Golden::read(&dir.join("expected.safetensors")).dequantized() {
            let linear = checkpoint.quantized_linear(&expected.name).unwrap().expect("quantized");
            expected.check(layout.dequantize_like_peer(&linear.weight).view());
            compared += expected.shape[0] * expected.shape[1];
        }
        assert_eq!(compared, 2 * 256 * 256);
    }
}

#[test]
fn reading_and_writing_gives_the_same_blocks() {
    for dir in folders() {
        let checkpoint = Checkpoint::open(dir.join("model.gguf")).unwrap();
        let layout = checkpoint.reader().unwrap().unwrap().layout();
        let modules: Vec<_> = checkpoint.quantized_modules().map(str::to_owned).collect();
        assert_eq!(modules.len(), 16, "{modules:?}");
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

/// What is not quantized is the float base, and the keys are its configuration.
#[test]
fn the_rest_is_that_of_the_float_model() {
    let base = Checkpoint::open(golden().join("base-llama256")).unwrap();
    for dir in folders() {
        let checkpoint = Checkpoint::open(dir.join("model.gguf")).unwrap();
        assert_eq!(checkpoint.verify(), []);
        let mut floats = 0;
        for (name, info) in checkpoint.tensor_infos() {
            if checkpoint.part_of(name).is_none() {
                let (ours, theirs) = (checkpoint.tensor(name).unwrap(), base.tensor(name).unwrap());
                assert_eq!((info.dtype, ours.bytes()), (theirs.dtype(), theirs.bytes()), "{name}");
                floats += 1;
            }
        }
        assert_eq!(floats, 5);
        for (field, value) in checkpoint.config().as_object().unwrap() {
            match field.as_str() {
                "rope_theta" => assert_eq!(value, &base.config()["rope_parameters"][field]),
                _ => assert_eq!(value, &base.config()[field], "{field}"),
            }
        }
        assert!(checkpoint.reader().unwrap().unwrap().spec().is_some());
    }
}

#[test]
fn a_file_of_another_kind_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    for (bytes, word) in
        [(&b"GG"[..], "truncated"), (b"\x93NUMPYxxxxxxxx", "magic"), (b"GGUF\x01\0\0\0", "version 1")]
    {
        fs::write(&path, bytes).unwrap();
        let error = GgufFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("model.gguf"), "{error}");
    }
}

/// A file written anew from its keys and tensors has the bytes of llama.cpp's writer.
#[test]
fn files_are_written_byte_for_byte() {
    let out = tempfile::tempdir().unwrap();
    for dir in folders() {
        let file = GgufFile::open(dir.join("model.gguf")).unwrap();
        let tensors: Vec<_> =
            file.tensors().iter().map(|t| (t.name.clone(), t.ty, t.shape.clone())).collect();
        let path = out.path().join("model.gguf");
        let writer = GgufWriter::create(&path, file.metadata(), &tensors, true).unwrap();
        for tensor in file.tensors() {
            writer.write(&tensor.name, &file.read(tensor).unwrap()).unwrap();
        }
        writer.finish().unwrap();
        assert!(fs::read(&path).unwrap() == fs::read(file.path()).unwrap(), "{}", dir.display());
    }
}

#[test]
fn the_writer_wants_every_tensor_once() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.gguf");
    let tensors = [("a".to_owned(), GgmlType::F32, vec![2]), ("b".to_owned(), GgmlType::Q8_0, vec![1, 32])];
    let writer = GgufWriter::create(&path, &Metadata::new(), &tensors, false).unwrap();
    writer.write("a", &[0; 8]).unwrap();
    let error = |result: Result<(), quant_formats::FormatError>| result.unwrap_err().to_string();
    assert!(error(writer.write("a", &[0; 8])).contains("twice"));
    assert!(error(writer.write("b", &[0; 33])).contains("34 are planned"));
    assert!(error(writer.write("c", &[])).contains("not planned"));
    assert!(error(writer.finish()).contains("1 planned tensors were not written, the first is b"));
    assert!(!path.exists() && fs::read_dir(out.path()).unwrap().next().is_none());
    let odd = [("b".to_owned(), GgmlType::Q8_0, vec![1, 33])];
    assert!(GgufWriter::create(&path, &Metadata::new(), &odd, false).is_err());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]

    /// A damaged file is read or refused; nothing panics, and no size that it names is believed.
    #[test]
    fn damage_never_panics(
        edits in proptest::collection::vec((0usize..2100, proptest::prelude::any::<u8>()), 1..5),
        cut in proptest::option::of(0usize..7008),
    ) {
        let control = golden().join("../malformed/controls/gguf-ok-llama.gguf");
        let mut bytes = fs::read(control).unwrap();
        edits.into_iter().for_each(|(at, value)| bytes[at] = value);
        bytes.truncate(cut.unwrap_or(bytes.len()));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        fs::write(&path, bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            checkpoint.verify();
            let _ = (checkpoint.tokenizer(), checkpoint.model_files(), checkpoint.side_files());
        }
    }
}
