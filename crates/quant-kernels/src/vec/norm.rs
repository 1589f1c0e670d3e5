//! Normalisation of a row.

use std::ops::Range;

use super::reduce::{fold, max, sum_f64};
use super::{LANES, apply, check_length, math};
use crate::error::ShapeError;

/// `out = x / sqrt(mean of x^2 + eps) * weight`; the mean is taken in f64.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> Result<(), ShapeError> {
    check_length("weight", x.len(), weight.len())?;
    check_length("out", x.len(), out.len())?;
    apply((x, weight, eps, out), rms_norm_body);
    Ok(())
}

#[inline(always)]
fn rms_norm_body((x, weight, eps, out): (&[f32], &[f32], f32, &mut [f32])) {
    let mean = sum_f64(x, |x| f64::from(x) * f64::from(x)) / x.len() as f64;
    let inverse = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for (out, (x, weight)) in out.iter_mut().zip(x.iter().zip(weight)) {
        *out = x * inverse * weight;
    }
}

/// `out = (x - mean) / sqrt(variance + eps) * weight + bias`; mean and variance are taken in f64.
pub fn layer_norm(
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) -> Result<(), ShapeError> {
    check_length("weight", x.len(), weight.len())?;
    check_length("bias", x.len(), bias.map_or(x.len(), <[f32]>::len))?;
    check_length("out", x.len(), out.len())?;
    apply((x, weight, bias, eps, out), layer_norm_body);
    Ok(())
}

#[expect(clippy::type_complexity, reason = "the arguments of the function above")]
#[inline(always)]
fn layer_norm_body((x, weight, bias, eps, out): (&[f32], &[f32], Option<&[f32]>, f32, &mut [f32])) {
    let n = x.len() as f64;
    let mean = sum_f64(x, f64::from) / n;
    let variance = sum_f64(x, |x| (f64::from(x) - mean) * (f64::from(x) - mean)) / n;
    let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
    for (out, (x, weight)) in out.iter_mut().zip(x.iter().zip(weight)) {
        *out = ((f64::from(*x) - mean) * inverse) as f32 * weight;
    }
    if let Some(bias) = bias {
        out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
    }
}

/// Softmax of the `visible` part of a row, in place; the rest becomes 0. An empty part leaves zeros.
pub fn softmax(row: &mut [f32], visible: Range<usize>) -> Result<(), ShapeError> {
    if visible.start > visible.end || visible.end > row.len() {
        return Err(ShapeError::Length { operand: "row", expected: visible.end, found: row.len() });
    }
    apply((row, visible), softmax_body);
    Ok(())
}

#[inline(always)]
pub(crate) fn softmax_body((row, visible): (&mut [f32], Range<usize>)) {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    let row = &mut row[visible];
    let max = max(row);
    row.iter_mut().for_each(|x| *x = math::exp(*x - max));
    let mut sums = [0.0; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            sums[i] += x[i];
        }
    }
    sums.iter_mut().zip(rest).for_each(|(sum, x)| *sum += x);
    let sum = fold(sums, |a, b| a + b);
    row.iter_mut().for_each(|x| *x /= sum);
}
