//! Row operations of a block. All act on each row alone, in a fixed order.

use libm::{erff, expf, tanhf};
use ndarray::{ArrayView2, ArrayViewMut2};

use crate::arch::{Activation, NormKind};

/// Weights of a norm.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    pub(crate) kind: NormKind,
    pub(crate) eps: f32,
    pub(crate) weight: Vec<f32>,
    /// Present for [`NormKind::Layer`].
    pub(crate) bias: Option<Vec<f32>>,
}

impl Norm {
    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        4 * (self.weight.len() + self.bias.as_ref().map_or(0, Vec::len))
    }

    /// `x`, `out`: `[t, n]`.
    pub(crate) fn forward(&self, x: ArrayView2<'_, f32>, mut out: ArrayViewMut2<'_, f32>) {
        for (x, mut out) in x.rows().into_iter().zip(out.rows_mut()) {
            out.assign(&x);
            self.row(out.as_slice_mut().expect("rows are contiguous"));
        }
    }

    /// Normalises one row in place.
    pub(crate) fn row(&self, x: &mut [f32]) {
        let n = x.len() as f32;
        if self.kind == NormKind::Layer {
            let mean = sum(x, |x| x) / n;
            x.iter_mut().for_each(|x| *x -= mean);
        }
        let inverse = 1.0 / (sum(x, |x| x * x) / n + self.eps).sqrt();
        x.iter_mut().zip(&self.weight).for_each(|(x, w)| *x = *x * inverse * w);
        if let Some(bias) = &self.bias {
            x.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
    }
}

fn sum(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    x.iter().map(|&x| f64::from(term(x))).sum::<f64>() as f32
}

/// Softmax of a row in place.
pub(crate) fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f32;
    for x in row.iter_mut() {
        *x = expf(*x - max);
        sum += *x;
    }
    row.iter_mut().for_each(|x| *x /= sum);
}

/// Applies the activation to each element.
pub(crate) fn activate(activation: Activation, x: &mut [f32]) {
    let map: fn(f32) -> f32 = match activation {
        Activation::Silu => |x| x / (1.0 + expf(-x)),
        Activation::Gelu => |x| 0.5 * x * (1.0 + erff(x * std::f32::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => |x| {
            const SCALE: f32 = 0.797_884_6; // sqrt(2 / pi)
            0.5 * x * (1.0 + tanhf(SCALE * (x + 0.044_715 * x * x * x)))
        },
        Activation::Relu => |x| x.max(0.0),
    };
    x.iter_mut().for_each(|x| *x = map(*x));
}

/// Rotates the pairs `(x[i], x[i + d/2])` of a head by the angles of its position.
pub(crate) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(head.len() / 2);
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
