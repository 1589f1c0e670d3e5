//! Operations on rows of f32, with the same bits on every instruction set.
//!
//! Elementwise operations are one expression per element. Sums run in [`LANES`] partial sums, element `i` in
//! number `i % LANES`, which are folded in halves; so the order of additions depends on the length alone. Fused
//! multiply-adds are used where the formula shows one and nowhere else. Exponentials are polynomials of this
//! crate (`math`), since the system's differ from machine to machine.

mod activation;
mod convert;
mod math;
mod norm;
mod reduce;

pub use activation::{add, axpy, gelu_erf, gelu_tanh, relu, rope, silu, silu_mul};
pub use convert::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use norm::{layer_norm, rms_norm, softmax};
pub use reduce::{absmax, dot, log_sum_exp};

pub(crate) use convert::narrow_f16;
pub(crate) use norm::softmax_visible;
pub(crate) use reduce::absmax_of;

use crate::error::ShapeError;
use crate::isa;
use crate::simd::{self, Vector, Work};

/// Partial sums of a reduction, whatever the vector width.
pub const LANES: usize = 16;

/// An operation with its arguments. `run` is `#[inline(always)]` and loops plainly: a function or closure that is
/// not inlined is compiled without the target features.
trait Operation {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs an operation compiled for the active instruction set.
fn apply<O: Operation>(operation: O) -> O::Output {
    struct Apply<O>(O);
    impl<O: Operation> Work for Apply<O> {
        type Output = O::Output;

        #[inline(always)]
        fn run<V: Vector>(self, _: V) -> O::Output {
            self.0.run()
        }
    }
    simd::run(isa::active(), Apply(operation))
}

fn check_length(operand: &'static str, expected: usize, found: usize) -> Result<(), ShapeError> {
    if expected == found { Ok(()) } else { Err(ShapeError::Length { operand, expected, found }) }
}

#[cfg(test)]
mod tests;
