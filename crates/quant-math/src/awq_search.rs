//! The two searches of AWQ: factors for the inputs of linear layers, and how far to clip the weights of a group.
//!
//! Lin, Tang, Tang, Yang, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and
//! Acceleration", 2023. Weights that meet large activations matter most; multiplied by `s > 1` before rounding they
//! lose less, as long as they do not stretch the range of their group.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis, Slice};
use quant_kernels::{matmul_nt, vectorized};
use rayon::prelude::*;

use crate::affine::Affine;
use crate::hessian::Hessian;
use crate::obq::GroupOverflow;
use crate::range::{GridFit, ScaleOverflow, power};

/// Mean over the rows of all `weights` of `|w| / max |w| of its group`: `[in]`. How much of its group's range a column
/// takes. `weights`: `[out, in]` each, in groups of `len` columns.
pub fn relative_magnitudes(weights: &[ArrayView2<'_, f32>], len: usize) -> Vec<f32> {
    /// A group of zeros must not divide by zero; the reference's number.
    const TINY: f32 = 1e-6;
    let cols = weights.first().map_or(0, |w| w.ncols());
    let rows: usize = weights.iter().map(|w| w.nrows()).sum();
    let len = len.max(1);
    let groups: Vec<Vec<f64>> = (0..cols.div_ceil(len))
        .into_par_iter()
        .map(|g| {
            let part = Slice::from(g * len..cols.min((g + 1) * len));
            let mut sums = vec![0.0; cols.min((g + 1) * len) - g * len];
            for w in weights {
                for row in w.slice_axis(Axis(1), part).rows() {
                    let max = row.iter().fold(TINY, |max, w| max.max(w.abs() + TINY));
                    sums.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(w.abs() / max));
                }
            }
            sums
        })
        .collect();
    groups.concat().into_iter().map(|sum| (sum / rows.max(1) as f64) as f32).collect()
}

/// A candidate: `s = x^share / w^(1 - share)`, or without `w` `x^share`, then divided by the geometric mean of its
/// extremes. `x`: mean magnitudes of the input, `w`: [`relative_magnitudes`], both `[in]`.
pub fn candidate(x: &[f32], w: Option<&[f32]>, share: f32) -> Vec<f32> {
    // Numbers of the reference: they keep features apart that are never active, or have no weights.
    const LEAST: f32 = 1e-4;
    let mut scales: Vec<f32> = match w {
        Some(w) => {
            let each = x.iter().zip(w);
            each.map(|(&x, &w)| (power(x, share) / (power(w, 1.0 - share) + LEAST)).max(LEAST)).collect()
        }
        None => x.iter().map(|&x| power(x, share).max(LEAST)).collect(),
    };
    let max = scales.iter().copied().fold(0.0, f32::max);
    let min = scales.iter().copied().fold(f32::INFINITY, f32::min);
    let middle = (max * min).sqrt();
    for scale in &mut scales {
        *scale /= middle;
        if !(scale.is_normal() && *scale > 0.0) {
            *scale = 1.0;
        }
    }
    scales
}

/// `Q(W diag(s)) diag(s)⁻¹`: what rounding leaves of weights whose inputs are multiplied. `w`: `[out, in]`, `scales`: `[in]`,
/// groups of `len` columns.
pub fn round_scaled(
    w: ArrayView2<'_, f32>,
    scales: &[f32],
    len: usize,
    fit: GridFit,
) -> Result<Array2<f32>, GroupOverflow> {
    let max = f32::from(fit.max_code());
    let mut out = w.to_owned();
    let failed = out.axis_iter_mut(Axis(0)).into_par_iter().enumerate().map(|(row, mut values)| {
        let values = values.as_slice_mut().expect("rows are contiguous");
        values.iter_mut().zip(scales).for_each(|(w, s)| *w *= s);
        for (g, group) in values.chunks_mut(len.max(1)).enumerate() {
            let grid =
                fit.fit(group).map_err(|error| GroupOverflow { row, col: g * len + error.index, error })?;
            vectorized(
                #[inline(always)]
                || group.iter_mut().for_each(|w| *w = grid.round(max, *w)),
            );
        }
        values.iter_mut().zip(scales).for_each(|(w, s)| *w /= s);
        Ok(())
    });
    match failed.find_first(Result::is_err) {
        Some(Err(error)) => Err(error),
        _ => Ok(out),
    }
}

/// Rows whose errors are multiplied together.
const ROWS: usize = 512;

/// Bytes that [`clipped_grids`] works in, for groups of `len` columns.
pub fn scratch_bytes(len: usize) -> usize {
    ROWS * (2 * 4 * len + size_of::<Group>())
}

/// How far the range of a group may shrink.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipSearch {
    /// Steps in which the whole range would shrink to nothing.
    pub steps: usize,
    /// Of these, so many are tried.
    pub tried: usize,
}

/// The grid of every group of `len` columns, `[out, groups]`, that loses least of the layer's output:
/// `(ŵ - w)ᵀ H (ŵ - w)` over the candidates `[max(low, -c), min(high, c)]`, `c = (1 - i / steps) max |w|`.
///
/// `moments`: `H = 2/n Σ x xᵀ` of the inputs of each group. The reference sums over a few hundred tokens instead.
pub fn clipped_grids(
    w: ArrayView2<'_, f32>,
    len: usize,
    fit: GridFit,
    search: ClipSearch,
    moments: &[Hessian],
) -> Result<Array2<Affine>, GroupOverflow> {
    let (rows, cols) = w.dim();
    let len = len.max(1);
    let mut grids = Array2::default((rows, cols.div_ceil(len)));
    let mut scratch = [Array2::zeros((ROWS, len.min(cols))), Array2::zeros((ROWS, len.min(cols)))];
    for (g, moment) in moments.iter().enumerate() {
        let of_group = Slice::from(g * len..cols.min((g + 1) * len));
        let w = w.slice_axis(Axis(1), of_group);
        for start in (0..rows).step_by(ROWS) {
            let part = Slice::from(start..rows.min(start + ROWS));
            let w = w.slice_axis(Axis(0), part);
            let [mut error, mut product] = scratch.each_mut().map(|scratch| {
                let mut part = scratch.view_mut();
                part.slice_axis_inplace(Axis(0), Slice::from(..w.nrows()));
                part.slice_axis_inplace(Axis(1), Slice::from(..w.ncols()));
                part
            });
            let groups = w.rows().into_iter().enumerate().map(|(row, w)| {
                let overflow = |error: ScaleOverflow| GroupOverflow {
                    row: start + row,
                    col: g * len + error.index,
                    error,
                };
                Group::new(contiguous(w), fit).map_err(overflow)
            });
            let mut groups = groups.collect::<Result<Vec<_>, _>>()?;
            for step in 0..search.tried.clamp(1, search.steps.max(1)) {
                let share = 1.0 - step as f32 / search.steps.max(1) as f32;
                let each = groups.par_iter_mut().zip(w.axis_iter(Axis(0))).zip(error.axis_iter_mut(Axis(0)));
                each.for_each(|((group, w), mut error)| {
                    group.propose(share, fit, contiguous(w), error.as_slice_mut().expect("a row"));
                });
                matmul_nt(error.view(), moment.matrix.view(), product.view_mut())
                    .expect("moments of every column of the group");
                let each =
                    groups.par_iter_mut().zip(error.axis_iter(Axis(0))).zip(product.axis_iter(Axis(0)));
                each.for_each(|((group, error), product)| {
                    let terms = error.iter().zip(product);
                    group.judge(terms.map(|(e, p)| f64::from(*e) * f64::from(*p)).sum());
                });
            }
            let place = grids.column_mut(g);
            place.into_iter().skip(start).zip(groups).for_each(|(grid, group)| *grid = group.best);
        }
    }
    Ok(grids)
}

/// The search for the grid of one group.
struct Group {
    low: f32,
    high: f32,
    proposed: Affine,
    best: Affine,
    least: f64,
}

impl Group {
    fn new(w: &[f32], fit: GridFit) -> Result<Self, ScaleOverflow> {
        let (low, high) = fit.range(w);
        let whole = GridFit { mse: None, ..fit }.fit(w)?;
        Ok(Self { low, high, proposed: whole, best: whole, least: f64::INFINITY })
    }

    /// Tries the range clipped at this share of the greatest magnitude, and tells what it does to each weight.
    fn propose(&mut self, share: f32, fit: GridFit, w: &[f32], error: &mut [f32]) {
        let cap = share * self.high.max(-self.low);
        // Below the whole range only a shrunk one can be, so it does not overflow either.
        self.proposed = fit.grid(self.low.max(-cap), self.high.min(cap)).unwrap_or(self.best);
        let (grid, max) = (self.proposed, f32::from(fit.max_code()));
        vectorized(
            #[inline(always)]
            || error.iter_mut().zip(w).for_each(|(e, &w)| *e = grid.round(max, w) - w),
        );
    }

    /// What the proposal costs.
    fn judge(&mut self, loss: f64) {
        if loss < self.least {
            (self.best, self.least) = (self.proposed, loss);
        }
    }
}

fn contiguous(row: ArrayView1<'_, f32>) -> &[f32] {
    row.to_slice().expect("rows are contiguous")
}

#[cfg(test)]
mod tests {
    use ndarray::array;
    use proptest::prelude::*;

    use super::*;
    use crate::hessian::HessianSum;
    use crate::range::ScaleRule;

    fn fit(bits: u8, symmetric: bool) -> GridFit {
        GridFit { bits, symmetric, mse: None, scales: ScaleRule::StoredF16 }
    }

    #[test]
    fn magnitudes_are_relative_to_the_group() {
        let (a, b) = (array![[1.0f32, -2.0, 0.5]], array![[4.0f32, 4.0, -8.0], [0.0, 0.0, 1.0]]);
        let found = relative_magnitudes(&[a.view(), b.view()], 2);
        for (found, exact) in found.iter().zip([(0.5 + 1.0) / 3.0, (1.0 + 1.0) / 3.0, 1.0]) {
            // What is added to each maximum is at most 2e-6 of it.
            assert!((found - exact).abs() <= 3e-6 * exact, "{found} {exact}");
        }
        assert_eq!(relative_magnitudes(&[], 2), [0.0f32; 0]);
    }

    #[test]
    fn candidates_by_hand() {
        // Square roots, extremes 1 and 4.
        let found = candidate(&[1.0, 16.0, 4.0], None, 0.5);
        for (found, exact) in found.iter().zip([0.5, 2.0, 1.0]) {
            assert!((found - exact).abs() < 3e-5 * exact, "{found} {exact}");
        }
        // x^0 / (w + 1e-4): the column of small weights gets the larger factor.
        let found = candidate(&[9.0, 1.0], Some(&[0.4999, 0.1249]), 0.0);
        for (found, exact) in found.iter().zip([0.5, 2.0]) {
            assert!((found - exact).abs() < 3e-5 * exact, "{found} {exact}");
        }
        assert!(candidate(&[0.0, 1.0], Some(&[0.0, 0.0]), 0.3).iter().all(|s| s.is_normal() && *s > 0.0));
    }

    #[test]
    fn a_large_activation_is_served_by_a_large_factor() {
        // The second weight falls between grid points of 2 bits; doubled, it meets one.
        let w = array![[3.0f32, 0.5, -1.0, 1.0]];
        let plain = round_scaled(w.view(), &[1.0; 4], 4, fit(2, false)).unwrap();
        let scaled = round_scaled(w.view(), &[1.0, 2.0, 1.0, 1.0], 4, fit(2, false)).unwrap();
        assert!((scaled[[0, 1]] - 0.5).abs() < (plain[[0, 1]] - 0.5).abs(), "{plain} {scaled}");
        let error = round_scaled(array![[1.0, 1e30]].view(), &[1.0, 2.0], 1, fit(4, true)).unwrap_err();
        assert_eq!((error.row, error.col, error.error.value), (0, 1, 2e30));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn clipping_never_loses_on_the_outputs(
            seed in any::<u64>(), rows in 1usize..6, cols in 1usize..40, len in 1usize..20, bits in 2u8..5, symmetric: bool
        ) {
            let mut state = seed;
            let mut random = move || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let unit = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                // Heavy tails, so that clipping pays.
                unit * unit * unit
            };
            let w = Array2::from_shape_simple_fn((rows, cols), &mut random);
            let x = Array2::from_shape_simple_fn((64, cols), &mut random);
            let moments: Vec<Hessian> = (0..cols).step_by(len).map(|start| {
                let part = Slice::from(start..cols.min(start + len));
                let mut sum = HessianSum::new(cols.min(start + len) - start);
                sum.accumulate(x.slice_axis(Axis(1), part)).unwrap();
                sum.finish()
            }).collect();
            let fit = fit(bits, symmetric);
            let max = f32::from(fit.max_code());
            let search = ClipSearch { steps: 20, tried: 10 };
            let grids = clipped_grids(w.view(), len, fit, search, &moments).unwrap();
            for ((row, g), grid) in grids.indexed_iter() {
                let range = g * len..cols.min((g + 1) * len);
                let group = w.row(row).to_slice().unwrap()[range.clone()].to_vec();
                // Σ_t ((ŵ - w) x_t)², in f64.
                let loss = |grid: Affine| -> f64 {
                    x.rows().into_iter().map(|x| {
                        let terms = x.to_slice().unwrap()[range.clone()].iter().zip(&group);
                        terms.map(|(&x, &w)| f64::from(x) * f64::from(grid.round(max, w) - w)).sum::<f64>().powi(2)
                    }).sum()
                };
                let whole = fit.fit(&group).unwrap();
                // A moment is a sum of 64 products in f32, off by at most 65 roundings of |x_i| |x_j| (Cauchy); the
                // product with the errors adds 20 more.
                let most = |grid: Affine| -> f64 {
                    let sizes = group.iter().enumerate().map(|(k, &w)| {
                        let x = x.column(range.start + k).iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
                        f64::from(grid.round(max, w) - w).abs() * x.sqrt()
                    });
                    sizes.sum::<f64>().powi(2)
                };
                let slack = 85.0 * f64::from(f32::EPSILON) * (most(*grid) + most(whole));
                prop_assert!(loss(*grid) <= loss(whole) + slack, "{} {}", loss(*grid), loss(whole));
            }
        }
    }
}
