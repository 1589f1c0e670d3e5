//! One token times the weights of a layer: what generating text costs. Bytes of weights per second, over more
//! weights than a cache holds.
//!
//! `cargo bench --bench gemv`. Every product is checked once before it is timed.

#[path = "support/mod.rs"]
mod support;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use ndarray::Array2;
use quant_kernels::{ActScales, Activations, DensePanels, DenseView, PackedMatrix};
use support::{check, quantized, random};

const SHAPE: (usize, usize) = (4096, 4096);

/// Bytes that the products of a bench go through in turn.
const WORKING_SET: usize = 256 << 20;

/// As many copies as fill the working set.
fn copies<T>(bytes: usize, make: impl Fn() -> T) -> Vec<T> {
    (0..WORKING_SET.div_ceil(bytes)).map(|_| make()).collect()
}

fn packed(c: &mut Criterion) {
    let (n, k) = SHAPE;
    let x = random(1, k, 1);
    for (bits, group) in [(4, 128), (4, 32), (8, 128), (2, 64), (3, 128)] {
        let matrix = quantized(n, k, bits, group, 2);
        let bytes = PackedMatrix::pack(matrix.clone()).expect("the matrix is sound").bytes();
        let layers = copies(bytes, || PackedMatrix::pack(matrix.clone()).expect("the matrix is sound"));
        let mut group = c.benchmark_group(format!("gemv/{bits} bits, group {group}"));
        group.throughput(Throughput::Bytes(bytes as u64));
        let mut out = Array2::zeros((1, n));
        let mut at = 0;
        let mut next = || {
            at = (at + 1) % layers.len();
            &layers[at]
        };

        let input = layers[0].fast_input().expect("integers have a fast product");
        let mut activations = Activations::default();
        let mut fast = |layer: &PackedMatrix, out: &mut Array2<f32>| {
            activations.quantize(x.view(), input, ActScales::Group).expect("shapes fit");
            layer.matmul_with(&activations, out.view_mut()).expect("shapes fit");
        };
        fast(&layers[0], &mut out);
        check(&layers[0], &x, &out, 0.51 / 127.0);
        group.bench_function("int8", |b| b.iter(|| fast(next(), &mut out)));

        layers[0].matmul(x.view(), out.view_mut()).expect("shapes fit");
        check(&layers[0], &x, &out, 0.0);
        group.bench_function("f32", |b| b.iter(|| next().matmul(x.view(), out.view_mut())));
        group.finish();
    }
}

fn dense(c: &mut Criterion) {
    let (n, k) = SHAPE;
    let (x, w) = (random(1, k, 1), random(n, k, 3).mapv(bf16::from_f32));
    let pack = || DensePanels::pack(DenseView::Bf16(w.view())).expect("rows are contiguous");
    let layers = copies(2 * n * k, pack);
    let mut out = Array2::zeros((1, n));
    layers[0].matmul_bf16(x.view(), out.view_mut()).expect("shapes fit");
    let exact = x.dot(&w.mapv(bf16::to_f32).t());
    assert!((&out - &exact).iter().all(|error| error.abs() < 0.004 * k as f32), "rounded to 9 bits");

    let mut group = c.benchmark_group("gemv/dense bf16");
    group.throughput(Throughput::Bytes((2 * n * k) as u64));
    let mut at = 0;
    let mut next = || {
        at = (at + 1) % layers.len();
        &layers[at]
    };
    group.bench_function("bf16", |b| b.iter(|| next().matmul_bf16(x.view(), out.view_mut())));
    group.bench_function("f32", |b| b.iter(|| next().matmul(x.view(), out.view_mut())));
    group.finish();
}

criterion_group!(benches, packed, dense);
criterion_main!(benches);
