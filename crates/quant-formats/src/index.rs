//! The index of a sharded checkpoint: which file holds which tensor.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::error::{FormatError, IndexError};
use crate::file;
use crate::json::{self, Pairs};

/// Largest index that is read; those of the largest models have about ten megabytes.
const INDEX_LIMIT: u64 = 100 << 20;

/// A parsed `*.safetensors.index.json`. The file names have been checked to be plain.
#[derive(Debug)]
pub(crate) struct ShardIndex {
    /// Tensor to file name.
    pub(crate) weight_map: BTreeMap<String, String>,
    /// Bytes of all tensors, as the writer counted them.
    pub(crate) total_size: Option<u64>,
}

#[derive(Deserialize)]
struct RawIndex {
    metadata: Option<Metadata>,
    weight_map: Pairs,
}

#[derive(Deserialize)]
struct Metadata {
    total_size: Option<serde_json::Number>,
}

impl ShardIndex {
    /// Reads an index and checks its file names; the shards are not opened.
    pub(crate) fn read(path: &Path) -> Result<Self, FormatError> {
        let raw: RawIndex = json::read(path, INDEX_LIMIT).map_err(|error| match error {
            FormatError::Json { file, detail } => {
                let form = "an index holds weight_map, an object of tensor names and file names";
                FormatError::Json { file, detail: format!("{detail}; {form}") }
            }
            other => other,
        })?;
        let fail = |tensor, source| Err(FormatError::Index { file: path.to_path_buf(), tensor, source });
        let mut weight_map = BTreeMap::new();
        for (tensor, shard) in raw.weight_map.0 {
            if let Some(problem) = refuse_shard(&shard) {
                return fail(tensor, IndexError::FileName { found: shard, problem });
            }
            if let Some(first) = weight_map.insert(tensor.clone(), shard.clone())
                && first != shard
            {
                return fail(tensor, IndexError::Twice { first, second: shard });
            }
        }
        let total_size = raw.metadata.and_then(|m| m.total_size).and_then(|n| n.as_u64());
        Ok(Self { weight_map, total_size })
    }
}

fn refuse_shard(name: &str) -> Option<&'static str> {
    let foreign = "a shard is a safetensors file; an index or a pickled file can't be one";
    file::refuse_file_name(name).or((!name.ends_with(".safetensors")).then_some(foreign))
}
