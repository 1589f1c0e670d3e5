//! How the operands of a product are copied into the order in which a register tile reads them.

use std::ops::Range;

use ndarray::ArrayView2;

use super::KC;
use crate::simd::{Element, Vector};

/// The left operand `[m, k]` of a product.
pub(crate) trait Left: Sync {
    /// `out[p, r] = self[rows[r], depth[p]]`, with `out: [depth, rows]`.
    fn pack(&self, rows: Range<usize>, depth: Range<usize>, out: &mut [f32]);
}

/// The right operand `[k, n]` of a product.
pub(crate) trait Right: Sync {
    /// `panel[p, c] = self[depth[p], j + c]`, zero from column `n` on, with `panel: [depth, NR]` and a depth of
    /// at most [`KC`].
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, panel: &mut [f32]);
}

/// A matrix in its own order: rows of the view are rows of the operand.
pub(crate) struct Plain<'a>(pub(crate) ArrayView2<'a, f32>);

/// A matrix turned over: rows of the view are columns of the operand.
pub(crate) struct Turned<'a, E>(pub(crate) ArrayView2<'a, E>);

impl Left for Plain<'_> {
    #[inline(always)]
    fn pack(&self, rows: Range<usize>, depth: Range<usize>, out: &mut [f32]) {
        let width = rows.len();
        for (r, i) in rows.enumerate() {
            let row = &contiguous_row(&self.0, i)[depth.clone()];
            for (out, x) in out[r..].iter_mut().step_by(width).zip(row) {
                *out = *x;
            }
        }
    }
}

impl Left for Turned<'_, f32> {
    #[inline(always)]
    fn pack(&self, rows: Range<usize>, depth: Range<usize>, out: &mut [f32]) {
        for (out, p) in out.chunks_exact_mut(rows.len()).zip(depth) {
            out.copy_from_slice(&contiguous_row(&self.0, p)[rows.clone()]);
        }
    }
}

impl Right for Plain<'_> {
    #[inline(always)]
    fn pack<V: Vector>(&self, _: V, j: usize, depth: Range<usize>, panel: &mut [f32]) {
        let columns = j..(j + V::NR).min(self.0.ncols());
        for (out, p) in panel.chunks_exact_mut(V::NR).zip(depth) {
            let row = contiguous_row(&self.0, p);
            if columns.len() == V::NR {
                out.copy_from_slice(&row[j..j + V::NR]);
            } else {
                let (inside, outside) = out.split_at_mut(columns.len());
                inside.copy_from_slice(&row[columns.clone()]);
                outside.fill(0.0);
            }
        }
    }
}

impl<E: Element> Right for Turned<'_, E> {
    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, panel: &mut [f32]) {
        let padding = [E::ZERO; KC];
        for at in (0..V::NR).step_by(8) {
            let rows = std::array::from_fn(|r| match j + at + r {
                row if row < self.0.nrows() => &contiguous_row(&self.0, row)[depth.clone()],
                _ => &padding[..depth.len()],
            });
            simd.transpose(rows, panel, at);
        }
    }
}

/// A row of a matrix whose rows were found contiguous at the entrance.
#[inline(always)]
fn contiguous_row<'a, E>(matrix: &ArrayView2<'a, E>, row: usize) -> &'a [E] {
    matrix.index_axis_move(ndarray::Axis(0), row).to_slice().expect("rows are contiguous")
}
