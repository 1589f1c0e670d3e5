//! What the words of packed operands hold: one f32, or two bf16.

use super::KC;
use crate::isa::Bf16Dot;
use crate::simd::{self, Vector};

/// A kind of word, and its product.
pub(crate) trait Word: Copy + Sync {
    /// Words of a block of [`KC`] steps of the inner dimension.
    const BLOCK: usize;

    /// [`Vector::tile`] for operands of such words.
    fn tile<V: Vector>(self, simd: V, rows: usize, width: usize, a: &[f32], b: &[f32], sums: &mut [f32]);
}

/// One number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Single;

/// Two bf16 in the bits of an f32, as [`simd::pair`] makes them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair(pub(crate) Bf16Dot);

impl Word for Single {
    const BLOCK: usize = KC;

    #[inline(always)]
    fn tile<V: Vector>(self, simd: V, rows: usize, width: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        simd.tile(rows, width, a, b, sums);
    }
}

impl Word for Pair {
    const BLOCK: usize = KC / 2;

    #[inline(always)]
    fn tile<V: Vector>(self, _: V, rows: usize, width: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        simd::pair_tile(self.0, rows, width, a, b, sums);
    }
}
