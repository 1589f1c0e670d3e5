//! What other weights in place of a stage's do to the module around it.

use ndarray::{Array2, Axis, Slice};
use quant_methods::{StageRunner, Stopped};
use quant_model::{DenseLinear, Linear, StageKind};

use super::activations::Activations;
use super::pass::{Pass, Slots};
use crate::error::Error;

/// One stage of a block, with a sample of its inputs and what the float module makes of it.
///
/// Attention is looked at behind its output projection, the MLP behind its projection back.
pub(crate) struct Inspector<'p, 'a> {
    pass: &'p mut Pass<'a>,
    stage: usize,
    biases: Vec<Option<Vec<f32>>>,
    /// `[sample, in]`.
    input: Array2<f32>,
    /// `[sample, hidden]`.
    expected: Array2<f32>,
    /// Why the block could not be run.
    pub(crate) error: Option<Error>,
}

/// The stages whose linears the module of a stage runs through.
pub(crate) fn module_of(kind: StageKind, stage: usize) -> std::ops::Range<usize> {
    match kind {
        StageKind::Qkv | StageKind::MlpIn => stage..stage + 2,
        StageKind::AttentionOut | StageKind::MlpOut => stage..stage + 1,
    }
}

impl<'p, 'a> Inspector<'p, 'a> {
    /// Runs the sample with `linears`: those of all stages of the module. `biases`: of the stage's own linears.
    pub(crate) fn new(
        pass: &'p mut Pass<'a>,
        stage: usize,
        linears: Slots,
        biases: Vec<Option<Vec<f32>>>,
        store: &mut Activations,
        tokens: usize,
    ) -> Result<Self, Error> {
        let input = pass.sample(store, tokens)?;
        pass.set(linears)?;
        let mut inspector =
            Self { pass, stage, biases, input, expected: Array2::default((0, 0)), error: None };
        inspector.expected = inspector.output()?;
        Ok(inspector)
    }

    /// What the module adds to the residual stream, `[sample, hidden]`. (With norms behind it: the norm of that.)
    fn output(&mut self) -> Result<Array2<f32>, Error> {
        let arch = self.pass.arch();
        let mut output = Array2::zeros((self.input.nrows(), arch.hidden_size));
        for rows in self.pass.pieces(self.input.nrows()) {
            let rows = Slice::from(rows);
            let mut input = self.input.slice_axis(Axis(0), rows).to_owned();
            let mut x = Array2::zeros((input.nrows(), arch.hidden_size));
            for stage in module_of(arch.stages[self.stage].kind, self.stage) {
                input = self.pass.advance(stage, input.view(), &mut x)?;
            }
            output.slice_axis_mut(Axis(0), rows).assign(&x);
        }
        Ok(output)
    }

    fn set(&mut self, weights: Vec<Array2<f32>>) -> Result<(), Error> {
        let slots = self.pass.arch().slots(self.stage);
        let linears = slots.zip(weights).zip(&self.biases).map(|((slot, w), bias)| {
            (slot, Box::new(DenseLinear::from_f32(w.view(), bias.clone())) as Box<dyn Linear>)
        });
        let linears = linears.collect();
        self.pass.set(linears)
    }
}

impl StageRunner for Inspector<'_, '_> {
    fn loss(&mut self, weights: Vec<Array2<f32>>) -> Result<f64, Stopped> {
        let output = self.set(weights).and_then(|()| self.output());
        let output = output.map_err(|error| {
            self.error = Some(error);
            Stopped
        })?;
        let squares = output.iter().zip(&self.expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
        Ok(squares.sum::<f64>() / output.len().max(1) as f64)
    }
}

impl Drop for Inspector<'_, '_> {
    fn drop(&mut self) {
        let arch = self.pass.arch();
        for stage in module_of(arch.stages[self.stage].kind, self.stage) {
            self.pass.clear(stage);
        }
    }
}
