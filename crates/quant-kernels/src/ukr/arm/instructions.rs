//! Instructions that the standard library does not offer yet.

use std::arch::aarch64::int32x4_t;
use std::arch::asm;

/// `acc[o] + sum over i of a[4 o + i] * b[4 o + i]`, signed bytes.
///
/// # Safety
/// The processor has the dot product.
#[inline(always)]
pub(super) unsafe fn sdot(mut acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: an instruction on registers, which the caller says the processor has.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// [`sdot`] with dword `LANE` of `b` in the place of all.
///
/// # Safety
/// The processor has the dot product.
#[inline(always)]
pub(super) unsafe fn sdot_lane<const LANE: i32>(mut acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: an instruction on registers, which the caller says the processor has.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]", inout(vreg) acc, in(vreg) a, in(vreg) b, const LANE,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// `acc + a · bᵀ` with signed bytes `a, b: [2, 8]` and `acc: [2, 2]`.
///
/// # Safety
/// The processor has the matrix product.
#[inline(always)]
pub(super) unsafe fn smmla(mut acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: an instruction on registers, which the caller says the processor has.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}
