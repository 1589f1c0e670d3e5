//! GPTQ: rounding column by column, each column's error made up for by the columns that follow.
//!
//! Minimises `‖(W - Ŵ) X‖²` greedily, with `H = 2/n Σ x xᵀ` standing for the inputs (Frantar, Ashkboos, Hoefler,
//! Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022). The column
//! loop and its formulation are in [`quant_math::obq`], damping in [`quant_math::damping`].
//!
//! Differences from the reference codes, all undone by [`Compat::GptqModel`]:
//! - groups are fitted on weights that hold every update so far, also within a block;
//! - codes are chosen for the scale as it is stored (f16), not for the f32 scale before rounding;
//! - a symmetric grid is symmetric even if no weight of its group is negative;
//! - the diagonal of features that never were active becomes the mean of the others, not 1, so that the damping does
//!   not depend on the unit of the activations; a whole-row grid is fitted without their weights.

use std::time::Instant;

use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use quant_core::{GroupSize, Permutation, QuantSpec, SpecError};
use quant_math::cholesky::Blocked;
use quant_math::damping::{Damped, Damping, DampingError, factor_damped, restore};
use quant_math::hessian::{dead_features, mean_diagonal, permute_columns, permute_symmetric};
use quant_math::obq::{GroupOverflow, GroupTiming, Grouping, Rounded, round_columns};
use quant_math::{GridFit, Hessian, ScaleOverflow, ScaleRule};
use rayon::prelude::*;

use crate::affine;
use crate::order::column_order;
use crate::quantizer::{Fallback, LayerReport, LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::rtn::{fit_groups, grid_bytes, result_bytes, round_to_nearest};
use crate::stats::{LayerStats, Needs};

/// Options of GPTQ. The names in brackets are those of the reference implementations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqOptions {
    /// Order in which columns are rounded.
    pub order: ColumnOrder,
    /// Fit every group on the original weights before the first column is rounded (`static_groups`).
    pub static_groups: bool,
    /// Shrink each group's range for the least `Σ |w - ŵ|^norm` (`mse`); `None` is off. On by default with the norm of
    /// the paper's code, 2.4: on a trained model it takes 5 to 12 % off the KL divergence at 2 to 4 bits.
    pub mse: Option<f32>,
    /// Added to the diagonal, as a fraction of its mean (`damp_percent`).
    pub damp: f64,
    /// Step by which the damping grows while the Hessian is not positive definite (`damp_auto_increment`).
    pub damp_increment: f64,
    /// Columns per block of the lazy update (`blocksize`). Without `compat` it matters for speed only.
    pub block_size: usize,
    /// Reproduce the codes of another implementation.
    pub compat: Option<Compat>,
}

impl Default for GptqOptions {
    fn default() -> Self {
        Self {
            order: ColumnOrder::GroupAware,
            static_groups: false,
            mse: Some(2.4),
            damp: 0.05,
            damp_increment: 0.01,
            block_size: 128,
            compat: None,
        }
    }
}

impl GptqOptions {
    /// The defaults of another implementation, and its codes.
    pub fn like(implementation: Compat) -> Self {
        Self { mse: None, compat: Some(implementation), ..Self::default() }
    }
}

/// Order in which columns are rounded. The earlier a column, the more others can make up for its error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ColumnOrder {
    /// As stored.
    Natural,
    /// Groups in order of their most active column, columns by activity inside each (`act_group_aware`): most of
    /// the gain of [`ColumnOrder::Activation`], with groups of consecutive columns.
    GroupAware,
    /// All columns by activity (`desc_act`); groups hold columns of similar activity, the layout needs `g_idx`.
    Activation,
}

/// An implementation whose codes can be reproduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compat {
    /// GPTQModel 7: groups that start inside a block are fitted without the updates of that block, codes are chosen
    /// for f32 scales.
    GptqModel,
}

/// The method. See the module's documentation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gptq {
    options: GptqOptions,
}

impl Gptq {
    /// With these options.
    pub fn new(options: GptqOptions) -> Self {
        Self { options }
    }

    fn fit(&self, spec: &QuantSpec) -> GridFit {
        let scales = match self.options.compat {
            None => ScaleRule::StoredF16,
            Some(Compat::GptqModel) => ScaleRule::GptqModel,
        };
        GridFit { bits: spec.bits, symmetric: spec.symmetric, mse: self.options.mse, scales }
    }

    /// True if groups hold columns in order of activity, which the result then says.
    fn reorders_groups(&self) -> bool {
        self.options.order == ColumnOrder::Activation && !self.options.static_groups
    }
}

impl Quantizer for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn description(&self) -> &'static str {
        "second-order rounding, column by column, from calibration data"
    }

    fn needs(&self) -> Needs {
        Needs::HESSIAN
    }

    fn default_spec(&self) -> QuantSpec {
        QuantSpec { act_order: self.reorders_groups(), ..QuantSpec::default() }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        affine::validate(spec)?;
        let GptqOptions { mse, damp, damp_increment, block_size, compat, .. } = self.options;
        affine::validate_mse(mse)?;
        let option = |option, found: String, allowed| Err(SpecError::Option { option, found, allowed });
        if spec.act_order != self.reorders_groups() {
            let allowed = "true with the order by activation and groups that are not static, else false";
            return option("act_order", spec.act_order.to_string(), allowed);
        }
        if !(damp > 0.0 && damp < 1.0) {
            return option("damp", damp.to_string(), "above 0 and below 1");
        }
        if !(0.0..1.0).contains(&damp_increment) {
            return option("damp_increment", damp_increment.to_string(), "at least 0 and below 1");
        }
        if !(1..=4096).contains(&block_size) {
            return option("block_size", block_size.to_string(), "1 to 4096");
        }
        match (compat, spec.group) {
            (Some(_), GroupSize::Columns(len)) if block_size % len != 0 && len % block_size != 0 => {
                let allowed = "with compat, groups divide the block or are multiples of it";
                Err(SpecError::Group { found: spec.group.as_config(), allowed })
            }
            _ => Ok(()),
        }
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize {
        let hessian = shapes.first().map_or(0, |&(_, cols)| 4 * cols * cols);
        // When a layer's turn comes, those before it are results and those after it still weights.
        let turn = |i: usize| {
            let done: usize = shapes[..i].iter().map(|&(rows, cols)| result_bytes(rows, cols, spec)).sum();
            let waiting: usize = shapes[i..].iter().map(|(rows, cols)| 4 * rows * cols).sum();
            let (rows, cols) = shapes[i];
            let len = spec.group.len(cols);
            let fixed = self.options.static_groups || len >= cols;
            // Sums of a window, and once more to fit a group longer than a block; codes, one per byte.
            let window =
                if fixed || len <= self.options.block_size { self.options.block_size } else { 2 * len };
            let scratch = 4 * rows * window.min(2 * cols) + rows * cols + grid_bytes(rows, cols, spec);
            done + waiting + scratch
        };
        hessian + (0..shapes.len()).map(turn).max().unwrap_or(0)
    }

    fn quantize(
        &self,
        layers: Vec<LayerWeights>,
        stats: LayerStats,
    ) -> Result<Vec<Quantized>, QuantizeError> {
        let layers = affine::checked(self, layers)?;
        let Some(Hessian { matrix: mut h, .. }) = stats.hessian.filter(is_active) else {
            let each = |(layer, weights)| self.fall_back(layer, weights, Fallback::NoCalibration);
            return layers.into_iter().enumerate().map(each).collect();
        };
        for (layer, LayerWeights { w, .. }) in layers.iter().enumerate() {
            if w.ncols() != h.ncols() {
                return Err(QuantizeError::StatsShape { layer, expected: h.ncols(), found: w.ncols() });
            }
        }
        let dead = dead_features(h.view());
        let stand_in = match self.options.compat {
            None => mean_diagonal(h.view()) * h.ncols() as f64 / (h.ncols() - dead.len()) as f64,
            Some(Compat::GptqModel) => 1.0,
        };
        dead.iter().for_each(|&k| h[[k, k]] = stand_in as f32);
        let activity = h.diag().to_vec();
        let order_of = |layer: &LayerWeights| {
            column_order(self.options.order, &activity, layer.spec.group.len(activity.len()))
        };
        let orders: Vec<_> = layers.iter().map(order_of).collect();

        // One factorization per distinct order; normally there is one.
        let mut waiting: Vec<_> = layers.into_iter().map(Some).collect();
        let mut done: Vec<_> = waiting.iter().map(|_| None).collect();
        while let Some(first) = waiting.iter().position(Option::is_some) {
            let mut start = Instant::now();
            let perm = orders[first].as_deref();
            if let Some(perm) = perm {
                permute_symmetric(h.view_mut(), perm);
            }
            let damping = Damping { initial: self.options.damp, increment: self.options.damp_increment };
            let factored = factor_damped(h.view_mut(), damping, &Blocked);
            for layer in first..waiting.len() {
                let Some(weights) = waiting[layer].take_if(|_| orders[layer] == orders[first]) else {
                    continue;
                };
                let mut quantized = match &factored {
                    Ok(damped) => self.solve(layer, weights, &dead, perm, h.view(), damped)?,
                    Err(DampingError::NonFinite) => {
                        self.fall_back(layer, weights, Fallback::NonFiniteHessian)?
                    }
                    Err(_) => self.fall_back(layer, weights, Fallback::NotPositiveDefinite)?,
                };
                quantized.report.seconds = start.elapsed().as_secs_f64();
                start = Instant::now();
                done[layer] = Some(quantized);
            }
            if waiting.iter().any(Option::is_some) {
                if let Ok(damped) = &factored {
                    restore(h.view_mut(), &damped.diagonal);
                }
                if let Some(perm) = perm {
                    permute_symmetric(h.view_mut(), &inverse(perm));
                }
            }
        }
        Ok(done.into_iter().flatten().collect())
    }
}

impl Gptq {
    /// Plain rounding where GPTQ cannot work.
    fn fall_back(
        &self,
        layer: usize,
        LayerWeights { w, spec }: LayerWeights,
        reason: Fallback,
    ) -> Result<Quantized, QuantizeError> {
        let mut quantized = round_to_nearest(layer, w.view(), &spec, self.fit(&spec))?;
        quantized.report.fallback = Some(reason);
        Ok(quantized)
    }

    /// Quantizes one layer. `r`: the factor of the damped Hessian whose columns are in the order `perm`.
    fn solve(
        &self,
        layer: usize,
        LayerWeights { mut w, spec }: LayerWeights,
        dead: &[usize],
        perm: Option<&[u32]>,
        r: ArrayView2<'_, f32>,
        damped: &Damped,
    ) -> Result<Quantized, QuantizeError> {
        let (rows, cols) = w.dim();
        let (fit, len) = (self.fit(&spec), spec.group.len(cols));
        let norm = affine::square_norm(w.view());
        let whole_row = len >= cols;
        // The reference fits whole rows before it clears the weights of dead features, all else after.
        let early = whole_row && self.options.compat.is_some();
        let mut grids = if early { Some(fit_groups(layer, w.view(), len, fit)?) } else { None };
        let cleared = clear_columns(w.view_mut(), dead);
        if grids.is_none() && (whole_row || self.options.static_groups) {
            grids = Some(fit_groups(layer, w.view(), len, fit)?);
        }
        if let Some(perm) = perm {
            permute_columns(w.view_mut(), perm);
        }
        // Column of the matrix of the p-th column rounded.
        let column = |p: usize| perm.map_or(p, |perm| perm[p] as usize);

        let of_col: Vec<u32> = (0..cols).map(|p| (column(p) / len) as u32).collect();
        let grouping = match &grids {
            Some(grids) => Grouping::Fixed { of_col: &of_col, grids: grids.view(), max: fit.max_code() },
            None => {
                let timing = match self.options.compat {
                    None => GroupTiming::Reached,
                    Some(Compat::GptqModel) => GroupTiming::BlockStart,
                };
                Grouping::Fitted { len, fit, timing }
            }
        };
        let rounded = round_columns(w.view_mut(), r, self.options.block_size, grouping);
        let Rounded { codes, grids: fitted, loss } =
            rounded.map_err(|GroupOverflow { row, col, error: ScaleOverflow { value, scale, .. } }| {
                QuantizeError::ScaleOverflow { layer, row, col: column(col), value, scale }
            })?;
        // What is left in `w` are the errors; damping's share of the loss is known exactly.
        let error = affine::square_norm(w.view());
        drop(w);
        let loss = (loss - damped.added * error).max(0.0) / 2.0;

        // Position in rounding order of each stored column; the order of the groups; the stored order.
        let mut position: Vec<u32> = perm.map_or_else(|| (0..cols as u32).collect(), inverse);
        let (mut group_order, mut input_perm) = (None, None);
        if grids.is_none() && perm.is_some() {
            if self.reorders_groups() {
                let group: Vec<u32> = position.iter().map(|p| p / len as u32).collect();
                input_perm = Permutation::sorting_groups(&group);
                if let Some(stored) = &input_perm {
                    position = stored.features().iter().map(|&f| position[f as usize]).collect();
                }
            } else {
                let starts = (0..cols).step_by(len);
                group_order = Some(starts.map(|c| position[c] as usize / len).collect::<Vec<_>>());
            }
        }
        let codes = affine::pack_rows(spec.bits, rows, cols, |r, out| {
            out.iter_mut().zip(&position).for_each(|(code, &p)| *code = codes[[r, p as usize]]);
        })
        .map_err(|source| QuantizeError::Matrix { layer, source })?;
        let grids = grids.as_ref().unwrap_or(&fitted);
        let matrix = affine::matrix(codes, len, grids, group_order.as_deref(), input_perm);
        let report = LayerReport {
            rel_error: affine::relative(error + cleared, norm),
            loss: Some(loss),
            damp: Some(damped.damp),
            retries: damped.retries,
            ..LayerReport::default()
        };
        Ok(Quantized { matrix, report })
    }
}

/// True if the statistics hold anything at all.
fn is_active(hessian: &Hessian) -> bool {
    hessian.rows > 0 && hessian.matrix.diag().iter().any(|&d| d != 0.0)
}

fn inverse(perm: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(to, &from)| inverse[from as usize] = to as u32);
    inverse
}

/// Sets columns to zero; returns the sum of the squares they held.
fn clear_columns(mut w: ArrayViewMut2<'_, f32>, columns: &[usize]) -> f64 {
    let clear = |mut row: ArrayViewMut1<'_, f32>| {
        let taken = columns.iter().map(|&c| f64::from(std::mem::take(&mut row[c])).powi(2));
        taken.sum()
    };
    w.axis_iter_mut(Axis(0)).into_par_iter().map(clear).collect::<Vec<f64>>().into_iter().sum()
}

#[cfg(test)]
#[path = "gptq_tests.rs"]
mod tests;
