//! How the operands of a product are copied into the order in which a register tile reads them, word by word.

use std::ops::Range;

use half::{bf16, f16};
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
    /// Whether wide panels suit it: they read from many rows at once.
    const WIDE: bool = false;

    /// `panel[p, c] = self[depth[p], j + c]`, anything from column `n` on, with `panel: [depth, width]`, a depth of
    /// at most [`KC`], and `width` a multiple of 8.
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]);
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

impl<'a> Turned<'a, [bf16; 2]> {
    /// Columns two by two; a last one without a partner is left out.
    pub(crate) fn pairs(matrix: ArrayView2<'a, bf16>) -> Self {
        Turned(rows_of(matrix).into_iter().map(|row| row.as_chunks().0).collect())
    }
}

/// The rows of a matrix whose rows were found contiguous at the entrance.
pub(crate) fn rows_of<'a, E>(matrix: ArrayView2<'a, E>) -> Vec<&'a [E]> {
    (0..matrix.nrows())
        .map(|row| matrix.index_axis_move(Axis(0), row).to_slice().expect("rows are contiguous"))
        .collect()
}

impl Left for Plain<'_> {
    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, rows: Range<usize>, depth: Range<usize>, out: &mut [f32]) {
        pack_rows(simd, &self.0[rows], depth, out);
    }
}

/// `out[p, r] = rows[r][depth[p]]`, with [`SPILL`] numbers behind it that may be overwritten.
#[inline(always)]
pub(crate) fn pack_rows<V: Vector>(simd: V, rows: &[&[f32]], depth: Range<usize>, out: &mut [f32]) {
    if let [row] = rows {
        out[..depth.len()].copy_from_slice(&row[depth]);
        return;
    }
    // Eight rows at a time give columns of eight. What they hold beyond the last row is overwritten by the next
    // column, provided that the last eight rows go first.
    for at in (0..rows.len()).step_by(8).rev() {
        let eight = eight_rows(rows, at, depth.clone());
        simd.transpose(eight, start_of(&eight), &mut out[at..], rows.len());
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
    fn pack<V: Vector>(&self, _: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        pack_plain(&self.0[depth], j, width, panel);
    }
}

/// `panel[p, c] = rows[p][j + c]` as far as the rows reach, with `panel: [rows, width]`.
#[inline(always)]
pub(crate) fn pack_plain(rows: &[&[f32]], j: usize, width: usize, panel: &mut [f32]) {
    for (out, row) in panel.chunks_exact_mut(width).zip(rows) {
        // The rows are far from each other: ask for the line that the next panel needs.
        prefetch(row.as_ptr().wrapping_add(j + width));
        let row = &row[j..];
        let (inside, rest) = row[..width.min(row.len())].as_chunks::<8>();
        let (out, out_rest) = out.split_at_mut(8 * inside.len());
        out.as_chunks_mut::<8>().0.copy_from_slice(inside);
        out_rest[..rest.len()].copy_from_slice(rest);
    }
}

impl<E: Element> Right for Turned<'_, E> {
    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        pack_turned(simd, &self.0, j, depth, width, panel);
    }
}

/// `panel[p, c] = rows[j + c][depth[p]]` as far as there are rows, with `panel: [depth, width]`.
#[inline(always)]
pub(crate) fn pack_turned<V: Vector, E: Element>(
    simd: V,
    rows: &[&[E]],
    j: usize,
    depth: Range<usize>,
    width: usize,
    panel: &mut [f32],
) {
    for at in (0..width.min(rows.len() - j)).step_by(8) {
        let eight = eight_rows(rows, j + at, depth.clone());
        let next = eight_rows(rows, j + at + 8, depth.clone());
        simd.transpose(eight, start_of(&next), &mut panel[at..], width);
    }
}

/// Rows of numbers that are widened row by row before they are turned over.
pub(crate) trait Expand: Sync {
    /// Number of rows.
    fn rows(&self) -> usize;
    /// Asks for what [`Expand::expand`] will read.
    fn prefetch(&self, row: usize, depth: Range<usize>);
    /// `out[p] = self[row, depth[p]]`.
    fn expand<V: Vector>(&self, simd: V, row: usize, depth: Range<usize>, out: &mut [f32]);
}

/// A matrix turned over whose rows expand.
pub(crate) struct Expanded<S>(pub(crate) S);

impl<S: Expand> Right for Expanded<S> {
    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        let mut rows = [[0.0; KC]; 8];
        for at in (0..width.min(self.0.rows() - j)).step_by(8) {
            for (r, row) in rows.iter_mut().enumerate() {
                let here = (j + at + r).min(self.0.rows() - 1);
                self.0.prefetch((j + at + r + 8).min(self.0.rows() - 1), depth.clone());
                self.0.expand(simd, here, depth.clone(), &mut row[..depth.len()]);
            }
            let [a, b, c, d, e, f, g, h] = &rows;
            let n = depth.len();
            let eight = [&a[..n], &b[..n], &c[..n], &d[..n], &e[..n], &f[..n], &g[..n], &h[..n]];
            simd.transpose(eight, start_of(&eight), &mut panel[at..], width);
        }
    }
}

impl Expand for Vec<&[f16]> {
    fn rows(&self) -> usize {
        self.len()
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, depth: Range<usize>) {
        self[row][depth].iter().step_by(32).for_each(|x| prefetch(&raw const *x));
    }

    #[inline(always)]
    fn expand<V: Vector>(&self, simd: V, row: usize, depth: Range<usize>, out: &mut [f32]) {
        simd.widen(&self[row][depth], out);
    }
}

/// Columns `depth` of the rows from `first` on; the last row again where there are fewer than eight.
#[inline(always)]
fn eight_rows<'a, E>(rows: &[&'a [E]], first: usize, depth: Range<usize>) -> [&'a [E]; 8] {
    let mut eight: [&[E]; 8] = [&[]; 8];
    for (r, row) in eight.iter_mut().enumerate() {
        *row = &rows[(first + r).min(rows.len() - 1)][depth.clone()];
    }
    eight
}

/// Where rows start in memory.
#[inline(always)]
fn start_of<E>(rows: &[&[E]; 8]) -> [*const E; 8] {
    let mut starts = [std::ptr::null(); 8];
    for (start, row) in starts.iter_mut().zip(rows) {
        *start = row.as_ptr();
    }
    starts
}
