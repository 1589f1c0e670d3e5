//! Reading safetensors files.
//!
//! A file is eight bytes of header length, a JSON header, and the tensors' bytes. The header is checked
//! completely when the file is opened; tensors are read later, each by position, from any thread. Nothing is
//! mapped: each weight is needed once, and a file that shrinks meanwhile gives an error instead of a signal.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quant_core::{DType, DenseTensor};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::error::{FormatError, HeaderError};
use crate::file;
use crate::json::Pairs;
use crate::layout::TensorSource;

/// Longest header the format allows, in bytes.
const HEADER_LIMIT: u64 = 100_000_000;

/// More dimensions than any library makes; it bounds what an error message can hold.
const RANK_LIMIT: usize = 64;

/// Where a tensor lies in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub range: Range<u64>,
}

impl TensorInfo {
    /// Number of bytes.
    pub fn byte_len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// An open safetensors file whose header has been checked.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    len: u64,
    header: Header,
}

/// What a header says. Ranges are relative to the end of the header until the file is known.
#[derive(Debug, PartialEq)]
pub(crate) struct Header {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Opens a file and checks its header: sizes, and that tensors cover the data without hole or overlap.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, FormatError> {
        let path = path.into();
        let (file, len) = file::open_regular(&path)?;
        let fail = |source| FormatError::Header { file: path.clone(), source };
        let read =
            |buf: &mut [u8], at| file::read_at(&file, buf, at).map_err(|e| FormatError::io("read", &path, e));
        if len < 8 {
            return Err(fail(HeaderError::Short { found: len }));
        }
        let mut word = [0; 8];
        read(&mut word, 0)?;
        let (n, room) = (u64::from_le_bytes(word), len - 8);
        if n > room || n > HEADER_LIMIT {
            let foreign = foreign(&word);
            return Err(fail(foreign.unwrap_or(HeaderError::Length { found: n, room, limit: HEADER_LIMIT })));
        }
        // At most HEADER_LIMIT bytes, and the file has as many.
        let mut bytes = vec![0; n as usize];
        read(&mut bytes, 8)?;
        let mut header = Header::parse(&bytes, room - n).map_err(fail)?;
        for info in header.tensors.values_mut() {
            info.range = info.range.start + 8 + n..info.range.end + 8 + n;
        }
        Ok(Self { path, file, len, header })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// Names and places of all tensors.
    pub(crate) fn table(&self) -> &BTreeMap<String, TensorInfo> {
        &self.header.tensors
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// Names and places of all tensors, sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &TensorInfo)> {
        self.header.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// The free text that the file carries, such as `format: pt`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Place of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.get(name)
    }

    fn need(&self, name: &str) -> Result<&TensorInfo, FormatError> {
        self.info(name).ok_or_else(|| FormatError::Missing {
            tensor: name.to_owned(),
            because: format!("{} does not hold it", crate::escape::display_path(&self.path)),
        })
    }

    /// Reads a whole tensor.
    pub fn read(&self, name: &str) -> Result<DenseTensor, FormatError> {
        let info = self.need(name)?;
        self.read_part(name, info.dtype, info.shape.clone(), info.range.clone())
    }

    /// Reads rows `rows` (indices of the first dimension) of a tensor of at least one dimension.
    pub fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<DenseTensor, FormatError> {
        let info = self.need(name)?;
        let count = *info.shape.first().unwrap_or(&1);
        let mut shape = if info.shape.is_empty() { vec![1] } else { info.shape.clone() };
        shape[0] = 1;
        let row = info.dtype.byte_len(&shape);
        let (Some(row), true) = (row, rows.start <= rows.end && rows.end <= count) else {
            let expected = format!("rows below {count}, each of whole bytes");
            let because = format!("rows {rows:?} were asked for");
            let (tensor, found) = (name.to_owned(), info.shape.clone());
            return Err(FormatError::TensorShape { tensor, expected, found, because });
        };
        shape[0] = rows.len();
        let start = info.range.start + (rows.start * row) as u64;
        self.read_part(name, info.dtype, shape, start..start + (rows.len() * row) as u64)
    }

    /// Reads elements `range` of a flattened tensor whose elements take whole bytes.
    pub(crate) fn read_flat(&self, name: &str, range: Range<usize>) -> Result<DenseTensor, FormatError> {
        let info = self.need(name)?;
        let width = info.dtype.bits() / 8;
        let start = info.range.start + (range.start * width) as u64;
        let end = info.range.start + (range.end * width) as u64;
        self.read_part(name, info.dtype, vec![range.len()], start..end.min(info.range.end))
    }

    fn read_part(
        &self,
        name: &str,
        dtype: DType,
        shape: Vec<usize>,
        range: Range<u64>,
    ) -> Result<DenseTensor, FormatError> {
        // The file has these bytes, so the size is no fiction; the cast can't cut on 64-bit machines.
        let len = usize::try_from(range.end - range.start)
            .map_err(|_| FormatError::io("read", &self.path, std::io::ErrorKind::OutOfMemory.into()))?;
        // Filled in place: a vector would be copied into the shared allocation.
        let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, len).collect();
        let buf = Arc::get_mut(&mut bytes).unwrap_or_default();
        file::read_at(&self.file, buf, range.start).map_err(|e| FormatError::io("read", &self.path, e))?;
        DenseTensor::new(dtype, shape, bytes)
            .map_err(|source| FormatError::Tensor { tensor: name.to_owned(), source })
    }
}

impl TensorSource for SafetensorsFile {
    fn lookup(&self, name: &str) -> Option<(DType, &[usize])> {
        self.info(name).map(|info| (info.dtype, &info.shape[..]))
    }

    fn read(&self, name: &str) -> Result<DenseTensor, FormatError> {
        SafetensorsFile::read(self, name)
    }
}

/// Files of other kinds, known by their first bytes.
fn foreign(word: &[u8; 8]) -> Option<HeaderError> {
    let (found, remedy) = match word {
        [b'P', b'K', 3, 4, ..] => {
            ("a zip archive, perhaps a pickled PyTorch checkpoint", "convert it to safetensors first")
        }
        b"version " => ("a Git LFS pointer", "fetch the real file with `git lfs pull`"),
        [b'G', b'G', b'U', b'F', ..] => ("a GGUF file", "rename it to end in .gguf"),
        [b'<', b'!', ..] | [b'<', b'h', ..] => ("an HTML page", "download the file again"),
        _ => return None,
    };
    Some(HeaderError::Foreign { found, remedy })
}

impl Header {
    /// Parses a header and checks it against `data_len` bytes of data. Ranges are relative to the data.
    pub(crate) fn parse(bytes: &[u8], data_len: u64) -> Result<Header, HeaderError> {
        if bytes.first() != Some(&b'{') {
            return Err(HeaderError::Json { detail: "it must begin with {".into() });
        }
        let raw: RawHeader<'_> = serde_json::from_slice(bytes).map_err(|e| HeaderError::Json {
            detail: crate::escape::display_name(&e.to_string()).to_string(),
        })?;
        let mut metadata = BTreeMap::new();
        for (key, value) in raw.metadata {
            if metadata.insert(key.clone(), value).is_some() {
                return Err(HeaderError::Duplicate { name: key });
            }
        }
        let mut tensors = BTreeMap::new();
        for (name, raw) in raw.tensors {
            let info = raw.check(&name)?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(HeaderError::Duplicate { name });
            }
        }
        check_coverage(&tensors, data_len)?;
        Ok(Header { tensors, metadata })
    }
}

/// Tensors in order of their offsets must follow each other from 0 to the end of the data.
fn check_coverage(tensors: &BTreeMap<String, TensorInfo>, data_len: u64) -> Result<(), HeaderError> {
    let mut order: Vec<(&String, &Range<u64>)> = tensors.iter().map(|(n, t)| (n, &t.range)).collect();
    order.sort_by_key(|(_, range)| (range.start, range.end));
    let mut expected = 0;
    for (name, range) in order {
        if range.start != expected {
            return Err(HeaderError::NotContiguous { tensor: name.clone(), expected, found: range.start });
        }
        expected = range.end;
    }
    if expected == data_len { Ok(()) } else { Err(HeaderError::DataLength { expected, found: data_len }) }
}

/// A header as it is written, duplicates included.
#[derive(Default)]
struct RawHeader<'a> {
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, RawTensor<'a>)>,
}

#[derive(serde::Deserialize)]
struct RawTensor<'a> {
    #[serde(borrow)]
    dtype: std::borrow::Cow<'a, str>,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl RawTensor<'_> {
    fn check(self, name: &str) -> Result<TensorInfo, HeaderError> {
        let tensor = || name.to_owned();
        let (begin, end) = self.data_offsets;
        let Some(dtype) = DType::from_name(&self.dtype) else {
            return Err(HeaderError::DType { tensor: tensor(), found: self.dtype.into_owned() });
        };
        if self.shape.len() > RANK_LIMIT {
            return Err(HeaderError::Rank { tensor: tensor(), found: self.shape.len(), limit: RANK_LIMIT });
        }
        if end < begin {
            return Err(HeaderError::Reversed { tensor: tensor(), begin, end });
        }
        let expected = dtype.byte_len(&self.shape);
        if expected.map(|n| n as u64) != Some(end - begin) {
            let (shape, found) = (self.shape, end - begin);
            return Err(HeaderError::Size { tensor: tensor(), dtype, shape, expected, found });
        }
        Ok(TensorInfo { dtype, shape: self.shape, range: begin..end })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for RawHeader<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Walks the header by hand: a map type would drop the first of two equal keys without a word.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut header = RawHeader::default();
        let mut seen_metadata = false;
        while let Some(key) = map.next_key::<String>()? {
            if key == "__metadata__" {
                if std::mem::replace(&mut seen_metadata, true) {
                    return Err(serde::de::Error::custom("duplicate __metadata__"));
                }
                header.metadata = map.next_value::<Pairs>()?.0;
            } else {
                header.tensors.push((key, map.next_value()?));
            }
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VALID: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[],"data_offsets":[16,18]},"c":{"dtype":"F4","shape":[3,0],"data_offsets":[18,18]}}  "#;

    #[test]
    fn a_valid_header_says_what_is_there() {
        let header = Header::parse(VALID.as_bytes(), 18).unwrap();
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.tensors["a"], TensorInfo { dtype: DType::F32, shape: vec![2, 2], range: 0..16 });
        assert_eq!(header.tensors["b"].elements(), 1);
        assert_eq!(header.tensors["c"].byte_len(), 0);
    }

    #[test]
    fn faults_are_named() {
        let parse = |text: String, len| Header::parse(text.as_bytes(), len).unwrap_err();
        let tensor = |shape: &str, range: &str| {
            format!(r#"{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":{range}}}}}"#)
        };
        assert!(matches!(parse(VALID.into(), 19), HeaderError::DataLength { expected: 18, found: 19 }));
        assert!(matches!(parse(tensor("[4]", "[4,8]"), 8), HeaderError::NotContiguous { expected: 0, .. }));
        assert!(matches!(parse(tensor("[4]", "[4,0]"), 4), HeaderError::Reversed { .. }));
        assert!(matches!(parse(tensor("[3]", "[0,4]"), 4), HeaderError::Size { expected: Some(3), .. }));
        let huge = format!("[{},{}]", u64::MAX, u64::MAX);
        assert!(matches!(parse(tensor(&huge, "[0,4]"), 4), HeaderError::Size { expected: None, .. }));
        let rank = format!("[{}]", ["1"; 65].join(","));
        assert!(matches!(parse(tensor(&rank, "[0,1]"), 1), HeaderError::Rank { found: 65, .. }));
        let twice = r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
        assert_eq!(parse(twice.into(), 0), HeaderError::Duplicate { name: "a".into() });
        let twice = r#"{"__metadata__":{"x":"1","x":"2"}}"#;
        assert_eq!(parse(twice.into(), 0), HeaderError::Duplicate { name: "x".into() });
        assert!(matches!(parse(" {}".into(), 0), HeaderError::Json { .. }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn damaged_headers_never_panic(
            edits in prop::collection::vec((0usize..250, any::<u8>(), 0u8..4), 1..6),
            data_len in prop_oneof![Just(18u64), any::<u64>()],
        ) {
            let mut bytes = VALID.as_bytes().to_vec();
            for (at, with, kind) in edits {
                let at = at % bytes.len();
                match kind {
                    0 => bytes[at] = with,
                    // Digits and brackets reach further than random bytes.
                    1 => bytes[at] = b"0123456789[]{},:\"-e."[usize::from(with) % 20],
                    2 => bytes.insert(at, with),
                    _ => drop(bytes.remove(at)),
                }
            }
            if let Ok(header) = Header::parse(&bytes, data_len) {
                let end = header.tensors.values().map(|t| t.range.end).max().unwrap_or(0);
                prop_assert_eq!(end, data_len);
            }
        }
    }
}
