//! What methods without calibration cost on one layer.
//!
//! `cargo bench --bench quantize`; `QUANT_BENCH_ROWS=14336` takes a whole projection of an 8B model instead of 1,024 of
//! its outputs. Every method is checked once before it is timed.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use quant_methods::{LayerStats, LayerWeights, METHODS, MethodOptions, Needs, quantizer};

const COLS: usize = 4096;

/// Sums of four uniform numbers, scaled as weights are.
fn weights(rows: usize) -> Array2<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    Array2::from_shape_simple_fn((rows, COLS), || 0.02 * (uniform() + uniform() + uniform() + uniform()))
}

fn quantize(c: &mut Criterion) {
    let rows = std::env::var("QUANT_BENCH_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(1024);
    let w = weights(rows);
    let mut group = c.benchmark_group("quantize");
    group.sample_size(10).throughput(Throughput::Elements((rows * COLS) as u64));
    for method in METHODS {
        let quantizer = quantizer(method.name, &MethodOptions::default()).expect("it is in the list");
        if quantizer.needs() != Needs::NONE {
            continue;
        }
        let run = |w: Array2<f32>| {
            let layers = vec![LayerWeights { w, spec: quantizer.default_spec() }];
            quantizer.quantize(layers, LayerStats::default()).expect("weights are finite").remove(0)
        };
        // Four bits of such weights lose less than a sixth.
        let error = run(w.clone()).report.rel_error;
        assert!(error < 0.17, "{}: {error}", method.name);
        group.bench_function(BenchmarkId::new(method.name, rows), |b| {
            b.iter_batched(|| w.clone(), |w| black_box(run(w)), BatchSize::LargeInput);
        });
    }
    group.finish();
}

criterion_group!(benches, quantize);
criterion_main!(benches);
