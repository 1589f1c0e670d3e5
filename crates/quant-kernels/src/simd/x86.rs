//! AVX2 and AVX-512. Both transpose with 256-bit vectors.

use std::arch::x86_64::__m256;

use pulp::x86::{V3, V4};

use super::{Element, Vector, prefetch, register_tile};

impl Vector for V3 {
    // 12 accumulators, 2 vectors of b, 1 broadcast of a: 15 of the 16 registers.
    const MR: usize = 6;
    const NR: usize = 16;

    #[inline(always)]
    fn tile(self, rows: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        match rows {
            1 => register_tile::<Self, 1, 2>(self, a, b, sums),
            2 => register_tile::<Self, 2, 2>(self, a, b, sums),
            3 => register_tile::<Self, 3, 2>(self, a, b, sums),
            4 => register_tile::<Self, 4, 2>(self, a, b, sums),
            5 => register_tile::<Self, 5, 2>(self, a, b, sums),
            _ => register_tile::<Self, 6, 2>(self, a, b, sums),
        }
    }

    #[inline(always)]
    fn transpose<E: Element>(self, rows: [&[E]; 8], out: &mut [f32], stride: usize) {
        transpose(self, rows, out, stride);
    }
}

impl Vector for V4 {
    // 24 accumulators, 2 vectors of b, 1 broadcast of a: 27 of the 32 registers.
    const MR: usize = 12;
    const NR: usize = 32;

    #[inline(always)]
    fn tile(self, rows: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        match rows {
            1 => register_tile::<Self, 1, 2>(self, a, b, sums),
            2 => register_tile::<Self, 2, 2>(self, a, b, sums),
            3 => register_tile::<Self, 3, 2>(self, a, b, sums),
            4 => register_tile::<Self, 4, 2>(self, a, b, sums),
            5 => register_tile::<Self, 5, 2>(self, a, b, sums),
            6 => register_tile::<Self, 6, 2>(self, a, b, sums),
            7 => register_tile::<Self, 7, 2>(self, a, b, sums),
            8 => register_tile::<Self, 8, 2>(self, a, b, sums),
            9 => register_tile::<Self, 9, 2>(self, a, b, sums),
            10 => register_tile::<Self, 10, 2>(self, a, b, sums),
            11 => register_tile::<Self, 11, 2>(self, a, b, sums),
            _ => register_tile::<Self, 12, 2>(self, a, b, sums),
        }
    }

    #[inline(always)]
    fn transpose<E: Element>(self, rows: [&[E]; 8], out: &mut [f32], stride: usize) {
        transpose(*self, rows, out, stride);
    }
}

/// [`Vector::transpose`] by squares of 8.
#[inline(always)]
fn transpose<E: Element>(simd: V3, rows: [&[E]; 8], out: &mut [f32], stride: usize) {
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
            for r in 0..8 {
                prefetch(rows[r].as_ptr().wrapping_add(p).wrapping_byte_add(1024));
            }
        }
        let columns = [at(0, p), at(1, p), at(2, p), at(3, p), at(4, p), at(5, p), at(6, p), at(7, p)];
        let columns = transpose_8x8(simd, columns);
        for i in 0..8 {
            // SAFETY: `p + i < kc`, and `(kc - 1) * stride + 8` numbers are in `out`; arrays are aligned as f32.
            unsafe { *out.as_mut_ptr().add((p + i) * stride).cast::<[f32; 8]>() = pulp::cast(columns[i]) };
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
