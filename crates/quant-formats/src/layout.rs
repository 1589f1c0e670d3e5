//! On-disk layouts of one quantized linear layer, and the table of them.
//!
//! To add a layout: one file that implements [`Layout`] and [`Reader`], and one line in [`layouts`]. If the
//! layout was recognised before, its line in `FAMILIES` of `detect.rs` goes.

mod awq;
mod bitsandbytes;
mod ct;
mod fields;
mod fp8;
mod gguf;
mod gptq;
mod hqq;
mod modelopt;
mod module;
mod mxfp4;
mod parts;
mod quanto;
mod scales;
mod sections;
mod sinq;
mod torchao;

use std::collections::BTreeMap;

use ndarray::Array2;
use quant_core::{ActSpec, DType, DenseTensor, QuantSpec, QuantizedLinear, QuantizedMatrix};
use serde_json::{Map, Value};

use crate::error::{FormatError, Unsupported};
use crate::gguf::GgmlType;
use crate::sink::PlannedTensor;

pub use gguf::gguf_layout;
pub(crate) use gguf::{parse_part, part_name};

/// All layouts that can be read and written, best known first.
pub fn layouts() -> &'static [&'static dyn Layout] {
    // One line each, with its family.
    &[
        &gptq::V1,
        &gptq::V2,
        &awq::GEMM,
        &awq::GEMV,
        &awq::GEMV_FAST,
        &gptq::PLANAR,
        &gptq::AUTO_ROUND,
        &fp8::FP8,
        &fp8::INVERSE,
        &fp8::FBGEMM,
        &modelopt::NVFP4,
        &modelopt::FP8,
        &mxfp4::MXFP4,
        &ct::PACK,
        &ct::INT,
        &ct::FLOAT,
        &ct::NVFP4,
        &ct::MXFP4,
        &ct::MXFP6,
        &ct::MXFP8,
        &torchao::TORCHAO,
        &gguf::ANY,
        &bitsandbytes::NF4,
        &bitsandbytes::FP4,
        &bitsandbytes::INT8,
        // Before HQQ, whose names it shares.
        &sinq::SINQ,
        &hqq::HQQ,
        &quanto::QUANTO,
    ]
}

/// The layout of that name. `gguf:q4_0` is the layout `gguf` with every layer in that type.
pub fn layout(id: &str) -> Result<&'static dyn Layout, FormatError> {
    if let Some(ty) = id.strip_prefix("gguf:").and_then(GgmlType::from_name).and_then(gguf_layout) {
        return Ok(ty);
    }
    layouts().iter().copied().find(|l| l.id() == id).ok_or_else(|| {
        let types = GgmlType::blocks().filter(|&ty| gguf_layout(ty).is_some());
        let known: Vec<_> = match id.split_once(':') {
            Some(("gguf", _)) => types.map(|ty| format!("gguf:{}", ty.name().to_lowercase())).collect(),
            _ => layouts().iter().map(|l| l.id().to_owned()).collect(),
        };
        FormatError::UnknownLayout { found: id.to_owned(), known: known.join(", ") }
    })
}

/// The first layout of safetensors files that can store such layers, or why the first one can't.
pub fn layout_for(layer: &PlannedLayer<'_>) -> Result<&'static dyn Layout, Unsupported> {
    let mut refusal = None;
    for &layout in layouts().iter().filter(|layout| layout.container() == Container::Directory) {
        match layout.can_store(layer) {
            Ok(()) => return Ok(layout),
            Err(e) => refusal = refusal.or(Some(e)),
        }
    }
    Err(refusal.unwrap_or(Unsupported {
        layout: "this build",
        field: "quantized weights",
        found: String::new(),
        remedy: "it has no layouts".into(),
    }))
}

/// A linear layer before it is quantized: everything that the types and sizes of its tensors follow from.
#[derive(Clone, Copy, Debug)]
pub struct PlannedLayer<'a> {
    /// Module path.
    pub module: &'a str,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// What the weight is made to.
    pub spec: &'a QuantSpec,
    /// How its inputs are quantized. The numbers of a static scale do not matter here.
    pub input: &'a ActSpec,
    /// Type of the bias, if there is one.
    pub bias: Option<DType>,
    /// Type that the layout's library computes the weights in, for layouts that name one
    /// ([`QuantizedMatrix::dtype`]).
    pub dtype: Option<DType>,
}

impl<'a> PlannedLayer<'a> {
    /// A layer with float inputs and without bias.
    pub fn new(module: &'a str, spec: &'a QuantSpec, rows: usize, cols: usize) -> Self {
        Self { module, rows, cols, spec, input: &ActSpec::Float, bias: None, dtype: None }
    }

    /// A tensor of this layer.
    pub(crate) fn part(&self, part: &str, dtype: DType, shape: &[usize]) -> PlannedTensor {
        PlannedTensor::new(format!("{}.{part}", self.module), dtype, shape)
    }

    /// The bias, if there is one.
    pub(crate) fn bias_part(&self) -> Option<PlannedTensor> {
        self.bias.map(|dtype| self.part("bias", dtype, &[self.rows]))
    }
}

/// Tensors by name: a checkpoint, a single file, or a map in memory.
pub trait TensorSource: Sync {
    /// Type and shape of a tensor, without reading it.
    fn lookup(&self, name: &str) -> Option<(DType, &[usize])>;

    /// A whole tensor.
    fn read(&self, name: &str) -> Result<DenseTensor, FormatError>;

    /// What the header of a file notes under this key, beside its tensors.
    fn note(&self, _key: &str) -> Option<&str> {
        None
    }

    /// The model's `config.json`, `null` where there is none: some layouts leave shapes to it.
    fn model_config(&self) -> &Value {
        &Value::Null
    }
}

impl TensorSource for BTreeMap<String, DenseTensor> {
    fn lookup(&self, name: &str) -> Option<(DType, &[usize])> {
        self.get(name).map(|t| (t.dtype(), t.shape()))
    }

    fn read(&self, name: &str) -> Result<DenseTensor, FormatError> {
        let because = "it is not in this map";
        self.get(name)
            .cloned()
            .ok_or_else(|| FormatError::Missing { tensor: name.to_owned(), because: because.into() })
    }
}

/// What a model in some layout is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// A directory of safetensors files with a `config.json`.
    Directory,
    /// One GGUF file.
    Gguf,
}

/// How the linear layers of a checkpoint are laid out on disk. Stateless; everything that a file says about
/// itself is in its [`Reader`].
pub trait Layout: Send + Sync {
    /// Short name, such as `gptq_v2`.
    fn id(&self) -> &'static str;

    /// One line for people.
    fn description(&self) -> &'static str;

    /// The `quant_method`s of configurations that mean this layout.
    fn methods(&self) -> &'static [&'static str];

    /// What holds the tensors of a model in this layout.
    fn container(&self) -> Container {
        Container::Directory
    }

    /// The part that every quantized module has, such as `qweight`.
    fn marker(&self) -> &'static str;

    /// The module that this tensor shows to be quantized, going by its name and type. Parts with names that other
    /// modules use too show nothing.
    fn module_of<'a>(&self, tensor: &'a str, dtype: DType) -> Option<&'a str>;

    /// Endings of tensor names that show this layout where no configuration names a method. The first layout of the
    /// table that has any of its endings in a checkpoint is taken, so special ones stand before general ones.
    fn known_by(&self) -> &'static [&'static str] {
        &[]
    }

    /// Parts that hold packed codes, which some libraries view as floats: their bytes are no numbers.
    fn packed_parts(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether such a layer can be stored: if not, which field stands in the way and what to choose instead.
    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported>;

    /// The tensors that [`Layout::write`] will give for a layer that can be stored. Exact, so that sizes are known
    /// before any work.
    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor>;

    /// The tensors of one layer, with their full names.
    fn write(
        &self,
        linear: &QuantizedLinear,
        module: &str,
    ) -> Result<Vec<(String, DenseTensor)>, FormatError>;

    /// The `quantization_config` of a checkpoint written in this layout.
    fn config(&self, model: &StoredModel<'_>) -> Value;

    /// Whether modules may have different bits and groups. If not, a configuration holds one kind for all.
    fn mixes(&self) -> bool {
        true
    }

    /// Further files that other programs look for, made from [`Layout::config`] and the quantized layers.
    fn side_files(&self, _config: &Value, _layers: &[PlannedLayer<'_>]) -> Vec<(String, Vec<u8>)> {
        Vec::new()
    }

    /// Whether its library looks for an index of tensors even where there is one file.
    fn always_indexed(&self) -> bool {
        false
    }

    /// What the header of every file notes of these layers and of the `others`, tensors that are stored as they are.
    fn header_notes(&self, _layers: &[PlannedLayer<'_>], _others: &[&str]) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Prepares to read a checkpoint with this `quantization_config` (`null` where there is none). A file beside the
    /// weights that describes each module by its name is its field `modules`.
    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError>;

    /// The weights `[out, in]` as this layout's own library computes them, with its rounding.
    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32>;
}

/// What a checkpoint written in some layout holds.
#[derive(Clone, Copy, Debug)]
pub struct StoredModel<'a> {
    /// What most modules were quantized to.
    pub spec: &'a QuantSpec,
    /// How most modules quantize their inputs; a static scale is each module's own.
    pub input: &'a ActSpec,
    /// Modules of the decoder that differ: another specification, or `None` for those left in float.
    pub exceptions: &'a [(String, Option<QuantSpec>)],
    /// Anything worth noting, such as `damp_percent`.
    pub meta: &'a Map<String, Value>,
}

/// Reads the layers of one checkpoint: a [`Layout`] with the checkpoint's configuration.
pub trait Reader: Send + Sync {
    /// The layout, with its version.
    fn layout(&self) -> &'static dyn Layout;

    /// What the configuration says of most modules, where it says something.
    fn spec(&self) -> Option<QuantSpec>;

    /// How most modules quantize their inputs, by the configuration.
    fn input(&self) -> ActSpec {
        ActSpec::Float
    }

    /// Shape `[out, in]` of a layer. Checks the names, types and shapes of its tensors; reads no weights, at most
    /// the few bytes in which some layouts say what they are.
    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError>;

    /// Reads a layer. The result is consistent: its `weight.validate()` succeeds.
    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError>;
}
