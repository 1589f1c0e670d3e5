use std::fs;

use super::*;
use crate::golden::{Golden, fixtures_dir};

fn written(checkpoint: &Checkpoint) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    checkpoint.write(dir.path()).unwrap();
    dir
}

fn bytes_with_threads(threads: usize) -> Vec<u8> {
    // 5000 x 64 elements are two pieces.
    let checkpoint = Checkpoint::new(Shape { vocab: 5000, ..Shape::tiny(Arch::Llama) });
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let dir = pool.install(|| written(&checkpoint));
    fs::read(dir.path().join("model.safetensors")).unwrap()
}

#[test]
fn files_do_not_depend_on_threads() {
    assert_eq!(bytes_with_threads(1), bytes_with_threads(3));
}

/// The fixtures of the same architectures were written by transformers: names and kinds of shape must be theirs.
#[test]
fn names_are_those_of_real_checkpoints() {
    for arch in Arch::ALL {
        let ours = written(&Checkpoint::new(Shape {
            tied: !matches!(arch, Arch::Mistral | Arch::Qwen2),
            ..Shape::tiny(arch)
        }));
        let ours = Golden::read(&ours.path().join("model.safetensors"));
        let fixture = fixtures_dir().join("golden").join(format!("base-{}", arch.model_type()));
        let theirs = Golden::read(&fixture.join("model.safetensors"));
        let strip = |n: String| n.strip_prefix("transformer.").map(String::from).unwrap_or(n);
        let mut theirs: Vec<String> = theirs.names().into_iter().map(strip).collect();
        if arch == Arch::Gpt2 {
            // The released checkpoint carries the masks; a saved model of today does not.
            theirs.extend(["h.0.attn.bias".into(), "h.1.attn.bias".into()]);
            theirs.sort();
        }
        assert_eq!(ours.names(), theirs, "{arch:?}");
    }
}

#[test]
fn outliers_are_planted() {
    let dir = written(&Checkpoint::new(Shape::tiny(Arch::Llama)));
    let model = Golden::read(&dir.path().join("model.safetensors"));
    let large = |name: &str| -> Vec<usize> {
        model.f32(name).iter().enumerate().filter(|(_, v)| v.abs() > 5.0).map(|(i, _)| i).collect()
    };
    let channels = large("model.layers.0.input_layernorm.weight");
    assert_eq!(channels.len(), 1);
    assert_eq!(channels, large("model.layers.1.post_attention_layernorm.weight"));
    assert!(large("model.norm.weight").is_empty());

    let weight = model.f32("model.layers.0.mlp.up_proj.weight");
    let rms =
        |row: ndarray::ArrayView1<'_, f32>| (row.iter().map(|v| v * v).sum::<f32>() / 64.0).sqrt() * 8.0;
    let rows: Vec<f32> =
        weight.into_dimensionality::<ndarray::Ix2>().unwrap().rows().into_iter().map(rms).collect();
    // A row's root mean square of 64 normal draws is within 5 / sqrt(2 * 64) of its deviation.
    assert_eq!(rows.iter().filter(|&&r| (r - 4.0).abs() < 4.0 * 0.45).count(), 1);
    assert_eq!(rows.iter().filter(|&&r| (r - 1.0).abs() < 0.45).count(), rows.len() - 1);
}

#[test]
fn conv1d_outliers_lie_in_one_output_column() {
    let dir = written(&Checkpoint::new(Shape::tiny(Arch::Gpt2)));
    let model = Golden::read(&dir.path().join("model.safetensors"));
    let weight = model.f32("h.0.mlp.c_fc.weight").into_dimensionality::<ndarray::Ix2>().unwrap();
    assert_eq!(weight.dim(), (64, 128));
    let power: Vec<f32> = weight.columns().into_iter().map(|c| c.iter().map(|v| v * v).sum()).collect();
    // Unit variance per output, sixteen for the outlier.
    assert_eq!(power.iter().filter(|&&p| p > 4.0).count(), 1);
    let mask = model.f32("h.0.attn.bias");
    assert_eq!((mask[[0, 0, 3, 3]], mask[[0, 0, 3, 4]], mask[[0, 0, 127, 0]]), (1.0, 0.0, 1.0));
}

#[test]
fn large_models_are_split_and_indexed() {
    let shape = Shape::tiny(Arch::Mistral);
    let whole = written(&Checkpoint { storage: Storage::F32, ..Checkpoint::new(shape) });
    let parts = written(&Checkpoint { storage: Storage::F32, shard_bytes: 60_000, ..Checkpoint::new(shape) });
    let whole = Golden::read(&whole.path().join("model.safetensors"));
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(parts.path().join("model.safetensors.index.json")).unwrap())
            .unwrap();
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), whole.names().len());
    for (name, file) in map {
        let shard = Golden::read(&parts.path().join(file.as_str().unwrap()));
        assert_eq!(shard.f32(name), whole.f32(name), "{name}");
    }
}

#[test]
fn real_shapes_have_their_known_sizes() {
    let millions = |shape| Checkpoint::new(shape).parameters() as f64 / 1e6;
    assert_eq!(millions(Shape::LLAMA_1_1B).round(), 1100.0);
    assert_eq!(millions(Shape::LLAMA_8B).round(), 8030.0);
    assert_eq!(millions(Shape::QWEN3_0_6B).round(), 596.0);
    assert_eq!(Checkpoint::new(Shape::GPT2).parameters(), 124_439_808);
}

#[test]
fn an_existing_folder_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "mine").unwrap();
    assert!(Checkpoint::new(Shape::tiny(Arch::Llama)).write(dir.path()).is_err());
    assert_eq!(fs::read_to_string(dir.path().join("config.json")).unwrap(), "mine");
}

#[test]
fn ids_are_a_numpy_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ids.npy");
    let ids = random_ids(1, 3, 5, 100);
    write_npy(&file, [3, 5], &ids).unwrap();
    let bytes = fs::read(file).unwrap();
    assert!(bytes.starts_with(b"\x93NUMPY\x01\x00") && bytes.len() == 128 + 60);
    assert!(String::from_utf8_lossy(&bytes[10..128]).contains("'shape': (3, 5)"));
    assert!(ids.iter().all(|&id| (0..100).contains(&id)));
}
