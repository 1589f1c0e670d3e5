//! Peak memory of a quantization run, from geometry alone.

use std::ops::Range;

use quant_core::QuantSpec;
use quant_methods::Quantizer;

/// One stage of a block: linears that share an input.
#[derive(Clone, Debug)]
pub(crate) struct StageShape {
    /// Input features.
    pub(crate) inputs: usize,
    /// Input features of the next stage (0 after the last).
    pub(crate) next_inputs: usize,
    /// `[out, in]` and stored bytes per weight of every linear.
    pub(crate) linears: Vec<(usize, usize, usize)>,
    /// The stages that run when a transform tries weights in its place.
    pub(crate) module: Range<usize>,
}

/// The geometry of a calibrated run.
#[derive(Clone, Debug)]
pub(crate) struct RunShape {
    /// Calibration tokens.
    pub(crate) tokens: usize,
    /// Tokens that go through a block at a time.
    pub(crate) chunk: usize,
    /// Features of the residual stream.
    pub(crate) hidden: usize,
    /// Blocks run twice: their input and all their quantized linears are kept meanwhile.
    pub(crate) twice: bool,
    /// Calibration tokens on which transforms try weights, if there are transforms.
    pub(crate) sample: Option<usize>,
    /// Stages of a block.
    pub(crate) stages: Vec<StageShape>,
    /// Bytes of the embedding table as stored.
    pub(crate) embedding: usize,
}

/// Resident bytes of the program with a tokenizer, thread stacks, packing buffers of the dense kernels and what the
/// allocator keeps: measured at 24 MB with two threads and no model.
pub(super) const BASE: usize = 24 << 20;

/// Where the two large stores of activations lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spill {
    /// The inputs of the current and the next stage go to files.
    pub(crate) inputs: bool,
    /// The residual stream, too.
    pub(crate) residual: bool,
}

impl Spill {
    /// From everything in memory to everything in files.
    pub(crate) const STEPS: [Spill; 3] = [
        Spill { inputs: false, residual: false },
        Spill { inputs: true, residual: false },
        Spill { inputs: true, residual: true },
    ];
}

impl RunShape {
    /// Predicted peak of resident memory in bytes.
    pub(crate) fn peak(&self, quantizer: &dyn Quantizer, spec: &QuantSpec, spill: Spill) -> usize {
        let store = |cols: usize, spilled: bool| 4 * cols * if spilled { 0 } else { self.tokens };
        let streams = if self.twice { 2 } else { 1 };
        let residual = streams * store(self.hidden, spill.residual);
        let embedding_phase = self.embedding + residual + 4 * self.chunk * self.hidden;
        let mut done = 0;
        let mut peak = embedding_phase;
        for stage in &self.stages {
            let shapes: Vec<(usize, usize)> = stage.linears.iter().map(|&(n, k, _)| (n, k)).collect();
            let weights: usize = shapes.iter().map(|(n, k)| n * k).sum();
            let largest_stored = stage.linears.iter().map(|&(n, k, bytes)| n * k * bytes).max().unwrap_or(0);
            let stats = quantizer.needs().bytes(stage.inputs, spec.group.len(stage.inputs));
            let input = store(stage.inputs, spill.inputs);
            // While weights are read: all of the stage in f32, and one as it is stored.
            let reading = input + stats + 4 * weights + largest_stored;
            let solving = input + quantizer.peak_bytes(&shapes, spec);
            // While the block advances: inputs and outputs of a chunk next to the stores.
            let packed = weights * usize::from(spec.bits) / 8 + weights / 16;
            let outputs: usize = shapes.iter().map(|(n, _)| n).sum();
            let chunk = 4 * self.chunk * (2 * self.hidden + stage.inputs + outputs + stage.next_inputs);
            let advancing = input + store(stage.next_inputs, spill.inputs) + packed + chunk;
            peak = peak.max(residual + done + reading.max(solving).max(advancing));
            if self.twice {
                done += packed;
            }
        }
        BASE + peak.max(self.transform_peak(spill))
    }

    /// Peak while transforms are planned: the float block runs on all tokens, and on a sample with other weights.
    fn transform_peak(&self, spill: Spill) -> usize {
        let Some(sample) = self.sample else { return 0 };
        let store = |cols: usize, spilled: bool| 4 * cols * if spilled { 0 } else { self.tokens };
        let residual = 2 * store(self.hidden, spill.residual);
        let weights = |stage: &StageShape| stage.linears.iter().map(|&(n, k, _)| 4 * n * k).sum::<usize>();
        let outputs = |stage: &StageShape| stage.linears.iter().map(|&(n, ..)| n).sum::<usize>();
        let stage_peak = |stage: &StageShape| {
            let module: usize = self.stages[stage.module.clone()].iter().map(weights).sum();
            let width: usize =
                self.stages[stage.module.clone()].iter().map(|s| s.inputs + outputs(s) + s.next_inputs).sum();
            let trying = 4 * sample * (stage.inputs + 2 * self.hidden)
                + 4 * self.chunk.min(sample) * (width + self.hidden)
                // The weights, rounded ones, and those that run.
                + 2 * weights(stage)
                + module;
            let chunk =
                4 * self.chunk * (2 * self.hidden + stage.inputs + outputs(stage) + stage.next_inputs);
            let running = store(stage.next_inputs, spill.inputs) + weights(stage) + chunk;
            residual + store(stage.inputs, spill.inputs) + trying.max(running)
        };
        self.stages.iter().map(stage_peak).max().unwrap_or(0)
    }
}
