//! Files: opened with care, read by position, written beside and renamed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::FormatError;

/// Opens a regular file and tells its length. Directories, pipes, sockets and devices are refused before they
/// are opened: opening a pipe would wait for a writer.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), FormatError> {
    let metadata = fs::metadata(path).map_err(|e| FormatError::io("open", path, e))?;
    if !metadata.is_file() {
        let found = if metadata.is_dir() { "a directory" } else { "a pipe, socket or device" };
        return Err(FormatError::NotAFile { file: path.to_path_buf(), found });
    }
    let file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
    Ok((file, metadata.len()))
}

/// Reads a whole side file of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, FormatError> {
    let (file, found) = open_regular(path)?;
    let too_large = |found| FormatError::TooLarge { file: path.to_path_buf(), found, limit };
    if found > limit {
        return Err(too_large(found));
    }
    let mut bytes = Vec::new();
    let read = file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| FormatError::io("read", path, e))?;
    if read as u64 > limit { Err(too_large(read as u64)) } else { Ok(bytes) }
}

/// Fills `buf` from byte `offset` on, without moving a cursor: any number of threads may read one file.
pub(crate) fn read_at(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match read_some(file, buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes `buf` at byte `offset`, without moving a cursor.
pub(crate) fn write_at(file: &File, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match write_some(file, buf, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                buf = &buf[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(unix)]
fn read_some(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buf, offset)
}

#[cfg(unix)]
fn write_some(file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::write_at(file, buf, offset)
}

#[cfg(windows)]
fn read_some(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buf, offset)
}

#[cfg(windows)]
fn write_some(file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_write(file, buf, offset)
}

/// Makes the names in a directory durable. Windows can't open directories and needs no such call.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), FormatError> {
    if cfg!(unix) {
        File::open(dir).and_then(|d| d.sync_all()).map_err(|e| FormatError::io("sync", dir, e))?;
    }
    Ok(())
}

/// The directory that holds `path`, and the last component of `path`.
pub(crate) fn split(path: &Path) -> Result<(PathBuf, String), FormatError> {
    let name = path.file_name().and_then(|n| n.to_str()).filter(|n| !n.is_empty());
    let Some(name) = name else {
        let problem = "it must end in a name in UTF-8, not in .. or /";
        return Err(FormatError::FileName { name: path.to_string_lossy().into_owned(), problem });
    };
    let parent = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    Ok((parent, name.to_owned()))
}

/// Why `name` is not a plain file name, if it isn't: names come from files and must not lead elsewhere.
pub(crate) fn refuse_file_name(name: &str) -> Option<&'static str> {
    if name.is_empty() || name == "." || name == ".." {
        Some("it names no file")
    } else if name.contains(['/', '\\', ':']) {
        Some("it is a path or URL that may lead outside the directory, not a file name")
    } else if name.chars().any(char::is_control) {
        Some("it holds control characters")
    } else if name.len() > 255 {
        Some("it is longer than 255 bytes")
    } else {
        None
    }
}

/// A new, empty path beside `path`: `.NAME.partial-PID`, made by `make`.
pub(crate) fn make_beside<T>(
    path: &Path,
    make: impl Fn(&Path) -> io::Result<T>,
) -> Result<(PathBuf, T), FormatError> {
    let (parent, name) = split(path)?;
    let pid = std::process::id();
    let mut n = 0u32;
    loop {
        let suffix = if n == 0 { String::new() } else { format!("-{n}") };
        let candidate = parent.join(format!(".{name}.partial-{pid}{suffix}"));
        match make(&candidate) {
            Ok(made) => return Ok((candidate, made)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && n < 1000 => n += 1,
            Err(e) => return Err(FormatError::io("create", &candidate, e)),
        }
    }
}

/// Paths that are removed when this process ends early.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
/// Held while finished output takes its final name.
static PUTTING_IN_PLACE: Mutex<()> = Mutex::new(());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets [`remove_unfinished`] wait until the guard is dropped, because an old output has no name for a moment.
pub(crate) fn putting_in_place() -> MutexGuard<'static, ()> {
    lock(&PUTTING_IN_PLACE)
}

/// Writes a whole file beside its place and gives it its name, replacing what was there.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    let (mut temp, file) = TempPath::beside(path, |p| File::create_new(p))?;
    write_at(&file, bytes, 0).map_err(|e| FormatError::io("write", path, e))?;
    file.sync_all().map_err(|e| FormatError::io("sync", path, e))?;
    let _whole = putting_in_place();
    temp.rename_to(path)
}

/// Removes all output of this process that is not complete yet. For programs that are about to end because of a
/// signal, and for nothing else: from now on no output can be finished.
pub fn remove_unfinished() {
    let (renames, unfinished) = (putting_in_place(), lock(&UNFINISHED));
    for path in unfinished.iter() {
        // Another thread may still be making files in the directory.
        for _ in 0..100 {
            remove(path);
            if !path.exists() {
                break;
            }
        }
    }
    // Never unlocked: whoever wants to begin or finish an output now waits for the end of the process.
    std::mem::forget((renames, unfinished));
}

fn remove(path: &Path) {
    // Nothing can be done about a failure here; the name says what it is.
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// A file or directory that is removed when dropped, unless it has been renamed to its final name.
#[derive(Debug)]
pub(crate) struct TempPath {
    path: PathBuf,
    renamed: bool,
}

impl TempPath {
    /// Makes a hidden path beside `path`, which is where it will be renamed to.
    pub(crate) fn beside<T>(
        path: &Path,
        make: impl Fn(&Path) -> io::Result<T>,
    ) -> Result<(Self, T), FormatError> {
        let mut unfinished = lock(&UNFINISHED);
        let (path, made) = make_beside(path, make)?;
        unfinished.insert(path.clone());
        Ok((Self { path, renamed: false }, made))
    }

    /// Where it lies now.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its final name, durably. The caller holds [`putting_in_place`].
    pub(crate) fn rename_to(&mut self, target: &Path) -> Result<(), FormatError> {
        let (parent, _) = split(target)?;
        fs::rename(&self.path, target).map_err(|e| FormatError::io("rename to", target, e))?;
        self.renamed = true;
        sync_dir(&parent)
    }
}

impl Drop for TempPath {
    fn drop(&mut self) {
        if !self.renamed {
            remove(&self.path);
        }
        lock(&UNFINISHED).remove(&self.path);
    }
}
