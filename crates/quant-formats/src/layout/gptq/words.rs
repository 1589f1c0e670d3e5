//! The packed words of `qweight`, which are the transpose of this crate's rows of codes.
//!
//! GPTQ packs the codes of one output, input by input, into a little-endian bit stream of 32-bit words, which
//! is what a row of [`Codes`] is. It stores word `w` of output `n` at `[w, n]`. So packing and unpacking is a
//! transposition of words, for any number of bits; only act-order has to touch codes.

use quant_core::{Codes, Permutation, codes};
use rayon::prelude::*;

/// Outputs that are transposed together: their words of one row fill four cache lines.
const ROWS: usize = 64;

/// Words of one output that are transposed together: one cache line.
const WORDS: usize = 16;

/// `qweight` `[words, out]` to codes `[out, in]`. With `perm`, stored columns are taken in its order.
/// The bytes of `qweight` must be as many as those of `codes`, whose rows are whole words.
pub(super) fn from_words(qweight: &[u8], codes: &mut Codes, perm: Option<&Permutation>) {
    let (rows, bits, cols, row_bytes) = (codes.rows(), codes.bits(), codes.cols(), codes.row_bytes());
    debug_assert_eq!(qweight.len(), rows * row_bytes);
    let (words, _) = qweight.as_chunks::<4>();
    let chunks: Vec<&mut [u8]> = codes.row_chunks_mut(ROWS).collect();
    chunks.into_par_iter().enumerate().for_each(|(i, chunk)| {
        let count = chunk.len() / row_bytes;
        for start in (0..row_bytes / 4).step_by(WORDS) {
            let end = (start + WORDS).min(row_bytes / 4);
            for w in start..end {
                let line = &words[w * rows + i * ROWS..][..count];
                for (row, word) in chunk.chunks_exact_mut(row_bytes).zip(line) {
                    row[4 * w..][..4].copy_from_slice(word);
                }
            }
        }
        if let Some(perm) = perm {
            let (mut natural, mut stored) = (vec![0; cols], vec![0; cols]);
            for row in chunk.chunks_exact_mut(row_bytes) {
                codes::unpack(bits, row, &mut natural);
                for (code, &feature) in stored.iter_mut().zip(perm.features()) {
                    *code = natural[feature as usize];
                }
                codes::pack(bits, &stored, row);
            }
        }
    });
}

/// The inverse of [`from_words`].
pub(super) fn to_words(codes: &Codes, perm: Option<&Permutation>) -> Vec<u8> {
    let (rows, bits, cols, row_bytes) = (codes.rows(), codes.bits(), codes.cols(), codes.row_bytes());
    let natural_order;
    let bytes = match perm {
        None => codes.bytes(),
        Some(perm) => {
            let mut packed = vec![0; codes.bytes().len()];
            packed.par_chunks_mut(row_bytes).enumerate().for_each_init(
                || (vec![0; cols], vec![0; cols]),
                |(natural, stored), (r, row)| {
                    codes.unpack_row(r, stored);
                    for (&code, &feature) in stored.iter().zip(perm.features()) {
                        natural[feature as usize] = code;
                    }
                    codes::pack(bits, natural, row);
                },
            );
            natural_order = packed;
            &natural_order
        }
    };
    let mut words = vec![0; bytes.len()];
    words.par_chunks_mut(4 * rows * WORDS).enumerate().for_each(|(i, chunk)| {
        for start in (0..rows).step_by(ROWS) {
            let end = (start + ROWS).min(rows);
            for r in start..end {
                let row = &bytes[r * row_bytes + 4 * i * WORDS..(r + 1) * row_bytes];
                for (line, word) in chunk.chunks_exact_mut(4 * rows).zip(row.as_chunks::<4>().0) {
                    line[4 * r..][..4].copy_from_slice(word);
                }
            }
        }
    });
    words
}
