//! Damaged copies of files, the same ones in every run.

use std::fs;
use std::path::{Path, PathBuf};

use crate::golden::fixtures_dir;

/// Longest seed and longest mutant, in bytes.
const LIMIT: usize = 64 << 10;

/// Numbers that programs get wrong.
const NUMBERS: [&str; 22] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "31",
    "32",
    "33",
    "255",
    "256",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "18446744073709551615",
    "1e999",
    "-1e-400",
    "0.5",
];

/// Pieces of JSON.
const PIECES: [&str; 20] = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "null",
    "true",
    "false",
    "{}",
    "[]",
    "[[[[[[[[",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"F16\"",
    "\"I32\"",
    "\"F8_E4M3\"",
    "\"../x\"",
    "\\",
];

/// A generator of damage: mutant `n` of a set of seeds depends on `n` and the seeds alone.
pub struct Mutants {
    seeds: Vec<Vec<u8>>,
}

impl Mutants {
    /// Mutants of these seeds; those that are empty or very long are left out.
    pub fn of(seeds: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let seeds: Vec<_> = seeds.into_iter().filter(|s| (1..=LIMIT).contains(&s.len())).collect();
        assert!(!seeds.is_empty(), "no seed");
        Self { seeds }
    }

    /// Number of seeds.
    pub fn seeds(&self) -> usize {
        self.seeds.len()
    }

    /// Mutant `n`. The first ones are the seeds themselves.
    pub fn get(&self, n: u64) -> Vec<u8> {
        let count = self.seeds.len() as u64;
        let mut bytes = self.seeds[(n % count) as usize].clone();
        if n < count {
            return bytes;
        }
        let mut random = Random(n.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        for _ in 0..1 + random.below(6) {
            self.damage(&mut bytes, &mut random);
        }
        bytes.truncate(LIMIT);
        bytes
    }

    fn damage(&self, bytes: &mut Vec<u8>, random: &mut Random) {
        if bytes.is_empty() {
            bytes.push(random.next() as u8);
        }
        // Headers and settings come first, so half of the damage is done there.
        let reach = if random.below(2) == 0 { bytes.len() } else { bytes.len().min(512) };
        let at = random.below(reach);
        let len = 1 + random.below(16.min(bytes.len() - at));
        match random.below(10) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => drop(bytes.drain(at..at + len)),
            3 => {
                let copy = bytes[at..at + len].to_vec();
                bytes.splice(at..at, copy);
            }
            4 => bytes.truncate(at),
            5 => {
                // Eight bytes of a length or a count.
                let word = (1u64 << random.below(64)).wrapping_sub(random.below(3) as u64).to_le_bytes();
                bytes.iter_mut().skip(at).zip(word).for_each(|(b, w)| *b = w);
            }
            6 => {
                let piece = PIECES[random.below(PIECES.len())];
                bytes.splice(at..at, piece.bytes());
            }
            7 => {
                let other = &self.seeds[random.below(self.seeds.len())];
                let from = random.below(other.len());
                let piece = &other[from..other.len().min(from + 1 + random.below(64))];
                bytes.splice(at..at + len, piece.iter().copied());
            }
            _ => replace_number(bytes, at, NUMBERS[random.below(NUMBERS.len())]),
        }
    }
}

/// Puts another number in place of the first one behind `at`.
fn replace_number(bytes: &mut Vec<u8>, at: usize, number: &str) {
    let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit).map(|i| at + i) else { return };
    let len = bytes[start..].iter().take_while(|b| b.is_ascii_digit() || **b == b'.').count();
    bytes.splice(start..start + len, number.bytes());
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    /// Below `n`, which is not 0.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// The content of every file below `fixtures/FOLDER` whose name ends so, in the order of their paths.
pub fn files(folder: &str, ending: &str) -> Vec<Vec<u8>> {
    let mut paths = Vec::new();
    collect(&fixtures_dir().join(folder), ending, &mut paths);
    paths.sort();
    paths.iter().filter_map(|path| fs::read(path).ok()).collect()
}

fn collect(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, ending, found);
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutants_are_the_same_in_every_run_and_differ() {
        let seeds =
            || [br#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#.to_vec(), vec![7; 40]];
        let (a, b) = (Mutants::of(seeds()), Mutants::of(seeds()));
        assert_eq!((a.seeds(), a.get(1)), (2, vec![7; 40]));
        let all: std::collections::BTreeSet<_> = (0..500).map(|n| a.get(n)).collect();
        assert!(all.len() > 400, "{}", all.len());
        assert!((0..500).all(|n| a.get(n) == b.get(n)));
    }

    #[test]
    fn seeds_are_found() {
        assert!(files("malformed/safetensors", ".safetensors").len() > 30);
        assert!(files("malformed/tokenizer", "tokenizer.json").len() > 10);
    }
}
