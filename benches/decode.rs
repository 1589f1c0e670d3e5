//! Generating and reading tokens with a small model of random weights: what is spent beside the products. Tokens
//! per second.
//!
//! `cargo bench --bench decode`. That reading a prompt at once and token by token gives the same bits is checked
//! before anything is timed.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quant::{Model, QuantizeConfig, Silent};
use quant_testkit::synthetic::{Arch, Checkpoint, Shape};

const TOKENS: usize = 16;

fn shape() -> Shape {
    let sizes =
        Shape { hidden: 1024, layers: 4, ffn: 2816, heads: 16, kv_heads: 4, ..Shape::tiny(Arch::Llama) };
    Shape { head_dim: 64, vocab: 4096, ..sizes }
}

fn decode(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (float, packed) = (dir.path().join("float"), dir.path().join("packed"));
    Checkpoint::new(shape()).write(&float).expect("the directory is writable");
    let config = QuantizeConfig { bits: 4, ..QuantizeConfig::new("rtn").expect("a method") };
    quant::quantize(&float, &packed, &config, &Silent).expect("the model is sound");

    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Elements(TOKENS as u64)).sample_size(10);
    let ids: Vec<u32> = (0..TOKENS as u32).map(|i| i * 251 % 4096).collect();
    for (name, path) in [("bf16", &float), ("4 bits", &packed)] {
        let model = Model::open(path).expect("the model is sound");
        let decoder = model.decoder();
        let step_by_step = || {
            let mut cache = decoder.new_cache();
            let logits = ids.iter().map(|&id| decoder.next_logits(&[id], &mut cache).expect("the id exists"));
            logits.last().expect("some tokens")
        };
        let at_once = || decoder.next_logits(&ids, &mut decoder.new_cache()).expect("the ids exist");
        assert_eq!(step_by_step(), at_once(), "a row of a product does not depend on the others");
        group.bench_function(format!("generate, {name}"), |b| b.iter(step_by_step));
        group.bench_function(format!("prompt, {name}"), |b| b.iter(at_once));
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
