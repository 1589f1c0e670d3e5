//! Whether a checkpoint can be used: structure, sizes, values and hashes.

use std::path::Path;
use std::sync::Arc;

use quant_formats::{Checkpoint, Finding, Severity, display_path};
use quant_model::{ArchSpec, Block, Embedding, Head};
use serde::Serialize;

use crate::error::Error;
use crate::hash::sha256_of;
use crate::model::read_tokenizer;

/// What [`verify`] found.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// No finding is an error.
    pub ok: bool,
    /// Everything that is wrong or strange.
    pub findings: Vec<Finding>,
}

/// Reads a whole checkpoint and checks it: that the configuration describes a known architecture, that every tensor
/// it needs exists in the right shape, that all values are finite, that quantized layers decode, that the tokenizer
/// loads, and that files from the Hugging Face cache have the hash they are named by.
///
/// A checkpoint that cannot even be opened is an error.
pub fn verify(model: &Path) -> Result<Verification, Error> {
    let checkpoint = Checkpoint::open(model)?;
    let mut findings = Vec::new();
    if !checkpoint.config().is_null() {
        let arch = check_structure(&checkpoint);
        findings.extend(check_tokenizer(&checkpoint, arch.as_ref().ok()));
        if let Err(error) = arch {
            let remedy = "download or convert the model again";
            findings.push(finding(Severity::Error, "structure", error.to_string(), remedy));
        }
    }
    findings.extend(checkpoint.verify());
    for file in checkpoint.files() {
        findings.extend(check_hash(file.path())?);
    }
    Ok(Verification { ok: findings.iter().all(|f| f.severity != Severity::Error), findings })
}

fn finding(severity: Severity, code: &'static str, message: String, remedy: &str) -> Finding {
    Finding { severity, code, tensor: String::new(), message, remedy: remedy.to_owned() }
}

/// Every tensor that the architecture needs, by name and shape. Of the large ones only embedding and head are read.
fn check_structure(checkpoint: &Checkpoint) -> Result<ArchSpec, Error> {
    let arch = Arc::new(ArchSpec::from_config(checkpoint.config())?);
    // Ends at the first missing block when the number of layers is nonsense.
    for layer in 0..arch.layers {
        Block::load_without_linears(&arch, layer, checkpoint)?;
    }
    let embedding = Embedding::load(&arch, checkpoint)?;
    if arch.causal {
        Head::load(&arch, &embedding, checkpoint)?;
    }
    Ok(Arc::unwrap_or_clone(arch))
}

/// A tokenizer is optional, a broken one is an error.
fn check_tokenizer(checkpoint: &Checkpoint, arch: Option<&ArchSpec>) -> Option<Finding> {
    let absent = match checkpoint.gguf_metadata() {
        None => !checkpoint.path().join("tokenizer.json").exists(),
        Some(_) => matches!(checkpoint.tokenizer(), Ok(None)),
    };
    if absent {
        return None;
    }
    let remedy = "download the tokenizer again";
    match read_tokenizer(checkpoint) {
        Err(error) => Some(finding(Severity::Error, "tokenizer", error.to_string(), remedy)),
        Ok(tokenizer) => {
            let (tokens, rows) = (tokenizer.vocab_size(), arch?.vocab_size);
            let message =
                || format!("the tokenizer has {tokens} tokens, the embedding has {rows} rows (vocab_size)");
            (tokens > rows).then(|| finding(Severity::Warning, "vocabulary", message(), remedy))
        }
    }
}

/// Downloads in the Hugging Face cache are links to files named by their SHA-256.
fn check_hash(file: &Path) -> Result<Option<Finding>, Error> {
    let Ok(target) = std::fs::canonicalize(file) else { return Ok(None) };
    let in_blobs = target.parent().and_then(Path::file_name).is_some_and(|dir| dir == "blobs");
    let expected = target.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !in_blobs || expected.len() != 64 || !expected.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let found = sha256_of(file)?;
    let message = || format!("{} has SHA-256 {found}, its name says {expected}", display_path(file));
    Ok((found != expected).then(|| finding(Severity::Error, "hash", message(), "download the file again")))
}
