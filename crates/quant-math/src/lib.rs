//! Numerics of quantization on plain arrays: no model, no file, no method.
//!
//! - [`hessian`] sums second moments of a layer's input and reorders them.
#![forbid(unsafe_code)]

pub mod hessian;

pub use hessian::{Hessian, HessianSum};
