//! What the machine says of itself.

use std::sync::OnceLock;
use std::time::Instant;

use ndarray::Array2;

/// Peak of this process's resident memory in bytes; 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")).and_then(|n| n.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Operations per second of the dense product, measured once, in about a tenth of a second.
pub fn dense_flops() -> f64 {
    static FLOPS: OnceLock<f64> = OnceLock::new();
    *FLOPS.get_or_init(|| {
        const N: usize = 768;
        let (a, b) = (Array2::from_elem((N, N), 1.0f32), Array2::from_elem((N, N), 0.5f32));
        let mut out = Array2::zeros((N, N));
        // The first round pays for threads and pages.
        let rounds = (0..3).map(|_| {
            let start = Instant::now();
            quant_kernels::matmul_nt(a.view(), b.view(), out.view_mut()).expect("square matrices fit");
            start.elapsed().as_secs_f64()
        });
        let best = rounds.fold(f64::INFINITY, f64::min);
        2.0 * (N as f64).powi(3) / best.max(1e-9)
    })
}
