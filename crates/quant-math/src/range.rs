//! Finding a scale and a zero point for a group of weights.

use half::f16;
use quant_kernels::vectorized;

use crate::affine::Affine;

/// Where a search for the best range stops: the range shrinks in steps of 1 % to 21 % of its width.
const SHRINK_STEPS: usize = 80;

/// How the grid of a group follows from its weights (`find_params` of the GPTQ family).
///
/// The range is `[min(w, 0), max(w, 0)]`, for a symmetric grid `[-a, a]` with `a = max |w|`, and `[-1, 1]` where all
/// weights are zero. `scale = range / (2^bits - 1)`; `zero = rne(-min / scale)`, or the middle `2^(bits-1)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GridFit {
    /// Bits per code, 1 to 8.
    pub bits: u8,
    /// The zero point is the middle of the codes.
    pub symmetric: bool,
    /// Shrink the range for the least `Σ |w - ŵ|^norm`. For 2-bit asymmetric grids both integers next to the ideal
    /// zero point are tried.
    pub mse: Option<f32>,
    /// What the scales are for.
    pub scales: ScaleRule,
}

/// Precision of the scales that codes are chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleRule {
    /// Rounded to f16 before zero point and codes are found, so that these are the best for what is stored. A scale
    /// below the least f16 becomes it (2^-24), one above the largest is an error.
    StoredF16,
    /// As GPTQModel: f32 (but within what f16 can hold), and a symmetric range with no negative weight stays `[0, a]`, which then clips the upper
    /// half of it.
    GptqModel,
}

/// A group's scale is not a finite f16.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error(
    "element {index} of the group is {value:e}, which needs the scale {scale:e}, above the largest f16 (65504)"
)]
pub struct ScaleOverflow {
    /// Index in the group of the weight of the greatest magnitude.
    pub index: usize,
    /// That weight.
    pub value: f32,
    /// The scale.
    pub scale: f32,
}

impl GridFit {
    /// The largest code.
    pub fn max_code(&self) -> u8 {
        (255u32 >> (8 - u32::from(self.bits.clamp(1, 8)))) as u8
    }

    /// The grid of a group of finite weights.
    pub fn fit(&self, w: &[f32]) -> Result<Affine, ScaleOverflow> {
        let (low, high) = self.range(w);
        let mut best = self.grid(low, high).map_err(|scale| {
            let extreme = w.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
            let (index, &value) = extreme.unwrap_or((0, &0.0));
            ScaleOverflow { index, value, scale }
        })?;
        if let Some(norm) = self.mse {
            best = vectorized(
                #[inline(always)]
                || self.search(w, low, high, norm).unwrap_or(best),
            );
        }
        Ok(best)
    }

    /// The grid over the part of the range that loses least.
    #[inline(always)]
    fn search(&self, w: &[f32], low: f32, high: f32, norm: f32) -> Option<Affine> {
        let max = f32::from(self.max_code());
        // Relative to the range, so that no power under- or overflows.
        let unit = 1.0 / (high - low);
        let (mut best, mut least) = (None, f32::INFINITY);
        for step in 0..SHRINK_STEPS {
            let part = (1.0 - step as f64 / 100.0) as f32;
            // Below the full range only a shrunk one can be, so it does not overflow either.
            let Ok(grid) = self.grid(part * low, part * high) else { continue };
            let other = (self.bits == 2 && !self.symmetric).then(|| other_zero(grid, part * low, max));
            for grid in std::iter::once(grid).chain(other) {
                let error = error(w, grid, max, unit, norm, least);
                if error < least {
                    (least, best) = (error, Some(grid));
                }
            }
        }
        best
    }

    /// The range to be covered; never empty.
    pub(crate) fn range(&self, w: &[f32]) -> (f32, f32) {
        let low = w.iter().fold(0.0f32, |a, &w| a.min(w));
        let high = w.iter().fold(0.0f32, |a, &w| a.max(w));
        let (low, high) = match (self.symmetric, self.scales) {
            (false, _) => (low, high),
            (true, ScaleRule::GptqModel) if low == 0.0 => (0.0, high),
            (true, _) => (-high.max(-low), high.max(-low)),
        };
        if low == 0.0 && high == 0.0 { (-1.0, 1.0) } else { (low, high) }
    }

    /// The grid over a range, or the scale if it is too large.
    pub(crate) fn grid(&self, low: f32, high: f32) -> Result<Affine, f32> {
        let max = f32::from(self.max_code());
        let exact = (high - low) / max;
        let stored = f16::from_f32(exact).max(f16::MIN_POSITIVE_SUBNORMAL);
        if !stored.is_finite() {
            return Err(exact);
        }
        let scale = match self.scales {
            ScaleRule::StoredF16 => stored.to_f32(),
            ScaleRule::GptqModel => exact.max(f32::MIN_POSITIVE),
        };
        let zero = if self.symmetric {
            self.max_code() / 2 + 1
        } else {
            (-low / scale).round_ties_even().clamp(0.0, max) as u8
        };
        Ok(Affine { scale, zero })
    }
}

/// `Σ |unit (w - ŵ)|^norm`, or a partial sum that has reached `limit`.
#[inline(always)]
fn error(w: &[f32], grid: Affine, max: f32, unit: f32, norm: f32, limit: f32) -> f32 {
    let of = |w: f32| power((grid.round(max, w) - w).abs() * unit, norm);
    // Eight sums, for vectors of up to eight: one sum is a chain of additions, each waiting for the last.
    let mut sums = [0.0f32; 8];
    for part in w.chunks(32) {
        let (eights, rest) = part.as_chunks::<8>();
        for eight in eights {
            sums.iter_mut().zip(eight).for_each(|(sum, &w)| *sum += of(w));
        }
        sums[0] += rest.iter().map(|&w| of(w)).sum::<f32>();
        if total(&sums) >= limit {
            break;
        }
    }
    total(&sums)
}

/// The sum in three steps of independent additions.
#[inline(always)]
fn total(s: &[f32; 8]) -> f32 {
    ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
}

/// `grid` with the other integer next to the ideal zero point `-low / scale`.
fn other_zero(grid: Affine, low: f32, max: f32) -> Affine {
    let ideal = -low / grid.scale;
    let (lower, upper) = (ideal.floor().clamp(0.0, max), ideal.ceil().clamp(0.0, max));
    let other = if f32::from(grid.zero) == lower { upper } else { lower };
    Affine { zero: other as u8, ..grid }
}

/// `x^p` as `2^(p log2 x)`, where that is within 2^-126 to 2^127. Zero counts as 1e-19: it gives at most `1e-38` for
/// `p >= 2`.
///
/// Own code rather than the system's, whose bits differ between machines, and one that the compiler can vectorise.
/// The relative error stays below `|p| * 1e-5`: comparing ranges needs far less.
#[inline(always)]
pub fn power(x: f32, p: f32) -> f32 {
    exp2(p * log2(x.max(1e-19)))
}

/// `log2 x` for normal `x`: with `m = x / 2^e` in `[0.7, 1.4)` and `s = (m-1)/(m+1)`, `e + 2/ln 2 (s + s³/3 + ...)`.
#[inline(always)]
fn log2(x: f32) -> f32 {
    const HALF_SQRT: u32 = 0x3F33_3333; // 0.7
    let shifted = x.to_bits().wrapping_sub(HALF_SQRT);
    let e = (shifted as i32 >> 23) as f32;
    let m = f32::from_bits((shifted & 0x007F_FFFF) + HALF_SQRT);
    let s = (m - 1.0) / (m + 1.0);
    let s2 = s * s;
    // s <= 0.177, so that the first term left out, s^9/9, is 2e-8 of the sum.
    let series = s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0))));
    e + series * (2.0 * std::f32::consts::LOG2_E)
}

/// `2^y` for `y <= 127`, at least `2^-126`; the series of `e^(f ln 2)`, `|f| <= 1/2`, to the sixth power.
#[inline(always)]
fn exp2(y: f32) -> f32 {
    let y = y.clamp(-126.0, 127.0);
    // Rounded as in `affine::round_ties_even`, but the integer is read from the significand.
    let shifted = y + 12_582_912.0;
    let f = (y - (shifted - 12_582_912.0)) * std::f32::consts::LN_2;
    let series = 1.0
        + f * (1.0 + f * (1.0 / 2.0 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f / 720.0)))));
    series * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fit(bits: u8, symmetric: bool) -> GridFit {
        GridFit { bits, symmetric, mse: None, scales: ScaleRule::StoredF16 }
    }

    #[test]
    fn ranges_hold_zero() {
        let f32s = |symmetric| GridFit { scales: ScaleRule::GptqModel, ..fit(4, symmetric) };
        assert_eq!(f32s(false).fit(&[1.0, 3.0]), Ok(Affine { scale: 0.2, zero: 0 }));
        assert_eq!(f32s(false).fit(&[-3.0, -1.0]), Ok(Affine { scale: 0.2, zero: 15 }));
        assert_eq!(f32s(false).fit(&[-1.0, 2.0]), Ok(Affine { scale: 0.2, zero: 5 }));
        assert_eq!(f32s(true).fit(&[-1.0, 3.0]), Ok(Affine { scale: 0.4, zero: 8 }));
        assert_eq!(
            f32s(true).fit(&[1.0, 3.0]),
            Ok(Affine { scale: 0.2, zero: 8 }),
            "the peer does not mirror"
        );
        assert_eq!(f32s(true).fit(&[0.0; 4]), Ok(Affine { scale: 2.0 / 15.0, zero: 8 }));
        assert_eq!(fit(4, true).fit(&[0.75, 3.75]), Ok(Affine { scale: 0.5, zero: 8 }));
        assert_eq!(fit(8, true).fit(&[]).unwrap().zero, 128);
    }

    #[test]
    fn scales_are_finite_f16_or_refused() {
        let tiny = fit(4, true).fit(&[1e-40, -3e-41]).unwrap();
        assert_eq!(tiny.scale, f16::MIN_POSITIVE_SUBNORMAL.to_f32());
        assert_eq!(
            fit(2, false).fit(&[-65504.0, 65504.0]).unwrap().scale,
            f16::from_f32(131008.0 / 3.0).to_f32()
        );
        let error = fit(4, true).fit(&[0.1, -1e30, 2.0]).unwrap_err();
        assert_eq!((error.index, error.value), (1, -1e30));
        assert!(fit(8, false).fit(&[f32::MAX, f32::MIN]).is_err());
    }

    #[test]
    fn the_search_never_loses() {
        // One outlier among many small weights: clipping it pays.
        let mut w: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 / 32.0 - 1.0) * 0.1).collect();
        w[5] = 0.31;
        let squares = |fit: GridFit| -> f64 {
            let grid = fit.fit(&w).unwrap();
            let max = f32::from(fit.max_code());
            w.iter().map(|&w| f64::from(grid.round(max, w) - w).powi(2)).sum()
        };
        for symmetric in [true, false] {
            for bits in [2, 3, 4] {
                let plain = fit(bits, symmetric);
                let searched = GridFit { mse: Some(2.0), ..plain };
                let (searched, plain) = (squares(searched), squares(plain));
                // The search sums 64 powers in f32; each is accurate to 2e-5.
                assert!(searched <= plain * (1.0 + 4e-5), "{bits} bits, symmetric {symmetric}");
                assert!(bits == 4 || searched < 0.9 * plain, "{bits} bits, symmetric {symmetric}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn powers_are_accurate(x in 1e-9f32..2.0, p in -1.0f32..4.0) {
            let exact = f64::from(x).powf(f64::from(p));
            let bound = f64::from(p.abs()) * 1e-5 * exact + f64::from(f32::MIN_POSITIVE);
            prop_assert!((f64::from(power(x, p)) - exact).abs() <= bound, "{} {} {}", x, p, exact);
        }

        #[test]
        fn every_weight_is_within_half_a_step(
            w in prop::collection::vec(-10.0f32..10.0, 1..100), bits in 2u8..=8, symmetric: bool
        ) {
            let fit = fit(bits, symmetric);
            let grid = fit.fit(&w).unwrap();
            let max = f32::from(fit.max_code());
            for w in w {
                // Half a step by rounding. A symmetric grid ends half a step below its range. The zero point of an
                // asymmetric one is rounded, which moves the range by half a step, and the stored scale is up to
                // 2^-11 smaller than the range needs, which the last of `max` steps feels.
                let bound = grid.scale * (1.0 + max / 1024.0);
                prop_assert!((grid.round(max, w) - w).abs() <= bound, "{} {:?}", w, grid);
            }
        }
    }
}
