//! Quantization methods: from float weights and calibration statistics to quantized matrices.
#![forbid(unsafe_code)]

pub mod gptq;
pub mod quantizer;

pub use gptq::{ColumnOrder, Compat, GptqOptions};
pub use quant_math::{Hessian, HessianSum};
pub use quantizer::{
    Fallback, LayerReport, LayerStats, LayerWeights, Needs, QuantizeError, Quantized, Quantizer,
};
