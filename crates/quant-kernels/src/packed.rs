//! Quantized weights in the order in which the products read them.
//!
//! One packed copy serves two products, for any number of rows and on every instruction set:
//!
//! - [`PackedMatrix::matmul`] is exact. Panels of weights are decoded where they are multiplied, element by element
//!   in the steps that [`QuantizedMatrix::dequantize`] takes. Columns are summed in stored order, which differs
//!   from the order of the features where groups are not contiguous (act-order): the bits are those of
//!   [`crate::matmul_nt`] on weights and activations in that order.
//! - [`PackedMatrix::matmul_with`] is fast: activations are rounded to eight bits, see [`Activations`], and codes
//!   are multiplied as integers. The same bits come out everywhere here, too.

pub(crate) mod act;
pub(crate) mod blocks;
mod fill;
mod panels;
pub(crate) mod params;
pub(crate) mod planes;
mod product;
#[cfg(test)]
mod tests;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use quant_core::{MatrixError, QuantizedMatrix};
use rayon::prelude::*;
use thiserror::Error;

pub use self::act::{ActScales, Activations, Input};
use self::panels::Panels;
use crate::dense::{self, Plain};
use crate::error::ShapeError;
use crate::ukr::Weights;
use crate::ukr::{HEIGHTS, table};
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
    /// Sixteen rows side by side.
    Panels(Box<Panels>),
    /// A geometry that panels do not suit: rows are dequantized strip by strip.
    Rows(Box<QuantizedMatrix>),
}

/// Rows of a strip of [`Layout::Rows`].
const STRIP: usize = 32;

impl PackedMatrix {
    /// Packs a matrix, which is dropped on the way: a layer is never held twice for longer than this call.
    pub fn pack(matrix: QuantizedMatrix) -> Result<Self, PackError> {
        matrix.validate()?;
        Ok(PackedMatrix(match Panels::pack(&matrix) {
            Some(panels) => Layout::Panels(Box::new(panels)),
            None => Layout::Rows(Box::new(matrix)),
        }))
    }

    /// `[out, in]`.
    pub fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Layout::Panels(panels) => (panels.rows, panels.cols),
            Layout::Rows(matrix) => (matrix.rows(), matrix.cols()),
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Layout::Panels(panels) => panels.bytes(),
            Layout::Rows(matrix) => matrix.byte_len(),
        }
    }

    /// `out = x · wᵀ` with `x: [m, in]`, `out: [m, out]`, exact.
    pub fn matmul(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ShapeError> {
        let shape = self.check(&x, &out)?;
        match &self.0 {
            Layout::Panels(panels) => {
                let gathered = panels.gathered(x);
                let x = gathered.as_ref().map_or(x, |gathered| gathered.view());
                dense::multiply(shape, 1.0, Plain::new(x), &**panels, 0.0, out)
            }
            Layout::Rows(matrix) => multiply_strips(matrix, x, out, dense::matmul_nt),
        }
    }

    /// `out = x · wᵀ` with activations and weights rounded to bf16: for weights that have no product of integers.
    ///
    /// The bits are those of [`crate::matmul_nt_bf16`] on the weights in f32, in stored order as for
    /// [`PackedMatrix::matmul`].
    pub fn matmul_bf16(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ShapeError> {
        let shape = self.check(&x, &out)?;
        match &self.0 {
            Layout::Panels(panels) => {
                let gathered = panels.gathered(x);
                let x = gathered.as_ref().map_or(x, |gathered| gathered.view());
                dense::multiply_bf16(shape, Plain::new(x), &**panels, out)
            }
            Layout::Rows(matrix) => multiply_strips(matrix, x, out, dense::matmul_bf16_of_f32),
        }
    }

    /// Checks the operands of a product; `[m, in, out]`.
    fn check(&self, x: &ArrayView2<'_, f32>, out: &ArrayViewMut2<'_, f32>) -> Result<[usize; 3], ShapeError> {
        let (rows, cols) = self.shape();
        dense::check_rows("x", x)?;
        dense::check_rows("out", out)?;
        dense::check_shape("x", [x.nrows(), cols], x)?;
        dense::check_shape("out", [x.nrows(), rows], out)?;
        Ok([x.nrows(), cols, rows])
    }

    /// What fast products ask of their activations, or `None` if there is no fast product for these weights:
    /// no kernel takes their grid, or their groups do not lie along rows.
    pub fn fast_input(&self) -> Option<&Input> {
        match &self.0 {
            Layout::Panels(panels) => panels.weights().map(|_| &panels.input),
            Layout::Rows(_) => None,
        }
    }

    /// Name of the kernel that multiplies tiles of `rows` rows (at most 12) in fast products, as
    /// `q8_u4_12x32_avx512vnni`: activations, weights, tile, instruction set.
    pub fn kernel_name(&self, rows: usize) -> Option<&'static str> {
        let weights = match &self.0 {
            Layout::Panels(panels) => panels.weights()?,
            Layout::Rows(_) => return None,
        };
        let height = HEIGHTS.into_iter().find(|&height| height >= rows)?;
        Some(table::select(isa::active(), weights, height).name)
    }

    /// `out = x · wᵀ` with `x: [m, in]` rounded to eight bits, `out: [m, out]`.
    ///
    /// Panics if there is no fast product ([`PackedMatrix::fast_input`] is `None`), or if the activations were
    /// made for another input.
    pub fn matmul_with(&self, x: &Activations, out: ArrayViewMut2<'_, f32>) -> Result<(), ShapeError> {
        matmul_all(x, vec![(self, out)])
    }

    /// The operands of a fast product, checked.
    fn fast(&self, x: &Activations, out: &ArrayViewMut2<'_, f32>) -> Result<(&Panels, Weights), ShapeError> {
        dense::check_rows("out", out)?;
        dense::check_shape("out", [x.rows(), self.shape().0], out)?;
        let fast = match &self.0 {
            Layout::Panels(panels) => panels.weights().map(|weights| (&**panels, weights)),
            Layout::Rows(_) => None,
        };
        let (panels, weights) = fast.expect("a matrix with a fast input");
        assert!(x.is_for(&panels.input), "activations for the input of this matrix");
        Ok((panels, weights))
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
            Layout::Panels(panels) => simd::run(isa::active(), panels::DecodeRow { panels, row: r, out }),
            Layout::Rows(matrix) => matrix.dequantize_row(r, out),
        }
        Ok(())
    }
}

/// [`PackedMatrix::matmul_with`] for several matrices at once, which costs less than one after the other where there are
/// few rows.
pub fn matmul_all(
    x: &Activations,
    products: Vec<(&PackedMatrix, ArrayViewMut2<'_, f32>)>,
) -> Result<(), ShapeError> {
    let mut checked = Vec::with_capacity(products.len());
    for (matrix, out) in products {
        let (panels, weights) = matrix.fast(x, &out)?;
        checked.push((panels, weights, out));
    }
    product::multiply(x, checked);
    Ok(())
}

/// `out = x · wᵀ` of matrices in f32.
type DenseProduct =
    fn(ArrayView2<'_, f32>, ArrayView2<'_, f32>, ArrayViewMut2<'_, f32>) -> Result<(), ShapeError>;

/// Dequantizes some rows at a time and multiplies them as a dense matrix.
fn multiply_strips(
    matrix: &QuantizedMatrix,
    x: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f32>,
    product: DenseProduct,
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
        product(x, weights.view(), out)
    })
}
