//! Norms with their weights.

use ndarray::{Array2, ArrayView2};
use quant_kernels::vec::{add, layer_norm, rms_norm};

use crate::arch::NormKind;
use crate::rows::{each_row, each_row_pair};

/// Weights of a norm over rows of `n` features.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    pub(crate) kind: NormKind,
    pub(crate) eps: f32,
    /// `[n]`.
    pub(crate) weight: Vec<f32>,
    /// `[n]`, present for [`NormKind::Layer`].
    pub(crate) bias: Option<Vec<f32>>,
}

impl Norm {
    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        4 * (self.weight.len() + self.bias.as_ref().map_or(0, Vec::len))
    }

    /// Normalises every row of `x` into `out`, both `[t, n]`. Panics if the rows have another width.
    pub(crate) fn forward(&self, x: ArrayView2<'_, f32>, out: &mut Array2<f32>) {
        each_row(x, out.view_mut(), |_, x, out| self.row(x, out));
    }

    /// `x += y`, and then as [`Norm::forward`]; all `[t, n]`.
    pub(crate) fn add_forward(&self, x: &mut Array2<f32>, y: ArrayView2<'_, f32>, out: &mut Array2<f32>) {
        each_row_pair(y, x.view_mut(), out.view_mut(), |y, x, out| {
            add(x, y).expect("rows are of one width");
            self.row(x, out);
        });
    }

    /// Normalises one row. Panics if it has another width.
    pub(crate) fn row(&self, x: &[f32], out: &mut [f32]) {
        match self.kind {
            NormKind::Rms => rms_norm(x, &self.weight, self.eps, out),
            NormKind::Layer => layer_norm(x, &self.weight, self.bias.as_deref(), self.eps, out),
        }
        .expect("a row has the width of the weights");
    }
}
