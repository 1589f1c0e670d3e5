//! What a checkpoint is, from its headers alone.

use std::path::Path;

use quant_core::QuantSpec;
use quant_formats::{Checkpoint, display_name, display_path};
use quant_model::ArchSpec;
use serde::Serialize;

use crate::error::Error;

/// What [`inspect`] found out.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// The directory or file.
    pub path: String,
    /// The architecture, if `config.json` describes a known one.
    pub architecture: Option<Architecture>,
    /// Id of the layout of the quantized layers; `None` for a float checkpoint.
    pub layout: Option<String>,
    /// What most quantized layers are made to, where the configuration says it.
    pub quantization: Option<Quantization>,
    /// Number of quantized layers.
    pub quantized_layers: usize,
    /// Weights and other parameters, a quantized layer's counted by its shape.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bits per weight of the quantized layers with scales, zeros and indices; of all parameters in a float
    /// checkpoint.
    pub bits_per_weight: f64,
    /// The weight files.
    pub files: Vec<File>,
    /// Every tensor, sorted by name.
    pub tensors: Vec<Tensor>,
    /// Why parts of the checkpoint are not understood.
    pub notes: Vec<String>,
}

/// The sizes of a model.
#[derive(Clone, Debug, Serialize)]
pub struct Architecture {
    /// `model_type` of the configuration.
    pub model_type: &'static str,
    /// Blocks.
    pub layers: usize,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Features inside the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Positions that the model was trained for.
    pub max_positions: usize,
    /// The output head is the embedding.
    pub tied_embeddings: bool,
}

/// How layers are quantized.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quantization {
    /// Bits per code.
    pub bits: u8,
    /// Columns per group, -1 for whole rows.
    pub group_size: i64,
    /// Without zero points.
    pub symmetric: bool,
    /// Groups follow the columns' activity.
    pub act_order: bool,
}

/// A weight file.
#[derive(Clone, Debug, Serialize)]
pub struct File {
    /// Name.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// Number of tensors.
    pub tensors: usize,
}

/// A tensor as it is stored.
#[derive(Clone, Debug, Serialize)]
pub struct Tensor {
    /// Full name, made safe to print.
    pub name: String,
    /// Element type, as in the header.
    pub dtype: &'static str,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Size.
    pub bytes: u64,
}

impl From<QuantSpec> for Quantization {
    fn from(spec: QuantSpec) -> Self {
        let QuantSpec { bits, group, symmetric, act_order, .. } = spec;
        Self { bits, group_size: group.as_config(), symmetric, act_order }
    }
}

impl From<&ArchSpec> for Architecture {
    fn from(arch: &ArchSpec) -> Self {
        Self {
            model_type: arch.model_type,
            layers: arch.layers,
            hidden_size: arch.hidden_size,
            intermediate_size: arch.intermediate_size,
            heads: arch.heads,
            kv_heads: arch.kv_heads,
            head_dim: arch.head_dim,
            vocab_size: arch.vocab_size,
            max_positions: arch.max_positions,
            tied_embeddings: arch.tied_embeddings,
        }
    }
}

/// Looks at a checkpoint directory or a safetensors file. An architecture or a layout that is not known is told in
/// [`Inspection::notes`]; only files that cannot be read at all are an error.
pub fn inspect(model: &Path) -> Result<Inspection, Error> {
    let checkpoint = Checkpoint::open_container(model)?;
    let mut notes = Vec::new();
    let architecture = match checkpoint.config() {
        config if config.is_null() => None,
        config => match ArchSpec::from_config(config) {
            Ok(arch) => Some(Architecture::from(&arch)),
            Err(error) => {
                notes.push(error.to_string());
                None
            }
        },
    };
    let (layout, quantization) = match checkpoint.reader() {
        Ok(Some(reader)) => (Some(reader.layout().id().to_owned()), reader.spec().map(Quantization::from)),
        Ok(None) => (None, None),
        Err(error) => {
            notes.push(error.to_string());
            (None, None)
        }
    };
    let count = count(&checkpoint).unwrap_or_else(|error| {
        notes.push(error.to_string());
        Count::default()
    });
    let files = checkpoint.files().iter().map(|file| File {
        name: file.path().file_name().map_or(String::new(), |n| display_path(Path::new(n))),
        bytes: file.file_len(),
        tensors: file.names().len(),
    });
    let tensors = checkpoint.tensor_infos().map(|(name, info)| {
        // Blocks are shown as the file has them, not as bytes.
        let stored = checkpoint.file_of(name).and_then(|file| file.gguf()?.stored(name));
        let (name, dtype, shape) = match stored {
            Some(tensor) => (tensor.name.as_str(), tensor.ty.name(), &tensor.shape),
            None => (name, info.dtype.name(), &info.shape),
        };
        Tensor { name: display_name(name).to_string(), dtype, shape: shape.clone(), bytes: info.byte_len() }
    });
    Ok(Inspection {
        path: display_path(model),
        architecture,
        layout,
        quantization,
        quantized_layers: checkpoint.quantized_modules().len(),
        parameters: count.parameters,
        bytes: checkpoint.tensor_bytes(),
        bits_per_weight: count.bits_per_weight(),
        files: files.collect(),
        tensors: tensors.collect(),
        notes,
    })
}

/// Bits per weight as [`Inspection::bits_per_weight`].
pub fn bits_per_weight(checkpoint: &Checkpoint) -> Result<f64, Error> {
    Ok(count(checkpoint)?.bits_per_weight())
}

#[derive(Default)]
struct Count {
    parameters: u64,
    /// Of quantized layers.
    weights: u64,
    /// Of quantized layers.
    bytes: u64,
    /// Of everything else.
    float_bytes: u64,
}

impl Count {
    fn bits_per_weight(&self) -> f64 {
        let (bytes, weights) =
            if self.weights > 0 { (self.bytes, self.weights) } else { (self.float_bytes, self.parameters) };
        if weights == 0 { 0.0 } else { 8.0 * bytes as f64 / weights as f64 }
    }
}

fn count(checkpoint: &Checkpoint) -> Result<Count, Error> {
    let mut count = Count::default();
    let reader = checkpoint.reader()?;
    if let Some(reader) = reader {
        for module in checkpoint.quantized_modules() {
            let (rows, cols) = reader.shape(checkpoint, module)?;
            // Shapes were checked against the tensors' sizes, so the products fit.
            count.weights += rows as u64 * cols as u64;
        }
    }
    for (name, info) in checkpoint.tensor_infos() {
        match checkpoint.part_of(name) {
            Some(_) => count.bytes += info.byte_len(),
            None => {
                count.parameters += info.elements() as u64;
                count.float_bytes += info.byte_len();
            }
        }
    }
    count.parameters += count.weights;
    Ok(count)
}
