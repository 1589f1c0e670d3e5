//! A GGUF file seen as a file of the Hugging Face checkpoint it was made from.
//!
//! Tensors have the names, shapes and row order of the checkpoint. Blocks keep their bytes: they are tensors of
//! bytes that are named after their type, which is what the layout `gguf` reads.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use quant_core::{DType, DenseTensor};
use serde_json::Value;

use super::arch::{GgufArch, TensorFacts};
use super::order::Order;
use super::{GgmlType, GgufFile, GgufTensor, Metadata};
use crate::error::FormatError;
use crate::file;
use crate::layout::part_name;
use crate::safetensors::TensorInfo;

/// The factors of rotary frequencies, which are part of the configuration elsewhere.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// One GGUF file with the names of its checkpoint.
#[derive(Debug)]
pub struct GgufView {
    file: GgufFile,
    tensors: BTreeMap<String, TensorInfo>,
    places: HashMap<String, Place>,
}

/// Where a tensor comes from.
#[derive(Debug)]
struct Place {
    /// Index in the file.
    tensor: usize,
    order: Order,
}

/// All files of a model, the first with the keys.
#[derive(Debug)]
pub(crate) struct GgufModel {
    pub(crate) files: Vec<GgufView>,
    pub(crate) config: Value,
    /// Most layers are of this type.
    pub(crate) main_type: Option<GgmlType>,
}

impl GgufModel {
    /// Opens a file and, if it is one of several, the others beside it.
    pub(crate) fn open(path: &Path) -> Result<Self, FormatError> {
        let first = GgufFile::open(path)?;
        let mut files = vec![first];
        for path in siblings(path, files[0].metadata())? {
            files.push(GgufFile::open(path)?);
        }
        let metadata = files[0].metadata();
        let arch = GgufArch::of(metadata)?;
        let config = match arch {
            Some(arch) => arch.config(metadata, &facts(&files)?),
            None => match metadata.text("general.architecture")? {
                // The table of architectures will say which are known.
                Some(name) => serde_json::json!({ "model_type": name }),
                None => serde_json::json!({}),
            },
        };
        let mut elements = BTreeMap::<GgmlType, u64>::new();
        for tensor in files.iter().flat_map(GgufFile::tensors).filter(|t| t.ty.dtype().is_none()) {
            *elements.entry(tensor.ty).or_default() += tensor.range.end - tensor.range.start;
        }
        let main_type = elements.into_iter().max_by_key(|&(_, bytes)| bytes).map(|(ty, _)| ty);
        let heads = arch.map(|arch| [false, true].map(|keys| arch.heads(metadata, keys)));
        let files = files.into_iter().map(|file| GgufView::new(file, arch, heads.unwrap_or_default()));
        Ok(Self { files: files.collect::<Result<_, _>>()?, config, main_type })
    }
}

/// The other files of a model that was split: `NAME-00001-of-00003.gguf` names them.
fn siblings(path: &Path, metadata: &Metadata) -> Result<Vec<PathBuf>, FormatError> {
    let count = metadata.number("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(Vec::new());
    }
    let wrong = |found: String| FormatError::Key {
        key: "split.count".into(),
        found,
        expected: "a file NAME-00001-of-NNNNN.gguf, the first of that many,".into(),
    };
    let (dir, name) = file::split(path)?;
    let end = format!("-00001-of-{count:05}.gguf");
    let number = metadata.number("split.no")?.unwrap_or(0);
    match name.strip_suffix(&end) {
        Some(base) if number == 0 && count < 100_000 => {
            Ok((2..=count).map(|i| dir.join(format!("{base}-{i:05}-of-{count:05}.gguf"))).collect())
        }
        _ => Err(wrong(format!("{count} in file {number} named {}", crate::display_name(&name)))),
    }
}

/// What the tensors say about the model.
fn facts(files: &[GgufFile]) -> Result<TensorFacts, FormatError> {
    let find = |name: &str| files.iter().find_map(|file| file.tensor(name).map(|tensor| (file, tensor)));
    let rows = |name: &str| find(name).and_then(|(_, t)| t.shape.first().copied());
    let rope_factors = match find(ROPE_FACTORS) {
        Some((file, tensor))
            if tensor.ty == GgmlType::F32 && tensor.range.end - tensor.range.start < 1 << 20 =>
        {
            let bytes = file.read(tensor)?;
            Some(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
        }
        _ => None,
    };
    Ok(TensorFacts {
        embedding_rows: rows("token_embd.weight"),
        token_types: rows("token_types.weight"),
        head: find("output.weight").is_some(),
        rope_factors,
    })
}

impl GgufView {
    fn new(
        file: GgufFile,
        arch: Option<&'static GgufArch>,
        heads: [Option<usize>; 2],
    ) -> Result<Self, FormatError> {
        let mut view = Self { file, tensors: BTreeMap::new(), places: HashMap::new() };
        for (i, tensor) in view.file.tensors().iter().enumerate() {
            if arch.is_some() && tensor.name == ROPE_FACTORS {
                continue;
            }
            let (name, shape, order) = place(tensor, arch, heads);
            let info = TensorInfo {
                dtype: tensor.ty.dtype().unwrap_or(DType::U8),
                shape,
                range: tensor.range.clone(),
            };
            if view.tensors.insert(name.clone(), info).is_some() {
                let path = || view.file.path().to_path_buf();
                return Err(FormatError::TensorTwice { tensor: name, first: path(), second: path() });
            }
            view.places.insert(name, Place { tensor: i, order });
        }
        Ok(view)
    }

    /// The file itself.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// Names and places of all tensors, sorted by name.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The tensor of the file that a tensor of the checkpoint is, with its type and shape there.
    pub fn stored(&self, name: &str) -> Option<&GgufTensor> {
        self.places.get(name).map(|place| &self.file.tensors()[place.tensor])
    }

    /// A whole tensor.
    pub(crate) fn read(&self, name: &str) -> Result<DenseTensor, FormatError> {
        let (Some(place), Some(info)) = (self.places.get(name), self.tensors.get(name)) else {
            let because = format!("{} does not hold it", crate::escape::display_path(self.file.path()));
            return Err(FormatError::Missing { tensor: name.to_owned(), because });
        };
        let stored = &self.file.tensors()[place.tensor];
        let bytes = place.order.to_checkpoint(self.file.read(stored)?, &stored.shape, stored.ty);
        let fail = |source| FormatError::Tensor { tensor: name.to_owned(), source };
        DenseTensor::new(info.dtype, info.shape.clone(), bytes).map_err(fail)
    }

    /// Elements `range` of the flattened tensor. Those that lie in another order in the file are read whole.
    pub(crate) fn read_flat(&self, name: &str, range: Range<usize>) -> Result<DenseTensor, FormatError> {
        let plain = self.places.get(name).filter(|place| place.order == Order::Same);
        let (bytes, dtype) = match (plain, self.tensors.get(name)) {
            (Some(place), Some(info)) => {
                let width = (info.dtype.bits() / 8) as u64;
                let mut stored = self.file.tensors()[place.tensor].clone();
                let start = stored.range.start;
                stored.range = start + range.start as u64 * width..start + range.end as u64 * width;
                (self.file.read(&stored)?, info.dtype)
            }
            _ => {
                let tensor = self.read(name)?;
                let width = tensor.dtype().bits() / 8;
                (tensor.bytes()[range.start * width..range.end * width].to_vec(), tensor.dtype())
            }
        };
        let fail = |source| FormatError::Tensor { tensor: name.to_owned(), source };
        DenseTensor::new(dtype, vec![range.len()], bytes).map_err(fail)
    }
}

/// Name, shape and order of a tensor in the checkpoint.
fn place(
    tensor: &GgufTensor,
    arch: Option<&'static GgufArch>,
    heads: [Option<usize>; 2],
) -> (String, Vec<usize>, Order) {
    let (module, part) = match tensor.name.rsplit_once('.') {
        Some((module, part @ ("weight" | "bias"))) => (module, part),
        _ => (tensor.name.as_str(), ""),
    };
    let named = arch.and_then(|arch| arch.names.to_hf(module)).filter(|_| !part.is_empty());
    let order = match (arch, &named) {
        (Some(arch), Some(named)) => {
            Order::of(arch, named, &tensor.shape, tensor.ty, |keys| heads[usize::from(keys)])
        }
        _ => Order::Same,
    };
    let module = named.unwrap_or_else(|| module.to_owned());
    match tensor.ty.byte_shape(&tensor.shape).filter(|_| tensor.ty.dtype().is_none()) {
        Some(shape) => (part_name(&module, tensor.ty), shape, order),
        None => {
            let name = if part.is_empty() { module } else { format!("{module}.{part}") };
            (name, order.shape(&tensor.shape), order)
        }
    }
}
