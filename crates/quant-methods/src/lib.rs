//! Quantization methods: from float weights and calibration statistics to quantized matrices.
#![forbid(unsafe_code)]

mod affine;
pub mod ggml;
pub mod gptq;
mod order;
pub mod quantizer;
pub mod registry;
pub mod rtn;
pub mod stats;

pub use gptq::{ColumnOrder, Compat, Gptq, GptqOptions};
pub use quant_math::{Hessian, HessianSum};
pub use quantizer::{Fallback, LayerReport, LayerWeights, QuantizeError, Quantized, Quantizer};
pub use registry::{METHODS, Method, MethodOptions, UnknownMethod, quantizer};
pub use rtn::{Rtn, RtnOptions};
pub use stats::{LayerStats, Magnitudes, Needs, StatsSum};
