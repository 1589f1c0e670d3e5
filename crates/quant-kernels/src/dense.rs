//! Dense f32 matrix products, bit-identical on every instruction set and thread count.
//!
//! # The order of additions
//!
//! Element `(i, j)` of a product over the inner dimension `k` is defined as
//!
//! ```text
//! s_b  = fma(a[i,p], b[p,j], ... fma(a[i,p0], b[p0,j], 0))      p ascending inside block b = [b*KC, (b+1)*KC)
//! out  = fma(alpha, s_B, ... fma(alpha, s_1, fma(alpha, s_0, beta*out)))
//! ```
//!
//! with `beta*out` taken as 0 when `beta = 0` (whatever `out` held) and as `out` when `beta = 1`. Vectors run
//! over outputs only, so the definition holds for every vector width, tile, and split of `m` and `n`: a row of a
//! product does not depend on how many other rows there are, and one token decoded alone has the bits that it has
//! inside a whole prompt.
//!
//! Against exact arithmetic `|error| <= (KC + k/KC + 1) * eps * sum |a| |b|` to first order.

mod driver;
mod operand;
mod pairs;
#[cfg(test)]
mod pairs_tests;
mod panels;
#[cfg(test)]
mod panels_tests;
#[cfg(test)]
mod tests;
mod word;

use half::{bf16, f16};
use ndarray::{ArrayBase, ArrayView2, ArrayViewMut2, Axis, Ix2, RawData};

use self::driver::Product;
pub(crate) use self::driver::{add, parts};
use self::operand::{Expanded, Turned};
pub(crate) use self::operand::{Left, Plain, Right, SPILL, pack_rows, rows_of};
pub use self::pairs::matmul_nt_bf16;
pub(crate) use self::pairs::{matmul_bf16_of_f32, multiply_bf16};
pub use self::panels::{DensePanels, DenseView};
use self::word::Single;
use crate::error::ShapeError;

/// Length of the blocks of the inner dimension that are summed apart. Part of the definition of a product.
pub const KC: usize = 256;

/// Weights `[n, k]` stored in 16 bits.
#[derive(Clone, Copy, Debug)]
pub enum HalfView<'a> {
    /// The upper half of an f32.
    Bf16(ArrayView2<'a, bf16>),
    /// IEEE binary16.
    F16(ArrayView2<'a, f16>),
}

impl HalfView<'_> {
    /// `[n, k]`.
    pub fn dim(&self) -> (usize, usize) {
        match self {
            HalfView::Bf16(w) => w.dim(),
            HalfView::F16(w) => w.dim(),
        }
    }
}

/// `out = x · wᵀ` with `x: [m, k]`, `w: [n, k]`, `out: [m, n]`.
pub fn matmul_nt(
    x: ArrayView2<'_, f32>,
    w: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    gemm_nt(1.0, x, w, 0.0, out)
}

/// `out = alpha · x · wᵀ + beta · out` with `x: [m, k]`, `w: [n, k]`, `out: [m, n]`.
pub fn gemm_nt(
    alpha: f32,
    x: ArrayView2<'_, f32>,
    w: ArrayView2<'_, f32>,
    beta: f32,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    check_rows("x", &x)?;
    check_rows("w", &w)?;
    check_shape("w", [w.nrows(), x.ncols()], &w)?;
    multiply([x.nrows(), x.ncols(), w.nrows()], alpha, Plain::new(x), Turned::new(w), beta, out)
}

/// `out = x · wᵀ` with `x: [m, k]`, `w: [n, k]` in 16 bits, `out: [m, n]`.
///
/// The same bits as [`matmul_nt`] on the widened weights; no f32 copy of `w` is made.
pub fn matmul_nt_half(
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
            multiply(shape, 1.0, Plain::new(x), Turned::new(w), 0.0, out)
        }
        HalfView::F16(w) => {
            check_rows("w", &w)?;
            check_shape("w", [w.nrows(), x.ncols()], &w)?;
            multiply(shape, 1.0, Plain::new(x), Expanded(rows_of(w)), 0.0, out)
        }
    }
}

/// `out = alpha · a · b + beta · out` with `a: [m, k]`, `b: [k, n]`, `out: [m, n]`.
pub fn matmul_nn(
    alpha: f32,
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    beta: f32,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    check_rows("a", &a)?;
    check_rows("b", &b)?;
    check_shape("b", [a.ncols(), b.ncols()], &b)?;
    multiply([a.nrows(), a.ncols(), b.ncols()], alpha, Plain::new(a), Plain::new(b), beta, out)
}

/// `h += alpha · xᵀ · x` on the upper triangle (diagonal included) of `h: [k, k]`, with `x: [t, k]`.
///
/// The strict lower triangle is neither read nor written; [`mirror_upper_to_lower`] fills it when all is summed.
/// The blocks of [`KC`] run over the rows of `x`: feeding `x` in several calls gives the bits of one call if each
/// but the last has a multiple of [`KC`] rows.
pub fn syrk_tn_acc(x: ArrayView2<'_, f32>, alpha: f32, h: ArrayViewMut2<'_, f32>) -> Result<(), ShapeError> {
    let (depth, k) = x.dim();
    check_rows("x", &x)?;
    check_rows("h", &h)?;
    check_shape("h", [k, k], &h)?;
    let (left, right) = (Turned::new(x), Plain::new(x));
    Product { word: Single, alpha, left, right, beta: 1.0, depth, upper: true }.run(h);
    Ok(())
}

/// Copies the upper triangle of `h: [k, k]` onto its lower triangle.
pub fn mirror_upper_to_lower(h: ArrayViewMut2<'_, f32>) -> Result<(), ShapeError> {
    check_shape("h", [h.ncols(), h.ncols()], &h)?;
    mirror(h);
    Ok(())
}

/// Halves the square until both halves of a triangle sit in cache: the squares off the diagonal are disjoint views.
fn mirror(mut h: ArrayViewMut2<'_, f32>) {
    const SIDE: usize = 64;
    let k = h.ncols();
    if k <= SIDE {
        for i in 1..k {
            for j in 0..i {
                h[[i, j]] = h[[j, i]];
            }
        }
        return;
    }
    let (top, bottom) = h.split_at(Axis(0), k / 2);
    let (first, upper) = top.split_at(Axis(1), k / 2);
    let (lower, last) = bottom.split_at(Axis(1), k / 2);
    rayon::join(|| transpose_into(upper.view(), lower), || rayon::join(|| mirror(first), || mirror(last)));
}

/// `to = fromᵀ`, by halves down to squares that sit in cache.
fn transpose_into(from: ArrayView2<'_, f32>, mut to: ArrayViewMut2<'_, f32>) {
    const SIDE: usize = 64;
    let (rows, columns) = to.dim();
    if rows.max(columns) <= SIDE {
        to.assign(&from.t());
        return;
    }
    let axis = if rows >= columns { Axis(0) } else { Axis(1) };
    let at = rows.max(columns) / 2;
    let (from_a, from_b) = from.split_at(Axis(1 - axis.index()), at);
    let (to_a, to_b) = to.split_at(axis, at);
    rayon::join(|| transpose_into(from_a, to_a), || transpose_into(from_b, to_b));
}

pub(crate) fn multiply<L: Left, R: Right>(
    shape: [usize; 3],
    alpha: f32,
    left: L,
    right: R,
    beta: f32,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    let [m, depth, n] = shape;
    check_rows("out", &out)?;
    check_shape("out", [m, n], &out)?;
    Product { word: Single, alpha, left, right, beta, depth, upper: false }.run(out);
    Ok(())
}

pub(crate) fn check_shape<S: RawData>(
    operand: &'static str,
    expected: [usize; 2],
    matrix: &ArrayBase<S, Ix2>,
) -> Result<(), ShapeError> {
    let found = [matrix.nrows(), matrix.ncols()];
    if expected == found { Ok(()) } else { Err(ShapeError::Shape { operand, expected, found }) }
}

pub(crate) fn check_rows<S: RawData>(
    operand: &'static str,
    matrix: &ArrayBase<S, Ix2>,
) -> Result<(), ShapeError> {
    let stride = matrix.strides()[1];
    if stride == 1 || matrix.ncols() < 2 || matrix.is_empty() {
        Ok(())
    } else {
        Err(ShapeError::Strided { operand, stride })
    }
}
