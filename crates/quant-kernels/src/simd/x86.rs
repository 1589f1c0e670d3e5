//! AVX2 and AVX-512. Both transpose with 256-bit vectors.

use std::arch::x86_64::{__m256, _mm256_cvtph_ps};

use half::f16;
use pulp::x86::{V3, V4};

use super::{Element, Vector, prefetch, register_tile, widen_f16};

impl Vector for V3 {
    // 12 accumulators, 2 vectors of b, 1 broadcast of a: 15 of the 16 registers.
    const MR: usize = 6;
    const NR: usize = 16;

    #[inline(always)]
    fn width(rows: usize) -> usize {
        match rows {
            1 => 64,
            2 | 3 => 32,
            _ => 16,
        }
    }

    #[inline(always)]
    fn tile(self, rows: usize, width: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        match (rows, width) {
            (1, 64) => register_tile::<Self, 1, 8>(self, a, b, sums),
            (2, 32) => register_tile::<Self, 2, 4>(self, a, b, sums),
            (3, 32) => register_tile::<Self, 3, 4>(self, a, b, sums),
            (1, _) => register_tile::<Self, 1, 2>(self, a, b, sums),
            (2, _) => register_tile::<Self, 2, 2>(self, a, b, sums),
            (3, _) => register_tile::<Self, 3, 2>(self, a, b, sums),
            (4, _) => register_tile::<Self, 4, 2>(self, a, b, sums),
            (5, _) => register_tile::<Self, 5, 2>(self, a, b, sums),
            _ => register_tile::<Self, 6, 2>(self, a, b, sums),
        }
    }

    #[inline(always)]
    fn transpose<E: Element>(self, rows: [&[E]; 8], ahead: [*const E; 8], out: &mut [f32], stride: usize) {
        transpose(self, rows, ahead, out, stride);
    }

    #[inline(always)]
    fn widen(self, numbers: &[f16], out: &mut [f32]) {
        widen(self, numbers, out);
    }
}

impl Vector for V4 {
    // 24 accumulators, 2 vectors of b, 1 broadcast of a: 27 of the 32 registers.
    const MR: usize = 12;
    const NR: usize = 32;

    #[inline(always)]
    fn width(rows: usize) -> usize {
        match rows {
            1 | 2 => 128,
            3 | 4 => 64,
            _ => 32,
        }
    }

    #[inline(always)]
    fn tile(self, rows: usize, width: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        match (rows, width) {
            (1, 128) => register_tile::<Self, 1, 8>(self, a, b, sums),
            (2, 128) => register_tile::<Self, 2, 8>(self, a, b, sums),
            (3, 64) => register_tile::<Self, 3, 4>(self, a, b, sums),
            (4, 64) => register_tile::<Self, 4, 4>(self, a, b, sums),
            (1, _) => register_tile::<Self, 1, 2>(self, a, b, sums),
            (2, _) => register_tile::<Self, 2, 2>(self, a, b, sums),
            (3, _) => register_tile::<Self, 3, 2>(self, a, b, sums),
            (4, _) => register_tile::<Self, 4, 2>(self, a, b, sums),
            (5, _) => register_tile::<Self, 5, 2>(self, a, b, sums),
            (6, _) => register_tile::<Self, 6, 2>(self, a, b, sums),
            (7, _) => register_tile::<Self, 7, 2>(self, a, b, sums),
            (8, _) => register_tile::<Self, 8, 2>(self, a, b, sums),
            (9, _) => register_tile::<Self, 9, 2>(self, a, b, sums),
            (10, _) => register_tile::<Self, 10, 2>(self, a, b, sums),
            (11, _) => register_tile::<Self, 11, 2>(self, a, b, sums),
            _ => register_tile::<Self, 12, 2>(self, a, b, sums),
        }
    }

    #[inline(always)]
    fn transpose<E: Element>(self, rows: [&[E]; 8], ahead: [*const E; 8], out: &mut [f32], stride: usize) {
        transpose(*self, rows, ahead, out, stride);
    }

    #[inline(always)]
    fn widen(self, numbers: &[f16], out: &mut [f32]) {
        widen(*self, numbers, out);
    }
}

/// [`Vector::widen`] with the conversion instruction.
#[inline(always)]
fn widen(_: V3, numbers: &[f16], out: &mut [f32]) {
    #[target_feature(enable = "avx,f16c")]
    fn with_f16c(numbers: &[f16], out: &mut [f32]) {
        let (eights, rest) = numbers.as_chunks::<8>();
        let (out_eights, out_rest) = out.as_chunks_mut::<8>();
        for (out, eight) in out_eights.iter_mut().zip(eights) {
            *out = pulp::cast(_mm256_cvtph_ps(pulp::cast(*eight)));
        }
        for (out, x) in out_rest.iter_mut().zip(rest) {
            *out = widen_f16(x.to_bits());
        }
    }
    // SAFETY: `isa::Vectors` hands out a V3 only where the processor has F16C beside it.
    unsafe { with_f16c(numbers, out) }
}

/// [`Vector::transpose`] by squares of 8.
#[inline(always)]
fn transpose<E: Element>(simd: V3, rows: [&[E]; 8], ahead: [*const E; 8], out: &mut [f32], stride: usize) {
    let kc = rows[0].len();
    for row in rows {
        assert_eq!(row.len(), kc);
    }
    assert!(kc == 0 || out.len() >= (kc - 1) * stride + 8);
    let at = |r: usize, p: usize| -> __m256 {
        debug_assert!(p + 8 <= kc);
        // SAFETY: `p + 8 <= kc`, the length of every row; an array is aligned as its element.
        pulp::cast(E::widen(unsafe { &*rows[r].as_ptr().add(p).cast::<[E; 8]>() }))
    };
    for p in (0..kc / 8 * 8).step_by(8) {
        if p % 16 == 0 {
            for row in ahead {
                prefetch(row.wrapping_add(p));
            }
        }
        let columns = [at(0, p), at(1, p), at(2, p), at(3, p), at(4, p), at(5, p), at(6, p), at(7, p)];
        let columns = transpose_8x8(simd, columns);
        for (i, column) in columns.into_iter().enumerate() {
            // SAFETY: `p + i < kc`, and `(kc - 1) * stride + 8` numbers are in `out`; arrays are aligned as f32.
            unsafe { *out.as_mut_ptr().add((p + i) * stride).cast::<[f32; 8]>() = pulp::cast(column) };
        }
    }
    for p in kc / 8 * 8..kc {
        for r in 0..8 {
            out[p * stride + r] = E::widen(&[rows[r][p]])[0];
        }
    }
}
#[inline(always)]
fn transpose_8x8(simd: V3, [r0, r1, r2, r3, r4, r5, r6, r7]: [__m256; 8]) -> [__m256; 8] {
    let avx = simd.avx;
    // Pairs of rows: columns 0 1 | 4 5 (lo) and 2 3 | 6 7 (hi).
    let (l01, h01) = (avx._mm256_unpacklo_ps(r0, r1), avx._mm256_unpackhi_ps(r0, r1));
    let (l23, h23) = (avx._mm256_unpacklo_ps(r2, r3), avx._mm256_unpackhi_ps(r2, r3));
    let (l45, h45) = (avx._mm256_unpacklo_ps(r4, r5), avx._mm256_unpackhi_ps(r4, r5));
    let (l67, h67) = (avx._mm256_unpacklo_ps(r6, r7), avx._mm256_unpackhi_ps(r6, r7));
    // Four rows of one column in each half: column c in the low, c + 4 in the high.
    const LOW: i32 = 0b01_00_01_00;
    const HIGH: i32 = 0b11_10_11_10;
    let upper = [
        avx._mm256_shuffle_ps::<LOW>(l01, l23),
        avx._mm256_shuffle_ps::<HIGH>(l01, l23),
        avx._mm256_shuffle_ps::<LOW>(h01, h23),
        avx._mm256_shuffle_ps::<HIGH>(h01, h23),
    ];
    let lower = [
        avx._mm256_shuffle_ps::<LOW>(l45, l67),
        avx._mm256_shuffle_ps::<HIGH>(l45, l67),
        avx._mm256_shuffle_ps::<LOW>(h45, h67),
        avx._mm256_shuffle_ps::<HIGH>(h45, h67),
    ];
    const LOW_HALVES: i32 = 0x20;
    const HIGH_HALVES: i32 = 0x31;
    [
        avx._mm256_permute2f128_ps::<LOW_HALVES>(upper[0], lower[0]),
        avx._mm256_permute2f128_ps::<LOW_HALVES>(upper[1], lower[1]),
        avx._mm256_permute2f128_ps::<LOW_HALVES>(upper[2], lower[2]),
        avx._mm256_permute2f128_ps::<LOW_HALVES>(upper[3], lower[3]),
        avx._mm256_permute2f128_ps::<HIGH_HALVES>(upper[0], lower[0]),
        avx._mm256_permute2f128_ps::<HIGH_HALVES>(upper[1], lower[1]),
        avx._mm256_permute2f128_ps::<HIGH_HALVES>(upper[2], lower[2]),
        avx._mm256_permute2f128_ps::<HIGH_HALVES>(upper[3], lower[3]),
    ]
}
