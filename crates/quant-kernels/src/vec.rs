//! Operations on rows of f32, with the same bits on every instruction set.
//!
//! Elementwise operations are one expression per element. Sums run in [`LANES`] partial sums, element `i` in
//! number `i % LANES`, which are folded in halves; so the order of additions depends on the length alone. Fused
//! multiply-adds are used where the formula shows one and nowhere else. Exponentials are polynomials of this
//! crate ([`math`]), since the system's differ from machine to machine.

mod activation;
mod convert;
mod math;
mod norm;
mod reduce;

pub use activation::{add, axpy, gelu_erf, gelu_tanh, relu, rope, silu, silu_mul};
pub use convert::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use norm::{layer_norm, rms_norm, softmax};
pub use reduce::{absmax, dot, log_sum_exp};

pub(crate) use norm::softmax_body;

use crate::error::ShapeError;
use crate::isa;
use crate::simd::{self, Vector, Work};

/// Partial sums of a reduction, whatever the vector width.
pub const LANES: usize = 16;

/// Runs `body` compiled for the active instruction set. `body` must be an `#[inline(always)]` function item: a
/// closure may be compiled on its own, without the target features.
fn apply<A, R>(arguments: A, body: impl FnOnce(A) -> R) -> R {
    struct Apply<A, F> {
        arguments: A,
        body: F,
    }
    impl<A, R, F: FnOnce(A) -> R> Work for Apply<A, F> {
        type Output = R;

        #[inline(always)]
        fn run<V: Vector>(self, _: V) -> R {
            (self.body)(self.arguments)
        }
    }
    simd::run(isa::active(), Apply { arguments, body })
}

fn check_length(operand: &'static str, expected: usize, found: usize) -> Result<(), ShapeError> {
    if expected == found { Ok(()) } else { Err(ShapeError::Length { operand, expected, found }) }
}

#[cfg(test)]
mod tests;
