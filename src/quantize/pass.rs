//! The calibration set on its way through one block.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2, Axis, Slice};
use quant_core::{NormId, QuantSpec, WeightSource};
use quant_methods::{Needs, StatsSum};
use quant_model::{ArchSpec, Block, Linear, ModelError, Sequences};

use super::activations::{Activations, Stores};
use crate::calibration::Calibration;
use crate::error::Error;

/// Tokens that go through a block at a time, rounded down to whole samples. A constant, because the Hessian is summed
/// chunk by chunk and the bits of the sum depend on the cut.
const CHUNK_TOKENS: usize = 2048;

/// Tokens per chunk for samples of this length.
pub(crate) fn chunk_len(seq_len: usize) -> usize {
    (CHUNK_TOKENS / seq_len.max(1)).max(1) * seq_len.max(1)
}

/// Linears by slot.
pub(crate) type Slots = Vec<(usize, Box<dyn Linear>)>;

/// One block and the residual stream of all samples.
pub(crate) struct Pass<'a> {
    arch: &'a Arc<ArchSpec>,
    path: String,
    block: Block,
    /// `[tokens, hidden]`.
    pub(crate) x: Activations,
    sequences: Sequences,
    tokens: usize,
    chunk: usize,
}

impl<'a> Pass<'a> {
    /// Block `layer` without linears, and what entered it.
    pub(crate) fn new(
        arch: &'a Arc<ArchSpec>,
        layer: usize,
        source: &dyn WeightSource,
        x: Activations,
        calibration: &Calibration,
    ) -> Result<Self, Error> {
        let block = Block::load_without_linears(arch, layer, source)?;
        let sequences = Sequences::new(arch, 0, calibration.seq_len)?;
        let (tokens, chunk) = (calibration.tokens(), chunk_len(calibration.seq_len));
        let path = arch.block_path(layer, source);
        Ok(Self { arch, path, block, x, sequences, tokens, chunk })
    }

    /// The architecture.
    pub(crate) fn arch(&self) -> &'a Arc<ArchSpec> {
        self.arch
    }

    /// Path of the linear in a slot.
    pub(crate) fn module(&self, slot: usize) -> &str {
        self.block.module(slot)
    }

    /// Puts linears in their slots.
    pub(crate) fn set(&mut self, linears: Slots) -> Result<(), Error> {
        Ok(linears.into_iter().try_for_each(|(slot, linear)| self.block.set_linear(slot, linear))?)
    }

    /// Path of the block.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Weight of a norm.
    pub(crate) fn norm(&self, norm: NormId) -> &[f32] {
        self.block.norm(norm).0
    }

    /// Changes the weight and the bias of a norm.
    pub(crate) fn edit_norm(&mut self, norm: NormId, edit: impl FnMut(&mut [f32])) {
        self.block.edit_norm(norm, edit);
    }

    /// Empties the slots of a stage.
    pub(crate) fn clear(&mut self, stage: usize) {
        self.arch.slots(stage).for_each(|slot| drop(self.block.take_linear(slot)));
    }

    /// Runs a stage on the rows of whole samples. See [`Block::advance`].
    pub(crate) fn advance(
        &self,
        stage: usize,
        input: ArrayView2<'_, f32>,
        x: &mut Array2<f32>,
    ) -> Result<Array2<f32>, Error> {
        Ok(self.block.advance(stage, input, x, &self.sequences, None)?)
    }

    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        self.pieces(self.tokens)
    }

    /// The pieces in which so many rows go through the block: whole samples.
    pub(crate) fn pieces(&self, rows: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let chunk = self.chunk;
        (0..rows).step_by(chunk).map(move |start| start..rows.min(start + chunk))
    }

    /// What calibration tells about the input of a stage.
    pub(crate) fn stats(
        &self,
        store: &mut Activations,
        stage: usize,
        needs: Needs,
        spec: &QuantSpec,
    ) -> Result<StatsSum, Error> {
        let features = self.arch.stages[stage].linears[0].in_features;
        let mut sum = StatsSum::new(needs, features, spec.group.len(features));
        if needs != Needs::NONE {
            let mut buffer = Vec::new();
            for rows in self.chunks() {
                sum.accumulate(store.read(rows, &mut buffer)?).map_err(ModelError::from)?;
            }
        }
        Ok(sum)
    }

    /// About `tokens` rows of a store: whole samples, evenly spaced, at least one.
    pub(crate) fn sample(&self, store: &mut Activations, tokens: usize) -> Result<Array2<f32>, Error> {
        let len = self.sequences.len().max(1);
        let all = self.tokens / len;
        let count = (tokens / len).clamp(1, all.max(1));
        let (mut buffer, mut sample) = (Vec::new(), Array2::zeros((0, 0)));
        for i in 0..count {
            let start = i * all / count * len;
            let rows = store.read(start..start + len, &mut buffer)?;
            if i == 0 {
                sample = Array2::zeros((count * len, rows.ncols()));
            }
            sample.slice_axis_mut(Axis(0), Slice::from(i * len..(i + 1) * len)).assign(&rows);
        }
        Ok(sample)
    }

    /// A copy of the residual stream.
    pub(crate) fn copy_residual(&mut self, stores: Stores) -> Result<Activations, Error> {
        let mut copy = stores.residual(self.arch.hidden_size)?;
        let mut buffer = Vec::new();
        for rows in self.chunks() {
            copy.write(rows.start, self.x.read(rows, &mut buffer)?)?;
        }
        Ok(copy)
    }

    /// The input of the first stage.
    pub(crate) fn begin(&mut self, stores: Stores) -> Result<Activations, Error> {
        let mut input = stores.inputs(self.arch.hidden_size)?;
        let mut buffer = Vec::new();
        for rows in self.chunks() {
            input.write(rows.start, self.block.begin(self.x.read(rows, &mut buffer)?).view())?;
        }
        Ok(input)
    }

    /// Runs a stage with these linears, which are dropped afterwards: from its input to the input of the next one,
    /// adding to the residual stream on the way.
    pub(crate) fn run_stage(
        &mut self,
        stage: usize,
        linears: Slots,
        mut input: Activations,
        stores: Stores,
    ) -> Result<Activations, Error> {
        self.set(linears)?;
        let mut output =
            stores.inputs(self.arch.stages.get(stage + 1).map_or(0, |s| s.linears[0].in_features))?;
        let mut buffer = Vec::new();
        for rows in self.chunks() {
            let mut x = self.residual(rows.clone())?;
            let inputs = input.read(rows.clone(), &mut buffer)?;
            let next = self.block.advance(stage, inputs, &mut x, &self.sequences, None)?;
            self.x.write(rows.start, x.view())?;
            if !next.is_empty() {
                output.write(rows.start, next.view())?;
            }
        }
        self.clear(stage);
        Ok(output)
    }

    /// Runs the whole block.
    pub(crate) fn forward(&mut self) -> Result<(), Error> {
        for rows in self.chunks() {
            let mut x = self.residual(rows.clone())?;
            self.block.forward(&mut x, &self.sequences, None)?;
            self.x.write(rows.start, x.view())?;
        }
        Ok(())
    }

    fn residual(&mut self, rows: Range<usize>) -> Result<Array2<f32>, Error> {
        let mut buffer = Vec::new();
        Ok(self.x.read(rows, &mut buffer)?.to_owned())
    }
}
