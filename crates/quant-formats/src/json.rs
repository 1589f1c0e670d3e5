//! JSON files, read with a limit of size and depth.

use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};

use crate::error::FormatError;
use crate::escape::display_name;
use crate::file;

/// Largest `config.json` that is read. Real ones are below one megabyte.
pub(crate) const CONFIG_LIMIT: u64 = 16 << 20;

/// Largest `tokenizer.json` that is read. The largest known ones have 35 MB.
pub(crate) const TOKENIZER_LIMIT: u64 = 128 << 20;

/// Reads a JSON file. `serde_json` refuses more than 128 levels of nesting.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<T, FormatError> {
    let bytes = file::read_limited(path, limit)?;
    // Some editors begin files with a byte order mark.
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    serde_json::from_slice(text).map_err(|e| FormatError::Json {
        file: path.to_path_buf(),
        detail: format!("not valid JSON: {}", display_name(&e.to_string())),
    })
}

/// An object of strings with its duplicates, or `null`. A map type would drop the first of two equal keys.
pub(crate) struct Pairs(pub(crate) Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PairsVisitor)
    }
}

struct PairsVisitor;

impl<'de> Visitor<'de> for PairsVisitor {
    type Value = Pairs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Pairs(pairs))
    }

    fn visit_unit<E>(self) -> Result<Pairs, E> {
        Ok(Pairs(Vec::new()))
    }
}
