//! Causal attention with grouped heads and an optional window.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, Slice};
use quant_kernels::dense::KC;
use quant_kernels::{gemm_nt, matmul_nn, vec::softmax};
use rayon::prelude::*;

use crate::error::ModelError;

/// Queries that are handled together.
const BLOCK: usize = 64;

/// Shape of an attention layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<usize>,
}

impl Attention {
    /// Context of the last `t` of `n` positions.
    ///
    /// `q`: `[t, heads * head_dim]`; `k`, `v`: `[n, kv_heads * head_dim]`; `out` like `q`. A row of the result does
    /// not depend on `t`: scores are products of one row, and masked keys add exact zeros at the end or, with a
    /// window, in front of a block boundary that is fixed by the position of the keys.
    pub(crate) fn forward(
        &self,
        q: ArrayView2<'_, f32>,
        k: ArrayView2<'_, f32>,
        v: ArrayView2<'_, f32>,
        mut out: ArrayViewMut2<'_, f32>,
    ) -> Result<(), ModelError> {
        let d = self.head_dim;
        let past = k.nrows() - q.nrows();
        let group = self.heads / self.kv_heads;
        let blocks = out.axis_chunks_iter_mut(Axis(0), BLOCK).into_par_iter().enumerate();
        blocks.try_for_each(|(block, mut out)| {
            let first = block * BLOCK;
            let rows = out.nrows();
            let from = self.window.map_or(0, |w| (past + first + 1).saturating_sub(w) / KC * KC);
            let to = past + first + rows;
            let heads = out.axis_chunks_iter_mut(Axis(1), d).into_par_iter().enumerate();
            heads.try_for_each(|(head, out)| {
                let column = head / group * d;
                let (queries, keys) = (Slice::from(first..first + rows), Slice::from(from..to));
                let (q, k, v) = (
                    q.slice_axis(Axis(0), queries),
                    k.slice_axis(Axis(0), keys),
                    v.slice_axis(Axis(0), keys),
                );
                let q = q.slice_axis(Axis(1), Slice::from(head * d..(head + 1) * d));
                let k = k.slice_axis(Axis(1), Slice::from(column..column + d));
                let v = v.slice_axis(Axis(1), Slice::from(column..column + d));
                let mut scores = Array2::zeros((rows, to - from));
                gemm_nt(self.scale, q, k, 0.0, scores.view_mut())?;
                for (r, mut row) in scores.rows_mut().into_iter().enumerate() {
                    let end = past + first + r + 1 - from;
                    let start =
                        self.window.map_or(0, |w| (end + from).saturating_sub(w).saturating_sub(from));
                    let row = row.as_slice_mut().expect("scores are in standard order");
                    softmax(row, start..end)?;
                }
                Ok(matmul_nn(1.0, scores.view(), v, 0.0, out)?)
            })
        })
    }
}
