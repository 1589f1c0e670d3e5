//! Plain code: the oracle of the other instruction sets, and what runs where there are no vectors.

use pulp::Scalar;

use super::{Element, Vector, register_tile};

impl Vector for Scalar {
    const MR: usize = 2;
    const NR: usize = 8;

    #[inline(always)]
    fn tile(self, rows: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        match rows {
            1 => register_tile::<Self, 1, 8>(self, a, b, sums),
            _ => register_tile::<Self, 2, 8>(self, a, b, sums),
        }
    }

    #[inline(always)]
    fn transpose<E: Element>(self, rows: [&[E]; 8], out: &mut [f32], stride: usize) {
        for p in 0..rows[0].len() {
            out[p * stride..][..8].copy_from_slice(&rows.map(|row| E::widen(&[row[p]])[0]));
        }
    }
}
