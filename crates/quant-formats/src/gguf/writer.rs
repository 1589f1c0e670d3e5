//! Writing GGUF files.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::header;
use super::{GgmlType, Metadata};
use crate::error::FormatError;
use crate::file::{self, TempPath};

/// Writes one GGUF file. Keys, and the type and shape of every tensor, are known at the beginning; tensors follow in
/// any order, from any thread. The same input gives the same bytes.
#[derive(Debug)]
pub struct GgufWriter {
    target: PathBuf,
    temp: TempPath,
    file: File,
    places: BTreeMap<String, Range<u64>>,
    written: Mutex<HashSet<String>>,
    overwrite: bool,
}

impl GgufWriter {
    /// Begins a file that will have the name `path` when [`GgufWriter::finish`] is called. Shapes are slowest first.
    pub fn create(
        path: impl Into<PathBuf>,
        metadata: &Metadata,
        tensors: &[(String, GgmlType, Vec<usize>)],
        overwrite: bool,
    ) -> Result<Self, FormatError> {
        let target = path.into();
        check_target(&target, overwrite)?;
        let encoded = header::encode(metadata, tensors);
        let (head, ranges) = encoded.map_err(|source| FormatError::Gguf { file: target.clone(), source })?;
        let end = ranges.iter().map(|r| r.end).max().unwrap_or(head.len() as u64);
        let alignment = header::alignment(metadata).unwrap_or(1);
        let places: BTreeMap<_, _> = tensors.iter().map(|(name, ..)| name.clone()).zip(ranges).collect();
        if places.len() != tensors.len() {
            let problem = "two tensors have one name".to_owned();
            return Err(FormatError::Plan { tensor: target.display().to_string(), problem });
        }
        let (temp, file) = TempPath::beside(&target, |p| File::create_new(p))?;
        let written =
            file::write_at(&file, &head, 0).and_then(|()| file.set_len(end.next_multiple_of(alignment)));
        written.map_err(|e| FormatError::io("write", temp.path(), e))?;
        Ok(Self { target, temp, file, places, written: Mutex::default(), overwrite })
    }

    /// Writes the bytes of a tensor.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let fail = |problem: String| Err(FormatError::Plan { tensor: name.to_owned(), problem });
        let Some(range) = self.places.get(name) else { return fail("it is not planned".to_owned()) };
        let len = range.end - range.start;
        if bytes.len() as u64 != len {
            return fail(format!("{} bytes where {len} are planned", bytes.len()));
        }
        if !self.written().insert(name.to_owned()) {
            return fail("it is written twice".to_owned());
        }
        let written = file::write_at(&self.file, bytes, range.start);
        written.map_err(|e| FormatError::io("write", self.temp.path(), e))
    }

    fn written(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all tensors.
    pub fn data_len(&self) -> u64 {
        self.places.values().map(|range| range.end - range.start).sum()
    }

    /// Makes the file durable and gives it its name. Fails if a planned tensor has not been written.
    pub fn finish(mut self) -> Result<(), FormatError> {
        let written = self.written().clone();
        crate::sink::check_written(self.places.keys().filter(|name| !written.contains(*name)))?;
        self.file.sync_all().map_err(|e| FormatError::io("sync", self.temp.path(), e))?;
        let _whole = file::putting_in_place();
        check_target(&self.target, self.overwrite)?;
        self.temp.rename_to(&self.target)
    }
}

/// Only files are replaced, and only when that was asked for.
fn check_target(target: &std::path::Path, overwrite: bool) -> Result<(), FormatError> {
    match target.symlink_metadata() {
        Err(_) => Ok(()),
        Ok(found) if found.is_dir() => {
            Err(FormatError::NotAFile { file: target.to_path_buf(), found: "a directory" })
        }
        Ok(_) if !overwrite => Err(FormatError::Exists { path: target.to_path_buf() }),
        Ok(_) => Ok(()),
    }
}
