//! What every quantization method offers: the trait, its inputs, its results.

use ndarray::Array2;
use quant_core::{ActSpec, MatrixError, QuantSpec, QuantizedMatrix, SpecError};

use crate::stats::{LayerStats, Needs};
use crate::transform::Transform;

/// A quantization method: linear layers in, quantized matrices out.
///
/// Pure and deterministic: no file, no tensor name, no global state, and the same bytes for any number of threads
/// (work runs on the current rayon pool).
pub trait Quantizer: Send + Sync {
    /// The name in the registry, on the command line and in reports.
    fn name(&self) -> &'static str;

    /// One line for `list` and `--help`.
    fn description(&self) -> &'static str;

    /// The calibration statistics that [`Quantizer::quantize`] uses.
    fn needs(&self) -> Needs;

    /// Rewritings of the model that the method begins with, in order.
    fn transforms(&self) -> Vec<Box<dyn Transform>> {
        Vec::new()
    }

    /// Layouts in which its results are expected, best first: the first that can store them is written unless another
    /// is asked for. Empty: any.
    fn layouts(&self) -> &'static [&'static str] {
        &[]
    }

    /// How the inputs of layers are quantized when they run, from what calibration tells of them. The kind does not depend
    /// on it: without statistics, only the numbers of static scales are missing.
    fn input(&self, _stats: &LayerStats) -> ActSpec {
        ActSpec::Float
    }

    /// What this method does when nothing is asked for; agrees with its options.
    fn default_spec(&self) -> QuantSpec;

    /// Checks that this method, with its options, can follow `spec`.
    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError>;

    /// Most bytes that one call holds at once: weights and statistics handed in, scratch and results.
    ///
    /// `shapes`: `[out, in]` of the layers of one call. Buffers of the dense product (some MB) are not counted.
    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize;

    /// Quantizes layers that share one input, so that the work on `stats` is done once for all of them.
    ///
    /// The results are in the order of `layers`. Errors carry the index of the layer.
    fn quantize(&self, layers: Vec<LayerWeights>, stats: LayerStats)
    -> Result<Vec<Quantized>, QuantizeError>;
}

/// A layer to be quantized.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// Weights `[out, in]`; consumed, so that no second copy is needed.
    pub w: Array2<f32>,
    /// What to make of them.
    pub spec: QuantSpec,
}

/// A quantized layer and what it cost.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The result `[out, in]`.
    pub matrix: QuantizedMatrix,
    /// Errors, time and choices made.
    pub report: LayerReport,
}

/// How the quantization of a layer went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerReport {
    /// `‖W - Ŵ‖ / ‖W‖` (Frobenius); 0 for an all-zero matrix.
    pub rel_error: f64,
    /// Mean over the calibration vectors of `‖(W - Ŵ) x‖²`, damping not counted. `None` without a Hessian.
    pub loss: Option<f64>,
    /// The damping used, as a fraction of the mean of the Hessian's diagonal.
    pub damp: Option<f64>,
    /// Factorizations that failed before one succeeded.
    pub retries: usize,
    /// Wall time in seconds. Work shared by the layers of a call is counted for the first of them.
    pub seconds: f64,
    /// Why a simpler method was used instead.
    pub fallback: Option<Fallback>,
}

/// Why plain rounding took the place of a calibrated method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fallback {
    /// No input vector reached the layer.
    #[error("no calibration input reached this layer")]
    NoCalibration,
    /// The statistics hold NaN or infinity.
    #[error("the calibration statistics are not finite")]
    NonFiniteHessian,
    /// No damping makes the Hessian positive definite.
    #[error("the calibration statistics are not positive definite at any damping")]
    NotPositiveDefinite,
}

/// A layer cannot be quantized.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// A weight is NaN or infinite.
    #[error("weight [{row}, {col}] is {value}, not finite; repair the checkpoint or zero such weights")]
    NonFinite {
        /// Index into the layers of the call.
        layer: usize,
        /// Output.
        row: usize,
        /// Input.
        col: usize,
        /// The weight.
        value: f32,
    },
    /// A group spans more than f16 scales can express.
    #[error(
        "weight [{row}, {col}] is {value:e}: its group needs the scale {scale:e}, above the largest f16 (65504); \
         use more bits or leave this layer unquantized"
    )]
    ScaleOverflow {
        /// Index into the layers of the call.
        layer: usize,
        /// Output.
        row: usize,
        /// Input.
        col: usize,
        /// The weight of the greatest magnitude in the group.
        value: f32,
        /// The scale.
        scale: f32,
    },
    /// The method cannot follow the specification.
    #[error("{source}")]
    Spec {
        /// Index into the layers of the call.
        layer: usize,
        /// What is wrong.
        source: SpecError,
    },
    /// The statistics belong to another input.
    #[error("the layer has {found} inputs, the calibration statistics have {expected}")]
    StatsShape {
        /// Index into the layers of the call.
        layer: usize,
        /// Inputs of the statistics.
        expected: usize,
        /// Inputs of the layer.
        found: usize,
    },
    /// The result cannot be held.
    #[error("{source}")]
    Matrix {
        /// Index into the layers of the call.
        layer: usize,
        /// What is wrong.
        source: MatrixError,
    },
}

impl QuantizeError {
    /// Index, into the layers of the call, of the one that failed.
    pub fn layer(&self) -> usize {
        match *self {
            QuantizeError::NonFinite { layer, .. }
            | QuantizeError::ScaleOverflow { layer, .. }
            | QuantizeError::Spec { layer, .. }
            | QuantizeError::StatsShape { layer, .. }
            | QuantizeError::Matrix { layer, .. } => layer,
        }
    }
}
