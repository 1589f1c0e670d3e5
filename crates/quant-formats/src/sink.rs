//! Writing safetensors files.
//!
//! Every tensor's name, type and shape is known before the first byte is written, so the header comes first,
//! each tensor goes straight to its place, in any order and from any thread, and no more than that tensor is
//! held in memory. Output appears under its name only when it is complete: until then it lies beside it under a
//! hidden name, which is removed when writing ends early.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};

use quant_core::{DType, DenseTensor};
use serde_json::json;

use crate::error::FormatError;
use crate::file::{self, TempPath};

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Full name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
}

impl PlannedTensor {
    /// A planned tensor.
    pub fn new(name: impl Into<String>, dtype: DType, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }

    /// The plan of an existing tensor.
    pub fn of(name: impl Into<String>, tensor: &DenseTensor) -> Self {
        Self::new(name, tensor.dtype(), tensor.shape())
    }

    /// Bytes of the tensor. `None` if that is no number.
    pub fn byte_len(&self) -> Option<u64> {
        self.dtype.byte_len(&self.shape).map(|n| n as u64)
    }
}

/// Cuts a plan in files, in its own order.
pub(crate) fn cut_shards(
    plan: &[PlannedTensor],
    shard_size: u64,
) -> Result<Vec<Vec<PlannedTensor>>, FormatError> {
    let mut names = BTreeSet::new();
    let mut shards = vec![Vec::new()];
    let (mut filled, mut total) = (0u64, 0u64);
    for tensor in plan {
        let fail = |problem: &str| {
            Err(FormatError::Plan { tensor: tensor.name.clone(), problem: problem.to_owned() })
        };
        if !names.insert(&tensor.name) {
            return fail("it is planned twice");
        }
        if tensor.name == "__metadata__" {
            return fail("this name is reserved for the header");
        }
        let Some(len) = tensor.byte_len() else { return fail("its size is no whole number of bytes") };
        // Offsets must fit 64 bits with the header before them.
        total = match total.checked_add(len) {
            Some(total) if total < u64::MAX / 2 => total,
            _ => return fail("the total size overflows"),
        };
        if filled > 0 && filled + len > shard_size {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += len;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor.clone());
        }
    }
    Ok(shards)
}

/// The place of a tensor in its file.
#[derive(Debug)]
pub(crate) struct Slot {
    dtype: DType,
    shape: Vec<usize>,
    offset: u64,
    pub(crate) len: u64,
    /// `FREE`, `BUSY` or `DONE`.
    state: AtomicU8,
}

const FREE: u8 = 0;
const BUSY: u8 = 1;
const DONE: u8 = 2;

/// Length word and header of a file, and where its tensors go. The order is the reference writer's: element
/// types from the widest, then names. So is the padding to eight bytes.
pub(crate) fn encode_header(
    mut tensors: Vec<PlannedTensor>,
    metadata: &BTreeMap<String, String>,
) -> (Vec<u8>, BTreeMap<String, Slot>) {
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut entries = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        entries.push(format!("\"__metadata__\":{}", json!(metadata)));
    }
    let mut slots = BTreeMap::new();
    let mut offset = 0;
    for PlannedTensor { name, dtype, shape } in tensors {
        let len = dtype.byte_len(&shape).unwrap_or(0) as u64;
        let info = json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [offset, offset + len] });
        entries.push(format!("{}:{info}", json!(name)));
        slots.insert(name, Slot { dtype, shape, offset, len, state: AtomicU8::new(FREE) });
        offset += len;
    }
    let mut text = format!("{{{}}}", entries.join(",")).into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    slots.values_mut().for_each(|slot| slot.offset += header.len() as u64);
    (header, slots)
}

/// One safetensors file under construction.
#[derive(Debug)]
pub(crate) struct Shard {
    path: PathBuf,
    file: File,
    slots: BTreeMap<String, Slot>,
}

impl Shard {
    pub(crate) fn create(
        path: PathBuf,
        file: File,
        tensors: Vec<PlannedTensor>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self, FormatError> {
        let (header, slots) = encode_header(tensors, metadata);
        let len = header.len() as u64 + slots.values().map(|s| s.len).sum::<u64>();
        let written = file::write_at(&file, &header, 0).and_then(|()| file.set_len(len));
        written.map_err(|e| FormatError::io("write", &path, e))?;
        Ok(Self { path, file, slots })
    }

    pub(crate) fn write(&self, name: &str, tensor: &DenseTensor) -> Result<(), FormatError> {
        let fail = |problem: String| Err(FormatError::Plan { tensor: name.to_owned(), problem });
        let Some(slot) = self.slots.get(name) else { return fail("it is not planned".into()) };
        if (tensor.dtype(), tensor.shape()) != (slot.dtype, &slot.shape[..]) {
            let (dtype, shape) = (tensor.dtype(), tensor.shape());
            return fail(format!("{dtype} {shape:?} where {} {:?} is planned", slot.dtype, slot.shape));
        }
        if slot.state.compare_exchange(FREE, BUSY, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return fail("it is written twice".into());
        }
        let written = file::write_at(&self.file, tensor.bytes(), slot.offset);
        slot.state.store(if written.is_ok() { DONE } else { FREE }, Ordering::Release);
        written.map_err(|e| FormatError::io("write", &self.path, e))
    }

    pub(crate) fn unwritten(&self) -> impl Iterator<Item = &String> {
        self.slots.iter().filter(|(_, s)| s.state.load(Ordering::Acquire) != DONE).map(|(name, _)| name)
    }

    pub(crate) fn sync(&self) -> Result<(), FormatError> {
        self.file.sync_all().map_err(|e| FormatError::io("sync", &self.path, e))
    }
}

pub(crate) fn check_written<'a>(unwritten: impl Iterator<Item = &'a String>) -> Result<(), FormatError> {
    let mut unwritten = unwritten.peekable();
    match unwritten.peek() {
        None => Ok(()),
        Some(first) => {
            let first = (*first).clone();
            Err(FormatError::Unwritten { first, count: unwritten.count() })
        }
    }
}

/// Writes one safetensors file of planned tensors.
#[derive(Debug)]
pub struct SafetensorsWriter {
    target: PathBuf,
    temp: TempPath,
    shard: Shard,
}

impl SafetensorsWriter {
    /// Begins a file that will replace `path` when [`SafetensorsWriter::finish`] is called.
    pub fn create(
        path: impl Into<PathBuf>,
        plan: &[PlannedTensor],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self, FormatError> {
        let target = path.into();
        if target.is_dir() {
            return Err(FormatError::NotAFile { file: target, found: "a directory" });
        }
        let tensors = cut_shards(plan, u64::MAX)?.concat();
        let (temp, file) = TempPath::beside(&target, |p| File::create_new(p))?;
        let shard = Shard::create(temp.path().to_path_buf(), file, tensors, metadata)?;
        Ok(Self { target, temp, shard })
    }

    /// Writes a planned tensor; any order, any thread.
    pub fn write(&self, name: &str, tensor: &DenseTensor) -> Result<(), FormatError> {
        self.shard.write(name, tensor)
    }

    /// Makes the file durable and gives it its name. Fails if a planned tensor has not been written.
    pub fn finish(mut self) -> Result<(), FormatError> {
        check_written(self.shard.unwritten())?;
        self.shard.sync()?;
        let _whole = file::putting_in_place();
        self.temp.rename_to(&self.target)
    }
}

/// Writes tensors to one safetensors file, replacing it.
pub fn write_safetensors(
    path: impl Into<PathBuf>,
    tensors: &[(String, DenseTensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<(), FormatError> {
    let plan: Vec<_> = tensors.iter().map(|(name, t)| PlannedTensor::of(name, t)).collect();
    let writer = SafetensorsWriter::create(path, &plan, metadata)?;
    tensors.iter().try_for_each(|(name, tensor)| writer.write(name, tensor))?;
    writer.finish()
}
