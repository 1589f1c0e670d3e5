//! Prints how near the dense products come to the limits of this machine.
//!
//! `cargo run --release -p quant-kernels --example roof`

#![expect(clippy::print_stdout, reason = "a report")]

use std::time::Instant;

use half::bf16;
use ndarray::Array2;
use quant_kernels::{
    DensePanels, DenseView, HalfView, isa, matmul_nn, matmul_nt, matmul_nt_bf16, matmul_nt_half, roof,
    syrk_tn_acc,
};

fn matrix(rows: usize, cols: usize) -> Array2<f32> {
    let mut state = 1u32;
    Array2::from_shape_simple_fn((rows, cols), || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// The best of some runs: on a shared machine the others are disturbed, not slow.
fn best_seconds(mut f: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed().as_secs_f64() < 1.0 {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let limits = roof::Roof::measure();
    println!(
        "{} threads, {}: {:.3} TFLOPS f32, {:.3} bf16, {:.3} TOPS int8, {:.1} GB/s read",
        rayon::current_num_threads(),
        isa::active(),
        limits.f32 / 1e12,
        limits.bf16 / 1e12,
        limits.int8 / 1e12,
        limits.read / 1e9
    );
    let (peak, bandwidth) = (limits.f32, limits.read);

    for (m, n, k) in
        [(512, 4096, 4096), (512, 14336, 4096), (2048, 4096, 4096), (64, 4096, 4096), (16, 4096, 4096)]
    {
        let (x, w, mut out) = (matrix(m, k), matrix(n, k), Array2::zeros((m, n)));
        let seconds = best_seconds(|| matmul_nt(x.view(), w.view(), out.view_mut()).unwrap());
        report("matmul_nt", [m, n, k], seconds, peak);
        let w = w.mapv(bf16::from_f32);
        let seconds =
            best_seconds(|| matmul_nt_bf16(x.view(), HalfView::Bf16(w.view()), out.view_mut()).unwrap());
        report("matmul_nt_bf16", [m, n, k], seconds, limits.bf16);
    }
    for (m, n, k) in [(4096, 3968, 128), (4096, 128, 2048), (2048, 2048, 2048)] {
        let (a, b, mut out) = (matrix(m, k), matrix(k, n), Array2::zeros((m, n)));
        let seconds = best_seconds(|| matmul_nn(-1.0, a.view(), b.view(), 1.0, out.view_mut()).unwrap());
        report("matmul_nn", [m, n, k], seconds, peak);
    }
    for (t, k) in [(2048, 4096), (512, 4096)] {
        let (x, mut h) = (matrix(t, k), Array2::zeros((k, k)));
        let seconds = best_seconds(|| syrk_tn_acc(x.view(), 2.0, h.view_mut()).unwrap());
        report("syrk_tn_acc", [k, k / 2, t], seconds, peak);
    }

    for m in [1, 8, 512] {
        let (n, k) = (14336, 4096);
        let (x, w, mut out) = (matrix(m, k), matrix(n, k), Array2::zeros((m, n)));
        let seconds = best_seconds(|| matmul_nt(x.view(), w.view(), out.view_mut()).unwrap());
        report_stream("matmul_nt", [m, n, k], seconds, 4, bandwidth);
        let panels = DensePanels::pack(DenseView::F32(w.view())).unwrap();
        let seconds = best_seconds(|| panels.matmul(x.view(), out.view_mut()).unwrap());
        report_stream("panels f32", [m, n, k], seconds, 4, bandwidth);
        let h = w.mapv(half::f16::from_f32);
        let panels = DensePanels::pack(DenseView::F16(h.view())).unwrap();
        let seconds = best_seconds(|| panels.matmul(x.view(), out.view_mut()).unwrap());
        report_stream("panels f16 exact", [m, n, k], seconds, 2, bandwidth);
        let seconds = best_seconds(|| panels.matmul_bf16(x.view(), out.view_mut()).unwrap());
        report_stream("panels f16 fast", [m, n, k], seconds, 2, bandwidth);
        let w = w.mapv(bf16::from_f32);
        let panels = DensePanels::pack(DenseView::Bf16(w.view())).unwrap();
        let seconds = best_seconds(|| panels.matmul(x.view(), out.view_mut()).unwrap());
        report_stream("panels bf16 exact", [m, n, k], seconds, 2, bandwidth);
        let seconds = best_seconds(|| panels.matmul_bf16(x.view(), out.view_mut()).unwrap());
        report_stream("panels bf16 fast", [m, n, k], seconds, 2, bandwidth);
        let seconds =
            best_seconds(|| matmul_nt_half(x.view(), HalfView::Bf16(w.view()), out.view_mut()).unwrap());
        report_stream("matmul_nt_half", [m, n, k], seconds, 2, bandwidth);
        let seconds =
            best_seconds(|| matmul_nt_bf16(x.view(), HalfView::Bf16(w.view()), out.view_mut()).unwrap());
        report_stream("matmul_nt_bf16", [m, n, k], seconds, 2, bandwidth);
    }
}

fn report(name: &str, [m, n, k]: [usize; 3], seconds: f64, peak: f64) {
    let rate = 2.0 * (m * n * k) as f64 / seconds;
    println!(
        "{name:15} {m:5} x {n:5} x {k:5}: {:7.1} GFLOP/s, {:3.0} % of peak",
        rate / 1e9,
        100.0 * rate / peak
    );
}

fn report_stream(name: &str, [m, n, k]: [usize; 3], seconds: f64, size: usize, bandwidth: f64) {
    let rate = (n * k * size) as f64 / seconds;
    println!(
        "{name:15} {m:5} x {n:5} x {k:5}: {:7.1} GB/s, {:3.0} % of memory",
        rate / 1e9,
        100.0 * rate / bandwidth
    );
}
