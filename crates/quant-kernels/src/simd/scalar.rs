//! Plain code: the oracle of the other instruction sets, and what runs where there are no vectors.

use half::f16;
use pulp::Scalar;

use super::{Element, Vector, register_tile, widen_f16};

impl Vector for Scalar {
    const MR: usize = 2;
    const NR: usize = 8;

    #[inline(always)]
    fn width(_: usize) -> usize {
        Self::NR
    }

    #[inline(always)]
    fn tile(self, rows: usize, _: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        match rows {
            1 => register_tile::<Self, 1, 8>(self, a, b, sums),
            _ => register_tile::<Self, 2, 8>(self, a, b, sums),
        }
    }

    #[inline(always)]
    fn transpose<E: Element>(self, rows: [&[E]; 8], _: [*const E; 8], out: &mut [f32], stride: usize) {
        for p in 0..rows[0].len() {
            for r in 0..8 {
                out[p * stride + r] = E::widen(&[rows[r][p]])[0];
            }
        }
    }

    #[inline(always)]
    fn widen(self, numbers: &[f16], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(numbers) {
            *out = widen_f16(x.to_bits());
        }
    }
}
