//! What the user asks for.

use quant_core::{GroupSize, QuantSpec, SpecError};
use quant_formats::{
    Container, FormatError, GgmlType, Layout, PlannedLayer, PlannedTensor, gguf_layout, layouts,
};
use quant_methods::{LayerStats, MethodOptions, Quantizer, Transform};
use regex::Regex;

use crate::calibration::CalibrationSource;
use crate::error::Error;

/// What to do with weights that are not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NonFinite {
    /// Stop, naming tensor and index.
    #[default]
    Refuse,
    /// Replace them with zero and count them.
    Zero,
}

/// How to quantize a checkpoint. Start from [`QuantizeConfig::new`] and change fields:
///
/// ```
/// use quant::{GroupSize, QuantizeConfig};
///
/// let config = QuantizeConfig { bits: 3, group: GroupSize::Columns(64), ..QuantizeConfig::new("gptq")? };
/// config.validate()?;
/// assert!(QuantizeConfig::new("magic").unwrap_err().to_string().contains("gptq"));
/// # Ok::<(), quant::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct QuantizeConfig {
    /// Name of the method; see [`crate::registry::methods`].
    pub method: String,
    /// Bits per code.
    pub bits: u8,
    /// Elements that share a scale.
    pub group: GroupSize,
    /// Symmetric grids; `None` is the method's default.
    pub symmetric: Option<bool>,
    /// Names of the rewritings of the model that come before the method, in order; `None` are the method's own.
    pub transforms: Option<Vec<String>>,
    /// Options of the method and of the transforms.
    pub options: MethodOptions,
    /// Id of the layout to write; `None` is the method's own.
    pub layout: Option<String>,
    /// Calibration data, for methods that need it.
    pub calibration: CalibrationSource,
    /// Calibration samples at most.
    pub samples: usize,
    /// Tokens per calibration sample, at most the context length of the model.
    pub seq_len: usize,
    /// Chooses the samples where there are more than asked for.
    pub seed: u64,
    /// Quantize only modules that match one of these (all linears of the blocks if empty).
    pub include: Vec<Regex>,
    /// Leave modules that match one of these in float.
    pub exclude: Vec<Regex>,
    /// Observe each layer's inputs behind the quantized layers before it in the same block, too.
    pub true_sequential: bool,
    /// What to do with NaN and infinity among the weights.
    pub non_finite: NonFinite,
    /// Peak resident memory in bytes to stay below.
    pub max_memory: Option<u64>,
    /// Largest size of an output file in bytes.
    pub shard_size: u64,
    /// Replace an existing output.
    pub overwrite: bool,
}

impl QuantizeConfig {
    /// The defaults of a method: its bits and groups, 128 samples of 512 tokens of the built-in text.
    /// An unknown name is answered with the known ones.
    pub fn new(method: &str) -> Result<Self, Error> {
        let spec = quant_methods::quantizer(method, &MethodOptions::default())?.default_spec();
        Ok(Self {
            method: method.to_owned(),
            bits: spec.bits,
            group: spec.group,
            symmetric: None,
            transforms: None,
            options: MethodOptions::default(),
            layout: None,
            calibration: CalibrationSource::Builtin,
            samples: 128,
            seq_len: 512,
            seed: 0,
            include: Vec::new(),
            exclude: Vec::new(),
            true_sequential: true,
            non_finite: NonFinite::Refuse,
            max_memory: None,
            shard_size: 5_000_000_000,
            overwrite: false,
        })
    }

    /// The method with its options.
    pub fn quantizer(&self) -> Result<Box<dyn Quantizer>, Error> {
        Ok(quant_methods::quantizer(&self.method, &self.options)?)
    }

    /// What the method with its options does when nothing is asked for.
    pub fn default_spec(&self) -> Result<QuantSpec, Error> {
        Ok(self.quantizer()?.default_spec())
    }

    /// The rewritings of the model that come first.
    pub(crate) fn transforms(&self) -> Result<Vec<Box<dyn Transform>>, Error> {
        match &self.transforms {
            None => Ok(self.quantizer()?.transforms()),
            Some(names) => {
                let each = |name: &String| Ok(quant_methods::registry::transform(name, &self.options)?);
                names.iter().map(each).collect()
            }
        }
    }

    /// The specification every selected linear gets.
    pub fn spec(&self) -> Result<QuantSpec, Error> {
        let default = self.default_spec()?;
        let symmetric = self.symmetric.unwrap_or(default.symmetric);
        let group = match (self.group, default.group) {
            // A number of weights, for methods that cut the flattened matrix.
            (GroupSize::Columns(len), GroupSize::Flat(_)) => GroupSize::Flat(len),
            (group, _) => group,
        };
        Ok(QuantSpec { bits: self.bits, group, symmetric, ..default })
    }

    /// The layout that will be written. By default the first that can store such layers if their sizes allow; which
    /// sizes do is a matter of each layer.
    pub fn storage(&self) -> Result<&'static dyn Layout, Error> {
        const FRIENDLY: usize = 4096;
        if let Some(id) = &self.layout {
            return Ok(quant_formats::layout(id)?);
        }
        let quantizer = self.quantizer()?;
        // The types of GGUF are methods, too.
        let ggml = GgmlType::from_name(&self.method).filter(|_| quantizer.layouts().is_empty());
        if let Some(layout) = ggml.and_then(gguf_layout) {
            return Ok(layout);
        }
        let (spec, input) = (self.spec()?, quantizer.input(&LayerStats::default()));
        let layer = PlannedLayer { input: &input, ..PlannedLayer::new("", &spec, FRIENDLY, FRIENDLY) };
        let fits = |layout: &&&'static dyn Layout| {
            layout.container() == Container::Directory && layout.can_store(&layer).is_ok()
        };
        let own: Vec<_> =
            quantizer.layouts().iter().filter_map(|id| quant_formats::layout(id).ok()).collect();
        let mut known = own.iter().chain(layouts());
        Ok(known.find(fits).copied().unwrap_or(layouts()[0]))
    }

    /// Exact bytes on disk of a linear layer of `rows` outputs and `cols` inputs, its bias not counted.
    ///
    /// ```
    /// let config = quant::QuantizeConfig::new("gptq")?;
    /// // Codes, 32 groups of f16 scales and 4-bit zeros for each output, and a group index for each input.
    /// let bytes = 14336 * 4096 / 2 + 32 * 14336 * (2 * 2 + 1) / 2 + 4096 * 4;
    /// assert_eq!(config.estimate(14336, 4096)?, bytes);
    /// # Ok::<(), quant::Error>(())
    /// ```
    pub fn estimate(&self, rows: usize, cols: usize) -> Result<u64, Error> {
        let (layout, spec) = (self.storage()?, self.spec()?);
        let input = self.quantizer()?.input(&LayerStats::default());
        let layer = PlannedLayer { input: &input, ..PlannedLayer::new("", &spec, rows, cols) };
        layout.can_store(&layer).map_err(FormatError::from)?;
        let tensors = layout.planned(&layer);
        Ok(tensors.iter().filter_map(PlannedTensor::byte_len).sum())
    }

    /// Checks everything that can be checked without a checkpoint.
    pub fn validate(&self) -> Result<(), Error> {
        self.quantizer()?.validate(&self.spec()?)?;
        self.transforms()?;
        for (option, value) in [("samples", self.samples), ("seq_len", self.seq_len)] {
            if value == 0 {
                let allowed = "at least 1";
                return Err(SpecError::Option { option, found: "0".to_owned(), allowed }.into());
            }
        }
        Ok(())
    }

    /// True if the module of this path is to be quantized.
    pub(crate) fn selects(&self, module: &str) -> bool {
        let matches = |list: &[Regex]| list.iter().any(|r| r.is_match(module));
        (self.include.is_empty() || matches(&self.include)) && !matches(&self.exclude)
    }
}
