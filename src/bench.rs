//! How fast this machine is, and at what.

mod kernels;
mod model;

use quant_kernels::isa;
use quant_kernels::roof::Roof;
use serde::Serialize;

pub use self::kernels::{KernelReport, KernelRow, KernelShape, bench_kernels};
pub use self::model::{Speed, bench_model};

/// What the machine can do at most.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Instruction set in use.
    pub isa: &'static str,
    /// Threads in use.
    pub threads: usize,
    /// Memory read by all threads, GB/s.
    pub read_gb_s: f64,
    /// Eight-bit dot products of all threads, 10^12 operations (multiplications and additions) a second.
    pub int8_tops: f64,
    /// The same for products of bf16 (of f32 where the processor has none).
    pub bf16_tflops: f64,
    /// The same for products of f32.
    pub f32_tflops: f64,
}

impl Machine {
    /// Measures it, in about a second.
    pub fn measure() -> Machine {
        Machine::of(&Roof::measure())
    }

    /// With limits that have been measured.
    fn of(roof: &Roof) -> Machine {
        Machine {
            isa: isa::active().name(),
            threads: rayon::current_num_threads(),
            read_gb_s: roof.read / 1e9,
            int8_tops: roof.int8 / 1e12,
            bf16_tflops: roof.bf16 / 1e12,
            f32_tflops: roof.f32 / 1e12,
        }
    }
}
