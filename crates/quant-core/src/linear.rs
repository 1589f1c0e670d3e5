//! What a linear layer is after quantization.

use ndarray::Array2;

use crate::dtype::DenseTensor;
use crate::matrix::QuantizedMatrix;

/// A quantized linear layer: what formats read and write and models load.
#[derive(Clone, Debug)]
pub struct QuantizedLinear {
    /// Weight `[out, in]`.
    pub weight: QuantizedMatrix,
    /// Bias `[out]`, with the type it has on disk.
    pub bias: Option<DenseTensor>,
    /// What is done to the input first.
    pub input: ActSpec,
    /// A correction of low rank that is added to the product.
    pub low_rank: Option<LowRank>,
}

impl QuantizedLinear {
    /// A layer with float activations and no bias.
    pub fn new(weight: QuantizedMatrix) -> Self {
        Self { weight, bias: None, input: ActSpec::Float, low_rank: None }
    }
}

/// How activations are quantized at the input of a layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ActSpec {
    /// Not at all.
    #[default]
    Float,
    /// With a scale found at run time.
    Dynamic {
        /// Target of the rounding.
        grid: ActGrid,
        /// Elements that share a scale.
        per: ActGroup,
        /// No zero point.
        symmetric: bool,
        /// LLM.int8: features with an element of at least this magnitude stay float.
        outlier_threshold: Option<f32>,
    },
    /// With scales of blocks found at run time, under a factor found by calibration (NVFP4).
    TwoLevel {
        /// Target of the rounding.
        grid: ActGrid,
        /// Features in a block.
        len: usize,
        /// Factor of the scales of blocks, or what they are divided by.
        factor: f32,
        /// Divide by the factor.
        divide: bool,
    },
    /// With a scale found by calibration.
    Static {
        /// Target of the rounding.
        grid: ActGrid,
        /// Step.
        scale: f32,
        /// Zero point.
        zero: i32,
    },
}

/// Values that quantized activations take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActGrid {
    /// Signed eight-bit integers.
    Int8,
    /// FP8 E4M3.
    E4M3,
    /// The 4-bit float of MXFP4 and NVFP4.
    E2M1,
}

/// Activations that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActGroup {
    /// All of a call.
    Tensor,
    /// Each token.
    Token,
    /// This many features of each token.
    Columns(usize),
}

/// `y += scale * b (a x)`: LoRA, or EoRA error repair.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// `[rank, in]`.
    pub a: Array2<f32>,
    /// `[out, rank]`.
    pub b: Array2<f32>,
    /// Factor.
    pub scale: f32,
}

/// The weights of a linear layer as a checkpoint holds them.
#[derive(Clone, Debug)]
pub enum LinearWeights {
    /// Floats. `weight` is `[out, in]`, or `[in, out]` in checkpoints with `Conv1D` layers.
    Dense {
        /// Weight.
        weight: DenseTensor,
        /// Bias `[out]`.
        bias: Option<DenseTensor>,
    },
    /// Codes; always `[out, in]`.
    Quantized(Box<QuantizedLinear>),
}
