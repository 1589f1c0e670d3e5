//! What a plan and a finished run report.

use std::collections::BTreeMap;

use quant_methods::LayerReport;
use serde::Serialize;

use super::job::{Job, Target};
use crate::error::Problem;

/// What would happen.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Every tensor of the checkpoint that is kept, and every layer that is quantized.
    pub tensors: Vec<PlannedLayer>,
    /// Name of the method.
    pub method: String,
    /// Id of the layout written.
    pub layout: String,
    /// Bytes of all tensors in the checkpoint.
    pub bytes_in: u64,
    /// Exact bytes of the safetensors files that will be written.
    pub bytes_out: u64,
    /// Bits per weight of the quantized layers, with scales, zeros and indices.
    pub bits_per_weight: f64,
    /// Calibration tokens that will be used (an upper bound where a text has still to be tokenized).
    pub calibration_tokens: usize,
    /// Predicted peak of resident memory.
    pub peak_rss_bytes: u64,
    /// Predicted wall time.
    pub seconds: f64,
    /// Whatever stands in the way. Nothing starts unless this is empty.
    pub problems: Vec<Problem>,
}

/// A line of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct PlannedLayer {
    /// Module path of a quantized layer, or name of a tensor that is kept.
    pub name: String,
    /// Shape of the weight, `[out, in]`.
    pub shape: Vec<usize>,
    /// Name of the method; `keep` for what is carried over.
    pub method: String,
    /// Bits per code, or of an element that is kept.
    pub bits: usize,
    /// Bytes in the output.
    pub bytes: u64,
}

/// What a run did.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Name of the method.
    pub method: String,
    /// Bits per code.
    pub bits: u8,
    /// Columns per group, -1 for whole rows.
    pub group_size: i64,
    /// Id of the layout written.
    pub layout: String,
    /// Every quantized layer, in the order of the work.
    pub layers: Vec<LayerSummary>,
    /// Layers for which a simpler method was used.
    pub fallbacks: usize,
    /// Weights that were not finite and were replaced with zero.
    pub zeroed: usize,
    /// Calibration tokens used.
    pub calibration_tokens: usize,
    /// Bytes of all tensors in the checkpoint.
    pub bytes_in: u64,
    /// Bytes of the safetensors files written.
    pub bytes_out: u64,
    /// Bits per weight of the quantized layers.
    pub bits_per_weight: f64,
    /// Wall time.
    pub seconds: f64,
    /// Peak of resident memory of this process so far (0 where the system does not tell).
    pub peak_rss_bytes: u64,
    /// SHA-256 of every file written.
    pub sha256: BTreeMap<String, String>,
}

impl Summary {
    /// Share of the layers for which a simpler method was used.
    pub fn fallback_share(&self) -> f64 {
        self.fallbacks as f64 / self.layers.len().max(1) as f64
    }
}

/// A quantized layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerSummary {
    /// Module path.
    pub name: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Name of the method.
    pub method: String,
    /// Bits per code.
    pub bits: u8,
    /// Columns per group, -1 for whole rows.
    pub group_size: i64,
    /// Relative error of the weights, `‖W - Ŵ‖ / ‖W‖`.
    pub rel_error: f64,
    /// Mean squared output error on the calibration data, if there were any.
    pub loss: Option<f64>,
    /// Damping used.
    pub damp: Option<f64>,
    /// Factorizations that failed before one succeeded.
    pub retries: usize,
    /// Wall time.
    pub seconds: f64,
    /// Why a simpler method was used, if one was.
    pub fallback: Option<String>,
}

impl LayerSummary {
    pub(crate) fn new(target: &Target, job: &Job<'_>, report: LayerReport) -> Self {
        Self {
            name: target.module.clone(),
            shape: [target.rows, target.cols],
            method: job.config.method.clone(),
            bits: job.spec.bits,
            group_size: job.spec.group.as_config(),
            rel_error: report.rel_error,
            loss: report.loss,
            damp: report.damp,
            retries: report.retries,
            seconds: report.seconds,
            fallback: report.fallback.map(|f| f.to_string()),
        }
    }
}
