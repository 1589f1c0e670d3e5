//! Test support for the whole workspace; no released code depends on it.
//!
//! - [`golden`]: reference files written by the libraries whose formats and numbers must be met
//! - [`malformed`]: hostile model files, each with the verdict it must get
//! - [`mutants`]: damaged copies of files, the same ones in every run
//! - [`strategies`]: random quantized matrices for property tests
//! - [`synthetic`]: checkpoints of any shape with random weights, and the `synth` program that writes them
//!
//! ```
//! use quant_testkit::Golden;
//!
//! let golden = Golden::open("base-llama");
//! assert_eq!(golden.f32("logits").shape(), [24, 512]);
//! assert!(golden.dir().join("model.safetensors").exists());
//! ```
#![forbid(unsafe_code)]

pub mod golden;
pub mod malformed;
pub mod mutants;
pub mod strategies;
pub mod synthetic;

pub use golden::{Dequantized, Golden, assets, fixtures_dir};
