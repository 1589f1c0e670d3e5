//! The work itself: every layer read, quantized, written and dropped.

use std::collections::HashSet;

use ndarray::Array2;
use quant_core::{DenseTensor, LinearWeights, QuantizedLinear, TensorError, WeightError};
use quant_formats::ModelWriter;
use quant_methods::{LayerWeights, Needs, Rewrite, StatsSum};
use quant_model::{Embedding, linear};

use super::activations::{Activations, Stores};
use super::job::{Job, Target};
use super::memory::Spill;
use super::pass::{Pass, Slots};
use super::summary::LayerSummary;
use crate::calibration::Calibration;
use crate::config::NonFinite;
use crate::error::Error;
use crate::progress::Progress;

/// A run in progress.
pub(crate) struct Run<'a> {
    pub(crate) job: &'a Job<'a>,
    pub(crate) writer: &'a ModelWriter,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) layers: Vec<LayerSummary>,
    /// Weights that were not finite and were replaced with zero.
    pub(crate) zeroed: usize,
    /// What transforms make of the current block.
    pub(super) rewrites: Vec<Rewrite>,
}

impl<'a> Run<'a> {
    /// A run that has done nothing yet.
    pub(crate) fn new(job: &'a Job<'a>, writer: &'a ModelWriter, progress: &'a dyn Progress) -> Self {
        Self { job, writer, progress, layers: Vec::new(), zeroed: 0, rewrites: Vec::new() }
    }
}

impl Run<'_> {
    /// Copies what is neither quantized nor rewritten.
    pub(crate) fn carry_tensors(&self) -> Result<(), Error> {
        let layers = self.job.arch.as_ref().map_or(0, |arch| arch.layers);
        let later: HashSet<_> = (0..layers).flat_map(|layer| self.job.rewritable_norms(layer)).collect();
        for tensor in self.job.carried.iter().filter(|tensor| !later.contains(&tensor.name)) {
            self.writer.write(&tensor.name, &self.job.source.tensor(&tensor.name)?)?;
        }
        Ok(())
    }

    /// Quantizes every layer without looking at any activation.
    pub(crate) fn without_calibration(&mut self) -> Result<(), Error> {
        self.begin();
        for target in &self.job.targets {
            self.quantize(&[target], StatsSum::new(Needs::NONE, target.cols, target.cols))?;
        }
        self.progress.end();
        Ok(())
    }

    /// Quantizes block by block; the inputs of a block come out of the quantized blocks before it.
    pub(crate) fn with_calibration(&mut self, calibration: &Calibration, spill: Spill) -> Result<(), Error> {
        let (source, job) = (&self.job.source, self.job);
        let arch = job.arch.as_ref().expect("a calibrated method has a model");
        let stores = Stores { tokens: calibration.tokens(), spill };
        let mut x = stores.residual(arch.hidden_size)?;
        let embedding = Embedding::load(arch, source)?;
        for (i, sample) in calibration.samples.iter().enumerate() {
            x.write(i * calibration.seq_len, embedding.embed(sample, 0)?.view())?;
        }
        drop(embedding);

        self.begin();
        for layer in 0..arch.layers {
            let mut pass = Pass::new(arch, layer, source, x, calibration)?;
            self.transform(&mut pass, layer, stores)?;
            match job.config.true_sequential {
                true => self.stage_by_stage(&mut pass, stores)?,
                false => self.block_at_once(&mut pass, stores)?,
            }
            if self.finished() {
                self.rewrites.clear();
                (layer + 1..arch.layers).try_for_each(|layer| self.write_norms(layer))?;
                break;
            }
            x = pass.x;
        }
        self.progress.end();
        Ok(())
    }

    /// Each stage sees its inputs behind the quantized stages before it.
    fn stage_by_stage(&mut self, pass: &mut Pass<'_>, stores: Stores) -> Result<(), Error> {
        let mut input = pass.begin(stores)?;
        for stage in 0..pass.arch().stages.len() {
            let linears = self.solve_stage(pass, stage, &mut input)?;
            if self.finished() {
                break;
            }
            input = pass.run_stage(stage, linears, input, stores)?;
        }
        Ok(())
    }

    /// All stages see their inputs behind the float stages before them; then the quantized block runs.
    fn block_at_once(&mut self, pass: &mut Pass<'_>, stores: Stores) -> Result<(), Error> {
        let before = pass.copy_residual(stores)?;
        let mut solved = Vec::new();
        let mut input = pass.begin(stores)?;
        for stage in 0..pass.arch().stages.len() {
            solved.extend(self.solve_stage(pass, stage, &mut input)?);
            let floats = self.float_linears(pass, stage)?;
            input = pass.run_stage(stage, floats, input, stores)?;
        }
        drop(input);
        pass.x = before;
        pass.set(solved)?;
        pass.forward()
    }

    fn finished(&self) -> bool {
        self.layers.len() == self.job.targets.len()
    }

    fn begin(&self) {
        let weights = self.job.targets.iter().map(|t| t.rows * t.cols).sum::<usize>();
        self.progress.begin("quantizing", weights as u64);
    }

    /// Quantizes the linears of a stage on their common input; those not selected are read as they are.
    fn solve_stage(
        &mut self,
        pass: &Pass<'_>,
        stage: usize,
        input: &mut Activations,
    ) -> Result<Slots, Error> {
        let (job, arch) = (self.job, pass.arch());
        let (mut slots, mut targets, mut linears) = (Vec::new(), Vec::new(), Vec::new());
        for slot in arch.slots(stage) {
            match job.by_module.get(pass.module(slot)) {
                Some(&target) => {
                    slots.push(slot);
                    targets.push(&job.targets[target]);
                }
                None => linears.push((slot, self.float_linear(pass, slot)?)),
            }
        }
        if targets.is_empty() {
            return Ok(linears);
        }
        let sum = pass.stats(input, stage, job.quantizer.needs(), &job.spec)?;
        for (slot, quantized) in slots.into_iter().zip(self.quantize(&targets, sum)?) {
            let weights = LinearWeights::Quantized(Box::new(quantized));
            linears.push((slot, linear(pass.module(slot), weights, arch.conv1d)?));
        }
        Ok(linears)
    }

    /// Reads, quantizes and writes linears that share an input.
    fn quantize(&mut self, targets: &[&Target], stats: StatsSum) -> Result<Vec<QuantizedLinear>, Error> {
        let mut layers = Vec::with_capacity(targets.len());
        for target in targets {
            let (w, zeroed) = self.rewritten_weight(target)?;
            self.zeroed += zeroed;
            layers.push(LayerWeights { w, spec: self.job.spec });
        }
        let stats = stats.finish();
        let input = self.job.quantizer.input(&stats);
        let quantized = self.job.quantizer.quantize(layers, stats).map_err(|source| {
            let module = targets[source.layer()].module.clone();
            Error::Quantize { module, source }
        })?;
        let mut linears = Vec::with_capacity(targets.len());
        for (target, quantized) in targets.iter().zip(quantized) {
            let mut layer = QuantizedLinear::new(quantized.matrix);
            layer.bias = self.rewritten_bias(target)?;
            layer.input = input.clone();
            for (name, tensor) in self.job.layout.write(&layer, &target.module)? {
                self.writer.write(&name, &tensor)?;
            }
            self.layers.push(LayerSummary::new(target, self.job, quantized.report));
            self.progress.advance(&target.module, (target.rows * target.cols) as u64);
            linears.push(layer);
        }
        Ok(linears)
    }

    /// The float weight `[out, in]` of a target, every element finite, and how many were made so.
    pub(super) fn read_weight(&self, target: &Target) -> Result<(Array2<f32>, usize), Error> {
        let tensor = self.job.source.tensor(&target.weight)?;
        let mut values = to_f32(&tensor, &target.weight)?;
        drop(tensor);
        let mut zeroed = 0;
        if self.job.config.non_finite == NonFinite::Zero {
            for value in values.iter_mut().filter(|v| !v.is_finite()) {
                *value = 0.0;
                zeroed += 1;
            }
        }
        let (rows, cols) = (target.rows, target.cols);
        let shaped =
            |dim| Array2::from_shape_vec(dim, values).expect("the shape was checked with the header");
        let weight = match target.transposed {
            true => shaped((cols, rows)).reversed_axes().as_standard_layout().into_owned(),
            false => shaped((rows, cols)),
        };
        Ok((weight, zeroed))
    }
}

pub(super) fn to_f32(tensor: &DenseTensor, name: &str) -> Result<Vec<f32>, Error> {
    let wrap = |source: TensorError| WeightError::Tensor { name: name.to_owned(), source };
    Ok(tensor.to_f32().map_err(wrap)?)
}
