//! How the operands of a product are copied into the order in which a register tile reads them.

use std::ops::Range;

use ndarray::{ArrayView2, Axis};

use super::KC;
use crate::simd::{Element, Vector, prefetch};

/// The left operand `[m, k]` of a product.
pub(crate) trait Left: Sync {
    /// `out[p, r] = self[rows[r], depth[p]]`, with `out: [depth, rows]` and [`SPILL`] numbers behind it that may
    /// be overwritten.
    fn pack<V: Vector>(&self, simd: V, rows: Range<usize>, depth: Range<usize>, out: &mut [f32]);
}

/// Numbers behind a packed left operand that packing may overwrite: it writes eights.
pub(crate) const SPILL: usize = 8;

/// The right operand `[k, n]` of a product.
pub(crate) trait Right: Sync {
    /// `panel[p, c] = self[depth[p], j + c]`, zero from column `n` on, with `panel: [depth, NR]` and a depth of
    /// at most [`KC`].
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, panel: &mut [f32]);
}

/// A matrix in its own order: rows of the view are rows of the operand.
pub(crate) struct Plain<'a>(Vec<&'a [f32]>);

/// A matrix turned over: rows of the view are columns of the operand.
pub(crate) struct Turned<'a, E>(Vec<&'a [E]>);

impl<'a> Plain<'a> {
    pub(crate) fn new(matrix: ArrayView2<'a, f32>) -> Self {
        Plain(rows_of(matrix))
    }
}

impl<'a, E> Turned<'a, E> {
    pub(crate) fn new(matrix: ArrayView2<'a, E>) -> Self {
        Turned(rows_of(matrix))
    }
}

/// The rows of a matrix whose rows were found contiguous at the entrance.
fn rows_of<'a, E>(matrix: ArrayView2<'a, E>) -> Vec<&'a [E]> {
    (0..matrix.nrows())
        .map(|row| matrix.index_axis_move(Axis(0), row).to_slice().expect("rows are contiguous"))
        .collect()
}

impl Left for Plain<'_> {
    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, rows: Range<usize>, depth: Range<usize>, out: &mut [f32]) {
        if rows.len() == 1 {
            out[..depth.len()].copy_from_slice(&self.0[rows.start][depth]);
            return;
        }
        // Eight rows at a time give columns of eight. What they hold beyond the last row is overwritten by the
        // next column, provided that the last eight rows go first.
        for at in (0..rows.len()).step_by(8).rev() {
            let mut eight: [&[f32]; 8] = [&[]; 8];
            for (r, row) in eight.iter_mut().enumerate() {
                *row = &self.0[(rows.start + at + r).min(rows.end - 1)][depth.clone()];
            }
            simd.transpose(eight, &mut out[at..], rows.len());
        }
    }
}

impl Left for Turned<'_, f32> {
    #[inline(always)]
    fn pack<V: Vector>(&self, _: V, rows: Range<usize>, depth: Range<usize>, out: &mut [f32]) {
        let width = rows.len();
        for (p, row) in self.0[depth].iter().enumerate() {
            // Eights again: each may spill into the next column, which is written afterwards.
            for at in (0..width).step_by(8) {
                let out = &mut out[p * width + at..];
                match row[rows.start + at..].first_chunk::<8>() {
                    Some(eight) => *out.first_chunk_mut().expect("room for the spill") = *eight,
                    None => out[..width - at].copy_from_slice(&row[rows.start + at..rows.end]),
                }
            }
        }
    }
}

impl Right for Plain<'_> {
    #[inline(always)]
    fn pack<V: Vector>(&self, _: V, j: usize, depth: Range<usize>, panel: &mut [f32]) {
        for (out, row) in panel.chunks_exact_mut(V::NR).zip(&self.0[depth]) {
            // The rows are far from each other: ask for the line that the next panel needs.
            prefetch(row.as_ptr().wrapping_add(j + V::NR));
            match row.get(j..j + V::NR) {
                Some(inside) => out.copy_from_slice(inside),
                None => {
                    let (inside, outside) = out.split_at_mut(row.len() - j);
                    inside.copy_from_slice(&row[j..]);
                    outside.fill(0.0);
                }
            }
        }
    }
}

impl<E: Element> Right for Turned<'_, E> {
    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, panel: &mut [f32]) {
        let padding = [E::ZERO; KC];
        for at in (0..V::NR).step_by(8) {
            let mut eight: [&[E]; 8] = [&padding[..depth.len()]; 8];
            for (row, from) in eight.iter_mut().zip(self.0.iter().skip(j + at)) {
                *row = &from[depth.clone()];
            }
            simd.transpose(eight, &mut panel[at..], V::NR);
        }
    }
}
