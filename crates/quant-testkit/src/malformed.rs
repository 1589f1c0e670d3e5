//! Hostile model files, each with the verdict it must get (`fixtures/malformed/README.md`).

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::golden::fixtures_dir;

/// The earliest stage by which a fault must be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Listing the tensors.
    Header,
    /// Opening the model: configuration, index, tensors, tokenizer.
    Load,
    /// Reading or quantizing every weight.
    Values,
    /// Encoding a text.
    Tokenize,
    /// Rendering the chat template.
    Template,
}

/// What must happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// An error with a text.
    Reject,
    /// Success: a valid control, against programs that refuse everything.
    Accept,
    /// An error or success.
    Either,
    /// An error, or success with finite numbers only.
    FiniteOrReject,
}

/// One case of the corpus.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// Unique name.
    pub id: String,
    /// Which reader it aims at: `safetensors`, `config`, `gptq`, `index`, `tokenizer`, `numeric`, `gguf`, ...
    pub kind: String,
    /// When the fault must be noticed.
    pub stage: Stage,
    /// What is wrong with it.
    pub wrong: String,
    /// What must happen.
    pub expected: Verdict,
    /// An error is clear if its text holds one of these words. Empty: any text.
    #[serde(default)]
    pub mention: Vec<String>,
    path: String,
    base: Option<String>,
    #[serde(default)]
    remove: Vec<String>,
    materialize: Option<Special>,
}

/// A file that version control cannot carry.
#[derive(Clone, Debug, Deserialize)]
struct Special {
    r#type: SpecialType,
    target: Option<String>,
    at: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SpecialType {
    Symlink,
    Dir,
    Absent,
}

#[derive(Deserialize)]
struct Manifest {
    limits: Limits,
    cases: Vec<Case>,
}

/// What a program may use for one case.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Limits {
    /// Seconds of wall time.
    pub max_seconds: u64,
    /// Peak resident memory in MiB.
    pub max_rss_mib: u64,
}

fn folder() -> PathBuf {
    fixtures_dir().join("malformed")
}

fn manifest() -> Manifest {
    let file = folder().join("manifest.json");
    let text = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

/// All cases of these kinds; all cases when `kinds` is empty.
pub fn cases(kinds: &[&str]) -> Vec<Case> {
    let mut cases = manifest().cases;
    cases.retain(|case| kinds.is_empty() || kinds.contains(&case.kind.as_str()));
    assert!(!cases.is_empty(), "no case of the kinds {kinds:?}");
    cases
}

/// The limits of the corpus.
pub fn limits() -> Limits {
    manifest().limits
}

impl Case {
    /// Builds the case inside `scratch`, an empty folder, and returns the path to give to the reader.
    pub fn materialize(&self, scratch: &Path) -> PathBuf {
        let stored = folder().join(&self.path);
        let model = scratch.join(stored.file_name().expect("a case has a name"));
        if let Some(base) = &self.base {
            copy(&folder().join(base), &model);
        }
        if stored.exists() {
            copy(&stored, &model);
        }
        for name in &self.remove {
            fs::remove_file(model.join(name)).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.id));
        }
        if let Some(special) = &self.materialize {
            let at = special.at.as_ref().map_or_else(|| model.clone(), |at| model.join(at));
            self.replace(&at, special);
        }
        model
    }

    fn replace(&self, at: &Path, special: &Special) {
        if at.symlink_metadata().is_ok() {
            fs::remove_file(at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
        }
        let made = match special.r#type {
            SpecialType::Absent => Ok(()),
            SpecialType::Dir => fs::create_dir(at),
            SpecialType::Symlink => match special.target.as_deref() {
                Some("@self") => symlink(at.file_name().expect("a link has a name"), at),
                target => panic!("{}: link to {target:?} is not known here", self.id),
            },
        };
        made.unwrap_or_else(|e| panic!("{}: {e}", at.display()));
    }
}

/// Copies a file, or a folder's content over an existing folder.
fn copy(from: &Path, to: &Path) {
    let fail = |e: std::io::Error| panic!("{} -> {}: {e}", from.display(), to.display());
    if !from.is_dir() {
        fs::copy(from, to).map(|_| ()).unwrap_or_else(fail);
        return;
    }
    fs::create_dir_all(to).unwrap_or_else(fail);
    for entry in fs::read_dir(from).unwrap_or_else(|e| panic!("{}: {e}", from.display())) {
        let entry = entry.unwrap_or_else(|e| panic!("{}: {e}", from.display()));
        copy(&entry.path(), &to.join(entry.file_name()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn build(id: &str, scratch: &Path) -> PathBuf {
        let case = cases(&[]).into_iter().find(|c| c.id == id).unwrap_or_else(|| panic!("no case {id}"));
        case.materialize(scratch)
    }

    #[test]
    fn every_case_can_be_built() {
        let ids: BTreeSet<String> = cases(&[]).into_iter().map(|c| c.id).collect();
        assert_eq!(ids.len(), cases(&[]).len(), "names are unique");
        for case in cases(&[]) {
            let scratch = tempfile::tempdir().unwrap();
            let path = case.materialize(scratch.path());
            let stored = folder().join(&case.path).exists();
            let differs = stored || !case.remove.is_empty() || case.materialize.is_some();
            assert!(differs, "{}: nothing tells it from its base", case.id);
            let absent = case.materialize.as_ref().is_some_and(|s| s.r#type == SpecialType::Absent);
            assert_eq!(path.symlink_metadata().is_err(), absent, "{}", case.id);
        }
        assert_eq!((limits().max_seconds, limits().max_rss_mib), (5, 256));
    }

    #[test]
    fn differences_to_a_control_are_applied() {
        let scratch = tempfile::tempdir().unwrap();
        let absent = build("config-absent", scratch.path());
        assert!(!absent.join("config.json").exists() && absent.join("model.safetensors").exists());
        let other = build("config-heads-0", scratch.path());
        assert!(
            fs::read_to_string(other.join("config.json")).unwrap().contains("\"num_attention_heads\": 0")
        );
        let link = build("index-shard-loop", scratch.path()).join("model-00002-of-00002.safetensors");
        assert!(fs::read(&link).is_err() && link.symlink_metadata().unwrap().is_symlink());
        assert!(build("index-shard-dir", scratch.path()).join("model-00002-of-00002.safetensors").is_dir());
    }

    #[test]
    fn kinds_select() {
        assert!(cases(&["numeric"]).iter().all(|c| c.kind == "numeric" && c.stage == Stage::Values));
        assert!(cases(&["index"]).iter().any(|c| c.expected == Verdict::Accept));
    }
}
