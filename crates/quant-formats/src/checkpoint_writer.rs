//! Writing a checkpoint directory: all of it, or nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use quant_core::DenseTensor;
use serde_json::json;

use crate::error::FormatError;
use crate::file::{self, TempPath};
use crate::sink::{self, PlannedTensor, Shard};

/// How a checkpoint is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// Bytes of tensors after which a new file begins. A larger tensor has a file of its own.
    pub shard_size: u64,
    /// Free text in the header of every file.
    pub metadata: BTreeMap<String, String>,
    /// Replace an existing model directory.
    pub overwrite: bool,
    /// Write an index beside a single file, too.
    pub index: bool,
}

impl Default for WriteOptions {
    /// 5 GB per file and `format: pt`, as Hugging Face writes them; an existing output is refused.
    fn default() -> Self {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        Self { shard_size: 5_000_000_000, metadata, overwrite: false, index: false }
    }
}

/// Names and exact sizes of the safetensors files that a plan gives.
pub fn planned_files(
    plan: &[PlannedTensor],
    options: &WriteOptions,
) -> Result<Vec<(String, u64)>, FormatError> {
    let shards = sink::cut_shards(plan, options.shard_size)?;
    let count = shards.len();
    let size = |(i, shard): (usize, Vec<PlannedTensor>)| {
        let (header, slots) = sink::encode_header(shard, &options.metadata);
        (shard_name(i, count), header.len() as u64 + slots.values().map(|s| s.len).sum::<u64>())
    };
    Ok(shards.into_iter().enumerate().map(size).collect())
}

fn shard_name(i: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".into()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", i + 1)
    }
}

/// Writes a checkpoint directory of planned tensors.
///
/// ```
/// use quant_core::{DType, DenseTensor};
/// use quant_formats::{CheckpointWriter, PlannedTensor, WriteOptions};
///
/// # let dir = tempfile::tempdir()?;
/// # let out = dir.path().join("model");
/// let plan = vec![PlannedTensor::new("norm.weight", DType::F32, &[2])];
/// let writer = CheckpointWriter::create(&out, &plan, &WriteOptions::default())?;
/// writer.write("norm.weight", &DenseTensor::from_f32(&[2], &[1.0, 2.0]))?;
/// writer.write_file("config.json", b"{}")?;
/// let files = writer.finish()?.files;
/// assert_eq!(files, ["config.json", "model.safetensors"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CheckpointWriter {
    target: PathBuf,
    temp: TempPath,
    shards: Vec<Shard>,
    shard_of: BTreeMap<String, usize>,
    side_files: Mutex<BTreeSet<String>>,
    overwrite: bool,
    index: bool,
    total_size: u64,
    /// After `temp`, so that it is dropped when the directory is gone.
    _parents: MadeParents,
}

/// A checkpoint that has been written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Names of all files, relative to the directory, sorted.
    pub files: Vec<String>,
    /// Bytes of all tensors.
    pub total_size: u64,
    /// The replaced directory, if it could not be removed.
    pub leftover: Option<PathBuf>,
}

impl CheckpointWriter {
    /// Begins the directory `dir`: checks the plan and that the output may be written, and writes all headers.
    pub fn create(
        dir: impl Into<PathBuf>,
        plan: &[PlannedTensor],
        options: &WriteOptions,
    ) -> Result<Self, FormatError> {
        let target = dir.into();
        let shards = sink::cut_shards(plan, options.shard_size)?;
        check_target(&target, options.overwrite)?;
        let parents = MadeParents::of(&target)?;
        let (temp, ()) = TempPath::beside(&target, |p| fs::create_dir(p))?;
        let mut writer = Self {
            target,
            temp,
            shards: Vec::with_capacity(shards.len()),
            shard_of: BTreeMap::new(),
            side_files: Mutex::default(),
            overwrite: options.overwrite,
            index: options.index,
            total_size: plan.iter().filter_map(PlannedTensor::byte_len).sum(),
            _parents: parents,
        };
        let count = shards.len();
        for (i, tensors) in shards.into_iter().enumerate() {
            writer.shard_of.extend(tensors.iter().map(|t| (t.name.clone(), i)));
            let path = writer.temp.path().join(shard_name(i, count));
            let file = File::create_new(&path).map_err(|e| FormatError::io("create", &path, e))?;
            writer.shards.push(Shard::create(path, file, tensors, &options.metadata)?);
        }
        Ok(writer)
    }

    /// Bytes of all planned tensors.
    pub fn total_size(&self) -> u64 {
        self.total_size
    }

    /// Writes a planned tensor; any order, any thread.
    pub fn write(&self, name: &str, tensor: &DenseTensor) -> Result<(), FormatError> {
        match self.shard_of.get(name) {
            Some(&i) => self.shards[i].write(name, tensor),
            None => Err(FormatError::Plan { tensor: name.to_owned(), problem: "it is not planned".into() }),
        }
    }

    /// Writes a side file such as `config.json` or `1_Pooling/config.json`.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let fail = |problem| Err(FormatError::FileName { name: name.to_owned(), problem });
        let plain = |c: Component<'_>| matches!(c, Component::Normal(n) if n.to_str().is_some_and(|n| file::refuse_file_name(n).is_none()));
        if name.is_empty() || !Path::new(name).components().all(plain) {
            return fail("side files lie inside the output directory");
        }
        let path = self.temp.path().join(name);
        let io = |e| FormatError::io("write", &path, e);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io)?;
        }
        let file = match File::create_new(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => return fail("it is written twice"),
            other => other.map_err(io)?,
        };
        file::write_at(&file, bytes, 0).and_then(|()| file.sync_all()).map_err(io)?;
        self.side_files.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        Ok(())
    }

    /// Makes everything durable and gives the directory its name. Fails, and leaves an old output as it was, if a
    /// planned tensor has not been written.
    pub fn finish(mut self) -> Result<Written, FormatError> {
        sink::check_written(self.shards.iter().flat_map(Shard::unwritten))?;
        if self.index || self.shards.len() > 1 {
            self.write_file("model.safetensors.index.json", &self.index())?;
        }
        self.shards.iter().try_for_each(Shard::sync)?;
        let mut files = self.side_files.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for parent in files.iter().filter_map(|f| Path::new(f).parent()) {
            file::sync_dir(&self.temp.path().join(parent))?;
        }
        file::sync_dir(self.temp.path())?;
        let count = self.shards.len();
        // Closed first: Windows does not rename directories with open files.
        self.shards.clear();
        let leftover = self.put_in_place()?;
        files.extend((0..count).map(|i| shard_name(i, count)));
        let total_size = self.total_size;
        Ok(Written { files: files.into_iter().collect(), total_size, leftover })
    }

    fn index(&self) -> Vec<u8> {
        let count = self.shards.len();
        let map: BTreeMap<_, _> = self.shard_of.iter().map(|(t, &i)| (t, shard_name(i, count))).collect();
        let index = json!({ "metadata": { "total_size": self.total_size }, "weight_map": map });
        format!("{index:#}\n").into_bytes()
    }

    /// Renames the finished directory, moving an old one out of the way first, and back if that fails.
    fn put_in_place(&mut self) -> Result<Option<PathBuf>, FormatError> {
        let _whole = file::putting_in_place();
        check_target(&self.target, self.overwrite)?;
        if !self.target.exists() {
            self.temp.rename_to(&self.target)?;
            return Ok(None);
        }
        let (old, ()) = file::make_beside(&self.target, |p| fs::create_dir(p))?;
        // The name must be free on Windows.
        let moved = fs::remove_dir(&old).and_then(|()| fs::rename(&self.target, &old));
        moved.map_err(|e| FormatError::io("move aside", &self.target, e))?;
        if let Err(error) = self.temp.rename_to(&self.target) {
            // If this fails too, the only thing left to do is to say where the old output lies.
            fs::rename(&old, &self.target).map_err(|e| FormatError::io("move back", &old, e))?;
            return Err(error);
        }
        Ok(fs::remove_dir_all(&old).is_err().then_some(old))
    }
}

/// Fails if something is at `path` that must not be replaced. An empty directory may always be.
fn check_target(path: &Path, overwrite: bool) -> Result<(), FormatError> {
    let metadata = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| FormatError::io("look at", path, e))?,
    };
    let mut names = BTreeSet::new();
    if metadata.is_dir() {
        let entries = fs::read_dir(path).map_err(|e| FormatError::io("read", path, e))?;
        for entry in entries {
            let entry = entry.map_err(|e| FormatError::io("read", path, e))?;
            names.insert(entry.file_name().to_string_lossy().into_owned());
        }
        if names.is_empty() {
            return Ok(());
        }
    }
    if !overwrite {
        return Err(FormatError::Exists { path: path.to_path_buf() });
    }
    // Replacing removes the whole directory, so nothing but a model is ever replaced.
    let weights = names.iter().any(|n| n.ends_with(".safetensors"));
    let found = if !metadata.is_dir() {
        "it is not a directory"
    } else if !weights || !names.contains("config.json") {
        "it does not look like a model (config.json and safetensors files); remove it yourself"
    } else if names.contains(".git") {
        "it is a git repository; remove it yourself"
    } else {
        return Ok(());
    };
    Err(FormatError::NotReplaced { path: path.to_path_buf(), found })
}

/// Parent directories that had to be made, innermost first. Dropping it removes those that are empty, which is
/// what a failed output leaves.
#[derive(Debug)]
struct MadeParents(Vec<PathBuf>);

impl MadeParents {
    fn of(path: &Path) -> Result<Self, FormatError> {
        let (parent, _) = file::split(path)?;
        let absent = parent.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists());
        let made = Self(absent.map(Path::to_path_buf).collect());
        fs::create_dir_all(&parent).map_err(|e| FormatError::io("create", &parent, e))?;
        Ok(made)
    }
}

impl Drop for MadeParents {
    fn drop(&mut self) {
        for dir in &self.0 {
            // A directory that is in use stays.
            let _ = fs::remove_dir(dir);
        }
    }
}
