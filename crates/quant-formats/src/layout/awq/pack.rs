//! The orders of AWQ's codes, and this crate's rows of codes.
//!
//! Every order is a rearrangement of nibbles within blocks that fit a few registers: no code is unpacked.

use quant_core::Codes;
use rayon::prelude::*;

/// Which output of an octet each nibble of a GEMM word holds.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Octets of outputs that are handled together: their words of one input fill a cache line.
const OCTETS: usize = 16;

/// Inputs that are handled together: their codes of one output fill a cache line.
const INPUTS: usize = 128;

/// One word of each of several octets.
type Line = [u32; OCTETS];

/// GEMM words `[in, out / 8]` to codes `[out, in]`. `bytes` must hold four for every octet of every input.
pub(super) fn from_gemm(bytes: &[u8], codes: &mut Codes) {
    let (octets, cols, row_bytes) = (codes.rows() / 8, codes.cols(), codes.row_bytes());
    let (words, _) = bytes.as_chunks::<4>();
    let chunks: Vec<&mut [u8]> = codes.row_chunks_mut(8 * OCTETS).collect();
    chunks.into_par_iter().enumerate().for_each(|(i, rows)| {
        let lanes = rows.len() / (8 * row_bytes);
        for start in (0..cols).step_by(INPUTS) {
            for k in (start..cols.min(start + INPUTS)).step_by(8) {
                let mut block = [[0; OCTETS]; 8];
                for (k, line) in (k..cols).zip(&mut block) {
                    let stored = &words[k * octets + i * OCTETS..][..lanes];
                    line.iter_mut().zip(stored).for_each(|(l, &word)| *l = u32::from_le_bytes(word));
                }
                transpose(&mut block);
                let at = k / 2..row_bytes.min(k / 2 + 4);
                for (lane, octet) in rows.chunks_exact_mut(8 * row_bytes).enumerate() {
                    for (line, output) in block.iter().zip(ORDER) {
                        let row = &mut octet[output * row_bytes..][at.clone()];
                        row.copy_from_slice(&line[lane].to_le_bytes()[..row.len()]);
                    }
                }
            }
        }
    });
}

/// The inverse of [`from_gemm`]. The number of rows must be a multiple of 8.
pub(super) fn to_gemm(codes: &Codes) -> Vec<u8> {
    let (octets, cols, row_bytes) = (codes.rows() / 8, codes.cols(), codes.row_bytes());
    let mut words = vec![0; 4 * octets * cols];
    words.par_chunks_mut((4 * octets * INPUTS).max(1)).enumerate().for_each(|(i, lines)| {
        for (j, rows) in codes.bytes().chunks(8 * OCTETS * row_bytes).enumerate() {
            for (b, lines) in lines.chunks_mut(4 * octets * 8).enumerate() {
                let start = (i * INPUTS + 8 * b) / 2;
                let mut block = [[0; OCTETS]; 8];
                for (lane, octet) in rows.chunks_exact(8 * row_bytes).enumerate() {
                    for (line, output) in block.iter_mut().zip(ORDER) {
                        let row = &octet[output * row_bytes..][start..row_bytes.min(start + 4)];
                        let mut word = [0; 4];
                        word[..row.len()].copy_from_slice(row);
                        line[lane] = u32::from_le_bytes(word);
                    }
                }
                transpose(&mut block);
                let lanes = rows.len() / (8 * row_bytes);
                for (out, line) in lines.chunks_exact_mut(4 * octets).zip(&block) {
                    let (out, _) = out[4 * j * OCTETS..][..4 * lanes].as_chunks_mut::<4>();
                    out.iter_mut().zip(line).for_each(|(o, word)| *o = word.to_le_bytes());
                }
            }
        }
    });
    words
}

/// Nibble `i` of word `j` becomes nibble `j` of word `i`, for each lane by itself.
fn transpose(block: &mut [Line; 8]) {
    for (distance, mask) in [(1, 0x0f0f_0f0f_u32), (2, 0x00ff_00ff), (4, 0x0000_ffff)] {
        let shift = 4 * distance;
        for i in (0..8).filter(|i| i & distance == 0) {
            let (head, tail) = block.split_at_mut(i + distance);
            for (a, b) in head[i].iter_mut().zip(&mut tail[0]) {
                let moved = (*a >> shift ^ *b) & mask;
                *b ^= moved;
                *a ^= moved << shift;
            }
        }
    }
}

/// Values of outputs, in octets, to the order of GEMM words.
pub(super) fn to_gemm_order(values: &[u8]) -> Vec<u8> {
    values.as_chunks::<8>().0.iter().flat_map(|octet| ORDER.map(|output| octet[output])).collect()
}

/// The inverse of [`to_gemm_order`].
pub(super) fn from_gemm_order(values: &[u8]) -> Vec<u8> {
    let natural = |stored: &[u8; 8]| {
        let mut octet = [0; 8];
        stored.iter().zip(ORDER).for_each(|(&value, output)| octet[output] = value);
        octet
    };
    values.as_chunks::<8>().0.iter().flat_map(natural).collect()
}

/// The strips of GEMV_FAST `[out / 4, in]` to codes `[out, in]`: four rows take turns every 64 inputs (32 bytes).
pub(super) fn from_strips(bytes: &[u8], codes: &mut Codes) {
    let row_bytes = codes.row_bytes();
    let chunks: Vec<&mut [u8]> = codes.row_chunks_mut(4).collect();
    chunks.into_par_iter().zip(bytes.par_chunks(4 * row_bytes)).for_each(|(rows, strips)| {
        for (i, strip) in strips.as_chunks::<16>().0.iter().enumerate() {
            // Two groups of 32 inputs make a strip.
            let (row, at) = (i / 2 % 4, i / 8 * 32 + i % 2 * 16);
            rows[row * row_bytes + at..][..16].copy_from_slice(&spread(strip));
        }
    });
}

/// The inverse of [`from_strips`].
pub(super) fn to_strips(codes: &Codes) -> Vec<u8> {
    let row_bytes = codes.row_bytes();
    let mut bytes = vec![0; codes.bytes().len()];
    let rows = codes.bytes().par_chunks(4 * row_bytes);
    bytes.par_chunks_mut(4 * row_bytes).zip(rows).for_each(|(strips, rows)| {
        for (i, strip) in strips.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (row, at) = (i / 2 % 4, i / 8 * 32 + i % 2 * 16);
            let mut group = [0; 16];
            group.copy_from_slice(&rows[row * row_bytes + at..][..16]);
            *strip = gather(&group);
        }
    });
    bytes
}

/// Eight half words of inputs `j, j + 8, j + 16, j + 24` to 32 codes in order.
fn spread(strip: &[u8; 16]) -> [u8; 16] {
    let (halves, _) = strip.as_chunks::<2>();
    let mut words = [0u32; 4];
    for (p, &half) in halves.iter().enumerate() {
        let half = u32::from(u16::from_le_bytes(half));
        words.iter_mut().enumerate().for_each(|(w, word)| *word |= (half >> (4 * w) & 15) << (4 * p));
    }
    let mut out = [0; 16];
    out.as_chunks_mut::<4>().0.iter_mut().zip(words).for_each(|(o, w)| *o = w.to_le_bytes());
    out
}

/// The inverse of [`spread`].
fn gather(group: &[u8; 16]) -> [u8; 16] {
    let words: [u32; 4] = std::array::from_fn(|w| u32::from_le_bytes(group.as_chunks::<4>().0[w]));
    let mut out = [0; 16];
    for (p, half) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let fields = words.iter().enumerate().map(|(w, word)| (word >> (4 * p) & 15) << (4 * w));
        *half = (fields.sum::<u32>() as u16).to_le_bytes();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_lie_as_published() {
        // Outputs 0 to 7 of one input hold the codes 0 to 7.
        let codes = Codes::from_values(4, 8, 1, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        assert_eq!(to_gemm(&codes), 0x7531_6420_u32.to_le_bytes());
        assert_eq!(to_gemm_order(&[0, 1, 2, 3, 4, 5, 6, 7]), [0, 2, 4, 6, 1, 3, 5, 7]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Sizes around the blocks of the transposition, against the definitions of the format.
        #[test]
        fn orders_are_as_defined(octets in 1usize..40, cols in 1usize..300, seed in any::<u64>()) {
            let rows = 8 * octets;
            let mut state = seed | 1;
            let values: Vec<u8> = (0..rows * cols).map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 60) as u8
            }).collect();
            let codes = Codes::from_values(4, rows, cols, &values).unwrap();
            let words = to_gemm(&codes);
            for (n, k) in [(0, 0), (rows - 1, cols - 1), (rows / 2, cols / 3)] {
                let word = u32::from_le_bytes(words.as_chunks::<4>().0[k * octets + n / 8]);
                let shift = [0, 16, 4, 20, 8, 24, 12, 28][n % 8];
                prop_assert_eq!(word >> shift & 15, u32::from(values[n * cols + k]));
            }
            let mut back = Codes::zeros(4, rows, cols).unwrap();
            from_gemm(&words, &mut back);
            prop_assert_eq!(&back, &codes);

            let cols = cols.next_multiple_of(64);
            let mut codes = Codes::zeros(4, rows, cols).unwrap();
            codes.row_chunks_mut(1).for_each(|row| row.iter_mut().zip(&values).for_each(|(r, v)| *r = v * 17));
            (0..rows).for_each(|r| {
                let row: Vec<u8> = (0..cols).map(|c| values[(r * 31 + c) % values.len()]).collect();
                codes.set_row(r, &row);
            });
            let strips = to_strips(&codes);
            // Position of a code: its strip of four rows, the row, and the place within 32 inputs.
            for (n, k) in [(0, 0), (rows - 1, cols - 1), (rows / 2, cols / 3), (1, 9)] {
                let (strip, place) = (k / 64, k % 32);
                let position = place % 8 * 4 + place / 8;
                let index = (n / 4) * 4 * cols + strip * 256 + n % 4 * 64 + k % 64 / 32 * 32 + position;
                prop_assert_eq!(strips[index / 2] >> (4 * (index % 2)) & 15, codes.get(n, k));
            }
            let mut back = Codes::zeros(4, rows, cols).unwrap();
            from_strips(&strips, &mut back);
            prop_assert_eq!(back, codes);
        }
    }
}
