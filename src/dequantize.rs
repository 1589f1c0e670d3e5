//! A checkpoint's weights in f32.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::Array2;
use quant_core::{DType, DenseTensor, WeightSource};
use quant_formats::{Checkpoint, FormatError, PlannedTensor, SafetensorsWriter, check_tensor};
use quant_model::ArchSpec;
use serde::Serialize;

use crate::error::Error;
use crate::progress::Progress;

/// What to write, and how.
#[derive(Clone, Debug, Default)]
pub struct DequantizeConfig {
    /// Names of tensors, or of modules for their weights; all if empty.
    pub tensors: Vec<String>,
    /// Round as the layout's own library does, and write quantized weights as its modules hold them, `[out, in]`.
    /// Otherwise they have the shape that the float checkpoint has (`[in, out]` for the `Conv1D` layers of GPT-2).
    pub like_peer: bool,
}

/// What [`dequantize`] wrote.
#[derive(Clone, Debug, Serialize)]
pub struct Dequantized {
    /// Id of the layout that was read; `None` for a float checkpoint.
    pub layout: Option<&'static str>,
    /// Number of tensors written.
    pub tensors: usize,
    /// Those that were quantized.
    pub dequantized: usize,
    /// Bytes of all tensors written.
    pub bytes: u64,
}

/// A tensor of the output and where it comes from.
struct Item {
    plan: PlannedTensor,
    /// The quantized module, or a float tensor of the same name.
    module: Option<String>,
}

/// Writes the float tensors of a checkpoint to the safetensors file `out` as f32, quantized layers under the name of
/// their float weight. One tensor is in memory at a time.
pub fn dequantize(
    model: &Path,
    out: &Path,
    config: &DequantizeConfig,
    progress: &dyn Progress,
) -> Result<Dequantized, Error> {
    let checkpoint = Checkpoint::open(model)?;
    let is_input = |file: &Path| match (file.canonicalize(), out.canonicalize()) {
        (Ok(file), Ok(out)) => file == out,
        _ => false,
    };
    if checkpoint.files().iter().any(|file| is_input(file.path())) {
        return Err(FormatError::Exists { path: out.to_path_buf() }.into());
    }
    let reader = checkpoint.reader()?;
    // In the float checkpoint the weights of GPT-2 are `[in, out]`.
    let conv1d = ArchSpec::from_config(checkpoint.config()).is_ok_and(|arch| arch.conv1d);
    let transposed = conv1d && !config.like_peer;
    let items = select(items(&checkpoint, transposed)?, config)?;

    let plan: Vec<PlannedTensor> = items.iter().map(|item| item.plan.clone()).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let writer = SafetensorsWriter::create(out, &plan, &metadata)?;
    let bytes = |item: &Item| item.plan.byte_len().unwrap_or(0);
    progress.begin("dequantizing", items.iter().map(bytes).sum());
    for item in &items {
        let name = &item.plan.name;
        let tensor = match (&item.module, reader) {
            (Some(module), Some(reader)) => {
                let because = || "the layer has just been listed".to_owned();
                let missing = || FormatError::Missing { tensor: module.clone(), because: because() };
                let linear = checkpoint.quantized_linear(module)?.ok_or_else(missing)?;
                let weight = match config.like_peer {
                    true => reader.layout().dequantize_like_peer(&linear.weight),
                    false => linear.weight.dequantize(),
                };
                dense(weight, transposed)
            }
            _ => {
                let stored = checkpoint.tensor(name)?;
                let fail = |source| FormatError::Tensor { tensor: name.clone(), source };
                DenseTensor::from_f32(stored.shape(), &stored.to_f32().map_err(fail)?)
            }
        };
        check_tensor(name, &tensor)?;
        writer.write(name, &tensor)?;
        progress.advance(name, bytes(item));
    }
    writer.finish()?;
    progress.end();
    Ok(Dequantized {
        layout: reader.map(|r| r.layout().id()),
        tensors: items.len(),
        dequantized: items.iter().filter(|item| item.module.is_some()).count(),
        bytes: items.iter().map(bytes).sum(),
    })
}

/// Every float tensor, and the weight of every quantized module.
fn items(checkpoint: &Checkpoint, transposed: bool) -> Result<Vec<Item>, Error> {
    let mut items = Vec::new();
    for (name, info) in checkpoint.tensor_infos() {
        if info.dtype.is_float() && checkpoint.part_of(name).is_none() {
            items.push(Item { plan: PlannedTensor::new(name, DType::F32, &info.shape), module: None });
        }
    }
    for module in checkpoint.quantized_modules() {
        let (rows, cols) = checkpoint.linear_shape(module)?;
        let shape = if transposed { [cols, rows] } else { [rows, cols] };
        let plan = PlannedTensor::new(format!("{module}.weight"), DType::F32, &shape);
        items.push(Item { plan, module: Some(module.to_owned()) });
    }
    Ok(items)
}

/// The items that were asked for, by the name of the tensor or of its module.
fn select(items: Vec<Item>, config: &DequantizeConfig) -> Result<Vec<Item>, Error> {
    if config.tensors.is_empty() {
        return Ok(items);
    }
    let matches = |item: &Item, asked: &String| {
        item.plan.name == *asked || item.plan.name.strip_suffix(".weight") == Some(asked)
    };
    for asked in &config.tensors {
        if !items.iter().any(|item| matches(item, asked)) {
            let because = "the model has no float tensor or quantized layer of this name".to_owned();
            return Err(FormatError::Missing { tensor: asked.clone(), because }.into());
        }
    }
    Ok(items.into_iter().filter(|item| config.tensors.iter().any(|asked| matches(item, asked))).collect())
}

/// `weight`: `[out, in]`.
fn dense(weight: Array2<f32>, transposed: bool) -> DenseTensor {
    let weight = if transposed { weight.reversed_axes() } else { weight };
    let (rows, cols) = weight.dim();
    let weight = weight.as_standard_layout();
    DenseTensor::from_f32(&[rows, cols], weight.as_slice().expect("it is in standard layout"))
}
