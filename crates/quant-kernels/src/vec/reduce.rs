//! Sums and maxima.

use super::{LANES, apply, check_length, math};
use crate::error::ShapeError;

/// `sum of x[i] * y[i]` by fused multiply-adds.
pub fn dot(x: &[f32], y: &[f32]) -> Result<f32, ShapeError> {
    check_length("y", x.len(), y.len())?;
    Ok(apply((x, y), dot_body))
}

#[inline(always)]
fn dot_body((x, y): (&[f32], &[f32])) -> f32 {
    let mut sums = [0.0; LANES];
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
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

/// The largest magnitude, 0 for an empty slice, NaN if there is a NaN.
pub fn absmax(x: &[f32]) -> f32 {
    apply(x, absmax_body)
}

#[inline(always)]
fn absmax_body(x: &[f32]) -> f32 {
    // Magnitudes order as their bits do, with NaN above infinity; the maximum of integers knows no order.
    let bits = x.iter().fold(0, |max, x| (x.to_bits() & 0x7fff_ffff).max(max));
    f32::from_bits(bits)
}

/// `ln of the sum of e^x[i]` in f64: the normaliser of log-probabilities. Minus infinity for an empty slice.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let (max, sum) = apply(x, log_sum_exp_body);
    if max.is_infinite() { f64::from(max) } else { f64::from(max) + libm::log(sum) }
}

#[inline(always)]
fn log_sum_exp_body(x: &[f32]) -> (f32, f64) {
    let max = max(x);
    (max, sum_f64(x, |x| math::exp_f64(f64::from(x) - f64::from(max))))
}

/// The largest element, minus infinity for an empty slice. NaN does not count.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], x[i]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, *x);
    }
    fold(lanes, larger)
}

/// The sum of `term(x[i])`, every element in f64.
#[inline(always)]
pub(super) fn sum_f64(x: &[f32], term: impl Fn(f32) -> f64) -> f64 {
    let mut sums = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            sums[i] += term(x[i]);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += term(*x);
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
