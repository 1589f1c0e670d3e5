//! Quantize language models and run them, on a CPU.
#![forbid(unsafe_code)]

pub mod calibration;
mod config;
mod error;
mod model;
mod progress;
mod quantize;
mod system;

pub use calibration::CalibrationSource;
pub use config::{NonFinite, QuantizeConfig};
pub use error::{Error, Problem};
pub use model::Model;
pub use progress::{Progress, Silent};
pub use quant_core::{GroupSize, QuantSpec};
pub use quant_methods::{ColumnOrder, Compat, GptqOptions, MethodOptions};
pub use quant_model::{Finish, GenerateOptions, Generated, Sampling, Tokenizer};
pub use quantize::{LayerSummary, Plan, PlannedLayer, Summary, plan, quantize};
pub use system::{dense_flops, peak_rss_bytes};
