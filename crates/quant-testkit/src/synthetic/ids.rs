//! Random token ids, and NumPy's file format for them.

use std::fs;
use std::io;
use std::path::Path;

use super::random::Stream;

/// `[samples, seq_len]` ids below `vocab`, each equally likely.
pub fn random_ids(seed: u64, samples: usize, seq_len: usize, vocab: usize) -> Vec<i32> {
    let stream = Stream::new(seed, "token ids");
    (0..(samples * seq_len) as u64).map(|i| stream.below(i, vocab) as i32).collect()
}

/// Writes an int32 array of this shape as `.npy` (version 1.0). Panics if `values` does not fit `shape`.
pub fn write_npy(file: &Path, shape: [usize; 2], values: &[i32]) -> io::Result<()> {
    assert_eq!(values.len(), shape[0] * shape[1], "values fit the shape");
    let mut header =
        format!("{{'descr': '<i4', 'fortran_order': False, 'shape': ({}, {}), }}", shape[0], shape[1]);
    // Magic, version and length word take 10 bytes; data begins at a multiple of 64, after a newline.
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let length = u16::try_from(header.len()).expect("two numbers are short");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    fs::write(file, bytes)
}
