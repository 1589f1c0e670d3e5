//! Numerics of quantization on plain arrays: no model, no file, no method.
//!
//! - [`range`] finds scale and zero point of a group, [`affine`] rounds with them;
//! - [`hessian`] sums second moments of a layer's input, [`cholesky`] factors them, [`damping`] sees to it that this
//!   succeeds;
//! - [`histogram`] counts magnitudes of activations, and finds where to clip them;
//! - [`obq`] is the column loop of GPTQ, [`awq_search`] what AWQ looks for;
//! - [`grouped`] hands out the weights of a matrix by group, [`proximal`] finds HQQ's zero points;
//! - [`sinkhorn`] evens out a matrix for SINQ, [`codebook`] finds the nearest value of a table.
//!
//! Everything works in place where matrices are large, runs on the current rayon pool, and gives the same bits for
//! any number of threads: work is cut at fixed places and summed in a fixed order. Loops outside the dense kernels
//! multiply and add in two roundings, because a fused operation is a function call on processors without it.
//!
//! ```
//! use ndarray::array;
//! use quant_math::obq::{GroupTiming, Grouping, round_columns};
//! use quant_math::{Cholesky, GridFit, HessianSum, ScaleRule};
//!
//! let mut w = array![[0.9f32, -0.31, 0.2, 0.05], [0.1, 0.4, -0.8, 0.3]];
//! let mut sum = HessianSum::new(4);
//! sum.accumulate(array![[1.0f32, 0.9, 0.1, 0.0], [0.5, 0.4, -1.0, 0.2]].view())?;
//! let mut h = sum.finish().matrix;
//! h.diag_mut().iter_mut().for_each(|d| *d += 0.05);
//! quant_math::cholesky::Blocked.reverse_factor(h.view_mut())?;
//!
//! let fit = GridFit { bits: 4, symmetric: true, mse: None, scales: ScaleRule::StoredF16 };
//! let grouping = Grouping::Fitted { len: 2, fit, timing: GroupTiming::Reached };
//! let rounded = round_columns(w.view_mut(), h.view(), 128, grouping)?;
//! assert_eq!(rounded.codes.dim(), (2, 4));
//! let mut back = [0.0; 2];
//! rounded.grids[[0, 1]].dequantize(&[rounded.codes[[0, 2]], rounded.codes[[0, 3]]], &mut back);
//! assert_eq!(w[[0, 2]], 0.2 - back[0], "`w` now holds the errors");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub mod affine;
pub mod awq_search;
pub mod cholesky;
pub mod codebook;
pub mod damping;
pub mod grouped;
pub mod hessian;
pub mod histogram;
pub mod obq;
pub mod proximal;
pub mod range;
pub mod sinkhorn;

pub use affine::Affine;
pub use cholesky::Cholesky;
pub use codebook::Codebook;
pub use grouped::Grouped;
pub use hessian::{Hessian, HessianSum};
pub use histogram::Histogram;
pub use proximal::{Proximal, ZeroGrid};
pub use quant_kernels::ShapeError;
pub use range::{GridFit, ScaleOverflow, ScaleRule};
