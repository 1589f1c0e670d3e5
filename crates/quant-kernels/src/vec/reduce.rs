//! Sums and maxima.

use super::{LANES, Operation, apply, check_length, math};
use crate::error::ShapeError;

/// `sum of x[i] * y[i]` by fused multiply-adds.
pub fn dot(x: &[f32], y: &[f32]) -> Result<f32, ShapeError> {
    check_length("y", x.len(), y.len())?;
    Ok(apply(Dot { x, y }))
}

struct Dot<'a> {
    x: &'a [f32],
    y: &'a [f32],
}

impl Operation for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        let mut sums = [0.0; LANES];
        let ((x, x_rest), (y, y_rest)) = (self.x.as_chunks::<LANES>(), self.y.as_chunks::<LANES>());
        for (x, y) in x.iter().zip(y) {
            for i in 0..LANES {
                sums[i] = x[i].mul_add(y[i], sums[i]);
            }
        }
        for (sum, (x, y)) in sums.iter_mut().zip(x_rest.iter().zip(y_rest)) {
            *sum = x.mul_add(*y, *sum);
        }
        fold(sums, |a, b| a + b)
    }
}

/// The largest magnitude, 0 for an empty slice, NaN if there is a NaN.
pub fn absmax(x: &[f32]) -> f32 {
    apply(AbsMax { x })
}

struct AbsMax<'a> {
    x: &'a [f32],
}

impl Operation for AbsMax<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        absmax_of(self.x)
    }
}

/// [`absmax`] inside code that is compiled for an instruction set.
#[inline(always)]
pub(crate) fn absmax_of(x: &[f32]) -> f32 {
    // Magnitudes order as their bits do, with NaN above infinity; the maximum of integers knows no order.
    let mut max = 0;
    for x in x {
        max = (x.to_bits() & 0x7fff_ffff).max(max);
    }
    f32::from_bits(max)
}

/// `ln of the sum of e^x[i]` in f64: the normaliser of log-probabilities. Minus infinity for an empty slice.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let (max, sum) = apply(SumExp { x });
    if max.is_infinite() { f64::from(max) } else { f64::from(max) + libm::log(sum) }
}

struct SumExp<'a> {
    x: &'a [f32],
}

impl Operation for SumExp<'_> {
    /// The maximum and the sum of exponentials of the distances to it.
    type Output = (f32, f64);

    #[inline(always)]
    fn run(self) -> (f32, f64) {
        let max = max(self.x);
        let mut sums = [0.0; LANES];
        let (chunks, rest) = self.x.as_chunks::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                sums[i] += math::exp_f64(f64::from(x[i]) - f64::from(max));
            }
        }
        for (sum, x) in sums.iter_mut().zip(rest) {
            *sum += math::exp_f64(f64::from(*x) - f64::from(max));
        }
        (max, fold(sums, |a, b| a + b))
    }
}

/// The largest element, minus infinity for an empty slice. NaN does not count.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = if *x > *lane { *x } else { *lane };
    }
    fold(lanes, |a, b| if b > a { b } else { a })
}

/// The sum of `x[i]` in f64.
#[inline(always)]
pub(super) fn sum(x: &[f32]) -> f64 {
    let mut sums = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            sums[i] += f64::from(x[i]);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(*x);
    }
    fold(sums, |a, b| a + b)
}

/// The sum of `(x[i] - center)^2` in f64.
#[inline(always)]
pub(super) fn sum_squares(x: &[f32], center: f64) -> f64 {
    let mut sums = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            let distance = f64::from(x[i]) - center;
            sums[i] = distance.mul_add(distance, sums[i]);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        let distance = f64::from(*x) - center;
        *sum = distance.mul_add(distance, *sum);
    }
    fold(sums, |a, b| a + b)
}

/// Folds lanes in halves: `i` with `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
#[inline(always)]
pub(super) fn fold<T: Copy>(mut lanes: [T; LANES], join: impl Fn(T, T) -> T) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = join(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}
