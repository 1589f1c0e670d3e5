//! Quantized weights in the order in which the products read them.
//!
//! [`PackedMatrix::matmul`] is exact: it gives the bits of [`crate::matmul_nt`] on the dequantized matrix,
//! without ever holding that matrix. Panels of weights are decoded where they are multiplied, element by element
//! in the steps that [`QuantizedMatrix::dequantize`] takes.

mod octets;
#[cfg(test)]
mod tests;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use quant_core::{MatrixError, QuantizedMatrix};
use rayon::prelude::*;
use thiserror::Error;

use self::octets::Octets;
use crate::dense::{self, Plain};
use crate::error::ShapeError;
use crate::{isa, simd};

/// A matrix that cannot be packed.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum PackError {
    /// Its parts do not fit each other.
    #[error("the quantized matrix is inconsistent")]
    Matrix(#[from] MatrixError),
}

/// A weight matrix `[out, in]` of few bits, ready to multiply.
#[derive(Clone, Debug)]
pub struct PackedMatrix(Layout);

#[derive(Clone, Debug)]
enum Layout {
    /// Eight rows side by side, decoded panel by panel.
    Octets(Octets),
    /// A geometry without a panel decoder: rows are dequantized strip by strip.
    Rows(Box<QuantizedMatrix>),
}

/// Rows of a strip of [`Layout::Rows`].
const STRIP: usize = 32;

impl PackedMatrix {
    /// Packs a matrix, which is dropped on the way: a layer is never held twice for longer than this call.
    pub fn pack(matrix: QuantizedMatrix) -> Result<Self, PackError> {
        matrix.validate()?;
        Ok(PackedMatrix(match Octets::pack(&matrix) {
            Some(octets) => Layout::Octets(octets),
            None => Layout::Rows(Box::new(matrix)),
        }))
    }

    /// `[out, in]`.
    pub fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Layout::Octets(octets) => octets.shape(),
            Layout::Rows(matrix) => (matrix.rows(), matrix.cols()),
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Layout::Octets(octets) => octets.bytes(),
            Layout::Rows(matrix) => matrix.byte_len(),
        }
    }

    /// `out = x · wᵀ` with `x: [m, in]`, `out: [m, out]`.
    pub fn matmul(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ShapeError> {
        let (rows, cols) = self.shape();
        dense::check_rows("x", &x)?;
        dense::check_rows("out", &out)?;
        dense::check_shape("x", [x.nrows(), cols], &x)?;
        dense::check_shape("out", [x.nrows(), rows], &out)?;
        match &self.0 {
            Layout::Octets(octets) => {
                dense::multiply([x.nrows(), cols, rows], 1.0, Plain::new(x), octets, 0.0, out)
            }
            Layout::Rows(matrix) => multiply_strips(matrix, x, out),
        }
    }

    /// Row `r` in f32, `out: [in]` (embedding lookup).
    pub fn dequantize_row(&self, r: usize, out: &mut [f32]) -> Result<(), ShapeError> {
        let (rows, cols) = self.shape();
        let length = |operand, expected, found| match expected == found {
            true => Ok(()),
            false => Err(ShapeError::Length { operand, expected, found }),
        };
        length("out", cols, out.len())?;
        if r >= rows {
            return Err(ShapeError::Row { found: r, rows });
        }
        match &self.0 {
            Layout::Octets(octets) => simd::run(isa::active(), octets::DecodeRow { octets, row: r, out }),
            Layout::Rows(matrix) => matrix.dequantize_row(r, out),
        }
        Ok(())
    }
}

/// Dequantizes some rows at a time and multiplies them as a dense matrix.
fn multiply_strips(
    matrix: &QuantizedMatrix,
    x: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    let mut strips = Vec::new();
    let mut rest = out;
    let mut start = 0;
    while rest.ncols() > 0 {
        let here = STRIP.min(rest.ncols());
        let (strip, right) = rest.split_at(Axis(1), here);
        strips.push((start..start + here, strip));
        rest = right;
        start += here;
    }
    strips.into_par_iter().try_for_each(|(rows, out)| {
        let mut weights = Array2::zeros((rows.len(), matrix.cols()));
        matrix.dequantize_rows(rows, weights.view_mut());
        dense::matmul_nt(x, weights.view(), out)
    })
}
