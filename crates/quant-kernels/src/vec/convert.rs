//! Conversion between f32 and the 16-bit formats, with the bits of the `half` crate.

use half::{bf16, f16};

use super::{Operation, apply, check_length};
use crate::error::ShapeError;
use crate::isa;
use crate::simd::{self, Vector, Work};

/// Widens binary16.
pub fn f16_to_f32(x: &[f16], out: &mut [f32]) -> Result<(), ShapeError> {
    struct Widen<'a>(&'a [f16], &'a mut [f32]);
    impl Work for Widen<'_> {
        type Output = ();

        #[inline(always)]
        fn run<V: Vector>(self, simd: V) {
            simd.widen(self.0, self.1);
        }
    }
    check_length("out", x.len(), out.len())?;
    simd::run(isa::active(), Widen(x, out));
    Ok(())
}

/// Widens bfloat16.
pub fn bf16_to_f32(x: &[bf16], out: &mut [f32]) -> Result<(), ShapeError> {
    check_length("out", x.len(), out.len())?;
    apply(WidenBf16 { x, out });
    Ok(())
}

struct WidenBf16<'a> {
    x: &'a [bf16],
    out: &'a mut [f32],
}

impl Operation for WidenBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            let bits = u32::from(x.to_bits()) << 16;
            let quiet = if bits & 0x7fff_ffff > 0x7f80_0000 { 0x0040_0000 } else { 0 };
            *out = f32::from_bits(bits | quiet);
        }
    }
}

/// Rounds to bfloat16, ties to even.
pub fn f32_to_bf16(x: &[f32], out: &mut [bf16]) -> Result<(), ShapeError> {
    check_length("out", x.len(), out.len())?;
    apply(NarrowBf16 { x, out });
    Ok(())
}

struct NarrowBf16<'a> {
    x: &'a [f32],
    out: &'a mut [bf16],
}

impl Operation for NarrowBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            let bits = x.to_bits();
            // Half of the last kept bit, and one more where that bit is set: ties round to even.
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            let nan = bits >> 16 | 0x0040;
            *out = bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded } as u16);
        }
    }
}

/// Rounds to binary16, ties to even.
pub fn f32_to_f16(x: &[f32], out: &mut [f16]) -> Result<(), ShapeError> {
    check_length("out", x.len(), out.len())?;
    apply(NarrowF16 { x, out });
    Ok(())
}

struct NarrowF16<'a> {
    x: &'a [f32],
    out: &'a mut [f16],
}

impl Operation for NarrowF16<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = f16::from_bits(narrow_f16(*x));
        }
    }
}

/// binary32 to binary16 without branches.
#[inline(always)]
pub(crate) fn narrow_f16(x: f32) -> u16 {
    let sign = x.to_bits() >> 16 & 0x8000;
    let bits = x.to_bits() & 0x7fff_ffff;
    // Normal results: move the exponent, round the 13 bits that fall off to even; too large ones carry into
    // infinity.
    let normal = bits.wrapping_sub(112 << 23).wrapping_add(0x0fff + (bits >> 13 & 1)) >> 13;
    let normal = if normal > 0x7c00 { 0x7c00 } else { normal };
    // Subnormal results: adding 0.5 makes their unit, 2^-24, the last bit of the sum, which the addition rounds.
    let subnormal = (f32::from_bits(bits) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
    let finite = if bits < 0x3880_0000 { subnormal } else { normal };
    let nan = 0x7e00 | bits >> 13 & 0x03ff;
    let magnitude = if bits > 0x7f80_0000 { nan } else { finite };
    (magnitude | sign) as u16
}
