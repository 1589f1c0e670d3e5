//! Products of bytes in registers, as fast as x86-64 has them.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::CHAINS;
use crate::isa::{Bf16Dot, Isa};

/// Operations of so many steps, done with the instructions of `isa`, which must come from [`crate::isa`].
pub(super) fn int8(isa: Isa, steps: usize) -> f64 {
    // SAFETY: `isa::active` names only what the processor has, and the features of these functions are among those
    // that `isa.rs` asks for.
    unsafe {
        match isa {
            Isa::Avx512Vnni | Isa::Avx512Bf16 => vnni_512(steps),
            Isa::Avx512 => pairs_512(steps),
            Isa::AvxVnni => vnni_256(steps),
            Isa::Avx2 => pairs_256(steps),
            _ => super::int8_plain(steps),
        }
    }
}

/// The same for products of bf16.
pub(super) fn bf16(_: Bf16Dot, steps: usize) -> f64 {
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn chains(steps: usize) -> f64 {
        let mut sums = black_box([_mm512_setzero_ps(); CHAINS]);
        // 0.5 and 0.25 in each half.
        let (a, b) = black_box((_mm512_set1_epi32(0x3f00_3f00), _mm512_set1_epi32(0x3e80_3e80)));
        // SAFETY: both types are 64 bytes without invalid values.
        let (a, b) = unsafe { std::mem::transmute::<(__m512i, __m512i), (__m512bh, __m512bh)>((a, b)) };
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        black_box(sums);
        (2 * 32 * CHAINS * steps) as f64
    }
    // SAFETY: a `Bf16Dot` proves that the processor has the features.
    unsafe { chains(steps) }
}

/// Products of codes of four bits and bytes that fit 16 bits when summed.
const PRESUMS: usize = 8;

#[target_feature(enable = "avx512f,avx512vnni")]
fn vnni_512(steps: usize) -> f64 {
    let mut sums = black_box([_mm512_setzero_si512(); CHAINS]);
    let (a, b) = black_box((_mm512_set1_epi8(3), _mm512_set1_epi8(5)));
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    black_box(sums);
    (2 * 64 * CHAINS * steps) as f64
}

#[target_feature(enable = "avx2,avxvnni")]
fn vnni_256(steps: usize) -> f64 {
    let mut sums = black_box([_mm256_setzero_si256(); CHAINS]);
    let (a, b) = black_box((_mm256_set1_epi8(3), _mm256_set1_epi8(5)));
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
        }
    }
    black_box(sums);
    (2 * 32 * CHAINS * steps) as f64
}

#[target_feature(enable = "avx512f,avx512bw")]
fn pairs_512(steps: usize) -> f64 {
    let mut sums = [_mm512_setzero_si512(); 4];
    // Operands in memory, so that no product can be taken out of the loop.
    let (a, b) = black_box(([_mm512_set1_epi8(3); PRESUMS], [_mm512_set1_epi8(5); PRESUMS]));
    let ones = _mm512_set1_epi16(1);
    let steps = steps / PRESUMS;
    for _ in 0..steps {
        let (a, b) = (black_box(&a), black_box(&b));
        for (chain, sum) in sums.iter_mut().enumerate() {
            let mut pairs = _mm512_maddubs_epi16(a[0], b[chain]);
            for i in 1..PRESUMS {
                pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(a[i], b[(chain + i) % PRESUMS]));
            }
            *sum = _mm512_add_epi32(*sum, _mm512_madd_epi16(pairs, ones));
        }
    }
    black_box(sums);
    (2 * 64 * PRESUMS * sums.len() * steps) as f64
}

#[target_feature(enable = "avx2")]
fn pairs_256(steps: usize) -> f64 {
    let mut sums = [_mm256_setzero_si256(); 4];
    // Operands in memory, so that no product can be taken out of the loop.
    let (a, b) = black_box(([_mm256_set1_epi8(3); PRESUMS], [_mm256_set1_epi8(5); PRESUMS]));
    let ones = _mm256_set1_epi16(1);
    let steps = steps / PRESUMS;
    for _ in 0..steps {
        let (a, b) = (black_box(&a), black_box(&b));
        for (chain, sum) in sums.iter_mut().enumerate() {
            let mut pairs = _mm256_maddubs_epi16(a[0], b[chain]);
            for i in 1..PRESUMS {
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(a[i], b[(chain + i) % PRESUMS]));
            }
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
        }
    }
    black_box(sums);
    (2 * 32 * PRESUMS * sums.len() * steps) as f64
}
