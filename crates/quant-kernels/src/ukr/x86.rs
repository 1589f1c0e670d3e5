//! Kernels of x86-64: 256-bit and 512-bit vectors, with and without `vpdpbusd`.

mod ymm;
mod zmm;

#[cfg(test)]
pub(super) use self::ymm::AVX512_VNNI_YMM;
pub(super) use self::ymm::{AVX_VNNI, AVX2};
pub(super) use self::zmm::{AVX512, AVX512_VNNI};

/// How many products of unsigned codes up to `max` and signed bytes up to 127, in pairs, fit sixteen bits when
/// `most` at most are summed: a power of two.
const fn presums(max: u8, most: usize) -> usize {
    let pair = 2 * 127 * max as usize;
    let mut sums = most;
    while sums > 1 && sums * pair > i16::MAX as usize {
        sums /= 2;
    }
    sums
}
