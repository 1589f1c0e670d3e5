//! Zero points that lose little in the norm `‖w - ŵ‖_p`, `p < 1`: the solver of HQQ.
//!
//! A group's scale stays as it is; its zero point `z` is found by half-quadratic splitting (Badri, Shaji,
//! "Half-Quadratic Quantization of Large Machine Learning Models", 2023). With `S` the inverse scale, a step is
//!
//! ```text
//! q  = clamp(rne(w S + z), 0, max)            codes
//! e  = w - (q - z) / S                        errors
//! e' = sign(e) max(|e| - |e|^(p-1) / β, 0)    the large ones among them, explained as outliers
//! z  = mean of q - (w - e') S over the group
//! ```
//!
//! and steps end when the mean of `|e|` over the whole matrix no longer falls.

use quant_kernels::vectorized;

use crate::affine::round_ties_even;
use crate::grouped::Grouped;
use crate::range::power;

/// The grid of a group: `code = clamp(rne(w * inverse + zero), 0, max)`, `ŵ = (code - zero) / inverse`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ZeroGrid {
    /// Inverse of the scale (`S`); positive and finite.
    pub inverse: f32,
    /// The code of zero (`z`), not necessarily an integer.
    pub zero: f32,
}

impl ZeroGrid {
    /// The code of `w`; `max` is the largest code, at most 255.
    #[inline(always)]
    pub fn code(self, max: f32, w: f32) -> f32 {
        round_ties_even((w * self.inverse + self.zero).clamp(0.0, max))
    }
}

/// Settings of the solver, with the names of the library.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Proximal {
    /// The norm (`lp_norm`), above 0 and at most 1.
    pub lp_norm: f32,
    /// Weight of the penalty (`beta`).
    pub beta: f32,
    /// Growth of `beta` per step (`kappa`); version 2 only.
    pub kappa: f32,
    /// Steps at most (`iters`).
    pub iters: usize,
    /// End when the mean error stops falling (`early_stop`).
    pub early_stop: bool,
    /// Which version of the library's solver.
    pub version: ProximalVersion,
    /// First try scales up to 5 % smaller and larger, in 129 steps, for the codes at the start (`scale_gridsearch`).
    pub scale_search: bool,
}

impl Default for Proximal {
    fn default() -> Self {
        Self { version: ProximalVersion::V2, scale_search: true, ..Self::library() }
    }
}

/// Versions of the solver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProximalVersion {
    /// `beta` stays, and the zero points of the step that did not help are kept.
    Legacy,
    /// `beta` grows, and a step that did not help is undone.
    V2,
}

/// Shrinks errors by `|e|^(p-1) / β`.
#[derive(Clone, Copy)]
struct Shrink {
    exponent: f32,
    inverse_beta: f32,
    /// Errors below are certainly shrunk to zero.
    least: f32,
}

impl Shrink {
    fn new(lp_norm: f32, beta: f32) -> Self {
        // |e| = |e|^(p-1) / β at β^(-1 / (2 - p)); powers are accurate to far less than a thousandth.
        let least = power(beta, -1.0 / (2.0 - lp_norm)) * 0.999;
        Self { exponent: lp_norm - 1.0, inverse_beta: 1.0 / beta, least }
    }

    #[inline(always)]
    fn apply(self, e: f32) -> f32 {
        let size = e.abs();
        (size - self.inverse_beta * power(size, self.exponent)).max(0.0).copysign(e)
    }
}

/// Lanes of a sum: four vectors of eight, then one after the other, the order in which the library adds.
const LANES: usize = 32;

/// The sum of `term(w)`, in the library's order of additions.
#[inline(always)]
fn sum(w: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (blocks, rest) = w.as_chunks::<LANES>();
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(lane, &w)| *lane += term(w));
    }
    let (eights, single) = rest.as_chunks::<8>();
    for eight in eights {
        lanes.iter_mut().zip(eight).for_each(|(lane, &w)| *lane += term(w));
    }
    let mut sum = single.iter().fold(0.0, |sum, &w| sum + term(w));
    for i in 0..8 {
        sum += ((lanes[i] + lanes[i + 8]) + lanes[i + 16]) + lanes[i + 24];
    }
    sum
}

/// The next zero point of a group, and the sum of the errors before it.
#[inline(always)]
fn step(w: &[f32], grid: ZeroGrid, max: f32, shrink: Shrink) -> (f32, f32) {
    let ZeroGrid { inverse, zero } = grid;
    let error = |w: f32| {
        let q = grid.code(max, w);
        w - (q - zero) / inverse
    };
    let errors = sum(w, |w| error(w).abs());
    let largest = w.iter().fold(0.0f32, |largest, &w| largest.max(error(w).abs()));
    let moved = if largest < shrink.least {
        sum(w, |w| grid.code(max, w) - w * inverse)
    } else {
        sum(w, |w| {
            let q = grid.code(max, w);
            let e = w - (q - zero) / inverse;
            q - (w - shrink.apply(e)) * inverse
        })
    };
    (moved / w.len() as f32, errors)
}

impl Proximal {
    /// What the library does unless it is told otherwise.
    pub fn library() -> Self {
        let (iters, early_stop) = (20, true);
        let (version, scale_search) = (ProximalVersion::Legacy, false);
        Self { lp_norm: 0.7, beta: 10.0, kappa: 1.01, iters, early_stop, version, scale_search }
    }

    /// The next zero point of a group, and the sum of `|w - ŵ|` with the present one.
    pub fn step(&self, w: &[f32], grid: ZeroGrid, max: f32) -> (f32, f32) {
        let shrink = Shrink::new(self.lp_norm, self.beta);
        vectorized(
            #[inline(always)]
            || step(w, grid, max, shrink),
        )
    }

    /// Improves the zero points of `grids`, one per group of `w`; with `scale_search` their scales, too.
    pub fn solve(&self, w: Grouped<'_>, grids: &mut [ZeroGrid], max: f32) {
        assert_eq!(grids.len(), w.count(), "one grid per group");
        if w.is_empty() {
            return;
        }
        if self.scale_search {
            let found = w.map(|g, w| better_scale(w, grids[g], max));
            grids.iter_mut().zip(found).for_each(|(grid, inverse)| grid.inverse = inverse);
        }
        let (mut beta, mut best) = (self.beta, f32::INFINITY);
        let mut before: Vec<f32> = Vec::new();
        for _ in 0..self.iters {
            let shrink = Shrink::new(self.lp_norm, beta);
            let next = w.map(|g, w| {
                vectorized(
                    #[inline(always)]
                    || step(w, grids[g], max, shrink),
                )
            });
            let total: f64 = next.iter().map(|&(_, errors)| f64::from(errors)).sum();
            let error = (total / w.len() as f64) as f32;
            let helped = error < best;
            best = best.min(error);
            let stop = self.early_stop && !helped;
            if stop && self.version == ProximalVersion::V2 {
                // These zero points are the ones that did not help.
                grids.iter_mut().zip(&before).for_each(|(grid, &zero)| grid.zero = zero);
                break;
            }
            if self.version == ProximalVersion::V2 {
                before.clear();
                before.extend(grids.iter().map(|grid| grid.zero));
                beta *= self.kappa;
            }
            grids.iter_mut().zip(next).for_each(|(grid, (zero, _))| grid.zero = zero);
            if stop {
                break;
            }
        }
    }
}

/// The inverse scale within 5 % of a grid's that loses least with the grid's codes.
fn better_scale(w: &[f32], grid: ZeroGrid, max: f32) -> f32 {
    const STEPS: i32 = 64;
    let candidate = |i: i32| grid.inverse * (1.0 + 0.05 * i as f32 / STEPS as f32);
    let error = |inverse: f32| {
        vectorized(
            #[inline(always)]
            || sum(w, |w| (w - (grid.code(max, w) - grid.zero) / inverse).abs()),
        )
    };
    // The grid's own scale wins ties.
    let order = std::iter::once(0).chain((-STEPS..=STEPS).filter(|&i| i != 0));
    let mut best = (f32::INFINITY, grid.inverse);
    for inverse in order.map(candidate) {
        let error = error(inverse);
        if error < best.0 {
            best = (error, inverse);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range_grid(w: &[f32], max: f32) -> ZeroGrid {
        let low = w.iter().copied().fold(f32::INFINITY, f32::min);
        let high = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let inverse = max / (high - low);
        ZeroGrid { inverse, zero: -low * inverse }
    }

    fn mean_error(w: Grouped<'_>, grids: &[ZeroGrid], max: f32) -> f64 {
        let of = |g: usize, w: &[f32]| {
            let ZeroGrid { inverse, zero } = grids[g];
            let error = |&w: &f32| f64::from(w - (grids[g].code(max, w) - zero) / inverse).abs();
            w.iter().map(error).sum::<f64>()
        };
        w.map(of).iter().sum::<f64>() / w.len() as f64
    }

    #[test]
    fn a_step_by_hand() {
        // S = 1, z = 0.25: codes of -1, 0.5, 2, 6.25 are 0, 1, 2, 3; the last error, 3.5, is shrunk by 3.5^-0.3 / 10.
        let grid = ZeroGrid { inverse: 1.0, zero: 0.25 };
        let (zero, errors) = step(&[-1.0, 0.5, 2.0, 6.25], grid, 3.0, Shrink::new(0.7, 10.0));
        let shrunk = |e: f64| e.signum() * (e.abs() - e.abs().powf(-0.3) / 10.0).max(0.0);
        let terms = [(0.0, -1.0, -0.75), (1.0, 0.5, -0.25), (2.0, 2.0, 0.25), (3.0, 6.25, 3.5)];
        let expected: f64 = terms.iter().map(|&(q, w, e)| q - (w - shrunk(e))).sum::<f64>() / 4.0;
        // Powers are accurate to 0.3e-5.
        assert!((f64::from(zero) - expected).abs() < 1e-5, "{zero} {expected}");
        assert_eq!(errors, 4.75);
    }

    #[test]
    fn small_errors_are_no_outliers() {
        let shrink = Shrink::new(0.7, 10.0);
        for e in [0.0, 1e-30, 0.01, shrink.least] {
            assert_eq!((shrink.apply(e), shrink.apply(-e)), (0.0, 0.0), "{e}");
        }
        assert!(shrink.apply(shrink.least * 1.01) > 0.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn version_2_never_loses(
            w in prop::collection::vec(-0.1f32..0.1, 128), len in 8usize..40, bits in 1u32..=8, search: bool
        ) {
            let max = ((1u32 << bits) - 1) as f32;
            let groups = Grouped::runs(&w, w.len(), len);
            let before = groups.map(|_, w| range_grid(w, max));
            prop_assume!(before.iter().all(|grid| grid.inverse.is_finite()));
            // Enough steps for the error to stop falling, so that the last one is undone.
            let iters = 10_000;
            let solver = Proximal { version: ProximalVersion::V2, scale_search: search, iters, ..Proximal::default() };
            let mut after = before.clone();
            solver.solve(groups, &mut after, max);
            let (old, new) = (mean_error(groups, &before, max), mean_error(groups, &after, max));
            // Sums of at most 40 errors of a step or less, each rounded once, are compared as f32.
            prop_assert!(new <= old * (1.0 + 64.0 * f64::from(f32::EPSILON)), "{} {}", new, old);
        }
    }
}
