//! Kernels of x86-64: 256-bit and 512-bit vectors, with and without `vpdpbusd`.

mod ymm;
mod zmm;

#[cfg(test)]
pub(super) use self::ymm::AVX512_VNNI_YMM;
pub(super) use self::ymm::{AVX_VNNI, AVX2};
pub(super) use self::zmm::{AVX512, AVX512_VNNI};
