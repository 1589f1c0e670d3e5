//! A file of a checkpoint, whatever its container.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use quant_core::DenseTensor;

use crate::error::FormatError;
use crate::gguf::GgufView;
use crate::safetensors::{SafetensorsFile, TensorInfo};

/// An open file of weights. Its tensors have the names of the checkpoint.
#[derive(Debug)]
pub enum WeightFile {
    /// A safetensors file.
    Safetensors(SafetensorsFile),
    /// A GGUF file, seen as a file of the checkpoint it was made from.
    Gguf(GgufView),
}

impl WeightFile {
    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        match self {
            WeightFile::Safetensors(file) => file.path(),
            WeightFile::Gguf(view) => view.file().path(),
        }
    }

    /// Size of the file in bytes.
    pub fn file_len(&self) -> u64 {
        match self {
            WeightFile::Safetensors(file) => file.file_len(),
            WeightFile::Gguf(view) => view.file().file_len(),
        }
    }

    fn table(&self) -> &BTreeMap<String, TensorInfo> {
        match self {
            WeightFile::Safetensors(file) => file.table(),
            WeightFile::Gguf(view) => view.tensors(),
        }
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.table().keys().map(String::as_str)
    }

    /// Type, shape and place of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.table().get(name)
    }

    /// A whole tensor.
    pub fn read(&self, name: &str) -> Result<DenseTensor, FormatError> {
        match self {
            WeightFile::Safetensors(file) => file.read(name),
            WeightFile::Gguf(view) => view.read(name),
        }
    }

    /// Elements `range` of the flattened tensor, in one dimension.
    pub(crate) fn read_flat(&self, name: &str, range: Range<usize>) -> Result<DenseTensor, FormatError> {
        match self {
            WeightFile::Safetensors(file) => file.read_flat(name, range),
            WeightFile::Gguf(view) => view.read_flat(name, range),
        }
    }

    /// What the header of a safetensors file notes under this key.
    pub(crate) fn note(&self, key: &str) -> Option<&str> {
        match self {
            WeightFile::Safetensors(file) => file.metadata().get(key).map(String::as_str),
            WeightFile::Gguf(_) => None,
        }
    }

    /// The GGUF file, if it is one.
    pub fn gguf(&self) -> Option<&GgufView> {
        match self {
            WeightFile::Gguf(view) => Some(view),
            WeightFile::Safetensors(_) => None,
        }
    }
}
