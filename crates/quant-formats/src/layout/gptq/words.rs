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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Codes `i mod 2^bits`, `i` from 0 to 31, as packed words: the published vectors of the format.
    const VECTORS: [(u8, &[u32]); 4] = [
        (2, &[0xe4e4_e4e4, 0xe4e4_e4e4]),
        (3, &[0x88fa_c688, 0xc688_fac6, 0xfac6_88fa]),
        (4, &[0x7654_3210, 0xfedc_ba98, 0x7654_3210, 0xfedc_ba98]),
        (
            8,
            &[
                0x0302_0100,
                0x0706_0504,
                0x0b0a_0908,
                0x0f0e_0d0c,
                0x1312_1110,
                0x1716_1514,
                0x1b1a_1918,
                0x1f1e_1d1c,
            ],
        ),
    ];

    #[test]
    fn words_lie_as_published() {
        for (bits, expected) in VECTORS {
            let row: Vec<u8> = (0..32u16).map(|i| (i % (1 << bits)) as u8).collect();
            let codes = Codes::from_values(bits, 3, 32, &row.repeat(3)).unwrap();
            let words = to_words(&codes, None);
            let words: Vec<u32> = words.as_chunks().0.iter().map(|&w| u32::from_le_bytes(w)).collect();
            let column: Vec<u32> = expected.iter().flat_map(|&w| [w; 3]).collect();
            assert_eq!(words, column, "{bits} bits");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Sizes around the blocks of the transposition.
        #[test]
        fn words_and_codes_are_inverse(
            bits in prop::sample::select(vec![2u8, 3, 4, 8]),
            (rows, blocks) in (1usize..140, 1usize..9),
            seed in any::<u64>(),
            permuted in any::<bool>(),
        ) {
            let cols = 32 * blocks;
            let mut state = seed | 1;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 33) as usize
            };
            let values: Vec<u8> = (0..rows * cols).map(|_| (next() % (1 << bits)) as u8).collect();
            let mut features: Vec<u32> = (0..cols as u32).collect();
            (1..cols).for_each(|i| features.swap(i, next() % (i + 1)));
            let perm = permuted.then(|| Permutation::new(features).unwrap());

            let codes = Codes::from_values(bits, rows, cols, &values).unwrap();
            let words = to_words(&codes, perm.as_ref());
            // The slow definition: code k of output n begins at bit k * bits of the column's words.
            for (n, k) in [(0, 0), (rows - 1, cols - 1), (rows / 2, cols / 3)] {
                let stored = perm.as_ref().map_or(k, |p| p.inverse()[k] as usize);
                for b in 0..usize::from(bits) {
                    let bit = k * usize::from(bits) + b;
                    let byte = words[4 * (bit / 32 * rows + n) + bit % 32 / 8];
                    prop_assert_eq!(byte >> (bit % 8) & 1, values[n * cols + stored] >> b & 1);
                }
            }
            let mut back = Codes::zeros(bits, rows, cols).unwrap();
            from_words(&words, &mut back, perm.as_ref());
            prop_assert_eq!(back, codes);
        }
    }
}
