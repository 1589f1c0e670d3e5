//! Cutting texts into windows of tokens.

use quant_model::{Tokenizer, TokenizerError};

/// How a text becomes windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Windowing {
    /// The whole text is one stream of tokens, cut every `len` tokens. An incomplete last window is left out.
    Stream {
        /// Tokens of a window.
        len: usize,
    },
    /// Each document is a window of its own, cut at `len` tokens.
    Documents {
        /// Tokens of a window at most.
        len: usize,
        /// What stands between documents; white space around them is removed.
        separator: String,
        /// Shorter documents, in tokens, are left out.
        shortest: usize,
    },
}

impl Windowing {
    /// Documents between `<|endoftext|>` marks, of at least 8 tokens: the protocol of story models.
    pub fn stories(len: usize) -> Self {
        Windowing::Documents { len, separator: "<|endoftext|>".to_owned(), shortest: 8 }
    }

    /// The windows of a text. Each encoding has the special tokens that the tokenizer adds by itself.
    pub fn windows(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<Vec<u32>>, TokenizerError> {
        match self {
            Windowing::Stream { len } => Ok(windows_of_ids(&tokenizer.encode(text, true)?, *len)),
            Windowing::Documents { len, separator, shortest } => {
                let documents = text.split(separator.as_str()).map(str::trim);
                let mut windows = Vec::new();
                for document in documents.filter(|document| !document.is_empty()) {
                    let mut ids = tokenizer.encode(document, true)?;
                    ids.truncate(*len);
                    if ids.len() >= (*shortest).max(2) {
                        windows.push(ids);
                    }
                }
                Ok(windows)
            }
        }
    }
}

/// Cuts a stream of tokens every `len`. An incomplete last window is left out, unless it is the only one.
pub fn windows_of_ids(ids: &[u32], len: usize) -> Vec<Vec<u32>> {
    let windows: Vec<_> = ids.chunks_exact(len.max(1)).map(<[u32]>::to_vec).collect();
    if windows.is_empty() && ids.len() >= 2 { vec![ids.to_vec()] } else { windows }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_cut_without_overlap() {
        let ids: Vec<u32> = (0..10).collect();
        assert_eq!(windows_of_ids(&ids, 4), [vec![0, 1, 2, 3], vec![4, 5, 6, 7]]);
        assert_eq!(windows_of_ids(&ids, 11), std::slice::from_ref(&ids));
        assert!(windows_of_ids(&ids[..1], 4).is_empty() && windows_of_ids(&[], 4).is_empty());
    }
}
