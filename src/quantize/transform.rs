//! The transforms of a method, block by block: planned on float weights, applied to all that is read and written.

use ndarray::Array2;
use quant_core::{DType, DenseTensor, NormId, Producer, WeightSource};
use quant_methods::{Rewrite, Stage, StageRunner, Stopped, Transform, transform};
use quant_model::{ArchSpec, DenseLinear, Linear, NormPlace, linear};

use super::activations::{Activations, Stores};
use super::inspector::{Inspector, module_of};
use super::job::{Job, Target};
use super::pass::{Pass, Slots};
use super::run::{Run, to_f32};
use crate::error::Error;

const NORMS: [NormId; 2] = [NormId::Attention, NormId::Mlp];

impl Job<'_> {
    /// Whether a transform may choose factors for a stage: all linears that share the input, and the linear that makes
    /// it, are quantized, so that none of them stays as it is in the checkpoint.
    pub(crate) fn may_scale(&self, transform: &dyn Transform, layer: usize, stage: usize) -> bool {
        let Some(arch) = &self.arch else { return false };
        let producer = arch.producer(stage);
        let made_by = match &producer {
            Producer::Outputs { slot, .. } => Some(*slot),
            Producer::Norm(_) | Producer::Fixed { .. } => None,
        };
        let names: Vec<_> = arch.linears().map(|linear| linear.name).collect();
        let path = arch.block_path(layer, &self.source);
        let selected = |slot: usize| self.by_module.contains_key(&format!("{path}.{}", names[slot]));
        // What is divided is written in its own type.
        let biases = made_by.map(|slot| format!("{path}.{}.bias", names[slot]));
        let holds = |name: String| {
            let info = self.source.tensor_info(&name);
            info.is_none_or(|info| DenseTensor::from_f32_as(info.dtype, &[0], &[]).is_some())
        };
        transform.covers(&producer)
            && arch.slots(stage).chain(made_by).all(selected)
            && norm_tensors(arch, &path).into_iter().chain(biases).all(holds)
    }

    /// Tensors of norms that transforms may rewrite, so that they cannot be copied up front.
    pub(crate) fn rewritable_norms(&self, layer: usize) -> Vec<String> {
        match &self.arch {
            Some(arch) if !self.transforms.is_empty() && arch.norm.place == NormPlace::Before => {
                let names = norm_tensors(arch, &arch.block_path(layer, &self.source));
                names.into_iter().filter(|name| self.source.contains(name)).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Stands in for a module that is never run.
struct Unused;

impl StageRunner for Unused {
    fn loss(&mut self, _: Vec<Array2<f32>>) -> Result<f64, Stopped> {
        Err(Stopped)
    }
}

fn norm_tensors(arch: &ArchSpec, path: &str) -> Vec<String> {
    let parts = |norm| ["weight", "bias"].map(|part| format!("{path}.{}.{part}", arch.norm_name(norm)));
    NORMS.into_iter().flat_map(parts).collect()
}

impl Run<'_> {
    /// Plans the transforms of a block, each on the block as those before it leave it, and rewrites its norms, which
    /// are written.
    pub(super) fn transform(
        &mut self,
        pass: &mut Pass<'_>,
        layer: usize,
        stores: Stores,
    ) -> Result<(), Error> {
        self.rewrites.clear();
        for transform in &self.job.transforms {
            let stages: Vec<_> = (0..pass.arch().stages.len())
                .filter(|&stage| self.job.may_scale(transform.as_ref(), layer, stage))
                .collect();
            let Some(&last) = stages.last() else { continue };
            let before = pass.copy_residual(stores)?;
            let mut input = pass.begin(stores)?;
            let mut planned: Vec<Rewrite> = Vec::new();
            for stage in 0..=last {
                if stages.contains(&stage) {
                    planned.extend(self.plan_stage(transform.as_ref(), pass, stage, &mut input)?);
                }
                if stage < last {
                    let linears = self.float_linears(pass, stage)?;
                    input = pass.run_stage(stage, linears, input, stores)?;
                }
            }
            pass.x = before;
            for norm in NORMS {
                pass.edit_norm(norm, |values| {
                    for rewrite in &planned {
                        rewrite.norm(norm, values);
                    }
                });
            }
            self.rewrites.extend(planned);
        }
        self.write_norms(layer)
    }

    fn plan_stage(
        &self,
        transform: &dyn Transform,
        pass: &mut Pass<'_>,
        stage: usize,
        input: &mut Activations,
    ) -> Result<Vec<Rewrite>, Error> {
        let (job, arch) = (self.job, pass.arch());
        let producer = arch.producer(stage);
        let stats = pass.stats(input, stage, transform.needs(), &job.spec)?.finish();
        let targets: Vec<&Target> = arch.slots(stage).map(|slot| self.target(pass, slot)).collect();
        let weights = targets.iter().map(|target| Ok(self.rewritten_weight(target)?.0));
        let weights = weights.collect::<Result<Vec<Array2<f32>>, Error>>()?;
        let biases = targets.iter().map(|target| self.bias_f32(target)).collect::<Result<_, _>>()?;
        let view = Stage {
            weights: &weights,
            specs: &vec![job.spec; weights.len()],
            producer: &producer,
            magnitudes: stats.magnitudes.as_ref(),
        };
        let chosen = if transform.candidates() == 0 {
            transform.scales(&view, &mut Unused)?
        } else {
            let mut linears = Vec::new();
            for stage in module_of(arch.stages[stage].kind, stage) {
                linears.extend(self.float_linears(pass, stage)?);
            }
            let tokens = transform.sample_tokens();
            let mut runner = Inspector::new(pass, stage, linears, biases, input, tokens)?;
            let chosen = transform.scales(&view, &mut runner);
            chosen.map_err(|stopped| runner.error.take().unwrap_or(Error::Stopped(stopped)))?
        };
        let Some(mut scales) = chosen else { return Ok(Vec::new()) };
        if let Producer::Norm(norm) = producer {
            self.make_storable(pass, norm, &mut scales);
        }
        let outputs = match producer {
            Producer::Outputs { slot, .. } => self.target(pass, slot).rows,
            Producer::Norm(_) | Producer::Fixed { .. } => 0,
        };
        Ok(transform::fold(&producer, outputs, arch.slots(stage), &scales))
    }

    /// Moves factors to where the norm's weights, divided by them, are numbers of the type they are stored in: what is
    /// folded then is undone exactly by the linears.
    fn make_storable(&self, pass: &Pass<'_>, norm: NormId, scales: &mut [f32]) {
        let name = format!("{}.{}.weight", pass.path(), pass.arch().norm_name(norm));
        let dtype = self.job.source.tensor_info(&name).map_or(DType::F32, |info| info.dtype);
        let weights = pass.norm(norm);
        let divided: Vec<f32> = weights.iter().zip(&*scales).map(|(w, s)| w / s).collect();
        let stored = DenseTensor::from_f32_as(dtype, &[divided.len()], &divided);
        let stored = stored.and_then(|tensor| tensor.to_f32().ok()).unwrap_or(divided);
        for ((scale, w), stored) in scales.iter_mut().zip(weights).zip(stored) {
            let exact = w / stored;
            *scale = if exact.is_normal() && exact > 0.0 { exact } else { 1.0 };
        }
    }

    fn target(&self, pass: &Pass<'_>, slot: usize) -> &Target {
        &self.job.targets[self.job.by_module[pass.module(slot)]]
    }

    /// The linears of a stage in float, as the transforms so far leave them.
    pub(super) fn float_linears(&self, pass: &Pass<'_>, stage: usize) -> Result<Slots, Error> {
        pass.arch().slots(stage).map(|slot| Ok((slot, self.float_linear(pass, slot)?))).collect()
    }

    /// A linear in float, as the transforms so far leave it.
    pub(super) fn float_linear(&self, pass: &Pass<'_>, slot: usize) -> Result<Box<dyn Linear>, Error> {
        let module = pass.module(slot);
        if !self.rewrites.iter().any(|rewrite| rewrite.touches(slot)) {
            return Ok(linear(module, self.job.source.linear(module)?, pass.arch().conv1d)?);
        }
        let target = self.target(pass, slot);
        let (weight, _) = self.rewritten_weight(target)?;
        Ok(Box::new(DenseLinear::from_f32(weight.view(), self.bias_f32(target)?)))
    }

    /// The weight of a target as the transforms so far leave it, and how many of its elements were replaced.
    pub(super) fn rewritten_weight(&self, target: &Target) -> Result<(Array2<f32>, usize), Error> {
        let (mut weight, zeroed) = self.read_weight(target)?;
        self.rewrites.iter().for_each(|rewrite| rewrite.weight(target.slot, &mut weight));
        Ok((weight, zeroed))
    }

    /// The bias of a target as the transforms so far leave it, in the type it has in the checkpoint.
    pub(super) fn rewritten_bias(&self, target: &Target) -> Result<Option<DenseTensor>, Error> {
        let Some(name) = &target.bias else { return Ok(None) };
        let tensor = self.job.source.tensor(name)?;
        let change =
            |values: &mut [f32]| self.changed(|rewrite, values| rewrite.bias(target.slot, values), values);
        Ok(Some(rewritten(tensor, name, change)?))
    }

    fn bias_f32(&self, target: &Target) -> Result<Option<Vec<f32>>, Error> {
        let Some(name) = &target.bias else { return Ok(None) };
        self.rewritten_bias(target)?.map(|tensor| to_f32(&tensor, name)).transpose()
    }

    fn changed(&self, rewrite: impl Fn(&Rewrite, &mut [f32]) -> bool, values: &mut [f32]) -> bool {
        let mut changed = false;
        for each in &self.rewrites {
            changed |= rewrite(each, values);
        }
        changed
    }

    /// Writes the norms of a block that could have been rewritten.
    pub(super) fn write_norms(&mut self, layer: usize) -> Result<(), Error> {
        for name in self.job.rewritable_norms(layer) {
            let arch = self.job.arch.as_ref().expect("norms belong to a model");
            let norm = NORMS.into_iter().find(|&norm| name.contains(&format!(".{}.", arch.norm_name(norm))));
            let tensor = self.job.source.tensor(&name)?;
            let change = |values: &mut [f32]| {
                norm.is_some_and(|norm| self.changed(|rewrite, values| rewrite.norm(norm, values), values))
            };
            self.writer.write(&name, &rewritten(tensor, &name, change)?)?;
        }
        Ok(())
    }
}

/// The tensor after a change of its values, in the type that it has; itself if nothing changed.
fn rewritten(
    tensor: DenseTensor,
    name: &str,
    change: impl FnOnce(&mut [f32]) -> bool,
) -> Result<DenseTensor, Error> {
    let mut values = to_f32(&tensor, name)?;
    if !change(&mut values) {
        return Ok(tensor);
    }
    Ok(DenseTensor::from_f32_as(tensor.dtype(), tensor.shape(), &values).unwrap_or(tensor))
}
