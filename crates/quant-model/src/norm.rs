//! Norms with their weights.

use ndarray::{Array2, ArrayView2, Axis};
use quant_kernels::vec::{layer_norm, rms_norm};
use rayon::prelude::*;

use crate::arch::NormKind;

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

    /// Normalises every row of `x`: `[t, n]`. Panics if the rows have another width.
    pub(crate) fn forward(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        let mut out = Array2::zeros(x.dim());
        let rows = x.axis_iter(Axis(0)).into_par_iter().zip(out.axis_iter_mut(Axis(0)));
        rows.for_each(|(x, mut out)| {
            self.row(x.as_slice().expect("contiguous rows"), out.as_slice_mut().expect("contiguous rows"));
        });
        out
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
