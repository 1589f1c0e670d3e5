//! A model of the Hugging Face form as a GGUF file.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use half::{bf16, f16};
use quant_core::{DType, DenseTensor};
use serde_json::Value;

use super::arch::{self, GgufArch};
use super::order::Order;
use super::view::ROPE_FACTORS;
use super::{GgmlType, GgufWriter, Metadata, tokenizer};
use crate::error::FormatError;
use crate::layout::parse_part;
use crate::sink::PlannedTensor;

/// What a model is besides its tensors.
#[derive(Clone, Debug, Default)]
pub struct ModelFiles {
    /// `config.json`.
    pub config: Value,
    /// `tokenizer.json`.
    pub tokenizer: Option<Value>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Value>,
    /// `generation_config.json`.
    pub generation_config: Option<Value>,
    /// `1_Pooling/config.json` of sentence-transformers.
    pub pooling: Option<Value>,
    /// `chat_template.jinja`.
    pub chat_template: Option<String>,
    /// A name for people.
    pub name: String,
}

/// Writes a GGUF file from tensors as a checkpoint has them: float tensors under their names, quantized layers as
/// the layout `gguf` gives them. Names, row orders and types are changed on the way.
#[derive(Debug)]
pub struct GgufModelWriter {
    writer: GgufWriter,
    /// By the name in the checkpoint. `None`: the tensor has no place in GGUF.
    entries: HashMap<String, Option<Entry>>,
}

/// A tensor of the file.
#[derive(Debug)]
struct Entry {
    name: String,
    ty: GgmlType,
    shape: Vec<usize>,
    order: Order,
}

/// Tensors that programs recompute or do not use.
const DROPPED: [&str; 7] = [
    ".attn.bias",
    ".masked_bias",
    "rotary_emb.inv_freq",
    "position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "cls.predictions.bias",
];

impl GgufModelWriter {
    /// Begins the file `path` for planned tensors.
    pub fn create(
        path: impl Into<PathBuf>,
        plan: &[PlannedTensor],
        files: &ModelFiles,
        overwrite: bool,
    ) -> Result<Self, FormatError> {
        let config = &files.config;
        let arch = GgufArch::for_config(config)?;
        let mut metadata = arch.metadata(config)?;
        let mut entries = HashMap::new();
        for tensor in plan {
            entries.insert(tensor.name.clone(), entry(tensor, arch, config, &metadata)?);
        }
        let mut table: Vec<&Entry> = entries.values().flatten().collect();
        table.sort_by_key(|entry| sort_key(&entry.name));
        finish_metadata(&mut metadata, files, &table)?;
        let mut tensors: Vec<_> = table.iter().map(|e| (e.name.clone(), e.ty, e.shape.clone())).collect();
        let factors = arch::rope_factors(config);
        if let Some(factors) = &factors {
            tensors.insert(0, (ROPE_FACTORS.to_owned(), GgmlType::F32, vec![factors.len()]));
        }
        let writer = GgufWriter::create(path, &metadata, &tensors, overwrite)?;
        if let Some(factors) = factors {
            writer.write(ROPE_FACTORS, DenseTensor::from_f32(&[factors.len()], &factors).bytes())?;
        }
        Ok(Self { writer, entries })
    }

    /// Writes a planned tensor; any order, any thread.
    pub fn write(&self, name: &str, tensor: &DenseTensor) -> Result<(), FormatError> {
        let Some(entry) = self.entries.get(name) else {
            return Err(FormatError::Plan { tensor: name.to_owned(), problem: "it is not planned".into() });
        };
        let Some(entry) = entry else { return Ok(()) };
        let fail = |source| FormatError::Tensor { tensor: name.to_owned(), source };
        let bytes = match (entry.ty, tensor.dtype()) {
            (ty, dtype) if ty.dtype().is_none_or(|ty| ty == dtype) => tensor.bytes().to_vec(),
            (GgmlType::F16, _) => {
                tensor.to_f32().map_err(fail)?.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()
            }
            (GgmlType::BF16, _) => {
                tensor.to_f32().map_err(fail)?.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
            }
            _ => tensor.to_f32().map_err(fail)?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        self.writer.write(&entry.name, &entry.order.to_file(&bytes, tensor.shape(), entry.ty))
    }

    /// Bytes of all tensors.
    pub fn data_len(&self) -> u64 {
        self.writer.data_len()
    }

    /// Makes the file durable and gives it its name.
    pub fn finish(self) -> Result<(), FormatError> {
        self.writer.finish()
    }
}

/// Place of a tensor in the file.
fn entry(
    tensor: &PlannedTensor,
    arch: &'static GgufArch,
    config: &Value,
    metadata: &Metadata,
) -> Result<Option<Entry>, FormatError> {
    let name = tensor.name.as_str();
    let tied = match arch.name {
        "gpt2" => config["tie_word_embeddings"] != false,
        _ => config["tie_word_embeddings"] == true,
    };
    if DROPPED.iter().any(|end| name.ends_with(end)) || tied && name.starts_with("lm_head.") {
        return Ok(None);
    }
    let blocks = parse_part(name).filter(|_| tensor.dtype == DType::U8);
    let (module, part) = match blocks {
        Some((module, _)) => (module, "weight"),
        None => name.rsplit_once('.').unwrap_or((name, "")),
    };
    let Some(to) = arch.names.to_gguf(module).filter(|_| matches!(part, "weight" | "bias")) else {
        let problem = format!("gguf has no name for it in the architecture {}; leave it out", arch.name);
        return Err(FormatError::Plan { tensor: name.to_owned(), problem });
    };
    let ty = match blocks {
        Some((_, ty)) => ty,
        // llama.cpp computes with these in f32 only.
        None if tensor.shape.len() < 2 || to.contains("_norm") => GgmlType::F32,
        None if to == "position_embd" || to == "token_types" => GgmlType::F32,
        None => match tensor.dtype {
            DType::F16 => GgmlType::F16,
            DType::BF16 => GgmlType::BF16,
            dtype if dtype.is_float() => GgmlType::F32,
            found => {
                let expected = "floats, or blocks of the layout gguf";
                return Err(FormatError::TensorDType { tensor: name.to_owned(), expected, found });
            }
        },
    };
    let shape = match blocks {
        None => tensor.shape.clone(),
        Some(_) => elements(&tensor.shape, ty).ok_or_else(|| FormatError::TensorShape {
            tensor: name.to_owned(),
            expected: format!("rows of whole blocks of {} bytes", ty.block_bytes()),
            found: tensor.shape.clone(),
            because: format!("type {ty}"),
        })?,
    };
    let order = Order::of(arch, module, &shape, ty, |keys| arch.heads(metadata, keys));
    Ok(Some(Entry { name: format!("{to}.{part}"), ty, shape: order.shape(&shape), order }))
}

/// The shape in elements of blocks in bytes.
fn elements(bytes: &[usize], ty: GgmlType) -> Option<Vec<usize>> {
    let mut shape = bytes.to_vec();
    let row = shape.last_mut()?;
    if !row.is_multiple_of(ty.block_bytes()) {
        return None;
    }
    *row = (*row / ty.block_bytes()).checked_mul(ty.block_len())?;
    Some(shape)
}

/// What is outside the blocks comes first, then the blocks by number.
fn sort_key(name: &str) -> (u64, String) {
    let block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')?.0.parse::<u64>().ok());
    (block.map_or(0, |n| n + 1), name.to_owned())
}

/// Name, types, token ids, tokenizer and template.
fn finish_metadata(metadata: &mut Metadata, files: &ModelFiles, table: &[&Entry]) -> Result<(), FormatError> {
    let config = &files.config;
    if !files.name.is_empty() {
        metadata.set("general.name", files.name.as_str().into());
    }
    metadata.set("general.file_type", file_type(table).into());
    metadata.set("general.quantization_version", 2u32.into());
    let rows = table.iter().find(|e| e.name == "token_embd.weight").map_or(0, |e| e.shape[0]);
    tokenizer::to_keys(files.tokenizer.as_ref(), rows, metadata)?;
    let fields = [("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")];
    for (key, field) in fields {
        let generation = files.generation_config.as_ref().map_or(&Value::Null, |c| &c[field]);
        let ids = [&config[field], generation].into_iter().find(|v| !v.is_null()).unwrap_or(&Value::Null);
        let all: Vec<u32> = match ids {
            Value::Array(ids) => {
                ids.iter().filter_map(Value::as_u64).filter_map(|id| id.try_into().ok()).collect()
            }
            id => id.as_u64().and_then(|id| id.try_into().ok()).into_iter().collect(),
        };
        let key = format!("tokenizer.ggml.{key}_token_id");
        if let Some(&id) = all.first().filter(|&&id| (id as usize) < rows && metadata.get(&key).is_none()) {
            metadata.set(key, id.into());
        }
        // llama.cpp has one more end, that of a turn.
        if let Some(&id) = all.get(1).filter(|&&id| field == "eos_token_id" && (id as usize) < rows) {
            metadata.set("tokenizer.ggml.eot_token_id", id.into());
        }
    }
    if let Some(pooling) = files.pooling.as_ref().filter(|_| metadata.get("bert.pooling_type").is_some()) {
        let cls = pooling["pooling_mode_cls_token"] == true;
        metadata.set("bert.pooling_type", if cls { 2u32 } else { 1 }.into());
    }
    let configured = files.tokenizer_config.as_ref().and_then(|c| c["chat_template"].as_str());
    if let Some(template) = files.chat_template.as_deref().or(configured) {
        metadata.set("tokenizer.chat_template", template.into());
    }
    Ok(())
}

/// The number that llama.cpp gives a file of which most is of a type.
fn file_type(table: &[&Entry]) -> u32 {
    let mut elements = BTreeMap::<GgmlType, usize>::new();
    for entry in table.iter().filter(|e| e.shape.len() > 1) {
        *elements.entry(entry.ty).or_default() += entry.shape.iter().product::<usize>();
    }
    match elements.into_iter().max_by_key(|&(_, n)| n).map(|(ty, _)| ty) {
        Some(GgmlType::F16) => 1,
        Some(GgmlType::Q4_0) => 2,
        Some(GgmlType::Q4_1) => 3,
        Some(GgmlType::Q8_0) => 7,
        Some(GgmlType::Q5_0) => 8,
        Some(GgmlType::Q5_1) => 9,
        Some(GgmlType::Q2_K) => 10,
        Some(GgmlType::Q3_K) => 11,
        Some(GgmlType::Q4_K) => 14,
        Some(GgmlType::Q5_K) => 16,
        Some(GgmlType::Q6_K) => 18,
        Some(GgmlType::IQ4_NL) => 25,
        Some(GgmlType::IQ4_XS) => 30,
        Some(GgmlType::BF16) => 32,
        Some(GgmlType::MXFP4) => 38,
        _ => 0,
    }
}
