//! The header of a GGUF file: keys and the table of tensors, read with care and written.
//!
//! ```text
//! "GGUF"  u32 version  u64 tensors  u64 keys
//! keys    x { string key, u32 type, value }
//! tensors x { string name, u32 n, u64 dimensions[n], u32 type, u64 offset }
//! zeros up to a multiple of the alignment, then data
//! ```
//!
//! A string is its length as u64 and its bytes, an array the type of its elements as u32, their number as u64 and
//! the elements. Dimensions come fastest first. Offsets count from the beginning of the data.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use super::metadata::{MetaArray, MetaValue, Metadata};
use super::types::GgmlType;
use crate::error::{FormatError, GgufError};
use crate::file;

/// The key of the alignment of tensors.
pub(crate) const ALIGNMENT: &str = "general.alignment";
const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// The format's own limit on dimensions.
const MAX_DIMS: u32 = 4;
/// Largest header that is read. The largest known vocabularies take 30 MB.
const HEADER_LIMIT: u64 = 128 << 20;
/// More tensors, keys or elements of a list of strings than any model has.
const MAX_TENSORS: u64 = 1 << 20;
const MAX_KEYS: u64 = 1 << 16;
const MAX_STRINGS: u64 = 1 << 24;
/// Bytes that are read at a time.
const CHUNK: usize = 256 << 10;

/// A tensor in a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Type of its elements.
    pub ty: GgmlType,
    /// Dimensions, slowest first (the file has them the other way).
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub range: Range<u64>,
}

/// What a header says.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<GgufTensor>,
}

impl Header {
    /// Reads and checks the header of a file of `len` bytes.
    pub(super) fn read(file: &File, len: u64, path: &Path) -> Result<Self, FormatError> {
        let mut input = Input { file, len, offset: 0, buffer: Vec::new(), pos: 0 };
        input.header().map_err(|error| match error {
            Failure::Io(e) => FormatError::io("read", path, e),
            Failure::Gguf(source) => FormatError::Gguf { file: path.to_path_buf(), source },
        })
    }
}

enum Failure {
    Io(io::Error),
    Gguf(GgufError),
}

impl From<GgufError> for Failure {
    fn from(error: GgufError) -> Self {
        Failure::Gguf(error)
    }
}

/// The file from its beginning on, buffered. Nothing is allocated for bytes that the file does not have.
struct Input<'a> {
    file: &'a File,
    len: u64,
    /// Place of the buffer's end in the file.
    offset: u64,
    buffer: Vec<u8>,
    pos: usize,
}

impl Input<'_> {
    /// Place in the file.
    fn place(&self) -> u64 {
        self.offset - (self.buffer.len() - self.pos) as u64
    }

    fn room(&self) -> u64 {
        self.len - self.place()
    }

    /// The next `n` bytes.
    fn take(&mut self, n: u64) -> Result<&[u8], Failure> {
        let place = self.place();
        if n > self.room() {
            return Err(GgufError::Cut { place, needed: n, file_len: self.len }.into());
        }
        if place + n > HEADER_LIMIT {
            return Err(GgufError::HeaderTooLarge { limit: HEADER_LIMIT }.into());
        }
        // At most HEADER_LIMIT.
        let n = n as usize;
        if self.buffer.len() - self.pos < n {
            self.buffer.drain(..self.pos);
            self.pos = 0;
            let (filled, wanted) = (self.buffer.len(), n.max(CHUNK) as u64);
            let more = (wanted - filled as u64).min(self.len - self.offset) as usize;
            self.buffer.resize(filled + more, 0);
            file::read_at(self.file, &mut self.buffer[filled..], self.offset).map_err(Failure::Io)?;
            self.offset += more as u64;
        }
        self.pos += n;
        Ok(&self.buffer[self.pos - n..self.pos])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Failure> {
        let bytes = self.take(N as u64)?;
        Ok(bytes.try_into().expect("as many bytes as asked for"))
    }

    fn u32(&mut self) -> Result<u32, Failure> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Failure> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &'static str) -> Result<String, Failure> {
        let len = self.u64()?;
        let place = self.place();
        match std::str::from_utf8(self.take(len)?) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(GgufError::NotUtf8 { what, place }.into()),
        }
    }

    /// Fails if there cannot be as many things of at least `size` bytes each.
    fn check_count(&self, what: &'static str, count: u64, size: u64, limit: u64) -> Result<(), Failure> {
        let possible = (self.room() / size).min(limit);
        match count > possible {
            true => Err(GgufError::Count { what, found: count, possible }.into()),
            false => Ok(()),
        }
    }

    fn header(&mut self) -> Result<Header, Failure> {
        let magic: [u8; 4] = self.array()?;
        if &magic != MAGIC {
            return Err(GgufError::Magic { found: magic }.into());
        }
        match self.u32()? {
            2 | VERSION => {}
            found if found.swap_bytes() == 2 || found.swap_bytes() == VERSION => {
                return Err(GgufError::BigEndian.into());
            }
            found => return Err(GgufError::Version { found }.into()),
        }
        let (tensor_count, key_count) = (self.u64()?, self.u64()?);
        self.check_count("keys", key_count, 13, MAX_KEYS)?;
        let mut metadata = Metadata::new();
        for _ in 0..key_count {
            let key = self.string("a key")?;
            let value = self.value(&key)?;
            metadata.insert_new(key, value)?;
        }
        let alignment = alignment(&metadata)?;
        self.check_count("tensors", tensor_count, 24, MAX_TENSORS)?;
        let (mut tensors, mut names) = (Vec::new(), BTreeSet::new());
        for _ in 0..tensor_count {
            let tensor = self.tensor(alignment)?;
            if !names.insert(tensor.name.clone()) {
                return Err(GgufError::DuplicateTensor { name: tensor.name }.into());
            }
            tensors.push(tensor);
        }
        self.place_tensors(&mut tensors, alignment)?;
        Ok(Header { metadata, tensors })
    }

    fn value(&mut self, key: &str) -> Result<MetaValue, Failure> {
        Ok(match self.u32()? {
            0 => MetaValue::U8(u8::from_le_bytes(self.array()?)),
            1 => MetaValue::I8(i8::from_le_bytes(self.array()?)),
            2 => MetaValue::U16(u16::from_le_bytes(self.array()?)),
            3 => MetaValue::I16(i16::from_le_bytes(self.array()?)),
            4 => MetaValue::U32(self.u32()?),
            5 => MetaValue::I32(i32::from_le_bytes(self.array()?)),
            6 => MetaValue::F32(f32::from_le_bytes(self.array()?)),
            7 => MetaValue::Bool(self.array::<1>()? != [0]),
            8 => MetaValue::Str(self.string("a value")?),
            9 => MetaValue::Array(self.list(key)?),
            10 => MetaValue::U64(self.u64()?),
            11 => MetaValue::I64(i64::from_le_bytes(self.array()?)),
            12 => MetaValue::F64(f64::from_le_bytes(self.array()?)),
            found => return Err(GgufError::ValueType { key: key.to_owned(), found }.into()),
        })
    }

    fn list(&mut self, key: &str) -> Result<MetaArray, Failure> {
        let (ty, count) = (self.u32()?, self.u64()?);
        Ok(match ty {
            0 => MetaArray::U8(self.elements(count, u8::from_le_bytes)?),
            1 => MetaArray::I8(self.elements(count, i8::from_le_bytes)?),
            2 => MetaArray::U16(self.elements(count, u16::from_le_bytes)?),
            3 => MetaArray::I16(self.elements(count, i16::from_le_bytes)?),
            4 => MetaArray::U32(self.elements(count, u32::from_le_bytes)?),
            5 => MetaArray::I32(self.elements(count, i32::from_le_bytes)?),
            6 => MetaArray::F32(self.elements(count, f32::from_le_bytes)?),
            7 => MetaArray::Bool(self.elements(count, |[b]: [u8; 1]| b != 0)?),
            8 => {
                self.check_count("strings of an array", count, 8, MAX_STRINGS)?;
                let strings = (0..count).map(|_| self.string("an element of an array"));
                MetaArray::Str(strings.collect::<Result<_, _>>()?)
            }
            9 => return Err(GgufError::NestedArray { key: key.to_owned() }.into()),
            10 => MetaArray::U64(self.elements(count, u64::from_le_bytes)?),
            11 => MetaArray::I64(self.elements(count, i64::from_le_bytes)?),
            12 => MetaArray::F64(self.elements(count, f64::from_le_bytes)?),
            found => return Err(GgufError::ValueType { key: key.to_owned(), found }.into()),
        })
    }

    /// Numbers of `N` bytes each.
    fn elements<const N: usize, T>(
        &mut self,
        count: u64,
        decode: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, Failure> {
        self.check_count("elements of an array", count, N as u64, u64::MAX)?;
        // The product fits: the file has that many bytes.
        let bytes = self.take(count * N as u64)?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|&b| decode(b)).collect())
    }

    /// A row of the table, its offset not yet moved to the data.
    fn tensor(&mut self, alignment: u64) -> Result<GgufTensor, Failure> {
        let name = self.string("a tensor's name")?;
        let dims = self.u32()?;
        if dims > MAX_DIMS {
            return Err(GgufError::Dimensions { tensor: name, found: dims, limit: MAX_DIMS }.into());
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(self.u64()?);
        }
        shape.reverse();
        let (id, offset) = (self.u32()?, self.u64()?);
        let Some(ty) = GgmlType::from_id(id) else {
            return Err(GgufError::TensorType { tensor: name, found: id }.into());
        };
        if !offset.is_multiple_of(alignment) {
            return Err(GgufError::Misaligned { tensor: name, offset, alignment }.into());
        }
        let sizes: Option<Vec<usize>> = shape.iter().map(|&n| usize::try_from(n).ok()).collect();
        let Some(bytes) = sizes.as_deref().and_then(|shape| byte_len(ty, shape)) else {
            return Err(GgufError::Size { tensor: name, ty, shape, block: ty.block_len() }.into());
        };
        let Some(end) = offset.checked_add(bytes) else {
            return Err(GgufError::PastEnd { tensor: name, end: u64::MAX, file_len: self.len }.into());
        };
        Ok(GgufTensor { name, ty, shape: sizes.unwrap_or_default(), range: offset..end })
    }

    /// Moves offsets to the data and checks that all lies in the file, one behind the other.
    fn place_tensors(&self, tensors: &mut [GgufTensor], alignment: u64) -> Result<(), Failure> {
        let data = self.place().next_multiple_of(alignment);
        for tensor in &mut *tensors {
            let moved = |at: u64| at.checked_add(data).filter(|&at| at <= self.len);
            let (start, end) = (moved(tensor.range.start), moved(tensor.range.end));
            let (Some(start), Some(end)) = (start, end) else {
                let end = tensor.range.end.saturating_add(data);
                return Err(
                    GgufError::PastEnd { tensor: tensor.name.clone(), end, file_len: self.len }.into()
                );
            };
            tensor.range = start..end;
        }
        let mut order: Vec<&GgufTensor> = tensors.iter().filter(|t| !t.range.is_empty()).collect();
        order.sort_by_key(|t| t.range.start);
        match order.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
            Some(pair) => {
                let (first, second) = (pair[0].name.clone(), pair[1].name.clone());
                Err(GgufError::Overlap { first, second }.into())
            }
            None => Ok(()),
        }
    }
}

/// Bytes of a tensor. `None` if its rows are no whole blocks or the size overflows.
pub(super) fn byte_len(ty: GgmlType, shape: &[usize]) -> Option<u64> {
    let rows = if shape.is_empty() { &[1][..] } else { shape };
    let bytes = quant_core::DType::U8.byte_len(&ty.byte_shape(rows)?)?;
    // Elements are counted in i64 by everybody else.
    let elements = quant_core::DType::U8.byte_len(shape)?;
    (elements <= i64::MAX as usize).then_some(bytes as u64)
}

/// The alignment of tensors: a power of two, 32 where the key is absent.
pub(super) fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    match metadata.get(ALIGNMENT) {
        None => Ok(32),
        Some(&MetaValue::U32(n)) if n.is_power_of_two() => Ok(n.into()),
        Some(found) => Err(GgufError::Alignment { found: format!("{found:?}") }),
    }
}

/// The header of a file that holds these tensors one behind the other, and where each begins and ends.
pub(super) fn encode(
    metadata: &Metadata,
    tensors: &[(String, GgmlType, Vec<usize>)],
) -> Result<(Vec<u8>, Vec<Range<u64>>), GgufError> {
    let alignment = alignment(metadata)?;
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.iter().len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_string(&mut out, key);
        put_value(&mut out, value);
    }
    let mut ranges = Vec::with_capacity(tensors.len());
    let mut offset = 0u64;
    for (name, ty, shape) in tensors {
        let size = || GgufError::Size {
            tensor: name.clone(),
            ty: *ty,
            shape: shape.iter().map(|&n| n as u64).collect(),
            block: ty.block_len(),
        };
        let len = byte_len(*ty, shape).ok_or_else(size)?;
        put_string(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&n| out.extend((n as u64).to_le_bytes()));
        out.extend(ty.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        ranges.push(offset..offset + len);
        let end = offset.checked_add(len).and_then(|end| end.checked_next_multiple_of(alignment));
        offset = end.filter(|&end| end < u64::MAX / 2).ok_or_else(size)?;
    }
    out.resize(out.len().next_multiple_of(alignment as usize), 0);
    let data = out.len() as u64;
    ranges.iter_mut().for_each(|range| *range = range.start + data..range.end + data);
    Ok((out, ranges))
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &MetaValue) {
    let mut put = |ty: u32, bytes: &[u8]| {
        out.extend(ty.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        MetaValue::U8(v) => put(0, &v.to_le_bytes()),
        MetaValue::I8(v) => put(1, &v.to_le_bytes()),
        MetaValue::U16(v) => put(2, &v.to_le_bytes()),
        MetaValue::I16(v) => put(3, &v.to_le_bytes()),
        MetaValue::U32(v) => put(4, &v.to_le_bytes()),
        MetaValue::I32(v) => put(5, &v.to_le_bytes()),
        MetaValue::F32(v) => put(6, &v.to_le_bytes()),
        MetaValue::Bool(v) => put(7, &[u8::from(*v)]),
        MetaValue::Str(text) => {
            put(8, &[]);
            put_string(out, text);
        }
        MetaValue::Array(list) => {
            put(9, &[]);
            put_list(out, list);
        }
        MetaValue::U64(v) => put(10, &v.to_le_bytes()),
        MetaValue::I64(v) => put(11, &v.to_le_bytes()),
        MetaValue::F64(v) => put(12, &v.to_le_bytes()),
    }
}

fn put_list(out: &mut Vec<u8>, list: &MetaArray) {
    fn numbers<T: Copy, const N: usize>(
        out: &mut Vec<u8>,
        ty: u32,
        list: &[T],
        bytes: impl Fn(T) -> [u8; N],
    ) {
        out.extend(ty.to_le_bytes());
        out.extend((list.len() as u64).to_le_bytes());
        list.iter().for_each(|&v| out.extend(bytes(v)));
    }
    match list {
        MetaArray::U8(v) => numbers(out, 0, v, u8::to_le_bytes),
        MetaArray::I8(v) => numbers(out, 1, v, i8::to_le_bytes),
        MetaArray::U16(v) => numbers(out, 2, v, u16::to_le_bytes),
        MetaArray::I16(v) => numbers(out, 3, v, i16::to_le_bytes),
        MetaArray::U32(v) => numbers(out, 4, v, u32::to_le_bytes),
        MetaArray::I32(v) => numbers(out, 5, v, i32::to_le_bytes),
        MetaArray::F32(v) => numbers(out, 6, v, f32::to_le_bytes),
        MetaArray::Bool(v) => numbers(out, 7, v, |b| [u8::from(b)]),
        MetaArray::Str(list) => {
            out.extend(8u32.to_le_bytes());
            out.extend((list.len() as u64).to_le_bytes());
            list.iter().for_each(|text| put_string(out, text));
        }
        MetaArray::U64(v) => numbers(out, 10, v, u64::to_le_bytes),
        MetaArray::I64(v) => numbers(out, 11, v, i64::to_le_bytes),
        MetaArray::F64(v) => numbers(out, 12, v, f64::to_le_bytes),
    }
}
