//! GGUF, the files of llama.cpp: one file that holds a whole model.
//!
//! Three things are kept apart. The *container* is in this folder: keys, a table of tensors, their bytes
//! ([`GgufFile`], [`GgufWriter`]). The *names* are too: a GGUF file is seen as the Hugging Face checkpoint it was
//! made from (`view.rs`), with `config.json` and `tokenizer.json` made from its keys, and written from one. What the
//! *blocks* of quantized tensors mean is the layout `gguf` (`layout/gguf.rs`), which sees no file: the blocks of the
//! linear layer `m` are for it a tensor of bytes `[out, bytes of a row]` that is named after its type, such as
//! `m.q4_k`. So everything that works on checkpoints works on these files.

mod arch;
mod export;
mod header;
mod metadata;
mod names;
mod order;
mod pretokenizers;
mod tokenizer;
mod types;
mod view;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

pub use self::export::{GgufModelWriter, ModelFiles};
pub use self::header::GgufTensor;
use self::header::Header;
pub use self::metadata::{MetaArray, MetaValue, Metadata};
pub(crate) use self::tokenizer::{to_config as tokenizer_config, to_json as tokenizer_json};
pub use self::types::GgmlType;
pub(crate) use self::view::GgufModel;
pub use self::view::GgufView;
pub use self::writer::GgufWriter;
use crate::error::FormatError;
use crate::file;

/// True if a file begins like a GGUF file or is named like one.
pub(crate) fn is_gguf(path: &Path) -> bool {
    let named = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let begins = || {
        let (file, len) = file::open_regular(path).ok()?;
        let mut magic = [0; 4];
        (len >= 4).then(|| file::read_at(&file, &mut magic, 0).ok()).flatten()?;
        Some(&magic == b"GGUF")
    };
    named || begins() == Some(true)
}

/// An open GGUF file whose header has been checked. Tensors are read by position, from any thread.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    file: File,
    len: u64,
    header: Header,
    index: BTreeMap<String, usize>,
}

impl GgufFile {
    /// Opens a file of version 2 or 3 and checks its header: types, sizes, and that all tensors lie in the file
    /// without overlap.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, FormatError> {
        let path = path.into();
        let (file, len) = file::open_regular(&path)?;
        let header = Header::read(&file, len, &path)?;
        let index = header.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { path, file, len, header, index })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// Its keys.
    pub fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// Its tensors, in the order of the file.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.header.tensors
    }

    /// A tensor by its name in the file.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.index.get(name).map(|&i| &self.header.tensors[i])
    }

    /// The bytes of a tensor of this file.
    pub fn read(&self, tensor: &GgufTensor) -> Result<Vec<u8>, FormatError> {
        // The header check has found as many bytes in the file.
        let mut bytes = vec![0; (tensor.range.end - tensor.range.start) as usize];
        let read = file::read_at(&self.file, &mut bytes, tensor.range.start);
        read.map_err(|e| FormatError::io("read", &self.path, e))?;
        Ok(bytes)
    }
}
