//! The packed words of `qweight`, which are the transpose of this crate's rows of codes.
//!
//! GPTQ packs the codes of one output, input by input, into a little-endian bit stream of 32-bit words, which
//! is what a row of [`Codes`] is. It stores word `w` of output `n` at `[w, n]`. So packing and unpacking is a
//! transposition of words, for any number of bits. Act-order moves whole columns of codes: the same shift for
//! all outputs, done for many of them at once without unpacking any.

use std::borrow::Cow;
use std::sync::Arc;

use quant_core::{Codes, Permutation};
use rayon::prelude::*;

use super::planes;

/// Outputs that are handled together: their words of one line of `qweight` fill four cache lines.
const LANES: usize = 64;

/// Words of one output that are transposed together: one cache line, so that each is touched once. Rows are
/// often a power of two apart, where coming back to 64 of them finds none in the cache.
const WORDS: usize = 16;

/// One word of each of several outputs.
type Line = [u32; LANES];

/// `qweight` `[words, out]` to codes `[out, in]`; with `perm`, stored columns are taken in its order.
/// `qweight` must have as many bytes as `codes`, whose rows are whole words. If it is `planar`, the bit planes are
/// joined to codes.
pub(super) fn from_words(qweight: &[u8], codes: &mut Codes, planar: bool, perm: Option<&Permutation>) {
    let (outputs, row_bytes, bits) = (codes.rows(), codes.row_bytes(), codes.bits());
    let (words, _) = qweight.as_chunks::<4>();
    let chunks: Vec<&mut [u8]> = codes.row_chunks_mut(LANES).collect();
    chunks.into_par_iter().enumerate().for_each(|(i, rows)| {
        let lanes = rows.len() / row_bytes;
        for start in (0..row_bytes / 4).step_by(WORDS) {
            let mut block = [[0; LANES]; WORDS];
            for (w, line) in (start..row_bytes / 4).zip(&mut block) {
                let stored = &words[w * outputs + i * LANES..][..lanes];
                line.iter_mut().zip(stored).for_each(|(l, &word)| *l = u32::from_le_bytes(word));
            }
            store(&block, rows, row_bytes, start);
        }
        if planar {
            planes::join(bits, rows);
        }
        if let Some(perm) = perm {
            permute(rows, row_bytes, bits, perm.features());
        }
    });
}

/// The inverse of [`from_words`].
pub(super) fn to_words(codes: &Codes, planar: bool, perm: Option<&Permutation>) -> Arc<[u8]> {
    let (outputs, row_bytes, bits) = (codes.rows(), codes.row_bytes(), codes.bits());
    let mut bytes = Cow::Borrowed(codes.bytes());
    if let Some(inverse) = perm.map(Permutation::inverse) {
        let chunks = bytes.to_mut().par_chunks_mut(LANES * row_bytes);
        chunks.for_each(|rows| permute(rows, row_bytes, bits, &inverse));
    }
    if planar {
        let chunks = bytes.to_mut().par_chunks_mut(LANES * row_bytes);
        chunks.for_each(|rows| planes::cut(bits, rows));
    }
    let mut words: Arc<[u8]> = std::iter::repeat_n(0, bytes.len()).collect();
    let chunks = Arc::get_mut(&mut words).unwrap_or_default().par_chunks_mut(4 * outputs * WORDS);
    chunks.enumerate().for_each(|(i, lines)| {
        for (j, rows) in bytes.chunks(LANES * row_bytes).enumerate() {
            let block = load(rows, row_bytes, i * WORDS);
            let lanes = rows.len() / row_bytes;
            for (out, line) in lines.chunks_exact_mut(4 * outputs).zip(&block) {
                let (out, _) = out[4 * j * LANES..][..4 * lanes].as_chunks_mut::<4>();
                out.iter_mut().zip(line).for_each(|(o, word)| *o = word.to_le_bytes());
            }
        }
    });
    words
}

/// Words `start..` of up to `LANES` rows, transposed.
fn load(rows: &[u8], row_bytes: usize, start: usize) -> [Line; WORDS] {
    let end = row_bytes.min(4 * (start + WORDS));
    let mut block = [[0; LANES]; WORDS];
    for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
        let (words, _) = row[4 * start..end].as_chunks::<4>();
        block.iter_mut().zip(words).for_each(|(line, &word)| line[lane] = u32::from_le_bytes(word));
    }
    block
}

/// The inverse of [`load`].
fn store(block: &[Line; WORDS], rows: &mut [u8], row_bytes: usize, start: usize) {
    let end = row_bytes.min(4 * (start + WORDS));
    for (lane, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
        let (words, _) = row[4 * start..end].as_chunks_mut::<4>();
        words.iter_mut().zip(block).for_each(|(word, line)| *word = line[lane].to_le_bytes());
    }
}

/// Reorders the codes of up to `LANES` rows: code `c` becomes what code `features[c]` was.
fn permute(rows: &mut [u8], row_bytes: usize, bits: u8, features: &[u32]) {
    let starts = || (0..row_bytes / 4).step_by(WORDS);
    let lines: Vec<Line> = starts().flat_map(|start| load(rows, row_bytes, start)).collect();
    for start in starts() {
        let mut block = [[0; LANES]; WORDS];
        for (w, line) in (start..row_bytes / 4).zip(&mut block) {
            *line = permuted_word(&lines, bits, features, w);
        }
        store(&block, rows, row_bytes, start);
    }
}

/// Word `w` of the bit streams whose code `c` is code `features[c]` of the bit streams `lines`. A code that
/// reaches into the next word is assembled for both.
fn permuted_word(lines: &[Line], bits: u8, features: &[u32], w: usize) -> Line {
    let bits = usize::from(bits);
    let mask = (1u32 << bits) - 1;
    let mut out = [0; LANES];
    let reaching = 32 * w / bits..(32 * (w + 1)).div_ceil(bits);
    for (c, &feature) in reaching.clone().zip(&features[reaching]) {
        let from = feature as usize * bits;
        let (low, right) = (&lines[from / 32], from % 32);
        // Shifted by less than a word: a code that ends with its word takes nothing from the next.
        let (high, left) = if right + bits > 32 { (&lines[from / 32 + 1], 32 - right) } else { (low, 0) };
        let straddles = left != 0;
        let to = c * bits;
        let (up, down) = (to.saturating_sub(32 * w), (32 * w).saturating_sub(to));
        for ((o, &low), &high) in out.iter_mut().zip(low).zip(high) {
            let mut code = low >> right;
            if straddles {
                code |= high << left;
            }
            *o |= (code & mask) << up >> down;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Codes `i mod 2^bits`, `i` from 0 to 31, as packed words: the published vectors of the format.
    const VECTORS: [(u8, &[u32]); 7] = [
        (2, &[0xe4e4_e4e4, 0xe4e4_e4e4]),
        (3, &[0x88fa_c688, 0xc688_fac6, 0xfac6_88fa]),
        (4, &[0x7654_3210, 0xfedc_ba98, 0x7654_3210, 0xfedc_ba98]),
        (5, &[0x8a41_8820, 0xc5a9_2839, 0xca30_7b9a, 0x38bd_ab49, 0xffbb_cdeb]),
        (6, &[0x440c_2040, 0xa248_1c61, 0x3ce3_4c2c, 0x544d_2450, 0xa658_5d65, 0x7de7_5c6d]),
        (7, &[0x4060_8080, 0x880e_1828, 0x68c1_6284, 0x8890_1e38, 0x58a9_4264, 0x668c_982e, 0x3e78_e9c3]),
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
            let words = to_words(&codes, false, None);
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
            bits in 2u8..=8,
            planar in any::<bool>(),
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
            let words = to_words(&codes, false, perm.as_ref());
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
            from_words(&words, &mut back, false, perm.as_ref());
            prop_assert_eq!(&back, &codes);

            let words = to_words(&codes, planar, perm.as_ref());
            from_words(&words, &mut back, planar, perm.as_ref());
            prop_assert_eq!(&back, &codes);
        }
    }
}
