//! Bringing weights into the order of the products: part of loading a model. Weights per second.
//!
//! `cargo bench --bench pack`. Every packed matrix is checked once before it is timed.

#[path = "support/mod.rs"]
mod support;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use quant_kernels::{DensePanels, DenseView, PackedMatrix};
use support::{quantized, random};

const SHAPE: (usize, usize) = (4096, 4096);

fn packed(c: &mut Criterion) {
    let (n, k) = SHAPE;
    let mut bench = c.benchmark_group("pack");
    bench.throughput(Throughput::Elements((n * k) as u64)).sample_size(10);
    for (bits, group) in [(4, 128), (4, 32), (3, 128), (8, 128)] {
        let matrix = quantized(n, k, bits, group, 1);
        let packed = PackedMatrix::pack(matrix.clone()).expect("the matrix is sound");
        let (mut found, mut expected) = (vec![0.0; k], vec![0.0; k]);
        for row in [0, n - 1] {
            packed.dequantize_row(row, &mut found).expect("a row of the matrix");
            matrix.dequantize_row(row, &mut expected);
            assert_eq!(found, expected);
        }
        bench.bench_function(format!("{bits} bits, group {group}"), |b| {
            b.iter_batched(|| matrix.clone(), PackedMatrix::pack, BatchSize::LargeInput);
        });
    }
    let w = random(n, k, 2).mapv(bf16::from_f32);
    let panels = DensePanels::pack(DenseView::Bf16(w.view())).expect("rows are contiguous");
    let mut found = vec![0.0; k];
    panels.dequantize_row(n - 1, &mut found).expect("a row of the matrix");
    assert!(found.iter().zip(w.row(n - 1)).all(|(found, w)| *found == w.to_f32()));
    bench.bench_function("dense bf16", |b| b.iter(|| DensePanels::pack(DenseView::Bf16(w.view()))));
    bench.finish();
}

criterion_group!(benches, packed);
criterion_main!(benches);
