//! What the processor can do at most, measured: the yardstick of the benchmarks.
//!
//! Each figure takes a fraction of a second and belongs to [`isa::active`] and to all threads of the current rayon
//! pool. Operations are counted as usual: a multiplication and an addition are two.

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::isa;
use crate::mem::Bytes;
use crate::simd::{self, Vector, Work, prefetch};

/// The limits of this machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roof {
    /// Bytes read from memory per second.
    pub read: f64,
    /// Operations per second on bytes, summed in 32 bits.
    pub int8: f64,
    /// Operations per second on bf16, summed in f32; those on f32 where the processor has none for bf16.
    pub bf16: f64,
    /// Operations per second on f32.
    pub f32: f64,
}

impl Roof {
    /// Measures all of them, in about a second.
    pub fn measure() -> Roof {
        let f32 = f32_per_second();
        Roof {
            read: read_bytes_per_second(),
            int8: int8_per_second(),
            bf16: bf16_per_second().unwrap_or(f32),
            f32,
        }
    }
}

/// Independent sums: enough for two units of latency 5, few enough for 16 registers with two operands beside them.
const CHAINS: usize = 12;

/// Operations per second on f32, from fused multiply-adds that touch registers only.
pub fn f32_per_second() -> f64 {
    struct Chains(usize);
    impl Work for Chains {
        type Output = f64;
        #[inline(always)]
        fn run<V: Vector>(self, simd: V) -> f64 {
            let mut sums: [V::f32s; CHAINS] = black_box([simd.splat_f32s(0.5); CHAINS]);
            let (x, y) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(0.25)));
            for _ in 0..self.0 {
                for sum in &mut sums {
                    *sum = simd.mul_add_f32s(*sum, x, y);
                }
            }
            black_box(sums);
            (2 * CHAINS * self.0 * V::F32_LANES) as f64
        }
    }

    let isa = isa::active();
    best_rate(|steps| on_all_threads(|_| simd::run(isa, Chains(steps))))
}

/// Operations per second on bf16 where the instruction set in use multiplies them.
pub fn bf16_per_second() -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    return isa::bf16_dot().map(|dot| best_rate(|steps| on_all_threads(|_| x86::bf16(dot, steps))));
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// Operations per second on bytes, with the instructions that the products use: integer dot products where there
/// are any; else pairs summed in 16 bits as often as codes of four bits allow.
pub fn int8_per_second() -> f64 {
    let isa = isa::active();
    best_rate(|steps| {
        on_all_threads(|_| {
            #[cfg(target_arch = "x86_64")]
            return x86::int8(isa, steps);
            #[cfg(target_arch = "aarch64")]
            return arm::int8(isa, steps);
            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            int8_plain(steps)
        })
    })
}

/// Dot products of bytes in plain code; returns the operations of so many steps.
fn int8_plain(steps: usize) -> f64 {
    let (a, b) = black_box(([3u8; 64], [5i8; 64]));
    let mut sums = [0i32; 16];
    for _ in 0..steps {
        let (a, b) = black_box((&a, &b));
        for (sum, (a, b)) in sums.iter_mut().zip(a.as_chunks::<4>().0.iter().zip(b.as_chunks::<4>().0)) {
            *sum = a.iter().zip(b).fold(*sum, |sum, (a, b)| sum.wrapping_add(i32::from(*a) * i32::from(*b)));
        }
    }
    black_box(sums);
    (2 * 64 * steps) as f64
}

/// Bytes per second read from memory that fits no cache: four streams per thread, on huge pages where the system
/// grants them.
pub fn read_bytes_per_second() -> f64 {
    /// Streams of a thread.
    const STREAMS: usize = 4;
    /// Bytes of all threads together; many times the caches of a large processor.
    const WHOLE: usize = 1 << 30;
    /// Bytes of a stream at most.
    const MOST: usize = 64 << 20;
    /// How far ahead of its use memory is asked for.
    const AHEAD: usize = 4096;

    struct Read<'a>([&'a [[u64; 8]]; STREAMS]);
    impl Work for Read<'_> {
        type Output = [[u64; 8]; STREAMS];
        #[inline(always)]
        fn run<V: Vector>(self, _: V) -> Self::Output {
            let length = self.0[0].len();
            let streams = self.0.map(|stream| &stream[..length]);
            let mut sums = [[0u64; 8]; STREAMS];
            for i in 0..length {
                for s in 0..STREAMS {
                    prefetch(streams[s].as_ptr().cast::<u8>().wrapping_add(64 * i + AHEAD));
                    for lane in 0..8 {
                        sums[s][lane] ^= streams[s][i][lane];
                    }
                }
            }
            sums
        }
    }

    let isa = isa::active();
    let threads = rayon::current_num_threads();
    let stream = (WHOLE / (threads * STREAMS)).clamp(1 << 20, MOST) & !0xfff;
    let memory = Bytes::filled(threads * STREAMS, stream, |_, piece| piece.fill(1));
    best_rate(|passes| {
        on_all_threads(|thread| {
            let share = memory[thread * STREAMS * stream..][..STREAMS * stream].chunks_exact(stream);
            let mut streams: [&[[u64; 8]]; STREAMS] = [&[]; STREAMS];
            streams.iter_mut().zip(share).for_each(|(to, bytes)| *to = pulp::bytemuck::cast_slice(bytes));
            for _ in 0..passes {
                black_box(simd::run(isa, Read(streams)));
            }
            (passes * STREAMS * stream) as f64
        })
    })
}

/// The sum of what `work` returns for every thread of the pool, each running its own call.
fn on_all_threads(work: impl Fn(usize) -> f64 + Sync) -> f64 {
    rayon::broadcast(|context| work(context.index())).into_iter().sum()
}

/// The best of some repetitions of a measurement that takes a number of steps and returns the work done.
fn best_rate(measure: impl Fn(usize) -> f64) -> f64 {
    const LONG_ENOUGH: Duration = Duration::from_millis(2);
    let timed = |steps| {
        let start = Instant::now();
        let work = measure(steps);
        (start.elapsed(), work)
    };
    // Few steps may round to no work at all, however long a busy machine took over them.
    let enough = |(time, work): (Duration, f64)| time >= LONG_ENOUGH && work > 0.0;
    let mut steps = 1;
    while !enough(timed(steps)) {
        steps *= 2;
    }
    let rate = |(time, work): (Duration, f64)| work / time.as_secs_f64();
    (0..8).map(|_| rate(timed(steps))).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rates are the machine's own. In a pool of its own: that of other tests is busy.
    #[test]
    fn every_instruction_set_is_measured() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for &cap in isa::supported() {
            pool.install(|| {
                isa::with_cap(cap, || {
                    let rates = [f32_per_second(), int8_per_second()];
                    assert!(rates.iter().all(|rate| rate.is_finite() && *rate > 0.0), "{cap}: {rates:?}");
                    assert_eq!(bf16_per_second().is_some(), cap == isa::Isa::Avx512Bf16);
                });
            });
        }
    }
}
