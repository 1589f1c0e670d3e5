//! Value types of a quantized matrix, and what they mean.
//!
//! No input or output, no threads, no SIMD, no algorithm beyond the types' own meaning. A quantizer makes a
//! [`QuantizedMatrix`], a layout reads or writes one, a kernel consumes its [`NormalForm`]; none of the three
//! knows the others. The meaning is one formula, stated at [`QuantizedMatrix`]:
//!
//! ```
//! use quant_core::{Codes, Groups, Offset, Params, QuantizedMatrix};
//!
//! // Two rows of four 4-bit codes; every two columns share a scale and a zero point.
//! let codes = Codes::from_values(4, 2, 4, &[0, 15, 8, 8, 1, 2, 3, 4])?;
//! let scales = Params::F32(vec![0.5, 2.0, 1.0, 1.0]);
//! let zeros = Offset::Zero(Params::U8(vec![8, 7, 0, 4]));
//! let w = QuantizedMatrix::affine(codes, Groups::Row { len: 2 }, scales, zeros, 0);
//! w.validate()?;
//! assert_eq!(w.dequantize().row(0).to_vec(), [-4.0, 3.5, 2.0, 2.0]);
//! assert_eq!(w.normal_form().unwrap().gemv(&[1.0, 1.0, 1.0, 1.0]), [3.5, 2.0]);
//! # Ok::<(), quant_core::MatrixError>(())
//! ```
#![forbid(unsafe_code)]

pub mod codes;
mod dtype;
mod error;
mod grid;
mod groups;
mod linear;
mod matrix;
pub mod minifloat;
mod normal;
mod params;
mod source;
mod spec;
mod topology;

pub use codes::Codes;
pub use dtype::{DType, DenseTensor};
pub use error::{MatrixError, SpecError, TensorError};
pub use grid::{Grid, GridKind};
pub use groups::Groups;
pub use linear::{ActGrid, ActGroup, ActSpec, LinearWeights, LowRank, QuantizedLinear};
pub use matrix::{ColScale, Offset, Outliers, Permutation, QuantizedMatrix};
pub use normal::{NormalForm, Prologue};
pub use params::{Params, ParamsKind};
pub use source::{WeightError, WeightSource};
pub use spec::{GroupSize, QuantSpec};
pub use topology::{NormId, Producer};
