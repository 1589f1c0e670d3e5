//! What the processor can do at most, measured: the yardstick of the benchmarks.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use crate::isa;
use crate::simd::{self, Vector, Work};

/// Floating-point operations per second of all threads of the current pool with the vectors of [`isa::active`],
/// from fused multiply-adds that touch registers only (a fused multiply-add counts as two).
pub fn fma_per_second() -> f64 {
    /// Independent chains: enough for two units of latency 4, few enough for 16 registers.
    const CHAINS: usize = 12;
    const STEPS: usize = 1 << 20;

    struct Chains;
    impl Work for Chains {
        type Output = f64;
        #[inline(always)]
        fn run<V: Vector>(self, simd: V) -> f64 {
            let mut sums: [V::f32s; CHAINS] = black_box([simd.splat_f32s(0.5); CHAINS]);
            let (x, y) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(0.25)));
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = simd.mul_add_f32s(*sum, x, y);
                }
            }
            black_box(sums);
            (2 * CHAINS * STEPS * V::F32_LANES) as f64
        }
    }

    let isa = isa::active();
    best_rate(|| (0..rayon::current_num_threads()).into_par_iter().map(|_| simd::run(isa, Chains)).sum())
}

/// Bytes per second that all threads of the current pool read from memory that fits no cache.
pub fn read_bytes_per_second() -> f64 {
    /// Bytes that each thread reads; beyond the caches of one core's share.
    const SHARE: usize = 256 << 20;
    let threads = rayon::current_num_threads();
    let memory = vec![1u64; threads * SHARE / size_of::<u64>()];
    let isa = isa::active();

    struct Sum<'a>(&'a [u64]);
    impl Work for Sum<'_> {
        type Output = u64;
        #[inline(always)]
        fn run<V: Vector>(self, _: V) -> u64 {
            let mut sums = [0u64; 32];
            for chunk in self.0.as_chunks::<32>().0 {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    *sum = sum.wrapping_add(*x);
                }
            }
            sums.into_iter().fold(0, u64::wrapping_add)
        }
    }

    best_rate(|| {
        memory.par_chunks(SHARE / size_of::<u64>()).for_each(|share| {
            black_box(simd::run(isa, Sum(share)));
        });
        (threads * SHARE) as f64
    })
}

/// The best of some repetitions of a measurement that returns the work done.
fn best_rate(measure: impl Fn() -> f64) -> f64 {
    (0..5)
        .map(|_| {
            let start = Instant::now();
            let work = measure();
            work / start.elapsed().as_secs_f64()
        })
        .fold(0.0, f64::max)
}
