//! Kernels of 64-bit ARM: with the base vectors, with `sdot`, with `smmla`.

mod instructions;
mod neon;

pub(super) use self::neon::{NEON, NEON_DOT, NEON_I8MM};
