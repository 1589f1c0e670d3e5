//! Dense products of operands rounded to bf16.
//!
//! The order of additions is that of [`crate::dense`], and on bf16 operands each product of two is exact in f32, so
//! the result is defined as that of [`crate::matmul_nt`] on the rounded operands. Processors with `vdpbf16ps` follow
//! the definition except that they take subnormal operands and partial sums (below 2^-126) for zeros; each of the
//! `k` steps then errs by at most 2^-126 * (1 + max(|x|, |w|)).

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2};

use super::driver::Product;
use super::operand::{Expanded, Left, Plain, Right, SPILL, Turned, rows_of};
use super::word::Pair;
use super::{HalfView, check_rows, check_shape, multiply};
use crate::error::ShapeError;
use crate::isa::{self, Bf16Dot};
use crate::simd::{Vector, pair, round_bf16};

/// `out = bf16(x) · bf16(w)ᵀ` with `x: [m, k]`, `w: [n, k]` in 16 bits, `out: [m, n]`: operands rounded to bf16 (nearest,
/// ties to even), sums in f32.
///
/// A row of the result depends on the row of `x` alone. About twice as fast as [`crate::matmul_nt_half`] where the
/// processor multiplies bf16 (see [`crate::isa::Isa::Avx512Bf16`]) and `k` is even, else as fast.
pub fn matmul_nt_bf16(
    x: ArrayView2<'_, f32>,
    w: HalfView<'_>,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    check_rows("x", &x)?;
    let shape = [x.nrows(), x.ncols(), w.dim().0];
    match w {
        HalfView::Bf16(w) => {
            check_rows("w", &w)?;
            check_shape("w", [w.nrows(), x.ncols()], &w)?;
            match isa::bf16_dot() {
                Some(dot) if w.ncols().is_multiple_of(2) => {
                    multiply_pairs(dot, shape, Plain::new(x), Turned::pairs(w), out)
                }
                _ => multiply(shape, 1.0, Rounded(Plain::new(x)), Turned::new(w), 0.0, out),
            }
        }
        HalfView::F16(w) => {
            check_rows("w", &w)?;
            check_shape("w", [w.nrows(), x.ncols()], &w)?;
            multiply_bf16(shape, Plain::new(x), Expanded(rows_of(w)), out)
        }
    }
}

/// [`matmul_nt_bf16`] for weights in f32.
pub(crate) fn matmul_bf16_of_f32(
    x: ArrayView2<'_, f32>,
    w: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    multiply_bf16([x.nrows(), x.ncols(), w.nrows()], Plain::new(x), Turned::new(w), out)
}

/// `out = bf16(x) · bf16(right)` for operands that pack as f32.
pub(crate) fn multiply_bf16<R: Right>(
    shape: [usize; 3],
    x: Plain<'_>,
    right: R,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    match isa::bf16_dot() {
        Some(dot) if shape[1].is_multiple_of(2) => multiply_pairs(dot, shape, x, Pairs(right), out),
        _ => multiply(shape, 1.0, Rounded(x), Rounded(right), 0.0, out),
    }
}

/// `out = bf16(x) · right` where `right` packs as words of two.
pub(super) fn multiply_pairs<R: Right>(
    dot: Bf16Dot,
    [m, k, n]: [usize; 3],
    x: Plain<'_>,
    right: R,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    check_rows("out", &out)?;
    check_shape("out", [m, n], &out)?;
    let (word, left) = (Pair(dot), Pairs(x));
    Product { word, alpha: 1.0, left, right, beta: 0.0, depth: k / 2, upper: false }.run(out);
    Ok(())
}

/// An operand with its numbers rounded to bf16.
pub(super) struct Rounded<T>(pub(super) T);

impl<L: Left> Left for Rounded<L> {
    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, rows: Range<usize>, depth: Range<usize>, out: &mut [f32]) {
        let length = rows.len() * depth.len();
        self.0.pack(simd, rows, depth, out);
        out[..length].iter_mut().for_each(|x| *x = round_bf16(*x));
    }
}

impl<R: Right> Right for Rounded<R> {
    const WIDE: bool = R::WIDE;

    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        self.0.pack(simd, j, depth, width, panel);
        panel.iter_mut().for_each(|x| *x = round_bf16(*x));
    }
}

/// An operand as words of two bf16: two neighbours of the inner dimension.
struct Pairs<T>(T);

/// Words of a column or row that are made at a time.
const STEP: usize = 16;

/// Rows of a register tile at most.
const ROWS: usize = 12;

/// Columns of a register tile at most.
const COLUMNS: usize = 128;

impl<L: Left> Left for Pairs<L> {
    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, rows: Range<usize>, depth: Range<usize>, out: &mut [f32]) {
        let mut singles = [0.0; 2 * STEP * ROWS + SPILL];
        let width = rows.len();
        for start in depth.clone().step_by(STEP) {
            let here = start..(start + STEP).min(depth.end);
            self.0.pack(simd, rows.clone(), 2 * here.start..2 * here.end, &mut singles);
            join(&singles, here.len(), width, &mut out[(start - depth.start) * width..]);
        }
    }
}

impl<R: Right> Right for Pairs<R> {
    const WIDE: bool = R::WIDE;

    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        let mut singles = [0.0; 2 * STEP * COLUMNS];
        for start in depth.clone().step_by(STEP) {
            let here = start..(start + STEP).min(depth.end);
            let singles = &mut singles[..2 * here.len() * width];
            self.0.pack(simd, j, 2 * here.start..2 * here.end, width, singles);
            join(singles, here.len(), width, &mut panel[(start - depth.start) * width..]);
        }
    }
}

/// `out[p, c] = pair(singles[2 p, c], singles[2 p + 1, c])` with rows of `width`. Eights of words, each of which may
/// spill into the next row, which is written afterwards: behind the last there is room for [`SPILL`] words.
#[inline(always)]
fn join(singles: &[f32], rows: usize, width: usize, out: &mut [f32]) {
    if width == 1 {
        for (out, [first, second]) in out.iter_mut().zip(&singles.as_chunks().0[..rows]) {
            *out = pair(*first, *second);
        }
        return;
    }
    for p in 0..rows {
        let (first, second) = (&singles[2 * p * width..], &singles[(2 * p + 1) * width..]);
        for at in (0..width).step_by(8) {
            let first = first[at..].first_chunk::<8>().expect("room for the spill");
            let second = second[at..].first_chunk::<8>().expect("room for the spill");
            let out = out[p * width + at..].first_chunk_mut::<8>().expect("room for the spill");
            for i in 0..8 {
                out[i] = pair(first[i], second[i]);
            }
        }
    }
}
