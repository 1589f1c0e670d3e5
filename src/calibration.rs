//! Calibration data: token sequences of equal length on which activations are observed.

use std::path::{Path, PathBuf};

use crate::error::Error;

/// The text used when no file is given: English prose and stories, Chinese, and code, written for this purpose.
pub const BUILTIN: &str = include_str!("calibration/builtin.txt");

/// Stands between documents in a text file.
pub const DOCUMENT_MARK: &str = "<|endoftext|>";

/// Where calibration tokens come from.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum CalibrationSource {
    /// [`BUILTIN`].
    #[default]
    Builtin,
    /// A file: `.txt` (documents separated by lines of `<|endoftext|>`), `.jsonl` (one object a line with a string
    /// `text`, or a list `messages` of objects with `content`), or `.npy` (token ids `[samples, seq]`).
    File(PathBuf),
    /// Token ids, one sample each.
    Ids(Vec<Vec<u32>>),
}

/// Token sequences of equal length.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// `[samples][seq_len]`.
    pub samples: Vec<Vec<u32>>,
    /// Length of every sample.
    pub seq_len: usize,
}

impl Calibration {
    /// Total number of tokens.
    pub fn tokens(&self) -> usize {
        self.samples.len() * self.seq_len
    }
}

/// The documents of a text, or of a `.jsonl` file.
pub fn documents(path: &Path, text: &str) -> Result<Vec<String>, Error> {
    if path.extension().is_none_or(|e| e != "jsonl") {
        return Ok(split_documents(text).map(str::to_owned).collect());
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(i, line)| jsonl_text(line).ok_or(Error::Jsonl { file: path.into(), line: i + 1 })).collect()
}

/// Pieces of a text between [`DOCUMENT_MARK`]s, trimmed, without empty ones.
pub fn split_documents(text: &str) -> impl Iterator<Item = &str> {
    text.split(DOCUMENT_MARK).map(str::trim).filter(|d| !d.is_empty())
}

fn jsonl_text(line: &str) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(line).ok()?;
    if let Some(text) = value.get("text").and_then(|t| t.as_str()) {
        return Some(text.to_owned());
    }
    let messages = value.get("messages")?.as_array()?;
    let contents: Option<Vec<&str>> = messages.iter().map(|m| m.get("content")?.as_str()).collect();
    Some(contents?.join("\n"))
}

/// Packs documents end to end and cuts the stream in samples of `seq_len` tokens; the rest is dropped. Of more than
/// `samples` the seed chooses which, in their order. A stream shorter than one sample becomes one short sample.
pub fn pack(documents: &[Vec<u32>], samples: usize, seq_len: usize, seed: u64) -> Calibration {
    let stream: Vec<u32> = documents.iter().flatten().copied().collect();
    if stream.len() < seq_len {
        return Calibration { seq_len: stream.len(), samples: vec![stream] };
    }
    let windows: Vec<&[u32]> = stream.chunks_exact(seq_len).collect();
    let chosen = choose(windows.len(), samples, seed);
    Calibration { samples: chosen.into_iter().map(|i| windows[i].to_vec()).collect(), seq_len }
}

/// `k` of the numbers below `n`, ascending (all of them if there are no more), by selection sampling.
fn choose(n: usize, k: usize, seed: u64) -> Vec<usize> {
    let mut state = seed;
    let mut left = k.min(n);
    (0..n)
        .filter(|i| {
            // SplitMix64: tiny, and fixed for ever, so that a seed keeps its meaning.
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
            let taken = ((u128::from(z) * (n - i) as u128) >> 64) < left as u128;
            left -= usize::from(taken);
            taken
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_fills_samples_across_documents() {
        let docs = vec![vec![1, 2, 3], vec![4, 5], vec![6, 7, 8]];
        let all = pack(&docs, 10, 3, 0);
        assert_eq!(all.samples, [[1, 2, 3], [4, 5, 6]]);
        assert_eq!(pack(&docs, 1, 3, 0).samples.len(), 1);
        let short = pack(&docs, 10, 100, 0);
        assert_eq!((short.samples.len(), short.seq_len, short.tokens()), (1, 8, 8));
    }

    #[test]
    fn choice_is_a_sorted_subset_and_depends_on_the_seed() {
        let a = choose(100, 10, 1);
        assert_eq!(a.len(), 10);
        assert!(a.is_sorted_by(|x, y| x < y) && a[9] < 100);
        assert_ne!(a, choose(100, 10, 2));
        assert_eq!(choose(5, 9, 0), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn documents_of_both_kinds() {
        let txt = documents(Path::new("a.txt"), "one\n<|endoftext|>\n two \n<|endoftext|>\n").unwrap();
        assert_eq!(txt, ["one", "two"]);
        let lines = "{\"text\":\"a\"}\n\n{\"messages\":[{\"content\":\"b\"},{\"content\":\"c\"}]}\n";
        assert_eq!(documents(Path::new("a.jsonl"), lines).unwrap(), ["a", "b\nc"]);
        assert!(matches!(documents(Path::new("a.jsonl"), "{\"text\":1}"), Err(Error::Jsonl { line: 1, .. })));
    }

    #[test]
    fn the_builtin_text_is_varied_and_large_enough() {
        let docs: Vec<&str> = split_documents(BUILTIN).collect();
        assert!(docs.len() >= 20, "{} documents", docs.len());
        assert!(BUILTIN.len() >= 40_000, "{} bytes", BUILTIN.len());
        assert!(BUILTIN.chars().filter(|c| ('\u{4e00}'..'\u{9fff}').contains(c)).count() > 2_000);
    }
}
