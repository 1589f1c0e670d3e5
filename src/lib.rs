//! Quantize language and embedding models and run them, on a CPU.
#![forbid(unsafe_code)]

mod bench;
pub mod calibration;
mod config;
mod convert;
mod dequantize;
mod embed;
mod error;
mod hash;
mod inspect;
mod lint;
mod model;
mod progress;
mod quantize;
pub mod registry;
mod synthetic;
mod system;
mod verify;

pub use bench::{KernelReport, KernelRow, KernelShape, Machine, Speed, bench_kernels, bench_model};
pub use calibration::CalibrationSource;
pub use config::{NonFinite, QuantizeConfig};
pub use convert::{Conversion, ConvertConfig, ConvertedLayer, Verdict, convert};
pub use dequantize::{DequantizeConfig, Dequantized, dequantize};
pub use embed::{Embedded, Embedder, EncoderModel, is_encoder};
pub use error::{Error, Problem};
pub use inspect::{Inspection, bits_per_weight, inspect};
pub use lint::lint;
pub use model::Model;
pub use progress::{Progress, Silent};
pub use quant_core::{GridKind, GroupSize, QuantSpec};
pub use quant_formats::{
    Finding, FormatError, Severity, npy_f32, read_npy_ids, remove_unfinished, resolve_model, write_file,
    write_safetensors,
};
pub use quant_kernels::isa::IsaError;
pub use quant_methods::{
    Activations, AwqOptions, Bnb4Options, ColumnOrder, Compat, GptqOptions, HqqOptions, LlmInt8Options,
    MethodOptions, Observer, Proximal, ProximalVersion, QuantoOptimizer, QuantoOptions, QuantoType,
    SinqOptions, SinqRounding, W8a8Options,
};
pub use quant_model::{
    ChatTemplate, Compute, Finish, GenerateOptions, Generated, Message, Pooling, Sampling, TemplateError,
    Tokenizer,
};
pub use quantize::{LayerSummary, Plan, PlannedLayer, Summary, plan, quantize};
pub use registry::{Entry, Info, check_environment, info};
pub use synthetic::{RandomLayout, RandomWeights, SHAPES, Shape, synthetic};
pub use system::{dense_flops, peak_rss_bytes};
pub use verify::{Verification, verify};
