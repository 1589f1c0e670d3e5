//! Numerics of quantization on plain arrays: no model, no file, no method.
//!
//! - [`hessian`] sums second moments of a layer's input and reorders them.
#![forbid(unsafe_code)]

pub mod affine;
pub mod cholesky;
pub mod hessian;
pub mod obq;
pub mod range;

pub use affine::Affine;
pub use hessian::{Hessian, HessianSum};
pub use range::{GridFit, ScaleOverflow, ScaleRule};
