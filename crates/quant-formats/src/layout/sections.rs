//! Codes packed by sections, as HQQ, SINQ and Quanto do.
//!
//! The matrix is viewed as `[R, C]`, padded with zero rows to `P * S` rows, and cut into `P` sections of `S` rows.
//! Word `[r, c]` of the packed `[S, C]` holds the codes `[r, c]` of all sections:
//!
//! ```text
//! high first, 4 bits:  word j = | code j of section 0 | code j of section 1 |     bits 7..4, 3..0
//! low first,  4 bits:  word j = | code j of section 1 | code j of section 0 |
//! ```
//!
//! In row-major order a section is `L = S * C` consecutive elements, whatever `R` and `C` are: element `i * L + j` lies
//! in field `i` of word `j`.

use std::sync::Arc;

use quant_core::{Codes, DType, MatrixError, codes};
use rayon::prelude::*;

/// Words that are packed together: their codes stay in the first-level cache.
const BLOCK: usize = 4096;

/// How codes lie in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packing {
    /// Bits of a field.
    pub(super) bits: u8,
    /// Fields of a word; the bits above are zero.
    pub(super) per: usize,
    /// Bytes of a word: 1 or 4.
    pub(super) word: usize,
    /// The first section lies in the highest field.
    pub(super) high_first: bool,
}

/// The packings of HQQ and SINQ by their names in files.
const NAMED: [(&str, Packing); 7] = [
    ("8bit_u8", high_first(8, 1, 1)),
    ("4bit_u8", high_first(4, 2, 1)),
    ("3bit_32", high_first(3, 10, 4)),
    ("2bit_u8", high_first(2, 4, 1)),
    ("1bit_u8", high_first(1, 8, 1)),
    ("5bit_32", high_first(5, 6, 4)),
    ("6bit_32", high_first(6, 5, 4)),
];

const fn high_first(bits: u8, per: usize, word: usize) -> Packing {
    Packing { bits, per, word, high_first: true }
}

impl Packing {
    /// The packing of HQQ or SINQ of this name.
    pub(super) fn named(name: &str) -> Option<Packing> {
        NAMED.iter().find(|(n, _)| *n == name).map(|(_, packing)| *packing)
    }

    /// The name of a packing of HQQ or SINQ.
    pub(super) fn name(&self) -> &'static str {
        NAMED.iter().find(|(_, packing)| packing == self).map_or("", |(name, _)| name)
    }

    /// Type of the words.
    pub(super) fn dtype(&self) -> DType {
        if self.word == 1 { DType::U8 } else { DType::I32 }
    }

    /// Rows of packed words of a matrix of `rows` rows.
    pub(super) fn word_rows(&self, rows: usize) -> usize {
        rows.div_ceil(self.per)
    }

    fn shift(&self, section: usize) -> u32 {
        let field = if self.high_first { self.per - 1 - section } else { section };
        (field * usize::from(self.bits)) as u32
    }

    /// Fills `codes` from packed words, which must have fields for all of them. Fails on a code that is too large,
    /// where fields are wider than codes.
    pub(super) fn unpack(&self, words: &[u8], codes: &mut Codes) -> Result<(), MatrixError> {
        let (cols, bits, max, row_bytes) = (codes.cols(), codes.bits(), codes.max(), codes.row_bytes());
        let rows_at_once = (BLOCK / cols.max(1)).max(1);
        let chunks: Vec<&mut [u8]> = codes.row_chunks_mut(rows_at_once).collect();
        chunks.into_par_iter().enumerate().try_for_each(|(i, rows)| {
            let mut row = vec![0; cols];
            for (j, out) in rows.chunks_mut(row_bytes.max(1)).enumerate() {
                self.extract(words, (i * rows_at_once + j) * cols, &mut row);
                if self.bits > bits
                    && let Some(&found) = row.iter().find(|&&code| code > max)
                {
                    return Err(MatrixError::Code { found, max });
                }
                codes::pack(bits, &row, out);
            }
            Ok(())
        })
    }

    /// The codes of elements `start..`.
    fn extract(&self, words: &[u8], start: usize, mut out: &mut [u8]) {
        let (len, mask) = (words.len() / self.word, (u16::MAX >> (16 - self.bits)) as u8);
        let mut at = start;
        while !out.is_empty() {
            let (section, from) = (at / len, at % len);
            let (here, rest) = out.split_at_mut(out.len().min(len - from));
            let shift = self.shift(section);
            if self.word == 1 {
                let words = &words[from..][..here.len()];
                here.iter_mut().zip(words).for_each(|(o, &w)| *o = w >> shift & mask);
            } else {
                let (words, _) = words[4 * from..][..4 * here.len()].as_chunks::<4>();
                let code = |w: &[u8; 4]| (u32::from_le_bytes(*w) >> shift) as u8 & mask;
                here.iter_mut().zip(words).for_each(|(o, w)| *o = code(w));
            }
            at += here.len();
            out = rest;
        }
    }

    /// The packed words of a matrix, `len` of them. The inverse of [`Packing::unpack`].
    pub(super) fn pack(&self, codes: &Codes, len: usize) -> Arc<[u8]> {
        let total = codes.rows() * codes.cols();
        let mut words: Arc<[u8]> = std::iter::repeat_n(0, len * self.word).collect();
        let blocks = Arc::get_mut(&mut words).unwrap_or_default().par_chunks_mut(BLOCK * self.word);
        blocks.enumerate().for_each(|(i, block)| {
            let mut row = [0; BLOCK];
            for section in 0..self.per {
                let start = section * len + i * BLOCK;
                let count = (block.len() / self.word).min(total.saturating_sub(start));
                let row = &mut row[..count];
                unpack_flat(codes, start, row);
                let shift = self.shift(section);
                if self.word == 1 {
                    block.iter_mut().zip(row).for_each(|(w, &mut code)| *w |= code << shift);
                } else {
                    let (block, _) = block.as_chunks_mut::<4>();
                    for (w, &mut code) in block.iter_mut().zip(row) {
                        *w = (u32::from_le_bytes(*w) | u32::from(code) << shift).to_le_bytes();
                    }
                }
            }
        });
        words
    }
}

/// The codes of elements `start..` of a matrix in row-major order.
pub(super) fn unpack_flat(codes: &Codes, start: usize, mut out: &mut [u8]) {
    let (cols, bits) = (codes.cols(), usize::from(codes.bits()));
    let mut at = start;
    while !out.is_empty() {
        let (r, c) = (at / cols, at % cols);
        let (here, rest) = out.split_at_mut(out.len().min(cols - c));
        // Eight codes are whole bytes.
        let ahead = (c.next_multiple_of(8) - c).min(here.len());
        let (first, whole) = here.split_at_mut(ahead);
        first.iter_mut().enumerate().for_each(|(i, o)| *o = codes.get(r, c + i));
        if !whole.is_empty() {
            codes::unpack(codes.bits(), &codes.row(r)[(c + ahead) / 8 * bits..], whole);
        }
        at += first.len() + whole.len();
        out = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::high_first as high;
    use super::*;
    use proptest::prelude::*;

    fn packed(packing: Packing, bits: u8, rows: usize, cols: usize, values: &[u8]) -> Vec<u8> {
        let codes = Codes::from_values(bits, rows, cols, values).unwrap();
        packing.pack(&codes, packing.word_rows(rows) * cols).to_vec()
    }

    /// The published vectors of the formats.
    #[test]
    fn words_lie_as_published() {
        let ramp: Vec<u8> = (0..16).collect();
        assert_eq!(packed(high(4, 2, 1), 4, 8, 2, &ramp), [8, 25, 42, 59, 76, 93, 110, 127]);
        let column: Vec<u8> = (0..20).map(|i| i % 8).collect();
        let words = [0x0298_2982u32, 0x0bbc_bbcb].map(u32::to_le_bytes);
        assert_eq!(packed(high(3, 10, 4), 3, 20, 1, &column), words.as_flattened());
        let column: Vec<u8> = (0..8).map(|i| i % 4).collect();
        assert_eq!(packed(high(2, 4, 1), 2, 8, 1, &column), [34, 119]);
        let low = |bits, per| Packing { bits, per, word: 1, high_first: false };
        assert_eq!(packed(low(2, 4), 2, 8, 1, &column), [136, 221]);
        let column: Vec<u8> = (0..16).map(|i| i % 2).collect();
        assert_eq!(packed(high(1, 8, 1), 1, 16, 1, &column), [0, 255]);
        assert_eq!(packed(low(4, 2), 4, 8, 1, &ramp[..8]), [64, 81, 98, 115]);
    }

    #[test]
    fn a_code_too_large_for_its_bits_is_refused() {
        let mut codes = Codes::zeros(5, 1, 2).unwrap();
        assert_eq!(
            high(8, 1, 1).unpack(&[31, 32], &mut codes),
            Err(MatrixError::Code { found: 32, max: 31 })
        );
        assert_eq!(high(8, 1, 1).unpack(&[31, 0], &mut codes), Ok(()));
        assert_eq!(codes.get(0, 0), 31);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        /// Any view of any matrix: rows and sections that begin anywhere, and more than one block.
        #[test]
        fn sections_and_codes_are_inverse(
            (packing, bits) in prop::sample::select(vec![
                (high(8, 1, 1), 8u8), (high(8, 1, 1), 5), (high(4, 2, 1), 4), (high(3, 10, 4), 3),
                (high(2, 4, 1), 2), (high(1, 8, 1), 1), (high(5, 6, 4), 5), (high(6, 5, 4), 6),
                (Packing { bits: 4, per: 2, word: 1, high_first: false }, 4),
                (Packing { bits: 2, per: 4, word: 1, high_first: false }, 2),
            ]),
            (rows, cols) in prop_oneof![(1usize..40, 1usize..70), (60usize..90, 300usize..400)],
            group in 1usize..64,
            seed in any::<u64>(),
        ) {
            let mut state = seed | 1;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as u8
            };
            let values: Vec<u8> = (0..rows * cols).map(|_| next() & ((1u16 << bits) - 1) as u8).collect();
            let codes = Codes::from_values(bits, rows, cols, &values).unwrap();
            // A view of `group` columns, its last row padded.
            let view_rows = (rows * cols).div_ceil(group);
            let len = packing.word_rows(view_rows) * group;
            let words = packing.pack(&codes, len);
            for i in [0, rows * cols - 1, rows * cols / 2, rows * cols / 3] {
                let (section, j) = (i / len, i % len);
                let mut word = [0; 4];
                word[..packing.word].copy_from_slice(&words[j * packing.word..][..packing.word]);
                let field = u32::from_le_bytes(word) >> packing.shift(section) & ((1 << packing.bits) - 1);
                prop_assert_eq!(field, u32::from(values[i]));
            }
            let mut back = Codes::zeros(bits, rows, cols).unwrap();
            packing.unpack(&words, &mut back).unwrap();
            prop_assert_eq!(back, codes);
        }
    }
}
