//! AWQ: inputs multiplied, and ranges clipped, so that what large activations meet loses least.
//!
//! Lin, Tang, Tang, Yang, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and
//! Acceleration", 2023. [`AwqScale`] searches factors for the inputs of linears that share one, by the error of the
//! module around them; [`Awq`] searches how far to clip each group, by the error of the layer's output, and rounds to
//! nearest. The searches are in [`quant_math::awq_search`].
//!
//! Differences from AutoAWQ:
//! - values and outputs are scaled with grouped-query attention too, with one factor for all query heads that read a
//!   value head;
//! - leaving a stage as it is is among the candidates, so that scaling never loses on the sample;
//! - clipping is judged on the second moments of all calibration inputs instead of on a few hundred of them;
//! - codes are chosen for the f16 scale as it is stored, and ranges include zero.

use std::time::Instant;

use ndarray::Array2;
use quant_core::{QuantSpec, SpecError};
use quant_math::awq_search::{ClipSearch, candidate, clipped_grids, relative_magnitudes, round_scaled};
use quant_math::obq::GroupOverflow;
use quant_math::{GridFit, Hessian, ScaleRule};

use crate::affine;
use crate::quantizer::{Fallback, LayerReport, LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::rtn::{fit_groups, grid_bytes, result_bytes, round_on};
use crate::stats::{LayerStats, Needs};
use crate::transform::{Stage, StageRunner, Stopped, Transform};

/// Options of AWQ. The names in brackets are those of the reference implementations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AwqOptions {
    /// Exponents tried (`n_grid`).
    pub steps: usize,
    /// Weigh activations against weights (`duo_scaling`); otherwise activations alone.
    pub duo_scaling: bool,
    /// Clip the range of groups (`apply_clip`).
    pub clip: bool,
    /// Calibration tokens that candidates are run on.
    pub tokens: usize,
}

impl Default for AwqOptions {
    fn default() -> Self {
        Self { steps: 20, duo_scaling: true, clip: true, tokens: 2048 }
    }
}

fn fit(spec: &QuantSpec) -> GridFit {
    GridFit { bits: spec.bits, symmetric: spec.symmetric, mse: None, scales: ScaleRule::StoredF16 }
}

/// The search for factors of inputs.
#[derive(Clone, Copy, Debug, Default)]
pub struct AwqScale {
    options: AwqOptions,
}

impl AwqScale {
    /// With these options.
    pub fn new(options: AwqOptions) -> Self {
        Self { options }
    }

    /// The weights of a stage as rounding leaves them. `None` if a group cannot be rounded with these factors.
    fn rounded(stage: &Stage<'_>, scales: &[f32]) -> Option<Vec<Array2<f32>>> {
        let each = stage.weights.iter().zip(stage.specs);
        let round = |(w, spec): (&Array2<f32>, &QuantSpec)| {
            round_scaled(w.view(), scales, spec.group.len(w.ncols()), fit(spec)).ok()
        };
        each.map(round).collect()
    }
}

impl Transform for AwqScale {
    fn name(&self) -> &'static str {
        "awq-scale"
    }

    fn needs(&self) -> Needs {
        Needs::MAGNITUDES
    }

    fn sample_tokens(&self) -> usize {
        self.options.tokens
    }

    fn candidates(&self) -> usize {
        self.options.steps + 1
    }

    fn scales(&self, stage: &Stage<'_>, runner: &mut dyn StageRunner) -> Result<Option<Vec<f32>>, Stopped> {
        let (Some(magnitudes), Some(spec)) = (stage.magnitudes, stage.specs.first()) else { return Ok(None) };
        let mean = |values: &[f32]| values.iter().sum::<f32>() / values.len() as f32;
        let mut x = magnitudes.mean.clone();
        stage.share(&mut x, mean);
        let views: Vec<_> = stage.weights.iter().map(|w| w.view()).collect();
        let mut w = relative_magnitudes(&views, spec.group.len(x.len()));
        stage.share(&mut w, mean);

        let Some(unscaled) = Self::rounded(stage, &vec![1.0; x.len()]) else { return Ok(None) };
        let (mut best, mut least) = (None, runner.loss(unscaled)?);
        for step in 0..self.options.steps {
            let share = step as f32 / self.options.steps as f32;
            let scales = candidate(&x, self.options.duo_scaling.then_some(&w), share);
            let Some(rounded) = Self::rounded(stage, &scales) else { continue };
            let loss = runner.loss(rounded)?;
            if loss < least {
                (best, least) = (Some(scales), loss);
            }
        }
        Ok(best)
    }
}

/// The method: rounds to nearest on grids that are clipped for the least error of the output.
#[derive(Clone, Copy, Debug, Default)]
pub struct Awq {
    options: AwqOptions,
}

impl Awq {
    /// How the range of a group shrinks: from all of it to half (`n_grid` 20, `max_shrink` 0.5).
    const CLIP: ClipSearch = ClipSearch { steps: 20, tried: 10 };

    /// With these options.
    pub fn new(options: AwqOptions) -> Self {
        Self { options }
    }
}

impl Quantizer for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn description(&self) -> &'static str {
        "round to nearest after scaling inputs and clipping ranges by what activations say"
    }

    fn needs(&self) -> Needs {
        Needs::GROUP_HESSIANS
    }

    fn transforms(&self) -> Vec<Box<dyn Transform>> {
        vec![Box::new(AwqScale::new(self.options))]
    }

    fn layouts(&self) -> &'static [&'static str] {
        &["awq"]
    }

    fn default_spec(&self) -> QuantSpec {
        QuantSpec { symmetric: false, ..QuantSpec::default() }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        affine::validate(spec)?;
        let option = |option, found: String, allowed| Err(SpecError::Option { option, found, allowed });
        if spec.act_order {
            return option("act_order", "true".to_owned(), "false: AWQ rounds columns as they are stored");
        }
        if !(1..=1000).contains(&self.options.steps) {
            return option("n_grid", self.options.steps.to_string(), "1 to 1000");
        }
        if self.options.tokens == 0 {
            return option("search_tokens", "0".to_owned(), "at least 1");
        }
        Ok(())
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize {
        // Results pile up while the weights of later layers wait.
        let weights: usize = shapes.iter().map(|(rows, cols)| 4 * rows * cols).sum();
        let results: usize = shapes.iter().map(|&(rows, cols)| result_bytes(rows, cols, spec)).sum();
        let grids = shapes.iter().map(|&(rows, cols)| grid_bytes(rows, cols, spec)).max().unwrap_or(0);
        let stats = shapes.first().map_or(0, |&(_, cols)| self.needs().bytes(cols, spec.group.len(cols)));
        let scratch = shapes
            .first()
            .map_or(0, |&(_, cols)| quant_math::awq_search::scratch_bytes(spec.group.len(cols)));
        weights + results + grids + stats + scratch
    }

    fn quantize(
        &self,
        layers: Vec<LayerWeights>,
        stats: LayerStats,
    ) -> Result<Vec<Quantized>, QuantizeError> {
        let layers = affine::checked(self, layers)?;
        let moments = stats.group_hessians.filter(|moments| moments.iter().any(|m| m.rows > 0));
        let each = |(layer, LayerWeights { w, spec }): (usize, LayerWeights)| {
            let start = Instant::now();
            let (fit, len) = (fit(&spec), spec.group.len(w.ncols()));
            let grids = match &moments {
                Some(moments) if self.options.clip => {
                    check_shape(layer, w.ncols(), moments)?;
                    let overflow =
                        |GroupOverflow { row, col, error }: GroupOverflow| QuantizeError::ScaleOverflow {
                            layer,
                            row,
                            col,
                            value: error.value,
                            scale: error.scale,
                        };
                    clipped_grids(w.view(), len, fit, Self::CLIP, moments).map_err(overflow)?
                }
                _ => fit_groups(layer, w.view(), len, fit)?,
            };
            let mut quantized = round_on(layer, w.view(), &spec, fit, &grids)?;
            quantized.report = LayerReport {
                seconds: start.elapsed().as_secs_f64(),
                fallback: moments.is_none().then_some(Fallback::NoCalibration),
                ..quantized.report
            };
            Ok(quantized)
        };
        layers.into_iter().enumerate().map(each).collect()
    }
}

fn check_shape(layer: usize, found: usize, moments: &[Hessian]) -> Result<(), QuantizeError> {
    let expected = moments.iter().map(Hessian::features).sum();
    if expected == found { Ok(()) } else { Err(QuantizeError::StatsShape { layer, expected, found }) }
}
