//! Writing a model, whatever its container.

use std::path::{Path, PathBuf};

use quant_core::DenseTensor;

use crate::checkpoint_writer::{CheckpointWriter, WriteOptions, Written};
use crate::error::FormatError;
use crate::file;
use crate::gguf::{GgufModelWriter, ModelFiles};
use crate::layout::Container;
use crate::sink::PlannedTensor;

/// Writes a directory of safetensors files, or one GGUF file: all of it, or nothing.
#[derive(Debug)]
pub enum ModelWriter {
    /// A directory.
    Directory(CheckpointWriter),
    /// A file.
    Gguf {
        /// Its writer.
        writer: GgufModelWriter,
        /// Its path.
        path: PathBuf,
    },
}

impl ModelWriter {
    /// Begins `out` for planned tensors, under the names of the checkpoint. A GGUF file takes its keys from `files`.
    pub fn create(
        container: Container,
        out: &Path,
        plan: &[PlannedTensor],
        files: impl FnOnce() -> Result<ModelFiles, FormatError>,
        options: &WriteOptions,
    ) -> Result<Self, FormatError> {
        Ok(match container {
            Container::Directory => ModelWriter::Directory(CheckpointWriter::create(out, plan, options)?),
            Container::Gguf => ModelWriter::Gguf {
                writer: GgufModelWriter::create(out, plan, &files()?, options.overwrite)?,
                path: out.to_path_buf(),
            },
        })
    }

    /// Writes a planned tensor; any order, any thread.
    pub fn write(&self, name: &str, tensor: &DenseTensor) -> Result<(), FormatError> {
        match self {
            ModelWriter::Directory(writer) => writer.write(name, tensor),
            ModelWriter::Gguf { writer, .. } => writer.write(name, tensor),
        }
    }

    /// The directory, for its side files: what they say has keys in a GGUF file.
    pub fn directory(&self) -> Option<&CheckpointWriter> {
        match self {
            ModelWriter::Directory(writer) => Some(writer),
            ModelWriter::Gguf { .. } => None,
        }
    }

    /// Makes everything durable and gives it its name. Files are named relative to the directory, or to that of the
    /// GGUF file.
    pub fn finish(self) -> Result<Written, FormatError> {
        match self {
            ModelWriter::Directory(writer) => writer.finish(),
            ModelWriter::Gguf { writer, path } => {
                let total_size = writer.data_len();
                writer.finish()?;
                let (_, name) = file::split(&path)?;
                Ok(Written { files: vec![name], total_size, leftover: None })
            }
        }
    }
}
