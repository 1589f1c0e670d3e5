//! Damaged files of every kind that is read: no panic, no signal, bounded memory and time. A fixed set of mutants, the
//! same in every run; `fuzz/run.sh` runs more of them.
//!
//! The mutants of a target run in a process of their own, whose address space is limited: an allocation by a number from
//! a file ends it.

// Public there.
#[allow(unreachable_pub)]
#[path = "../fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use quant_testkit::fixtures_dir;
use quant_testkit::mutants::{Mutants, files};
use targets::{TARGETS, Target};

/// Mutants of each target, where the environment does not say.
const COUNT: u64 = 1000;

/// Address space of the process, in MiB: threads' stacks and the program itself take some hundred.
const ADDRESS_SPACE: u64 = 2048;

/// Resident memory that may be used at any time, in MiB.
const RESIDENT: u64 = 256;

/// Time for one mutant: hundreds of times more than the slowest takes, because the machine may be busy.
const LIMIT: Duration = Duration::from_secs(5);

/// Tells the child which target is its own.
const CHILD: &str = "QUANT_MUTANT_CHILD";

/// The malformed files of the kind, valid ones, and what the libraries wrote.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let all =
        |lists: &[(&str, &str)]| lists.iter().flat_map(|(folder, ending)| files(folder, ending)).collect();
    match target {
        "safetensors" => {
            let mut seeds: Vec<_> = all(&[("malformed", ".safetensors")]);
            seeds.extend(golden_headers());
            seeds
        }
        "gguf" => all(&[("malformed", ".gguf")]),
        "config" => all(&[("malformed", "config.json"), ("golden", "config.json")]),
        "index" => all(&[("malformed", ".index.json"), ("golden", ".index.json")]),
        "quant_state" => [
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [32, 32]}"#,
            r#"{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [16, 64], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.24689865112304688}"#,
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec(),
        "tokenizer" => all(&[("malformed", "tokenizer.json"), ("golden", "tokenizer.json")]),
        other => panic!("no seeds of {other}"),
    }
}

/// Headers of the libraries' own files, with as many zero bytes behind as they promise for their first tensors.
fn golden_headers() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for file in files("golden", ".safetensors") {
        let Some(length) = file.first_chunk::<8>().map(|b| u64::from_le_bytes(*b) as usize) else { continue };
        let Some(header) = file.get(8..8 + length) else { continue };
        let Ok(serde_json::Value::Object(tensors)) = serde_json::from_slice(header) else { continue };
        // The smallest tensors, put one behind the other.
        let size =
            |t: &serde_json::Value| Some(t["data_offsets"][1].as_u64()? - t["data_offsets"][0].as_u64()?);
        let mut small: Vec<_> =
            tensors.iter().filter_map(|(name, t)| Some((size(t)?, name, t.clone()))).collect();
        small.sort_by_key(|(size, name, _)| (*size, (*name).clone()));
        small.truncate(24);
        let mut end = 0;
        let mut header = serde_json::Map::new();
        for (size, name, mut tensor) in small {
            tensor["data_offsets"] = serde_json::json!([end, end + size]);
            end += size;
            header.insert(name.clone(), tensor);
        }
        let header = serde_json::Value::from(header).to_string();
        let mut seed = (header.len() as u64).to_le_bytes().to_vec();
        seed.extend(header.bytes());
        seed.resize(seed.len() + end as usize, 0);
        seeds.push(seed);
    }
    seeds
}

/// Runs the mutants of one target and prints the first that fails.
fn run(target: &Target, count: u64) {
    let mutants = Mutants::of(seeds(target.name));
    let folder = tempfile::tempdir().unwrap();
    // A panic is counted, not printed with its backtrace.
    std::panic::set_hook(Box::new(|_| {}));
    let (mut accepted, mut slowest) = (0, Duration::ZERO);
    for n in 0..count.max(mutants.seeds() as u64) {
        let bytes = mutants.get(n);
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| (target.run)(folder.path(), &bytes)));
        let (time, resident) = (start.elapsed(), resident_mib());
        slowest = slowest.max(time);
        let problem = match result {
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                format!(
                    "panic: {}",
                    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("of another type")
                )
            }
            Ok(_) if time > LIMIT => format!("{time:?}"),
            Ok(_) if resident > RESIDENT => format!("{resident} MiB"),
            Ok(here) => {
                accepted += u64::from(here);
                continue;
            }
        };
        let artifacts = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/artifacts").join(target.name);
        let saved = artifacts.join(format!("mutant-{n}"));
        let kept = fs::create_dir_all(&artifacts).and_then(|()| fs::write(&saved, &bytes));
        let place = kept.map_or("not saved".to_owned(), |()| saved.display().to_string());
        eprintln!("{}: mutant {n}: {problem} ({place})", target.name);
        std::process::exit(1);
    }
    let (seeds, resident) = (mutants.seeds(), resident_mib());
    eprintln!(
        "{}: {count} mutants of {seeds} seeds, {accepted} valid, slowest {slowest:.1?}, {resident} MiB",
        target.name
    );
}

/// Peak resident memory so far. 0 where the system does not tell.
fn resident_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}

fn count() -> u64 {
    std::env::var("QUANT_MUTANTS").ok().and_then(|n| n.parse().ok()).unwrap_or(COUNT)
}

/// Runs a target in a process of its own.
fn in_child(target: &str) {
    if std::env::var("QUANT_MUTANT_TARGET").is_ok_and(|only| !only.is_empty() && only != target) {
        return;
    }
    let program = std::env::current_exe().unwrap();
    let limit = ADDRESS_SPACE * 1024;
    let output = Command::new("sh")
        .args(["-c", &format!("ulimit -v {limit}; exec \"$0\" \"$@\"")])
        .arg(program)
        .args(["child", "--exact", "--nocapture", "--test-threads", "1"])
        .env(CHILD, target)
        .env("RAYON_NUM_THREADS", "2")
        .env("MALLOC_ARENA_MAX", "2")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprint!(
        "{}",
        err.lines().filter(|l| l.starts_with(target)).map(|l| format!("{l}\n")).collect::<String>()
    );
    assert!(output.status.success(), "{target}: {}\n{out}{err}", output.status);
    assert!(err.contains(&format!("{target}: ")), "the child ran nothing: {out}{err}");
}

/// The body of a child process; by itself it does nothing.
#[test]
fn child() {
    let Ok(name) = std::env::var(CHILD) else { return };
    assert!(fixtures_dir().exists());
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    run(target, count());
}

#[test]
fn safetensors() {
    in_child("safetensors");
}

#[test]
fn gguf() {
    in_child("gguf");
}

#[test]
fn config() {
    in_child("config");
}

#[test]
fn index() {
    in_child("index");
}

#[test]
fn quant_state() {
    in_child("quant_state");
}

#[test]
fn tokenizer() {
    in_child("tokenizer");
}
