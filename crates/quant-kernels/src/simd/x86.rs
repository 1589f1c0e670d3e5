//! AVX2 and AVX-512. Both transpose with 256-bit vectors.

use std::arch::x86_64::__m256;

use pulp::x86::{V3, V4};

use super::{Element, Vector, register_tile};

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
    fn transpose<E: Element>(self, rows: [&[E]; 8], panel: &mut [f32], at: usize) {
        transpose::<Self, E>(self, rows, panel, at);
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
    fn transpose<E: Element>(self, rows: [&[E]; 8], panel: &mut [f32], at: usize) {
        transpose::<Self, E>(*self, rows, panel, at);
    }
}

/// [`Vector::transpose`] into panels of the width of `V`.
#[inline(always)]
fn transpose<V: Vector, E: Element>(simd: V3, rows: [&[E]; 8], panel: &mut [f32], at: usize) {
    let kc = rows[0].len();
    let blocks = rows.map(|row| &row[..kc].as_chunks::<8>().0[..kc / 8]);
    let (head, tail) = panel.split_at_mut(kc / 8 * 8 * V::NR);
    for (block, out) in head.chunks_exact_mut(8 * V::NR).enumerate() {
        let columns = transpose_8x8(simd, blocks.map(|row| pulp::cast(E::widen(&row[block]))));
        for (out, column) in out.chunks_exact_mut(V::NR).zip(columns) {
            let out: &mut [f32; 8] = (&mut out[at..at + 8]).try_into().expect("8 columns");
            *out = pulp::cast(column);
        }
    }
    for (p, out) in (kc / 8 * 8..kc).zip(tail.chunks_exact_mut(V::NR)) {
        out[at..at + 8].copy_from_slice(&rows.map(|row| E::widen(&[row[p]])[0]));
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
