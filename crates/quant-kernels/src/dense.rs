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

use half::{bf16, f16};
use ndarray::{ArrayView2, ArrayViewMut2};

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
    check("w", (w.nrows(), x.ncols()), w.dim())?;
    naive(alpha, x, |p, j| w[[j, p]], beta, w.nrows(), out)
}

/// `out = x · wᵀ` with `x: [m, k]`, `w: [n, k]` in 16 bits, `out: [m, n]`.
///
/// The same bits as [`matmul_nt`] on the widened weights; no f32 copy of `w` is made.
pub fn matmul_nt_half(
    x: ArrayView2<'_, f32>,
    w: HalfView<'_>,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    let (n, k) = w.dim();
    check("w", (n, x.ncols()), (n, k))?;
    let at = |p: usize, j: usize| match &w {
        HalfView::Bf16(w) => w[[j, p]].to_f32(),
        HalfView::F16(w) => w[[j, p]].to_f32(),
    };
    naive(1.0, x, at, 0.0, n, out)
}

/// `out = alpha · a · b + beta · out` with `a: [m, k]`, `b: [k, n]`, `out: [m, n]`.
pub fn matmul_nn(
    alpha: f32,
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    beta: f32,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    check("b", (a.ncols(), b.ncols()), b.dim())?;
    naive(alpha, a, |p, j| b[[p, j]], beta, b.ncols(), out)
}

/// `h += alpha · xᵀ · x` on the upper triangle (diagonal included) of `h: [k, k]`, with `x: [t, k]`.
///
/// The strict lower triangle is neither read nor written; [`mirror_upper_to_lower`] fills it when all is summed.
pub fn syrk_tn_acc(
    x: ArrayView2<'_, f32>,
    alpha: f32,
    mut h: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    let k = x.ncols();
    check("h", (k, k), h.dim())?;
    for i in 0..k {
        for j in i..k {
            let mut out = h[[i, j]];
            for p0 in (0..x.nrows()).step_by(KC) {
                let mut sum = 0.0f32;
                for p in p0..(p0 + KC).min(x.nrows()) {
                    sum = x[[p, i]].mul_add(x[[p, j]], sum);
                }
                out = alpha.mul_add(sum, out);
            }
            h[[i, j]] = out;
        }
    }
    Ok(())
}

/// Copies the upper triangle of `h: [k, k]` onto its lower triangle.
pub fn mirror_upper_to_lower(mut h: ArrayViewMut2<'_, f32>) -> Result<(), ShapeError> {
    let k = h.ncols();
    check("h", (k, k), h.dim())?;
    for i in 0..k {
        for j in 0..i {
            h[[i, j]] = h[[j, i]];
        }
    }
    Ok(())
}

fn check(operand: &'static str, expected: (usize, usize), found: (usize, usize)) -> Result<(), ShapeError> {
    if expected == found {
        return Ok(());
    }
    Err(ShapeError::Shape { operand, expected: [expected.0, expected.1], found: [found.0, found.1] })
}

fn naive(
    alpha: f32,
    a: ArrayView2<'_, f32>,
    b: impl Fn(usize, usize) -> f32,
    beta: f32,
    n: usize,
    mut out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    let (m, k) = a.dim();
    check("out", (m, n), out.dim())?;
    for i in 0..m {
        for j in 0..n {
            let mut value = if beta == 0.0 { 0.0 } else { beta * out[[i, j]] };
            for p0 in (0..k).step_by(KC) {
                let mut sum = 0.0f32;
                for p in p0..(p0 + KC).min(k) {
                    sum = a[[i, p]].mul_add(b(p, j), sum);
                }
                value = alpha.mul_add(sum, value);
            }
            out[[i, j]] = value;
        }
    }
    Ok(())
}
