//! Quantized activations, as values: the numbers that a layer sees after its library has rounded its input.
//!
//! A product of integers with one scale per row on both sides is the product of the rounded activations with the
//! rounded weights. So W8A8, FP8 and LLM.int8 need no product of their own here: the input is rounded to its grid and
//! kept in f32, and the weight-only product does the rest, exactly up to the rounding of f32. Integer kernels may
//! replace it where they are faster.

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
    }
}

impl Params {
    /// The parameters of compressed-tensors: a range that includes zero, over the width of the grid.
    fn fit(grid: ActGrid, symmetric: bool, values: impl Iterator<Item = f32>) -> Self {
        let (min, max) = values.fold((0.0f32, 0.0f32), |(min, max), x| (min.min(x), max.max(x)));
        let (low, high) = range(grid);
        let (scale, zero) = if symmetric || grid == ActGrid::E4M3 {
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

/// LLM.int8: columns with an element of at least `threshold` stay as they are; the rest is rounded to integers over
/// the largest of the row's other elements, to a 127th part. A threshold of 0 makes no outliers.
fn int8_with_outliers(threshold: f32, x: &mut Array2<f32>) {
    let is_outlier = |v: f32| threshold > 0.0 && v.abs() >= threshold;
    let mut keep = vec![false; x.ncols()];
    for row in x.rows() {
        keep.iter_mut().zip(row).for_each(|(keep, &v)| *keep |= is_outlier(v));
    }
    x.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| {
        let max = row.iter().filter(|v| !is_outlier(**v)).fold(0.0f32, |max, v| max.max(v.abs()));
        if max == 0.0 {
            return;
        }
        let to_code = 127.0 / max;
        for (v, &keep) in row.iter_mut().zip(&keep) {
            if !keep {
                *v = (*v * to_code).round_ties_even() * (max / 127.0);
            }
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
        assert_eq!(quantize(&spec(0.0), x.view()), array![[127.0, 7.0, 0.0], [63.5, 0.5, 1.0]]);
        // The first two columns stay in both rows; the last is rounded over what remains below the threshold.
        let y = quantize(&spec(6.0), x.view());
        let kept = Slice::from(..2);
        assert_eq!(y.slice_axis(Axis(1), kept), x.slice_axis(Axis(1), kept));
        assert!((y[[0, 2]] - 0.4).abs() < 1e-6 && (y[[1, 2]] - 1.0).abs() < 1e-6, "{y}");
    }
}
