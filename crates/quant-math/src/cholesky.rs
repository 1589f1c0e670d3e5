//! Cholesky factors of symmetric positive definite matrices, in place: blocked, parallel, f32.
//!
//! # Which factor GPTQ needs
//!
//! The reference code computes `chol(H)`, from it `H⁻¹`, and from that the upper factor `U` with `UᵀU = H⁻¹`:
//! `4/3 n³` multiply-adds... twice as much as needed. Factoring from the last row upwards gives an upper `R` with
//! `R Rᵀ = H`, hence `H⁻¹ = R⁻ᵀ R⁻¹` and `U = R⁻¹`: one factorization (`n³/3` flops) and one triangular inverse
//! (another `n³/3`) in a single matrix. [`crate::obq`] goes one step further and works with `R` itself.
//!
//! # Precision
//!
//! Products run in f32 on the dense kernels, which sum blocks of 256 apart; diagonal blocks are factored in f64. The
//! computed factor is the exact one of a matrix whose entries differ by `O(√n ε) √(h_ii h_jj)`: rounding respects the
//! scale of each feature, and with damping the smallest eigenvalue is at least `damp` times the mean of the diagonal,
//! far above. The Hessian itself is no more accurate, because it was summed in f32.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, Slice};
use quant_kernels::{gemm_nt, matmul_nn, mirror_upper_to_lower};
use rayon::prelude::*;

#[cfg(feature = "lapack")]
mod lapack;
#[cfg(feature = "lapack")]
pub use lapack::Lapack;

/// Columns per block. On 2 cores of a Zen 3 at n = 4096: 64 and 256 are slower by 20 % and 10 %.
const BLOCK: usize = 128;

/// Rows per parallel piece of a triangular solve.
const ROWS: usize = 32;

/// A matrix that is not positive definite (or not finite) where it was factored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the matrix is not positive definite: the pivot of column {column} is not positive")]
pub struct NotPositiveDefinite {
    /// Column of the pivot that is not a positive number.
    pub column: usize,
}

/// Factorizations of a symmetric `h: [n, n]` in place. Each reads the upper triangle only, unless said otherwise.
///
/// After an error the triangle that was to hold the result is undefined, the other one unchanged.
pub trait Cholesky: Sync {
    /// What to call it in reports.
    fn name(&self) -> &'static str;

    /// Upper `R` with `h = R Rᵀ`, in the upper triangle. The strict lower triangle is left as it is.
    fn reverse_factor(&self, h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite>;

    /// Lower `L` with `h = L Lᵀ`, in the lower triangle. Reads the lower triangle; the strict upper one is left.
    fn factor(&self, h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite>;

    /// Upper `U` with `UᵀU = h⁻¹`, in the upper triangle; the strict lower triangle becomes zero.
    fn upper_factor_of_inverse(&self, h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite>;

    /// `h⁻¹`, both triangles.
    fn inverse(&self, h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite>;
}

/// The default: pure Rust on the dense kernels. Same bits for any number of threads and any instruction set.
#[derive(Clone, Copy, Debug, Default)]
pub struct Blocked;

impl Cholesky for Blocked {
    fn name(&self) -> &'static str {
        "blocked"
    }

    fn reverse_factor(&self, mut h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite> {
        let mut end = square(&h);
        while end > 0 {
            let start = (end - 1) / BLOCK * BLOCK;
            let (left, done) = h.view_mut().split_at(Axis(1), end);
            let (_, panel) = left.split_at(Axis(1), start);
            let (mut above, rest) = panel.split_at(Axis(0), start);
            let mut diagonal = rows_mut(rest, 0..end - start);
            let (done_above, done_here) = (rows(done.view(), 0..start), rows(done.view(), start..end));

            // What the columns to the right explain of the block on the diagonal and of the panel above it.
            let mut update = Array2::zeros((end - start, end - start));
            gemm_nt(-1.0, done_here, done_here, 0.0, update.view_mut()).expect("equal depth");
            gemm_nt(-1.0, done_above, done_here, 1.0, above.view_mut()).expect("equal depth");

            let factor = reverse_factor_block(diagonal.view(), update.view())
                .map_err(|column| NotPositiveDefinite { column: start + column })?;
            for (i, row) in factor.rows().into_iter().enumerate() {
                (i..end - start).for_each(|j| diagonal[[i, j]] = row[j]);
            }
            solve_transposed(above, factor.view());
            end = start;
        }
        Ok(())
    }

    fn factor(&self, mut h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite> {
        // Reversing rows and columns turns a lower factor into an upper one.
        let n = square(&h);
        reverse(h.view_mut());
        let result = self.reverse_factor(h.view_mut());
        reverse(h);
        result.map_err(|e| NotPositiveDefinite { column: n - 1 - e.column })
    }

    fn upper_factor_of_inverse(&self, mut h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite> {
        self.reverse_factor(h.view_mut())?;
        invert_upper(h);
        Ok(())
    }

    fn inverse(&self, mut h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite> {
        self.upper_factor_of_inverse(h.view_mut())?;
        multiply_by_transpose(h.view_mut());
        mirror_upper_to_lower(h).expect("the matrix is square");
        Ok(())
    }
}

fn square(h: &ArrayViewMut2<'_, f32>) -> usize {
    assert_eq!(h.nrows(), h.ncols(), "the matrix is square");
    h.nrows()
}

fn rows<'a>(m: ArrayView2<'a, f32>, range: std::ops::Range<usize>) -> ArrayView2<'a, f32> {
    m.slice_axis_move(Axis(0), Slice::from(range))
}

fn rows_mut<'a>(m: ArrayViewMut2<'a, f32>, range: std::ops::Range<usize>) -> ArrayViewMut2<'a, f32> {
    m.slice_axis_move(Axis(0), Slice::from(range))
}

/// The reverse factor of `h + update` (upper triangles), in f64. An error is the column of the bad pivot.
fn reverse_factor_block(h: ArrayView2<'_, f32>, update: ArrayView2<'_, f32>) -> Result<Array2<f32>, usize> {
    let n = h.nrows();
    let mut r = Array2::from_shape_fn((n, n), |(i, j)| f64::from(h[[i, j]]) + f64::from(update[[i, j]]));
    for c in (0..n).rev() {
        let (mut top, bottom) = r.view_mut().split_at(Axis(0), c);
        let mut pivot_row = bottom;
        let tail = |row: &[f64]| row[c + 1..].iter().map(|v| v * v).sum::<f64>();
        let mut pivot_row = pivot_row.row_mut(0);
        let pivot_row = pivot_row.as_slice_mut().expect("rows are contiguous");
        let square = pivot_row[c] - tail(pivot_row);
        let pivot = square.sqrt();
        // A pivot must be a normal number in f32, whose reciprocal is finite.
        if !(pivot as f32).is_normal() {
            return Err(c);
        }
        pivot_row[c] = pivot;
        for mut row in top.rows_mut() {
            let row = row.as_slice_mut().expect("rows are contiguous");
            let dot: f64 = row[c + 1..].iter().zip(&pivot_row[c + 1..]).map(|(a, b)| a * b).sum();
            row[c] = (row[c] - dot) / pivot;
        }
    }
    Ok(r.mapv(|v| v as f32))
}

/// `x <- x R⁻ᵀ` for every row of `x: [m, n]`, `r: [n, n]` upper: back substitution from the last column.
fn solve_transposed(mut x: ArrayViewMut2<'_, f32>, r: ArrayView2<'_, f32>) {
    // Column c of R, contiguous, is what solving for x_c takes from the columns before it.
    let columns = r.t().as_standard_layout().into_owned();
    let reciprocals: Vec<f32> = r.diag().iter().map(|d| 1.0 / d).collect();
    x.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter().for_each(|mut x| {
        for mut x in x.rows_mut() {
            let x = x.as_slice_mut().expect("rows are contiguous");
            for (c, column) in columns.rows().into_iter().enumerate().rev() {
                let (before, rest) = x.split_at_mut(c);
                rest[0] *= reciprocals[c];
                let column = column.to_slice().expect("rows are contiguous");
                before.iter_mut().zip(column).for_each(|(x, r)| *x -= rest[0] * r);
            }
        }
    });
}

/// Rotates `h` by half a turn: `h[i, j] <-> h[n-1-i, n-1-j]`.
fn reverse(mut h: ArrayViewMut2<'_, f32>) {
    let n = h.nrows();
    let (mut top, bottom) = h.view_mut().split_at(Axis(0), n / 2);
    let mut bottom = rows_mut(bottom, n % 2..n.div_ceil(2));
    bottom.invert_axis(Axis(0));
    let pairs = top.axis_iter_mut(Axis(0)).into_par_iter().zip(bottom.axis_iter_mut(Axis(0)));
    pairs.for_each(|(mut top, mut bottom)| {
        top.iter_mut().zip(bottom.iter_mut().rev()).for_each(|(a, b)| std::mem::swap(a, b));
    });
    if n % 2 == 1 {
        let mut middle = h.row_mut(n / 2);
        (0..n / 2).for_each(|j| middle.swap(j, n - 1 - j));
    }
}

/// `R <- R⁻¹` for the upper triangle; the strict lower one becomes zero.
///
/// Block column by block column from the left: `U[..j, J] = -U[..j, ..j] R[..j, J] U[J, J]`.
fn invert_upper(mut h: ArrayViewMut2<'_, f32>) {
    let n = h.nrows();
    h.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(i, mut row)| {
        row.iter_mut().take(i).for_each(|v| *v = 0.0);
    });
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        let (left, right) = h.view_mut().split_at(Axis(1), start);
        let panel = right.slice_axis_move(Axis(1), Slice::from(..end - start));
        let (mut above, rest) = panel.split_at(Axis(0), start);
        let mut diagonal = rows_mut(rest, 0..end - start);
        let inverse = invert_upper_block(diagonal.view());
        diagonal.assign(&inverse);
        if start == 0 {
            continue;
        }
        let mut scaled = Array2::zeros((start, end - start));
        matmul_nn(-1.0, above.view(), inverse.view(), 0.0, scaled.view_mut()).expect("equal depth");
        // Rows of a triangle: only the columns from the diagonal on take part.
        above.axis_chunks_iter_mut(Axis(0), BLOCK).into_par_iter().enumerate().for_each(|(i, out)| {
            let from = i * BLOCK;
            let triangle = rows(left.view(), from..from + out.nrows());
            let triangle = triangle.slice_axis_move(Axis(1), Slice::from(from..));
            let (_, scaled) = scaled.view().split_at(Axis(0), from);
            matmul_nn(1.0, triangle, scaled, 0.0, out).expect("equal depth");
        });
    }
}

/// The inverse of an upper triangular block, in f64.
fn invert_upper_block(r: ArrayView2<'_, f32>) -> Array2<f32> {
    let n = r.nrows();
    let mut u = Array2::<f64>::zeros((n, n));
    for j in 0..n {
        u[[j, j]] = 1.0 / f64::from(r[[j, j]]);
        for i in 0..j {
            let dot: f64 = (i..j).map(|k| u[[i, k]] * f64::from(r[[k, j]])).sum();
            u[[i, j]] = -dot * u[[j, j]];
        }
    }
    u.mapv(|v| v as f32)
}

/// `U <- UᵀU`, upper triangle, for an upper `U` with zeros below.
///
/// Block rows from the last to the first: row `I` of the product takes rows `..=I` of `U` only.
fn multiply_by_transpose(mut h: ArrayViewMut2<'_, f32>) {
    let n = h.nrows();
    for start in (0..n).step_by(BLOCK).rev() {
        let end = (start + BLOCK).min(n);
        let right = h.view_mut().slice_axis_move(Axis(1), Slice::from(start..));
        let (above, rest) = right.split_at(Axis(0), start);
        let mut out = rows_mut(rest, 0..end - start);
        let here = out.to_owned();
        let transpose = |m: ArrayView2<'_, f32>| {
            m.slice_axis(Axis(1), Slice::from(..end - start)).t().as_standard_layout().into_owned()
        };
        matmul_nn(1.0, transpose(here.view()).view(), here.view(), 0.0, out.view_mut()).expect("equal depth");
        if start > 0 {
            matmul_nn(1.0, transpose(above.view()).view(), above.view(), 1.0, out).expect("equal depth");
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
