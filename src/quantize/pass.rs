//! The calibration set on its way through one block.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2};
use quant_core::WeightSource;
use quant_model::{ArchSpec, Block, Linear, Sequences};

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
        Ok(Self { arch, block, x, sequences, tokens, chunk })
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

    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (tokens, chunk) = (self.tokens, self.chunk);
        (0..tokens).step_by(chunk).map(move |start| start..tokens.min(start + chunk))
    }

    /// Calls `f` with every chunk of a store, in order.
    pub(crate) fn each_chunk(
        &self,
        store: &mut Activations,
        mut f: impl FnMut(ArrayView2<'_, f32>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut buffer = Vec::new();
        self.chunks().try_for_each(|rows| f(store.read(rows, &mut buffer)?))
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
        self.arch.slots(stage).for_each(|slot| drop(self.block.take_linear(slot)));
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
