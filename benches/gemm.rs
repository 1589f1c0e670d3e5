//! Many tokens times the weights of a layer: what reading a prompt costs. Multiply-adds per second (elements; one is
//! two operations).
//!
//! `cargo bench --bench gemm`. Every product is checked once before it is timed.

#[path = "support/mod.rs"]
mod support;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use ndarray::Array2;
use quant_kernels::{ActScales, Activations, DensePanels, DenseView, PackedMatrix, matmul_nt};
use support::{check, quantized, random};

const SHAPE: (usize, usize, usize) = (512, 4096, 4096);

fn packed(c: &mut Criterion) {
    let (m, n, k) = SHAPE;
    let x = random(m, k, 1);
    let mut out = Array2::zeros((m, n));
    for (bits, group) in [(4, 128), (4, 32), (8, 128)] {
        let layer = PackedMatrix::pack(quantized(n, k, bits, group, 2)).expect("the matrix is sound");
        let mut group = c.benchmark_group(format!("gemm/{bits} bits, group {group}"));
        group.throughput(Throughput::Elements((m * n * k) as u64)).sample_size(10);

        let input = layer.fast_input().expect("integers have a fast product");
        let mut activations = Activations::default();
        let mut fast = |out: &mut Array2<f32>| {
            activations.quantize(x.view(), input, ActScales::Group).expect("shapes fit");
            layer.matmul_with(&activations, out.view_mut()).expect("shapes fit");
        };
        fast(&mut out);
        check(&layer, &x, &out, 0.51 / 127.0);
        group.bench_function("int8", |b| b.iter(|| fast(&mut out)));

        layer.matmul_bf16(x.view(), out.view_mut()).expect("shapes fit");
        check(&layer, &x, &out, 0.002);
        group.bench_function("bf16 panels", |b| b.iter(|| layer.matmul_bf16(x.view(), out.view_mut())));

        layer.matmul(x.view(), out.view_mut()).expect("shapes fit");
        check(&layer, &x, &out, 0.0);
        group.bench_function("f32 panels", |b| b.iter(|| layer.matmul(x.view(), out.view_mut())));
        group.finish();
    }
}

fn dense(c: &mut Criterion) {
    let (m, n, k) = SHAPE;
    let (x, w) = (random(m, k, 1), random(n, k, 3).mapv(bf16::from_f32));
    let layer = DensePanels::pack(DenseView::Bf16(w.view())).expect("rows are contiguous");
    let w = w.mapv(bf16::to_f32);
    let (mut out, mut exact) = (Array2::zeros((m, n)), Array2::zeros((m, n)));
    matmul_nt(x.view(), w.view(), exact.view_mut()).expect("shapes fit");
    layer.matmul(x.view(), out.view_mut()).expect("shapes fit");
    assert_eq!(out, exact, "the same sums in the same order");
    layer.matmul_bf16(x.view(), out.view_mut()).expect("shapes fit");
    assert!((&out - &exact).iter().all(|error| error.abs() < 0.004 * k as f32), "rounded to 9 bits");

    let mut group = c.benchmark_group("gemm/dense");
    group.throughput(Throughput::Elements((m * n * k) as u64)).sample_size(10);
    group.bench_function("bf16", |b| b.iter(|| layer.matmul_bf16(x.view(), out.view_mut())));
    group.bench_function("f32, weights in bf16", |b| b.iter(|| layer.matmul(x.view(), out.view_mut())));
    group.bench_function("f32", |b| b.iter(|| matmul_nt(x.view(), w.view(), out.view_mut())));
    group.finish();
}

criterion_group!(benches, packed, dense);
criterion_main!(benches);
