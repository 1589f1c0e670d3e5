//! Rewritings of a model that change none of its outputs and make its weights or activations easier to quantize.
//!
//! A linear layer that sees `x / s` and has the weights `W diag(s)` computes what it did before. The division is folded
//! into what makes `x`: the weight of a norm, or the rows of another linear. A [`Transform`] chooses `s` for the inputs
//! of one stage of a block; [`fold`] says what that does to weights, as data; [`Rewrite`] applies it.

use ndarray::{Array2, Axis, Zip};
use quant_core::{NormId, Producer, QuantSpec};

use crate::stats::{Magnitudes, Needs};

/// A way to choose factors for the inputs of linear layers.
pub trait Transform: Send + Sync {
    /// The name in recipes and reports.
    fn name(&self) -> &'static str;

    /// The statistics of a stage's input that it uses.
    fn needs(&self) -> Needs;

    /// Calibration tokens that [`StageRunner::loss`] is to run on; 0 if it is never called.
    fn sample_tokens(&self) -> usize;

    /// How often [`StageRunner::loss`] is called for a stage.
    fn candidates(&self) -> usize;

    /// Whether the inputs that this makes are looked at.
    fn covers(&self, producer: &Producer) -> bool {
        !matches!(producer, Producer::Fixed { .. })
    }

    /// Factors `[in]` for the inputs of a stage: positive and finite, equal for all features that share a row of the
    /// producer ([`Stage::share`] sees to it). `None` leaves the stage as it is.
    fn scales(&self, stage: &Stage<'_>, runner: &mut dyn StageRunner) -> Result<Option<Vec<f32>>, Stopped>;
}

/// Linears of a block that share an input, in float, and what is known of that input.
#[derive(Clone, Debug)]
pub struct Stage<'a> {
    /// Weights `[out, in]` of every linear.
    pub weights: &'a [Array2<f32>],
    /// What the linears will be quantized to.
    pub specs: &'a [QuantSpec],
    /// What makes the input.
    pub producer: &'a Producer,
    /// Magnitudes of the input, if they were asked for.
    pub magnitudes: Option<&'a Magnitudes>,
}

impl Stage<'_> {
    /// Replaces the values `[in]` of features that share a row of the producer with what `join` makes of them.
    pub fn share(&self, values: &mut [f32], join: impl Fn(&[f32]) -> f32) {
        let Producer::Outputs { rows, .. } = self.producer else { return };
        let mut of_row = vec![Vec::new(); rows.iter().max().map_or(0, |last| last + 1)];
        rows.iter().zip(&*values).for_each(|(&row, &value)| of_row[row].push(value));
        let joined: Vec<f32> = of_row.iter().map(|v| if v.is_empty() { 0.0 } else { join(v) }).collect();
        values.iter_mut().zip(rows).for_each(|(value, &row)| *value = joined[row]);
    }
}

/// Runs the part of a model that a stage belongs to.
pub trait StageRunner {
    /// Mean squared difference that other weights, in the place of the stage's, make to the output of the module around
    /// them (attention or MLP) on a sample of the calibration tokens.
    fn loss(&mut self, weights: Vec<Array2<f32>>) -> Result<f64, Stopped>;
}

/// The model could not be run; the runner knows why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the block could not be run")]
pub struct Stopped;

/// A change of the weights of one block. A list of them is applied in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Rewrite {
    /// The columns of a linear's weight are multiplied.
    MultiplyInputs {
        /// The linear.
        slot: usize,
        /// Factor of each input, `[in]`.
        by: Vec<f32>,
    },
    /// The rows of a linear's weight and the elements of its bias are divided.
    DivideOutputs {
        /// The linear.
        slot: usize,
        /// Divisor of each output, `[out]`.
        by: Vec<f32>,
    },
    /// The weight and the bias of a norm are divided.
    DivideNorm {
        /// The norm.
        norm: NormId,
        /// Divisor of each feature.
        by: Vec<f32>,
    },
}

impl Rewrite {
    /// Rewrites the weight `[out, in]` of the linear in `slot`.
    pub fn weight(&self, slot: usize, w: &mut Array2<f32>) {
        match self {
            Rewrite::MultiplyInputs { slot: own, by } if *own == slot => {
                w.axis_iter_mut(Axis(0))
                    .for_each(|mut row| row.iter_mut().zip(by).for_each(|(w, s)| *w *= s));
            }
            Rewrite::DivideOutputs { slot: own, by } if *own == slot => {
                Zip::from(w.rows_mut()).and(by).for_each(|mut row, &s| row.mapv_inplace(|w| w / s));
            }
            _ => {}
        }
    }

    /// Rewrites the bias `[out]` of the linear in `slot`. True if that changed it.
    pub fn bias(&self, slot: usize, bias: &mut [f32]) -> bool {
        match self {
            Rewrite::DivideOutputs { slot: own, by } if *own == slot => {
                bias.iter_mut().zip(by).for_each(|(b, s)| *b /= s);
                true
            }
            _ => false,
        }
    }

    /// Rewrites the weight or the bias of a norm. True if that changed it.
    pub fn norm(&self, norm: NormId, values: &mut [f32]) -> bool {
        match self {
            Rewrite::DivideNorm { norm: own, by } if *own == norm => {
                values.iter_mut().zip(by).for_each(|(v, s)| *v /= s);
                true
            }
            _ => false,
        }
    }

    /// True if it concerns the weight of the linear in `slot`.
    pub fn touches(&self, slot: usize) -> bool {
        match self {
            Rewrite::MultiplyInputs { slot: own, .. } | Rewrite::DivideOutputs { slot: own, .. } => {
                *own == slot
            }
            Rewrite::DivideNorm { .. } => false,
        }
    }
}

/// What multiplying the inputs of the linears in `slots` by `scales`, and dividing what makes them, does to a block.
/// `outputs`: rows of the linear that makes the input, if one does. Empty where nothing can take up the division.
pub fn fold(
    producer: &Producer,
    outputs: usize,
    slots: std::ops::Range<usize>,
    scales: &[f32],
) -> Vec<Rewrite> {
    let divided = match producer {
        Producer::Fixed { .. } => return Vec::new(),
        Producer::Norm(norm) => Rewrite::DivideNorm { norm: *norm, by: scales.to_vec() },
        Producer::Outputs { slot, rows } => {
            let mut by = vec![1.0; outputs];
            rows.iter().zip(scales).for_each(|(&row, &scale)| by[row] = scale);
            Rewrite::DivideOutputs { slot: *slot, by }
        }
    };
    let multiplied = slots.map(|slot| Rewrite::MultiplyInputs { slot, by: scales.to_vec() });
    std::iter::once(divided).chain(multiplied).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn factors_of_inputs_come_back_out_of_outputs() {
        // Two query heads read one value head of two channels, in rows 2 and 3.
        let producer = Producer::Outputs { slot: 1, rows: vec![2, 3, 2, 3] };
        let stage = Stage { weights: &[], specs: &[], producer: &producer, magnitudes: None };
        let mut scales = [1.0, 4.0, 3.0, 16.0];
        stage.share(&mut scales, |v| v.iter().sum::<f32>() / v.len() as f32);
        assert_eq!(scales, [2.0, 10.0, 2.0, 10.0]);

        let rewrites = fold(&producer, 4, 2..3, &scales);
        let (mut v, mut o) = (array![[1.0], [2.0], [4.0], [20.0]], array![[1.0, 1.0, 3.0, -1.0]]);
        let mut bias = [1.0, 1.0, 1.0, 1.0];
        for rewrite in &rewrites {
            rewrite.weight(1, &mut v);
            rewrite.weight(2, &mut o);
            rewrite.bias(1, &mut bias);
            assert!(!rewrite.touches(0) && !rewrite.norm(NormId::Mlp, &mut []));
        }
        assert_eq!(v, array![[1.0], [2.0], [2.0], [2.0]]);
        assert_eq!(o, array![[2.0, 10.0, 6.0, -10.0]]);
        assert_eq!(bias, [1.0, 1.0, 0.5, 0.1]);
    }

    #[test]
    fn norms_take_up_factors_and_nothing_else_does() {
        let rewrites = fold(&Producer::Norm(NormId::Mlp), 0, 3..5, &[2.0, 0.5]);
        let mut weight = [1.0, 1.0];
        let changed: Vec<bool> = rewrites.iter().map(|r| r.norm(NormId::Mlp, &mut weight)).collect();
        assert_eq!((weight, changed), ([0.5, 2.0], vec![true, false, false]));
        assert!(rewrites.iter().all(|r| !r.norm(NormId::Attention, &mut weight)));
        assert!(rewrites[1].touches(3) && rewrites[2].touches(4));
        assert_eq!(fold(&Producer::Fixed { because: "a test" }, 0, 3..5, &[2.0, 0.5]), []);
    }
}
