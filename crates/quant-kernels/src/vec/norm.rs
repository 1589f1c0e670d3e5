//! Normalisation of a row.

use std::ops::Range;

use super::reduce::{fold, max, sum, sum_squares};
use super::{LANES, Operation, apply, check_length, math};
use crate::error::ShapeError;

/// `out = x / sqrt(mean of x^2 + eps) * weight`; the mean is taken in f64.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> Result<(), ShapeError> {
    check_length("weight", x.len(), weight.len())?;
    check_length("out", x.len(), out.len())?;
    apply(RmsNorm { x, weight, eps, out });
    Ok(())
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Operation for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mean = sum_squares(self.x, 0.0) / self.x.len() as f64;
        let inverse = (1.0 / (mean + f64::from(self.eps)).sqrt()) as f32;
        for (out, (x, weight)) in self.out.iter_mut().zip(self.x.iter().zip(self.weight)) {
            *out = x * inverse * weight;
        }
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
    apply(LayerNorm { x, weight, bias, eps, out });
    Ok(())
}

struct LayerNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    out: &'a mut [f32],
}

impl Operation for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let n = self.x.len() as f64;
        let mean = sum(self.x) / n;
        let variance = sum_squares(self.x, mean) / n;
        let inverse = 1.0 / (variance + f64::from(self.eps)).sqrt();
        for (out, (x, weight)) in self.out.iter_mut().zip(self.x.iter().zip(self.weight)) {
            *out = ((f64::from(*x) - mean) * inverse) as f32 * weight;
        }
        for (out, bias) in self.out.iter_mut().zip(self.bias.unwrap_or_default()) {
            *out += bias;
        }
    }
}

/// Softmax of the `visible` part of a row, in place; the rest becomes 0. An empty part leaves zeros.
pub fn softmax(row: &mut [f32], visible: Range<usize>) -> Result<(), ShapeError> {
    if visible.start > visible.end || visible.end > row.len() {
        return Err(ShapeError::Length { operand: "row", expected: visible.end, found: row.len() });
    }
    apply(Softmax { row, visible });
    Ok(())
}

struct Softmax<'a> {
    row: &'a mut [f32],
    visible: Range<usize>,
}

impl Operation for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        softmax_visible(self.row, self.visible);
    }
}

/// [`softmax`] inside code that is compiled for an instruction set.
#[inline(always)]
pub(crate) fn softmax_visible(row: &mut [f32], visible: Range<usize>) {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    let row = &mut row[visible];
    let max = max(row);
    let mut sums = [0.0; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            x[i] = math::exp(x[i] - max);
            sums[i] += x[i];
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *x = math::exp(*x - max);
        *sum += *x;
    }
    let sum = fold(sums, |a, b| a + b);
    for x in row {
        *x /= sum;
    }
}
