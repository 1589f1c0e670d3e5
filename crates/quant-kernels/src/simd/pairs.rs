//! Rounding to bf16, and the product of bf16 pairs.

use half::bf16;

use super::Element;
use crate::isa::Bf16Dot;

/// The nearest bf16, ties to even; a NaN becomes quiet.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let quiet = bits | 0x0040_0000;
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    f32::from_bits(if is_nan { quiet } else { rounded } & 0xffff_0000)
}

/// A word of two bf16, each rounded by [`round_bf16`]: the first in the upper half, because `vdpbf16ps` multiplies
/// the upper halves first.
#[inline(always)]
pub(crate) fn pair(first: f32, second: f32) -> f32 {
    f32::from_bits(round_bf16(first).to_bits() | round_bf16(second).to_bits() >> 16)
}

/// A word of two bf16 that lie one after the other.
impl Element for [bf16; 2] {
    #[inline(always)]
    fn widen<const N: usize>(pairs: &[[bf16; 2]; N]) -> [f32; N] {
        let mut out = [0.0; N];
        for (out, [first, second]) in out.iter_mut().zip(pairs) {
            *out = f32::from_bits(u32::from(first.to_bits()) << 16 | u32::from(second.to_bits()));
        }
        out
    }
}

/// `sums[r, j] = dot over p ascending of a[p, r] and b[p, j], from sums[r, j]`, where the operands are words of
/// [`pair`], `a: [kc, rows]`, `b: [kc, width]`, `sums: [rows, width]`, and rows and width are those of a tile of 512-bit vectors.
///
/// A step is `fma(a.second, b.second, fma(a.first, b.first, sum))`, rounded to nearest even each time, with
/// subnormal operands and results replaced by zeros: what Intel's manual says of `vdpbf16ps`, and what processors
/// of AMD do too.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn pair_tile(_: Bf16Dot, rows: usize, width: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
    let tile = match (rows, width) {
        (1, 128) => x86::tile::<1, 8>,
        (2, 128) => x86::tile::<2, 8>,
        (3, 64) => x86::tile::<3, 4>,
        (4, 64) => x86::tile::<4, 4>,
        (1, 32) => x86::tile::<1, 2>,
        (2, 32) => x86::tile::<2, 2>,
        (3, 32) => x86::tile::<3, 2>,
        (4, 32) => x86::tile::<4, 2>,
        (5, 32) => x86::tile::<5, 2>,
        (6, 32) => x86::tile::<6, 2>,
        (7, 32) => x86::tile::<7, 2>,
        (8, 32) => x86::tile::<8, 2>,
        (9, 32) => x86::tile::<9, 2>,
        (10, 32) => x86::tile::<10, 2>,
        (11, 32) => x86::tile::<11, 2>,
        (12, 32) => x86::tile::<12, 2>,
        _ => unreachable!("no tile of 512-bit vectors has {rows} rows and {width} columns"),
    };
    // SAFETY: a `Bf16Dot` proves that the processor has the features of `tile`.
    unsafe { tile(a, b, sums) }
}

/// There is no proof to call it with.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn pair_tile(never: Bf16Dot, _: usize, _: usize, _: &[f32], _: &[f32], _: &mut [f32]) {
    match never {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps, _mm512_set1_ps};

    /// Lanes of a vector.
    const LANES: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn words(vector: __m512) -> __m512bh {
        // SAFETY: both types are 64 bytes without invalid values.
        unsafe { std::mem::transmute::<__m512, __m512bh>(vector) }
    }

    /// [`super::pair_tile`] of `M` rows and `V` vectors in each.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn tile<const M: usize, const V: usize>(a: &[f32], b: &[f32], sums: &mut [f32]) {
        let sums = sums.as_chunks_mut::<LANES>().0.as_chunks_mut::<V>().0;
        let sums = sums.first_chunk_mut::<M>().expect("M rows of sums");
        let mut acc: [[__m512; V]; M] = sums.map(|row| row.map(pulp::cast));
        let b = b.as_chunks::<LANES>().0.as_chunks::<V>().0;
        for (a, b) in a.as_chunks::<M>().0.iter().zip(b) {
            for r in 0..M {
                let x = words(_mm512_set1_ps(a[r]));
                for v in 0..V {
                    acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, words(pulp::cast(b[v])));
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            *sums = acc.map(pulp::cast);
        }
    }
}
