//! Decoding while tokens arrive.

use super::{Tokenizer, TokenizerError};

/// Tokens that may be held back. A character has at most four bytes, and so at most four byte tokens; more tokens
/// without a valid end are not going to form one.
const MAX_HELD: usize = 8;

/// Turns tokens that come one by one into pieces of text, each of whole characters. All pieces together are the text
/// of all tokens.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Tokens already shown, kept for the context that some decoders need, then those held back.
    ids: Vec<u32>,
    /// How many of `ids` were shown.
    shown: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), shown: 0 }
    }

    /// Adds a token. Returns the text that is complete by now, often one word, sometimes nothing.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        self.take(self.ids.len() - self.shown > MAX_HELD)
    }

    /// The text that is still held back, with U+FFFD for what is no character.
    pub fn finish(mut self) -> Result<String, TokenizerError> {
        self.take(true)
    }

    fn take(&mut self, incomplete: bool) -> Result<String, TokenizerError> {
        let before = self.tokenizer.decode(&self.ids[..self.shown], self.skip_special)?;
        let all = self.tokenizer.decode(&self.ids, self.skip_special)?;
        if !incomplete && all.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        // A decoder that changes earlier text with later tokens can only be followed from here on.
        let new = all.get(before.len()..).unwrap_or("").to_owned();
        if !new.is_empty() {
            self.ids.drain(..self.shown);
        }
        self.shown = self.ids.len();
        Ok(new)
    }
}
