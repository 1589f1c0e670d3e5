//! Quantized activations, as values: the numbers that a layer sees after its library has rounded its input.
//!
//! A product of integers with one scale per row on both sides is the product of the rounded activations with the
//! rounded weights. So W8A8, FP8 and LLM.int8 need no product of their own here: the input is rounded to its grid and
//! kept in f32, and the weight-only product does the rest, exactly up to the rounding of f32. Integer kernels may
//! replace it where they are faster.

use half::f16;
use ndarray::{Array2, ArrayView2, ArrayViewMut1, Axis};
use quant_core::{ActGrid, ActGroup, ActSpec};
use rayon::prelude::*;

/// Rounds activations as `spec` says. `x`: `[t, in]`; the result has the same shape.
///
/// With [`ActGroup::Token`] and [`ActGroup::Columns`] a row depends on itself alone. Scales of a whole call
/// ([`ActGroup::Tensor`]) and the outlier columns of LLM.int8 depend on all rows, as they do in the libraries.
pub(crate) fn quantize(spec: &ActSpec, x: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut out = x.to_owned();
    match *spec {
        ActSpec::Float => {}
        ActSpec::Static { grid, scale, zero } => {
            let params = Params { scale, zero: zero as f32 };
            out.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| params.round(grid, row.view_mut()));
        }
        ActSpec::Dynamic { grid, per, symmetric, outlier_threshold: None } => match per {
            ActGroup::Tensor => {
                let params = Params::fit(grid, symmetric, x.iter().copied());
                out.axis_iter_mut(Axis(0))
                    .into_par_iter()
                    .for_each(|mut row| params.round(grid, row.view_mut()));
            }
            ActGroup::Token => round_groups(grid, symmetric, usize::MAX, &mut out),
            ActGroup::Columns(len) => round_groups(grid, symmetric, len.max(1), &mut out),
        },
        ActSpec::Dynamic { outlier_threshold: Some(threshold), .. } => {
            int8_with_outliers(threshold, &mut out)
        }
        ActSpec::TwoLevel { grid, len, factor, divide } => {
            let factor = if divide { factor } else { 1.0 / factor };
            round_blocks(grid, len.max(1), factor, &mut out);
        }
    }
    out
}

/// Every run of `len` columns of each row gets its own scale.
fn round_groups(grid: ActGrid, symmetric: bool, len: usize, x: &mut Array2<f32>) {
    let len = len.min(x.ncols().max(1));
    x.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| {
        for mut group in row.axis_chunks_iter_mut(Axis(0), len) {
            let params = Params::fit(grid, symmetric, group.iter().copied());
            params.round(grid, group.view_mut());
        }
    });
}

/// NVFP4: every run of `len` columns of each row has a scale of E4M3, over a `factor` that is common to all.
fn round_blocks(grid: ActGrid, len: usize, factor: f32, x: &mut Array2<f32>) {
    let len = len.min(x.ncols().max(1));
    x.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| {
        for mut block in row.axis_chunks_iter_mut(Axis(0), len) {
            let max = block.iter().fold(0.0f32, |max, v| max.max(v.abs()));
            let scale = round_e4m3((factor * max / range(grid).1).min(448.0)) / factor;
            match scale > 0.0 {
                true => Params { scale, zero: 0.0 }.round(grid, block.view_mut()),
                false => block.fill(0.0),
            }
        }
    });
}

/// Scale and zero point of some activations: `value = (q - zero) * scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Params {
    scale: f32,
    zero: f32,
}

/// Smallest and largest code of a grid; of FP8 its largest value.
fn range(grid: ActGrid) -> (f32, f32) {
    match grid {
        ActGrid::Int8 => (-128.0, 127.0),
        ActGrid::E4M3 => (-448.0, 448.0),
        ActGrid::E2M1 => (-6.0, 6.0),
    }
}

impl Params {
    /// The parameters of compressed-tensors: a range that includes zero, over the width of the grid.
    fn fit(grid: ActGrid, symmetric: bool, values: impl Iterator<Item = f32>) -> Self {
        let (min, max) = values.fold((0.0f32, 0.0f32), |(min, max), x| (min.min(x), max.max(x)));
        let (low, high) = range(grid);
        let (scale, zero) = if grid == ActGrid::E2M1 {
            (power_of_two(min.abs().max(max.abs())), 0.0)
        } else if symmetric || grid == ActGrid::E4M3 {
            (min.abs().max(max.abs()) / ((high - low) / 2.0), 0.0)
        } else {
            let scale = (max - min) / (high - low);
            (scale, (low - min / scale).clamp(low, high).round_ties_even())
        };
        // All zeros: any scale gives zeros.
        if scale > 0.0 { Self { scale, zero } } else { Self { scale: 1.0, zero: 0.0 } }
    }

    /// To the grid and back.
    fn round(self, grid: ActGrid, mut values: ArrayViewMut1<'_, f32>) {
        let (low, high) = range(grid);
        values.mapv_inplace(|x| {
            let q = (x / self.scale + self.zero).clamp(low, high);
            let q = match grid {
                ActGrid::Int8 => q.round_ties_even(),
                ActGrid::E4M3 => round_e4m3(q),
                ActGrid::E2M1 => round_e2m1(q),
            };
            (q - self.zero) * self.scale
        });
    }
}

/// The nearest E4M3 number, ties to even, of one within its range: four significant bits, down to a step of `2^-9`.
fn round_e4m3(x: f32) -> f32 {
    let exponent = (x.abs().to_bits() >> 23) as i32 - 127;
    let step = quant_core::minifloat::exp2((exponent - 3).max(-9));
    (x / step).round_ties_even() * step
}

/// The nearest E2M1 number, ties to even: two significant bits, down to a step of a half.
fn round_e2m1(x: f32) -> f32 {
    let exponent = (x.abs().to_bits() >> 23) as i32 - 127;
    let step = quant_core::minifloat::exp2((exponent - 1).max(-1));
    (x / step).round_ties_even() * step
}

/// The scale of an MX block with that largest magnitude: a fourth of it, as a power of two; magnitudes from 1.75 times
/// a power of two on count as the next.
fn power_of_two(max: f32) -> f32 {
    let bits = max.to_bits();
    let up = i32::from(bits & 0x7F_FFFF >= 0x60_0000);
    let exponent = (bits >> 23) as i32 - 127 + up - 2;
    if max > 0.0 { quant_core::minifloat::exp2(exponent.clamp(-127, 127)) } else { 0.0 }
}

/// `1 / 127²` in bitsandbytes' products on a CPU, too large by 1.8e-5. Its logits are met with this number alone: another
/// one moves values over the edges of the roundings to f16 and to integers in the next layer.
const PER_SQUARE: f32 = 6.200_124e-5;

/// LLM.int8: columns with an element of at least `threshold` stay as they are; the rest is rounded to f16, then to
/// integers over the largest of the row's other elements, to a 127th part. A threshold of 0 makes no outliers.
///
/// The product with weights `code * scale / 127` then is the library's `sum * max * scale / 127²`.
fn int8_with_outliers(threshold: f32, x: &mut Array2<f32>) {
    // Beyond the range of f16 nothing is infinite here.
    let halves = |v: f32| f16::from_f32(v.clamp(-f16::MAX.to_f32(), f16::MAX.to_f32())).to_f32();
    let is_outlier = |v: f32| threshold > 0.0 && halves(v).abs() >= threshold;
    let mut keep = vec![false; x.ncols()];
    for row in x.rows() {
        keep.iter_mut().zip(row).for_each(|(keep, &v)| *keep |= is_outlier(v));
    }
    x.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| {
        let max = row.iter().filter(|v| !is_outlier(**v)).fold(0.0f32, |max, &v| max.max(halves(v).abs()));
        let (to_code, step) = (127.0 / max, max * (127.0 * PER_SQUARE));
        for (v, _) in row.iter_mut().zip(&keep).filter(|(_, keep)| !**keep) {
            *v = if max > 0.0 { (halves(*v) * to_code).round_ties_even() * step } else { 0.0 };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Slice, array};

    fn dynamic(grid: ActGrid, per: ActGroup, symmetric: bool) -> ActSpec {
        ActSpec::Dynamic { grid, per, symmetric, outlier_threshold: None }
    }

    #[test]
    fn integers_by_hand() {
        // Scale 127.5 / 127.5 = 1; the ends of the range are clamped.
        let x = array![[127.5, -127.5, 0.5, 1.5, 2.4], [0.0, 0.0, 0.0, 0.0, 0.0]];
        let y = quantize(&dynamic(ActGrid::Int8, ActGroup::Token, true), x.view());
        assert_eq!(y, array![[127.0, -128.0, 0.0, 2.0, 2.0], [0.0; 5]]);
        // A range of 0 to 255: scale 1, zero point -128.
        let x = array![[255.0, 3.2, 0.0, 7.5, 100.0]];
        let y = quantize(&dynamic(ActGrid::Int8, ActGroup::Token, false), x.view());
        assert_eq!(y, array![[255.0, 3.0, 0.0, 8.0, 100.0]]);
        let y = quantize(&ActSpec::Static { grid: ActGrid::Int8, scale: 0.5, zero: 10 }, x.view());
        assert_eq!(y, array![[58.5, 3.0, 0.0, 7.5, 58.5]]);
    }

    #[test]
    fn small_floats_by_hand() {
        let ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 5.1, 6.0];
        assert_eq!(ties.map(round_e2m1), [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0, 6.0]);
        assert_eq!([4.0, 6.9, 7.0, 0.0].map(power_of_two), [1.0, 1.0, 2.0, 0.0]);
        // Largest 6: scale 1. Largest 12: scale 2.
        let x = array![[6.0, 2.4, 12.0, -4.9]];
        let y = quantize(&dynamic(ActGrid::E2M1, ActGroup::Columns(2), true), x.view());
        assert_eq!(y, array![[6.0, 2.0, 12.0, -4.0]]);
        // Blocks of 2 under the factor 2: scales 2 * 6 / 6 and 2 * 3 / 6, halved.
        let spec = |factor, divide| ActSpec::TwoLevel { grid: ActGrid::E2M1, len: 2, factor, divide };
        let x = array![[6.0, 2.4, 3.0, -1.3, 0.0]];
        let y = quantize(&spec(2.0, true), x.view());
        assert_eq!(y, array![[6.0, 2.0, 3.0, -1.5, 0.0]]);
        assert_eq!(y, quantize(&spec(0.5, false), x.view()));
    }

    #[test]
    fn groups_are_apart() {
        let x = array![[1.0, 2.0, 100.0, 50.0]];
        let whole = quantize(&dynamic(ActGrid::Int8, ActGroup::Token, true), x.view());
        let halves = quantize(&dynamic(ActGrid::Int8, ActGroup::Columns(2), true), x.view());
        assert!((whole[[0, 0]] - 1.0).abs() > (halves[[0, 0]] - 1.0).abs());
        let left = quantize(&dynamic(ActGrid::Int8, ActGroup::Token, true), array![[1.0, 2.0]].view());
        assert_eq!(halves.slice_axis(Axis(1), Slice::from(..2)), left);
    }

    #[test]
    fn eight_bit_floats() {
        // Scale 2: 448 is the largest number; 17 lies between 16 and 18.
        let x = array![[896.0, 34.0, -1.0]];
        let y = quantize(&dynamic(ActGrid::E4M3, ActGroup::Token, true), x.view());
        assert_eq!(y, array![[896.0, 32.0, -1.0]]);
        let y = quantize(&ActSpec::Static { grid: ActGrid::E4M3, scale: 1.0, zero: 0 }, x.view());
        assert_eq!(y, array![[448.0, 32.0, -1.0]], "what is too large saturates");
    }

    #[test]
    fn every_eight_bit_float_is_its_own_rounding() {
        let all: Vec<f32> =
            (0..=255).map(quant_core::minifloat::e4m3_to_f32).filter(|x| x.is_finite()).collect();
        for &x in &all {
            assert_eq!(round_e4m3(x), x);
            // Between two neighbours: the nearer one.
            if let Some(above) = all.iter().copied().filter(|a| *a > x).min_by(f32::total_cmp) {
                assert_eq!(round_e4m3(x + 0.4 * (above - x)), x);
                assert_eq!(round_e4m3(x + 0.6 * (above - x)), above);
            }
        }
    }

    #[test]
    fn outlier_columns_stay() {
        let x = array![[127.0, 7.3, 0.4], [63.5, 0.3, 1.0]];
        let spec = |threshold| ActSpec::Dynamic {
            grid: ActGrid::Int8,
            per: ActGroup::Token,
            symmetric: true,
            outlier_threshold: Some(threshold),
        };
        let step = 127.0 * PER_SQUARE;
        let y = quantize(&spec(0.0), x.view());
        let half = 63.5 * step;
        let codes = array![[127.0, 7.0, 0.0], [127.0, 1.0, 2.0]];
        assert_eq!(y.row(0), codes.row(0).mapv(|code: f32| code * (127.0 * step)));
        assert_eq!(y.row(1), codes.row(1).mapv(|code: f32| code * half));
        // The first two columns stay in both rows; the last is rounded over what remains below the threshold.
        let y = quantize(&spec(6.0), x.view());
        let kept = Slice::from(..2);
        assert_eq!(y.slice_axis(Axis(1), kept), x.slice_axis(Axis(1), kept));
        let half = f16::from_f32(0.4).to_f32();
        // Each is the largest of its row.
        let largest = |v: f32| 127.0 * (v * step);
        assert_eq!([y[[0, 2]], y[[1, 2]]], [largest(half), largest(1.0)]);
    }

    #[test]
    fn halves_come_before_integers() {
        // 2049 is 2048 in f16, and 5.9999 is 6, an outlier.
        let spec = |threshold| ActSpec::Dynamic {
            grid: ActGrid::Int8,
            per: ActGroup::Token,
            symmetric: true,
            outlier_threshold: Some(threshold),
        };
        let step = |max: f32| max * (127.0 * PER_SQUARE);
        let y = quantize(&spec(0.0), array![[1024.0, 1e6]].view());
        assert_eq!(y, array![[2.0 * step(65504.0), 127.0 * step(65504.0)]], "infinity is no scale");
        let y = quantize(&spec(0.0), array![[2049.0, 1024.0]].view());
        assert_eq!(y, array![[127.0 * step(2048.0), 64.0 * step(2048.0)]]);
        let y = quantize(&spec(6.0), array![[5.9999, 1.0]].view());
        assert_eq!(y, array![[5.9999, 127.0 * step(1.0)]]);
    }
}
