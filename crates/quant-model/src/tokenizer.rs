//! Text to token ids and back, from a `tokenizer.json` that nobody vouches for.

mod charsmap;
mod check;
mod stream;

use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

pub use stream::TextStream;

/// Largest `tokenizer.json` that is read; the largest known ones have 35 MB.
const MAX_BYTES: u64 = 128 << 20;

/// A tokenizer that cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The file can't be read.
    #[error("tokenizer {}: {source}", .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        source: Arc<std::io::Error>,
    },
    /// The file is larger than any tokenizer.
    #[error("tokenizer {}: more than {MAX_BYTES} bytes", .file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
    },
    /// The file is no JSON, or nested too deep.
    #[error("tokenizer.json is no valid JSON: {reason}")]
    Json {
        /// What the parser says.
        reason: String,
    },
    /// A part of the file contradicts itself or is not known.
    #[error("tokenizer.json, {part}: {reason}")]
    Invalid {
        /// Where, such as `model` or `post_processor`.
        part: &'static str,
        /// Expected and found.
        reason: String,
    },
    /// A text can't be encoded, or ids can't be decoded.
    #[error("the tokenizer cannot {action} this: {reason}")]
    Run {
        /// `encode` or `decode`.
        action: &'static str,
        /// What the tokenizer says.
        reason: String,
    },
}

/// A tokenizer of the Hugging Face kind.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    pub fn from_file(file: &Path) -> Result<Self, TokenizerError> {
        let io = |source| TokenizerError::Io { file: file.to_owned(), source: Arc::new(source) };
        let mut bytes = Vec::new();
        File::open(file).map_err(io)?.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(TokenizerError::TooLarge { file: file.to_owned() });
        }
        Self::from_bytes(&bytes)
    }

    /// Parses the content of a `tokenizer.json`. Truncation, padding and dropout, which it may ask for, are off.
    pub fn from_bytes(json: &[u8]) -> Result<Self, TokenizerError> {
        let invalid = |e: serde_json::Error| TokenizerError::Json { reason: clean(&e.to_string()) };
        let mut file: Value = serde_json::from_slice(json).map_err(invalid)?;
        check::check(&file)?;
        for part in ["/truncation", "/padding", "/model/dropout"] {
            if let Some(value) = file.pointer_mut(part) {
                *value = Value::Null;
            }
        }
        // What the crate parses is what was checked: a file with duplicate keys has lost them by now.
        let checked = serde_json::to_vec(&file).map_err(invalid)?;
        drop(file);
        let inner = guarded("load", || tokenizers::Tokenizer::from_bytes(&checked)).map_err(|e| match e {
            TokenizerError::Run { reason, .. } => TokenizerError::Invalid { part: "tokenizer", reason },
            other => other,
        })?;
        Ok(Self { inner })
    }

    /// Token ids of a text. With `special`, the tokens that the file's post-processor adds (such as the beginning of
    /// text) are added. Special tokens written out in the text are recognised.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = guarded("encode", || self.inner.encode_fast(text, special))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids. With `skip_special`, special tokens leave no trace. Bytes that are no UTF-8 become
    /// U+FFFD, ids that do not exist nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        guarded("decode", || self.inner.decode(ids, skip_special))
    }

    /// A decoder for tokens that come one by one.
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream::new(self, skip_special)
    }

    /// Id of a token by its content.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Content of a token.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// Runs the tokenizer. Files are checked before they come here; should one still make it panic, the caller gets an
/// error all the same.
fn guarded<T>(
    action: &'static str,
    run: impl FnOnce() -> tokenizers::Result<T>,
) -> Result<T, TokenizerError> {
    let failed = |reason: &str| TokenizerError::Run { action, reason: clean(reason) };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(failed(&error.to_string())),
        Err(_) => Err(failed("its tokenizer.json has an inconsistency that was not foreseen")),
    }
}

/// Text for a terminal: one line, no control characters, not too long.
fn clean(text: &str) -> String {
    const MAX: usize = 200;
    text.chars()
        .take(MAX)
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect()
}
