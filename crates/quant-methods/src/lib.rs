//! Quantization methods: from float weights and calibration statistics to quantized matrices.
#![forbid(unsafe_code)]

mod affine;
mod aux8;
pub mod awq;
pub mod bnb;
pub mod floats;
pub mod ggml;
pub mod gptq;
pub mod hqq;
mod order;
pub mod quantizer;
pub mod quanto;
pub mod registry;
pub mod rtn;
pub mod sinq;
pub mod smoothquant;
pub mod stats;
pub mod transform;
pub mod w8a8;

pub use awq::{Awq, AwqOptions, AwqScale};
pub use bnb::{Bnb4, Bnb4Options, LlmInt8, LlmInt8Options};
pub use floats::Floats;
pub use gptq::{ColumnOrder, Compat, Gptq, GptqOptions};
pub use hqq::{Hqq, HqqOptions};
pub use quant_math::proximal::{Proximal, ProximalVersion};
pub use quant_math::{Hessian, HessianSum};
pub use quantizer::{Fallback, LayerReport, LayerWeights, QuantizeError, Quantized, Quantizer};
pub use quanto::{Quanto, QuantoOptimizer, QuantoOptions, QuantoType};
pub use registry::{METHODS, Method, MethodOptions, TRANSFORMS, TransformEntry, UnknownMethod, quantizer};
pub use rtn::{Rtn, RtnOptions};
pub use sinq::{Sinq, SinqOptions, SinqRounding};
pub use smoothquant::SmoothQuant;
pub use stats::{LayerStats, Magnitudes, Needs, StatsSum};
pub use transform::{Rewrite, Stage, StageRunner, Stopped, Transform};
pub use w8a8::{Activations, Observer, W8a8, W8a8Options};
