//! One scale and one zero point for a run of weights.

/// Scale and zero point of a group: `w ≈ scale * (code - zero)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    /// Step of the grid; positive and finite.
    pub scale: f32,
    /// The code of zero.
    pub zero: u8,
}

impl Default for Affine {
    /// The identity on codes.
    fn default() -> Self {
        Self { scale: 1.0, zero: 0 }
    }
}

impl Affine {
    /// `clamp(rne(w / scale) + zero, 0, max)` of every weight.
    pub fn quantize(self, max: u8, w: &[f32], codes: &mut [u8]) {
        w.iter().zip(codes).for_each(|(&w, code)| *code = code_bits(self.code(f32::from(max), w)));
    }

    /// `(code - zero) * scale` of every code.
    pub fn dequantize(self, codes: &[u8], w: &mut [f32]) {
        let zero = f32::from(self.zero);
        codes.iter().zip(w).for_each(|(&code, w)| *w = (f32::from(code) - zero) * self.scale);
    }

    /// The weight that takes the place of `w`.
    #[inline(always)]
    pub(crate) fn round(self, max: f32, w: f32) -> f32 {
        (self.code(max, w) - f32::from(self.zero)) * self.scale
    }

    #[inline(always)]
    fn code(self, max: f32, w: f32) -> f32 {
        nearest_code(w, self.scale, f32::from(self.zero), max)
    }
}

/// `clamp(rne(w / scale) + zero, 0, max)` as a float; `zero` and `max` are integers in 0..=255.
///
/// Written for vectors of any width: no call, no branch, no step that a compiler may contract.
#[inline(always)]
pub(crate) fn nearest_code(w: f32, scale: f32, zero: f32, max: f32) -> f32 {
    // Codes span at most 255 steps, so that nothing changes beyond 512, and the rounding below is exact.
    let steps = (w / scale).clamp(-512.0, 512.0);
    (round_ties_even(steps) + zero).max(0.0).min(max)
}

/// Rounds half to even where `|x| < 2^22`: adding `1.5 * 2^23` leaves no bit for a fraction.
/// [`f32::round_ties_even`] is a call, and scalar, on x86-64 without SSE4.1.
#[inline(always)]
pub(crate) fn round_ties_even(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

/// The integer `code` in 0..=255 as a byte: the lowest bits of the significand of `code + 2^23`.
/// A cast saturates, which costs several instructions where there is no vector form of it.
#[inline(always)]
pub fn code_bits(code: f32) -> u8 {
    (code + 8_388_608.0).to_bits() as u8
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn halves_go_to_even() {
        let grid = Affine { scale: 0.5, zero: 8 };
        let w = [0.25, 0.75, -0.25, -0.75, 1.25, -100.0, 100.0, 1e30, -1e30, 0.0];
        let mut codes = [0; 10];
        grid.quantize(15, &w, &mut codes);
        assert_eq!(codes, [8, 10, 8, 6, 10, 0, 15, 15, 0, 8]);
        let mut back = [0.0; 4];
        grid.dequantize(&codes[..4], &mut back);
        assert_eq!(back, [0.0, 1.0, 0.0, -1.0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_fast_rounding_is_the_standard_one(x in -4.0e6f32..4.0e6) {
            for x in [x, x.round() + 0.5, x.round() - 0.5] {
                prop_assert_eq!(round_ties_even(x), x.round_ties_even());
            }
        }

        #[test]
        fn rounding_twice_is_rounding_once(
            w in prop::collection::vec(-3.0f32..3.0, 1..40), scale in 1e-3f32..2.0, zero: u8, bits in 2u32..=8
        ) {
            let max = (255u32 >> (8 - bits)) as u8;
            let grid = Affine { scale, zero: zero & max };
            let (mut once, mut twice, mut back) = (vec![0; w.len()], vec![0; w.len()], vec![0.0; w.len()]);
            grid.quantize(max, &w, &mut once);
            grid.dequantize(&once, &mut back);
            grid.quantize(max, &back, &mut twice);
            prop_assert_eq!(&once, &twice);
            for ((&w, &b), &code) in w.iter().zip(&back).zip(&once) {
                prop_assert_eq!(grid.round(f32::from(max), w), b);
                // Inside the range the nearest grid point is at most half a step away; the quotient carries one
                // rounding, which moves a tie by at most its own size.
                if code > 0 && code < max {
                    prop_assert!((w - b).abs() <= scale * (0.5 + 512.0 * f32::EPSILON), "{} {}", w, b);
                }
            }
        }
    }
}
