//! Fast, exact and deterministic f32 kernels: the only crate of the project with vector instructions.
//!
//! - [`isa`] finds out what the processor can do;
//! - [`dense`] multiplies matrices;
//! - [`packed`] multiplies by quantized matrices;
//! - [`attention`] attends to cached keys and values;
//! - [`mod@vec`] normalises, activates, converts rows;
//! - [`pool`] runs regions of microseconds on several threads.
//!
//! Every function gives the same bits on every instruction set and for every number of threads. Work is split
//! over the current rayon pool.

pub mod attention;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dense;
pub mod error;
pub mod isa;
mod mem;
pub mod packed;
pub mod pool;
pub mod roof;
mod scratch;
mod simd;
mod ukr;
pub mod vec;

pub use attention::{Heads, KvStore, KvType, Mask, attend, attend_stored};
pub use dense::{
    DensePanels, DenseView, HalfView, gemm_nt, matmul_nn, matmul_nt, matmul_nt_bf16, matmul_nt_half,
    mirror_upper_to_lower, syrk_tn_acc,
};
pub use error::ShapeError;
pub use isa::Isa;
pub use packed::{ActScales, Activations, Input, PackError, PackedMatrix, matmul_all};
pub use simd::vectorized;

/// So many cases of a property, fewer where `PROPTEST_CASES` says so: emulated processors are slow.
#[cfg(test)]
pub(crate) fn at_most(cases: u32) -> proptest::prelude::ProptestConfig {
    let config = proptest::prelude::ProptestConfig::default();
    proptest::prelude::ProptestConfig { cases: config.cases.min(cases), ..config }
}
