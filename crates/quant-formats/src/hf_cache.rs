//! Models that Hugging Face tools have downloaded before. Nothing is ever fetched.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::FormatError;
use crate::file;

/// The directory or file that a user means: an existing path, or a model name such as `Qwen/Qwen3-0.6B` that is
/// in the local cache (`HF_HUB_CACHE`, `HF_HOME`, or `~/.cache/huggingface/hub`).
pub fn resolve_model(model: &str) -> Result<PathBuf, FormatError> {
    let path = Path::new(model);
    match fs::metadata(path) {
        Ok(_) => return Ok(path.to_path_buf()),
        Err(e) if !is_model_name(model) => return Err(FormatError::io("open", path, e)),
        Err(_) => {}
    }
    let Some(cache) = cache_dir() else {
        let looked = "no home directory is set to look for a cache in".to_owned();
        return Err(FormatError::NotInCache { name: model.to_owned(), looked });
    };
    resolve_in(&cache, model)
}

/// Where downloads are kept.
fn cache_dir() -> Option<PathBuf> {
    let var = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || var("HOME").or_else(|| var("USERPROFILE"));
    let xdg = || var("XDG_CACHE_HOME").or_else(|| home().map(|h| h.join(".cache")));
    var("HF_HUB_CACHE")
        .or_else(|| var("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| var("HF_HOME").map(|h| h.join("hub")))
        .or_else(|| xdg().map(|c| c.join("huggingface/hub")))
}

/// `name` or `organisation/name`, of letters, digits, `-`, `_` and `.`.
fn is_model_name(name: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && p.len() <= 96
            && !p.starts_with(['.', '-'])
            && p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    name.split('/').count() <= 2 && name.split('/').all(part)
}

fn resolve_in(cache: &Path, name: &str) -> Result<PathBuf, FormatError> {
    let repo = cache.join(format!("models--{}", name.replace('/', "--")));
    let snapshots = repo.join("snapshots");
    if let Ok(revision) = file::read_limited(&repo.join("refs/main"), 256) {
        let revision = String::from_utf8_lossy(&revision).trim().to_owned();
        let snapshot = snapshots.join(&revision);
        if file::refuse_file_name(&revision).is_none() && snapshot.is_dir() {
            return Ok(snapshot);
        }
    }
    let dirs =
        fs::read_dir(&snapshots).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir());
    let age =
        |path: &PathBuf| fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    dirs.max_by_key(|path| (age(path), path.clone())).ok_or_else(|| FormatError::NotInCache {
        name: name.to_owned(),
        looked: format!("the cache {} does not hold it", crate::escape::display_path(cache)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_strict() {
        for name in ["gpt2", "Qwen/Qwen3-0.6B", "a/b_c.d"] {
            assert!(is_model_name(name), "{name}");
        }
        for name in ["", "a/b/c", "../x", "a/..", "/etc", "a/", "-x/y", "a b/c", "a\0/b", ".hidden"] {
            assert!(!is_model_name(name), "{name}");
        }
    }

    #[test]
    fn main_is_preferred_and_a_hostile_ref_is_not_followed() {
        let cache = tempfile::tempdir().unwrap();
        let repo = cache.path().join("models--org--m");
        assert!(matches!(resolve_in(cache.path(), "org/m"), Err(FormatError::NotInCache { .. })));
        for revision in ["aaa", "bbb"] {
            fs::create_dir_all(repo.join("snapshots").join(revision)).unwrap();
        }
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::write(repo.join("refs/main"), "aaa\n").unwrap();
        assert!(resolve_in(cache.path(), "org/m").unwrap().ends_with("aaa"));
        fs::write(repo.join("refs/main"), "../../..").unwrap();
        let found = resolve_in(cache.path(), "org/m").unwrap();
        assert_eq!(found.parent(), Some(repo.join("snapshots").as_path()));
    }
}
