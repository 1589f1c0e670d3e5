//! Running the program.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use quant_testkit::fixtures_dir;
use quant_testkit::synthetic::{Arch, Checkpoint, Shape, random_ids, write_npy};
use serde_json::Value;
use tempfile::TempDir;

/// The built program.
pub(crate) const QUANT: &str = env!("CARGO_BIN_EXE_quant");

/// A finished run.
#[derive(Debug)]
pub(crate) struct Run {
    /// Exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// Asserts success.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// Asserts an error (exit code 1) whose text holds all `words`.
    #[track_caller]
    pub(crate) fn fails(self, words: &[&str]) -> Self {
        self.ends(1, words)
    }

    /// Asserts an exit code and that standard error holds all `words`.
    #[track_caller]
    pub(crate) fn ends(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.stdout, self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {:?}", self.stderr);
        }
        self
    }

    /// The JSON object, which must be all of standard output.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let value: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        assert!(value.is_object() && self.stdout.ends_with("}\n"), "{}", self.stdout);
        value
    }
}

/// Arguments as text.
pub(crate) fn args<'a>(list: &[&'a str]) -> Vec<&'a str> {
    list.to_vec()
}

/// A path as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are text")
}

/// Runs the program to its end.
pub(crate) fn quant(args: &[&str]) -> Run {
    finish(Command::new(QUANT).args(args))
}

/// Runs the program with limits on address space and time. Resident memory cannot exceed the address space.
pub(crate) fn quant_within(mib: u64, limit: Duration, args: &[&str]) -> Run {
    // One arena of the allocator instead of one per thread, each of which reserves 64 MiB that it does not use.
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -v {}; exec \"$0\" \"$@\"", mib * 1024), QUANT])
        .args(args)
        // Every thread reserves a stack.
        .args(["--threads", "2"])
        .env("MALLOC_ARENA_MAX", "1");
    finish_within(&mut command, limit)
}

/// Runs any command to its end.
pub(crate) fn finish(command: &mut Command) -> Run {
    finish_within(command, Duration::from_secs(120))
}

fn finish_within(command: &mut Command, limit: Duration) -> Run {
    let scratch = tempfile::tempdir().unwrap();
    let (out, err) = (scratch.path().join("out"), scratch.path().join("err"));
    // Files instead of pipes: a pipe that nobody reads would block.
    let child = command
        .stdin(Stdio::null())
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap())
        .spawn()
        .unwrap();
    let status = wait(child, limit);
    let read = |path: &Path| {
        let mut bytes = Vec::new();
        File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
        String::from_utf8(bytes).expect("output is UTF-8")
    };
    Run { code: status.code(), stdout: read(&out), stderr: read(&err) }
}

/// Waits for a process; one that takes longer is killed, and so ended by a signal.
pub(crate) fn wait(mut child: Child, limit: Duration) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if start.elapsed() > limit {
            child.kill().unwrap();
            return child.wait().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The trained model of the fixtures.
pub(crate) fn trained_model() -> PathBuf {
    fixtures_dir().join("models/ts-llama-3.7M")
}

/// A tiny float model with random weights, and token ids to calibrate on: `[8, 32]`.
pub(crate) struct TinyModel {
    folder: TempDir,
    vocab: usize,
}

impl TinyModel {
    /// Two blocks.
    pub(crate) fn new(arch: Arch) -> Self {
        Self::of(Checkpoint::new(Shape::tiny(arch)))
    }

    /// Any checkpoint.
    pub(crate) fn of(checkpoint: Checkpoint) -> Self {
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write(&folder.path().join("model")).unwrap();
        let vocab = checkpoint.shape.vocab;
        write_npy(&folder.path().join("ids.npy"), [8, 32], &random_ids(1, 8, 32, vocab)).unwrap();
        Self { folder, vocab }
    }

    /// The model's folder.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    /// The weight file.
    pub(crate) fn weights(&self) -> PathBuf {
        self.path().join("model.safetensors")
    }

    /// Token ids.
    pub(crate) fn ids(&self) -> PathBuf {
        self.folder.path().join("ids.npy")
    }

    /// A new path in the same folder.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Names of everything beside the model, hidden files included.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        names(self.folder.path()).into_iter().filter(|n| n != "model" && n != "ids.npy").collect()
    }

    /// Number of tokens.
    pub(crate) fn vocab(&self) -> usize {
        self.vocab
    }

    /// Quantizes into `out` with further arguments.
    pub(crate) fn quantize(&self, out: &Path, more: &[&str]) -> Run {
        let (model, ids) = (self.path(), self.ids());
        let mut args = args(&["quantize", text(&model), "--out", text(out), "--calibration", text(&ids)]);
        args.extend(["--group-size", "32"]);
        args.extend(more);
        quant(&args)
    }
}

/// Sorted names in a folder.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().expect("test names are text")).collect();
    names.sort();
    names
}

/// Asserts that an object has these keys, and that each is of the kind named: `n`umber, `s`tring, `a`rray,
/// `o`bject, `b`oolean, or any if `?`.
#[track_caller]
pub(crate) fn has_keys(object: &Value, keys: &[(&str, char)]) {
    for (key, kind) in keys {
        let value = &object[*key];
        let fits = match kind {
            'n' => value.is_number(),
            's' => value.is_string(),
            'a' => value.is_array(),
            'o' => value.is_object(),
            'b' => value.is_boolean(),
            '?' => object.get(*key).is_some(),
            _ => panic!("no kind {kind}"),
        };
        assert!(fits, "{key} is {value}");
    }
}
