//! Output is complete or absent, whatever happens.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use quant_core::{DType, DenseTensor};
use quant_formats::{
    Checkpoint, CheckpointWriter, FormatError, PlannedTensor, SafetensorsFile, SafetensorsWriter,
    WriteOptions, planned_files, write_safetensors,
};

fn tensors() -> Vec<(String, DenseTensor)> {
    let ids: Vec<i32> = (0..6).collect();
    let values: Vec<f32> = (0..100).map(|i| i as f32).collect();
    vec![
        ("z.weight".into(), DenseTensor::from_f32(&[10, 10], &values)),
        ("a.ids".into(), DenseTensor::from_i32(&[2, 3], &ids)),
        ("empty".into(), DenseTensor::from_f32(&[0, 7], &[])),
        ("h".into(), DenseTensor::from_f32_as_f16(&[3], &values[..3])),
        ("byte".into(), DenseTensor::new(DType::U8, vec![], vec![7]).unwrap()),
        ("b.weight".into(), DenseTensor::from_f32(&[50], &values[..50])),
    ]
}

fn plan() -> Vec<PlannedTensor> {
    tensors().iter().map(|(name, t)| PlannedTensor::of(name, t)).collect()
}

/// Everything in a directory, hidden temporary files included.
fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn write_all(writer: &CheckpointWriter) {
    // Backwards and from several threads.
    std::thread::scope(|scope| {
        for (name, tensor) in tensors().into_iter().rev() {
            scope.spawn(move || writer.write(&name, &tensor).unwrap());
        }
    });
    writer.write_file("config.json", b"{}").unwrap();
}

#[test]
fn a_file_is_the_reference_writers_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let path = dir.path().join("x.safetensors");
    write_safetensors(&path, &tensors(), &metadata).unwrap();
    let all = tensors();
    let views = all.iter().map(|(name, t)| {
        let dtype = match t.dtype() {
            DType::F32 => safetensors::Dtype::F32,
            DType::F16 => safetensors::Dtype::F16,
            DType::I32 => safetensors::Dtype::I32,
            _ => safetensors::Dtype::U8,
        };
        (name, safetensors::tensor::TensorView::new(dtype, t.shape().to_vec(), t.bytes()).unwrap())
    });
    let reference = safetensors::serialize(views, Some(metadata.into_iter().collect())).unwrap();
    assert!(fs::read(&path).unwrap() == reference);
    let sizes = planned_files(&plan(), &WriteOptions::default()).unwrap();
    assert_eq!(sizes, [("model.safetensors".to_owned(), reference.len() as u64)]);

    let file = SafetensorsFile::open(&path).unwrap();
    for (name, tensor) in tensors() {
        assert_eq!(file.read(&name).unwrap().bytes(), tensor.bytes(), "{name}");
    }
    let rows = file.read_rows("z.weight", 3..5).unwrap();
    assert_eq!((rows.shape(), rows.bytes()), (&[2, 10][..], &all[0].1.bytes()[120..200]));
    assert!(file.read_rows("z.weight", 3..11).is_err());
    assert!(file.read("absent").unwrap_err().to_string().contains("absent"));
}

#[test]
fn shards_are_cut_in_plan_order_and_indexed() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let options = WriteOptions { shard_size: 424, ..Default::default() };
    let writer = CheckpointWriter::create(&out, &plan(), &options).unwrap();
    write_all(&writer);
    writer.write_file("1_Pooling/config.json", b"[]").unwrap();
    let written = writer.finish().unwrap();
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let others = ["1_Pooling/config.json", "config.json", "model.safetensors.index.json"];
    assert_eq!(written.files, [&others[..2], &shards[..], &others[2..]].concat());
    assert_eq!((written.total_size, written.leftover), (631, None));
    assert_eq!(entries(dir.path()), ["model"]);
    for (name, size) in planned_files(&plan(), &options).unwrap() {
        assert_eq!(fs::metadata(out.join(&name)).unwrap().len(), size, "{name}");
    }
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(checkpoint.verify(), []);
    for (name, tensor) in tensors() {
        assert_eq!(checkpoint.tensor(&name).unwrap().bytes(), tensor.bytes());
    }
    assert!(checkpoint.file_of("z.weight").unwrap().path().ends_with(shards[0]));
    assert!(checkpoint.file_of("b.weight").unwrap().path().ends_with(shards[1]));
}

#[test]
fn nothing_remains_of_an_unfinished_output() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("new/deep/model");
    let writer = CheckpointWriter::create(&out, &plan(), &WriteOptions::default()).unwrap();
    let (name, tensor) = &tensors()[0];
    writer.write(name, tensor).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(&error, FormatError::Unwritten { first, count: 5 } if first == "a.ids"), "{error}");
    assert_eq!(entries(dir.path()), [""; 0]);

    let path = dir.path().join("x.safetensors");
    fs::write(&path, "old").unwrap();
    drop(SafetensorsWriter::create(&path, &plan(), &BTreeMap::new()).unwrap());
    assert_eq!(entries(dir.path()), ["x.safetensors"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn what_is_not_planned_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let writer = CheckpointWriter::create(dir.path().join("m"), &plan(), &WriteOptions::default()).unwrap();
    let (name, tensor) = &tensors()[0];
    writer.write(name, tensor).unwrap();
    let error = |name: &str, tensor: &DenseTensor| writer.write(name, tensor).unwrap_err().to_string();
    assert!(error(name, tensor).contains("written twice"));
    assert!(error("other", tensor).contains("not planned"));
    assert!(error("h", tensor).contains("F32 [10, 10] where F16 [3] is planned"));
    assert!(error("b.weight", &tensor.reshaped(vec![100]).unwrap()).contains("[50]"));
    for name in ["../x", "/x", "", "a/../../x", "c:\\x", "a\0b", "model.safetensors"] {
        assert!(writer.write_file(name, b"").is_err(), "{name:?}");
    }
    let twice = [plan(), plan()].concat();
    assert!(planned_files(&twice, &WriteOptions::default()).is_err());
    let odd = [PlannedTensor::new("f4", DType::F4, &[3])];
    assert!(planned_files(&odd, &WriteOptions::default()).is_err());
    let huge = [PlannedTensor::new("a", DType::U8, &[usize::MAX]), PlannedTensor::new("b", DType::U8, &[1])];
    assert!(planned_files(&huge, &WriteOptions::default()).is_err());
}

#[test]
fn an_existing_output_is_replaced_only_when_asked_and_only_if_it_is_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let create = |overwrite| {
        CheckpointWriter::create(&out, &plan(), &WriteOptions { overwrite, ..Default::default() })
    };
    // An empty directory is no output yet.
    fs::create_dir(&out).unwrap();
    let writer = create(false).unwrap();
    write_all(&writer);
    writer.finish().unwrap();

    fs::write(out.join("mark"), "old").unwrap();
    assert!(matches!(create(false), Err(FormatError::Exists { .. })));
    let writer = create(true).unwrap();
    writer.write_file("config.json", b"{}").unwrap();
    assert!(writer.finish().is_err());
    assert_eq!(fs::read(out.join("mark")).unwrap(), b"old", "a failure leaves the old output");
    let writer = create(true).unwrap();
    write_all(&writer);
    writer.finish().unwrap();
    assert_eq!(entries(&out), ["config.json", "model.safetensors"]);
    assert_eq!(entries(dir.path()), ["model"]);

    fs::remove_file(out.join("config.json")).unwrap();
    assert!(matches!(create(true), Err(FormatError::NotReplaced { .. })));
    fs::remove_dir_all(&out).unwrap();
    fs::write(&out, "a file").unwrap();
    assert!(matches!(create(true), Err(FormatError::NotReplaced { .. })));
}

#[test]
fn an_output_that_appears_meanwhile_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let writer = CheckpointWriter::create(&out, &plan(), &WriteOptions::default()).unwrap();
    write_all(&writer);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mark"), "other").unwrap();
    assert!(matches!(writer.finish(), Err(FormatError::Exists { .. })));
    assert_eq!((entries(dir.path()), entries(&out)), (vec!["model".to_owned()], vec!["mark".to_owned()]));
}

#[test]
fn a_target_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = CheckpointWriter::create(file.join("model"), &plan(), &WriteOptions::default()).unwrap_err();
    assert!(error.to_string().contains("file"), "{error}");
    // The kernel's own directory can't be written by anybody.
    if cfg!(target_os = "linux") {
        let error =
            CheckpointWriter::create("/proc/quant-model", &plan(), &WriteOptions::default()).unwrap_err();
        assert!(error.to_string().contains("cannot create /proc/.quant-model.partial"), "{error}");
        let read_only = write_safetensors("/proc/x.safetensors", &tensors(), &BTreeMap::new()).unwrap_err();
        assert!(matches!(read_only, FormatError::Io { action: "create", .. }), "{read_only}");
    }
}

/// Needs a directory on a full file system of a few kilobytes, which takes rights to mount.
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let Some(small) = std::env::var_os("QUANT_TEST_SMALL_DIR") else {
        eprintln!("skipped: QUANT_TEST_SMALL_DIR is not set");
        return;
    };
    let small = Path::new(&small);
    let before = entries(small);
    let plan = [PlannedTensor::new("w", DType::F32, &[4 << 20])];
    let writer = CheckpointWriter::create(small.join("model"), &plan, &WriteOptions::default()).unwrap();
    let tensor = DenseTensor::from_f32(&[4 << 20], &vec![1.0; 4 << 20]);
    let error = writer.write("w", &tensor).unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    assert!(matches!(writer.finish(), Err(FormatError::Unwritten { .. })));
    assert_eq!(entries(small), before);
}
