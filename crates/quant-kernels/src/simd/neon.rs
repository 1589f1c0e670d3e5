//! NEON, 128-bit vectors.

use std::arch::aarch64::float32x4_t;

use pulp::aarch64::Neon;

use super::{Element, Vector, register_tile};

impl Vector for Neon {
    // 24 accumulators, 4 vectors of b, 1 broadcast of a: 29 of the 32 registers.
    const MR: usize = 6;
    const NR: usize = 16;

    #[inline(always)]
    fn tile(self, rows: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        match rows {
            1 => register_tile::<Self, 1, 4>(self, a, b, sums),
            2 => register_tile::<Self, 2, 4>(self, a, b, sums),
            3 => register_tile::<Self, 3, 4>(self, a, b, sums),
            4 => register_tile::<Self, 4, 4>(self, a, b, sums),
            5 => register_tile::<Self, 5, 4>(self, a, b, sums),
            _ => register_tile::<Self, 6, 4>(self, a, b, sums),
        }
    }

    #[inline(always)]
    fn transpose<E: Element>(self, rows: [&[E]; 8], out: &mut [f32], stride: usize) {
        let kc = rows[0].len();
        let blocks = rows.map(|row| &row[..kc].as_chunks::<4>().0[..kc / 4]);
        for block in 0..kc / 4 {
            let [a, b, c, d, e, f, g, h] = blocks.map(|row| pulp::cast(E::widen(&row[block])));
            let upper = transpose_4x4(self, [a, b, c, d]);
            let lower = transpose_4x4(self, [e, f, g, h]);
            for ((p, upper), lower) in (4 * block..).zip(upper).zip(lower) {
                let out: &mut [f32; 8] = (&mut out[p * stride..][..8]).try_into().expect("8 columns");
                *out = pulp::cast([upper, lower]);
            }
        }
        for p in kc / 4 * 4..kc {
            out[p * stride..][..8].copy_from_slice(&rows.map(|row| E::widen(&[row[p]])[0]));
        }
    }
}

#[inline(always)]
fn transpose_4x4(simd: Neon, [r0, r1, r2, r3]: [float32x4_t; 4]) -> [float32x4_t; 4] {
    let neon = simd.neon;
    let (l02, h02) = (neon.vzip1q_f32(r0, r2), neon.vzip2q_f32(r0, r2));
    let (l13, h13) = (neon.vzip1q_f32(r1, r3), neon.vzip2q_f32(r1, r3));
    [
        neon.vzip1q_f32(l02, l13),
        neon.vzip2q_f32(l02, l13),
        neon.vzip1q_f32(h02, h13),
        neon.vzip2q_f32(h02, h13),
    ]
}
