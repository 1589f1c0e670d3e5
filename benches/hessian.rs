//! What calibration and GPTQ cost on one layer, and Cholesky beside LAPACK.
//!
//! `cargo bench --bench hessian`; with `--features lapack` the system's LAPACK is timed on the same matrices (state
//! `OPENBLAS_NUM_THREADS` with its figures). Every case is checked once before it is timed.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use quant_core::QuantSpec;
use quant_math::cholesky::{Blocked, Cholesky};
use quant_math::{Hessian, HessianSum};
use quant_methods::{Gptq, GptqOptions, LayerStats, LayerWeights, Quantizer};

/// Uniform numbers in -1..1.
fn random(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_simple_fn((rows, cols), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// The damped Hessian of twice as many inputs as there are features.
fn hessian(k: usize) -> Hessian {
    let mut sum = HessianSum::new(k);
    sum.accumulate(random(2 * k, k, 1).view()).expect("one column per feature");
    let mut hessian = sum.finish();
    let damp = 0.05 * hessian.matrix.diag().mean().expect("features exist");
    hessian.matrix.diag_mut().iter_mut().for_each(|d| *d += damp);
    hessian
}

/// Largest `|(R Rᵀ - H)_ij|` over a sample of entries.
fn residual(r: &Array2<f32>, h: &Array2<f32>) -> f32 {
    let k = h.nrows();
    let entry = |i: usize, j: usize| (j..k).map(|p| r[[i, p]] * r[[j, p]]).sum::<f32>() - h[[i, j]];
    (0..200)
        .map(|s| (s * 37 % k, s * 59 % k))
        .map(|(i, j)| entry(i.min(j), i.max(j)).abs())
        .fold(0.0, f32::max)
}

fn accumulate(c: &mut Criterion) {
    let mut group = c.benchmark_group("hessian/accumulate 512 tokens");
    for k in [1024, 4096] {
        let x = random(512, k, 2);
        // Multiply-adds of one triangle, two flops each.
        group.throughput(Throughput::ElementsAndBytes {
            elements: (512 * k * k) as u64,
            bytes: (4 * 512 * k) as u64,
        });
        group.bench_with_input(BenchmarkId::from_parameter(k), &x, |b, x| {
            let mut sum = HessianSum::new(k);
            b.iter(|| sum.accumulate(black_box(x.view())).expect("one column per feature"));
        });
    }
    group.finish();
}

fn cholesky(c: &mut Criterion) {
    let backends: &[&dyn Cholesky] = &[
        &Blocked,
        #[cfg(feature = "lapack")]
        &quant_math::cholesky::Lapack,
    ];
    for k in [1024, 4096] {
        let h = hessian(k).matrix;
        let mut group = c.benchmark_group(format!("cholesky/{k}"));
        group.sample_size(10);
        for backend in backends {
            let mut r = h.clone();
            backend.reverse_factor(r.view_mut()).expect("the matrix is positive definite");
            assert!(residual(&r, &h) < 1e-4, "{} is wrong", backend.name());
            type Run = fn(&dyn Cholesky, &mut Array2<f32>);
            let all: [(&str, Run); 3] = [
                ("reverse factor", |c, h| c.reverse_factor(h.view_mut()).expect("positive definite")),
                ("upper factor of inverse", |c, h| {
                    c.upper_factor_of_inverse(h.view_mut()).expect("positive definite")
                }),
                ("inverse", |c, h| c.inverse(h.view_mut()).expect("positive definite")),
            ];
            for (name, run) in all {
                group.bench_function(BenchmarkId::new(name, backend.name()), |b| {
                    b.iter_batched_ref(|| h.clone(), |h| run(*backend, h), BatchSize::LargeInput);
                });
            }
        }
        group.finish();
    }
}

fn gptq(c: &mut Criterion) {
    let mut group = c.benchmark_group("gptq/4 bits, group 128");
    group.sample_size(10);
    for (n, k) in [(1024, 1024), (4096, 4096)] {
        let (w, h) = (random(n, k, 3), hessian(k));
        let quantizer = Gptq::new(GptqOptions::default());
        let spec = QuantSpec::default();
        let run = |(w, hessian): (Array2<f32>, Hessian)| {
            let layers = vec![LayerWeights { w, spec }];
            let stats = LayerStats { hessian: Some(hessian), ..LayerStats::default() };
            quantizer.quantize(layers, stats).expect("the layer is sound").remove(0)
        };
        let report = run((w.clone(), h.clone())).report;
        assert!(report.fallback.is_none() && report.rel_error < 0.15, "{report:?}");
        group.throughput(Throughput::Elements((n * k) as u64));
        group.bench_function(format!("{n}x{k}"), |b| {
            b.iter_batched(|| (w.clone(), h.clone()), run, BatchSize::LargeInput);
        });
    }
    group.finish();
}

criterion_group!(benches, accumulate, cholesky, gptq);
criterion_main!(benches);
