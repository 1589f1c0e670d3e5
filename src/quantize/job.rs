//! What a run will do, found out from headers alone.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use quant_core::{ActSpec, QuantSpec, WeightSource};
use quant_formats::{Checkpoint, Layout, PlannedLayer, PlannedTensor};
use quant_methods::{LayerStats, Needs, Quantizer, Transform};
use quant_model::ArchSpec;
use serde_json::Value;

use crate::config::QuantizeConfig;
use crate::error::{Error, Problem};

/// A linear layer that will be quantized.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Module path.
    pub(crate) module: String,
    /// Slot in its block.
    pub(crate) slot: usize,
    /// Its float weight in the checkpoint.
    pub(crate) weight: String,
    /// Its bias in the checkpoint.
    pub(crate) bias: Option<String>,
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) cols: usize,
    /// Stored `[in, out]`.
    pub(crate) transposed: bool,
    /// Bytes per weight as stored.
    pub(crate) stored_width: usize,
    /// The tensors it becomes.
    pub(crate) tensors: Vec<PlannedTensor>,
}

impl Target {
    /// Bytes of what replaces the weight, without the bias.
    pub(crate) fn weight_bytes(&self) -> u64 {
        let bias = format!("{}.bias", self.module);
        self.tensors.iter().filter(|t| t.name != bias).filter_map(PlannedTensor::byte_len).sum()
    }

    /// What it is to its layout.
    pub(crate) fn layer<'b>(&'b self, spec: &'b QuantSpec, input: &'b ActSpec) -> PlannedLayer<'b> {
        let name = format!("{}.bias", self.module);
        let bias = self.tensors.iter().find(|tensor| tensor.name == name).map(|tensor| tensor.dtype);
        PlannedLayer { bias, input, ..PlannedLayer::new(&self.module, spec, self.rows, self.cols) }
    }
}

/// A run, ready to start: nothing has been read but headers, nothing written.
pub(crate) struct Job<'a> {
    pub(crate) config: &'a QuantizeConfig,
    pub(crate) source: Checkpoint,
    /// `None` for a bare file of tensors.
    pub(crate) arch: Option<Arc<ArchSpec>>,
    pub(crate) quantizer: Box<dyn Quantizer>,
    /// Rewritings of the model before it is quantized, in order.
    pub(crate) transforms: Vec<Box<dyn Transform>>,
    pub(crate) layout: &'static dyn Layout,
    pub(crate) spec: QuantSpec,
    /// How inputs are quantized; the numbers of static scales are found on the way.
    pub(crate) input: ActSpec,
    pub(crate) targets: Vec<Target>,
    /// Index of the target of a module.
    pub(crate) by_module: HashMap<String, usize>,
    /// Tensors that are carried over as they are.
    pub(crate) carried: Vec<PlannedTensor>,
    pub(crate) problems: Vec<Problem>,
}

impl<'a> Job<'a> {
    /// Looks at the checkpoint and finds every layer, every output tensor and every problem.
    pub(crate) fn prepare(source: Checkpoint, config: &'a QuantizeConfig) -> Result<Self, Error> {
        config.validate()?;
        let quantizer = config.quantizer()?;
        let transforms = config.transforms()?;
        let spec = config.spec()?;
        let input = quantizer.input(&LayerStats::default());
        let layout = config.storage()?;
        let arch = match source.config() {
            Value::Null if quantizer.needs() == Needs::NONE && transforms.is_empty() => None,
            Value::Null => return Err(Error::NoModel { method: config.method.clone() }),
            config => Some(Arc::new(ArchSpec::from_config(config)?)),
        };
        let (by_module, carried, problems) = (HashMap::new(), Vec::new(), Vec::new());
        let targets = Vec::new();
        let mut job = Self {
            config,
            source,
            arch,
            quantizer,
            transforms,
            layout,
            spec,
            input,
            targets,
            by_module,
            carried,
            problems,
        };
        job.find_targets()?;
        job.find_carried();
        if job.targets.is_empty() {
            let message = "no layer is selected; see --include and --exclude".to_owned();
            job.problems.push(Problem { tensor: None, message });
        }
        Ok(job)
    }

    fn find_targets(&mut self) -> Result<(), Error> {
        let mut modules = Vec::new();
        match self.arch.clone() {
            Some(arch) => {
                for layer in 0..arch.layers {
                    let path = arch.block_path(layer, &self.source);
                    for (slot, linear) in arch.linears().enumerate() {
                        let module = format!("{path}.{}", linear.name);
                        // Also ends the loop, at the first missing layer, when `layers` is nonsense.
                        let stored = self.source.linear_shape(&module)?;
                        let shape = (linear.out_features, linear.in_features);
                        modules.push((module, slot, shape, arch.conv1d, stored, linear.because));
                    }
                }
            }
            None => {
                let floats =
                    self.source.tensor_infos().filter(|(_, t)| t.shape.len() == 2 && t.dtype.is_float());
                for (name, tensor) in floats {
                    let shape = (tensor.shape[0], tensor.shape[1]);
                    let module = name.strip_suffix(".weight").unwrap_or(name).to_owned();
                    modules.push((module, 0, shape, false, shape, ""));
                }
            }
        }
        for (module, slot, shape, transposed, stored, because) in modules {
            let expected = if transposed { (shape.1, shape.0) } else { shape };
            let weight = [format!("{module}.weight"), module.clone()].into_iter();
            let Some(weight) = weight.into_iter().find(|name| self.source.contains(name)) else {
                return Err(Error::AlreadyQuantized { module });
            };
            if stored != expected {
                let message = format!("shape {stored:?} where {expected:?} follows from {because}");
                self.problems.push(Problem { tensor: Some(weight), message });
            } else if self.config.selects(&module) {
                self.add_target((module, slot), weight, shape, transposed);
            }
        }
        Ok(())
    }

    fn add_target(
        &mut self,
        (module, slot): (String, usize),
        weight: String,
        (rows, cols): (usize, usize),
        transposed: bool,
    ) {
        let bias = Some(format!("{module}.bias")).filter(|name| self.source.contains(name));
        let bias_dtype = bias.as_ref().and_then(|name| self.source.tensor_info(name)).map(|info| info.dtype);
        let layer = PlannedLayer {
            bias: bias_dtype,
            input: &self.input,
            ..PlannedLayer::new(&module, &self.spec, rows, cols)
        };
        if let Err(unsupported) = self.layout.can_store(&layer) {
            self.problems.push(Problem { tensor: Some(module), message: unsupported.to_string() });
            return;
        }
        let tensors = self.layout.planned(&layer);
        let stored_width = self.source.tensor_info(&weight).map_or(4, |info| info.dtype.bits().div_ceil(8));
        self.by_module.insert(module.clone(), self.targets.len());
        self.targets.push(Target {
            module,
            slot,
            weight,
            bias,
            rows,
            cols,
            transposed,
            stored_width,
            tensors,
        });
    }

    fn find_carried(&mut self) {
        let replaced: HashSet<&str> = self
            .targets
            .iter()
            .flat_map(|t| [Some(t.weight.as_str()), t.bias.as_deref()])
            .flatten()
            .collect();
        let carried = self.source.tensor_infos().filter(|(name, _)| !replaced.contains(name));
        self.carried =
            carried.map(|(name, info)| PlannedTensor::new(name, info.dtype, &info.shape)).collect();
    }

    /// Whether a calibration set is run through the model.
    pub(crate) fn is_calibrated(&self) -> bool {
        self.quantizer.needs() != Needs::NONE || !self.transforms.is_empty()
    }

    /// All tensors of the output.
    pub(crate) fn outputs(&self) -> Vec<PlannedTensor> {
        let quantized = self.targets.iter().flat_map(|t| t.tensors.iter().cloned());
        self.carried.iter().cloned().chain(quantized).collect()
    }

    /// Bits per weight of the layers that are quantized, biases not counted.
    pub(crate) fn bits_per_weight(&self) -> f64 {
        let weights: usize = self.targets.iter().map(|t| t.rows * t.cols).sum();
        let bytes: u64 = self.targets.iter().map(Target::weight_bytes).sum();
        if weights == 0 { 0.0 } else { 8.0 * bytes as f64 / weights as f64 }
    }
}
