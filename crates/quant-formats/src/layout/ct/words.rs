//! The packed integers of compressed-tensors, and this crate's rows of codes.

use quant_core::{Codes, Groups, Permutation, codes};
use rayon::prelude::*;

use crate::error::FormatError;
use crate::layout::parts::Writing;

/// Rows in one piece of parallel work.
const ROWS: usize = 64;

/// Codes that a word of 32 bits holds without gaps between words, or with gaps above the last code.
pub(super) fn words_of(len: usize, bits: u8, dense: bool) -> Option<usize> {
    let bits = usize::from(bits);
    match dense {
        true => len.checked_mul(bits).map(|n| n.div_ceil(32)),
        false => Some(len.div_ceil(32 / bits)),
    }
}

/// Rows of words to codes. `bytes` holds [`words_of`] words for each row.
pub(super) fn from_words(bytes: &[u8], out: &mut Codes, dense: bool) {
    let (bits, row_bytes, cols) = (out.bits(), out.row_bytes(), out.cols());
    let line = 4 * words_of(cols, bits, dense).unwrap_or(0);
    let chunks: Vec<&mut [u8]> = out.row_chunks_mut(ROWS).collect();
    chunks.into_par_iter().zip(bytes.par_chunks((ROWS * line).max(1))).for_each(|(rows, lines)| {
        let mut values = vec![0; if dense { 0 } else { cols }];
        for (row, line) in rows.chunks_exact_mut(row_bytes.max(1)).zip(lines.chunks_exact(line.max(1))) {
            if dense {
                row.copy_from_slice(&line[..row_bytes]);
            } else {
                unpack_gapped(bits, line, &mut values);
                codes::pack(bits, &values, row);
            }
        }
    });
}

/// Words with gaps to one code per byte.
fn unpack_gapped(bits: u8, line: &[u8], values: &mut [u8]) {
    let (words, _) = line.as_chunks::<4>();
    for (values, &word) in values.chunks_mut(32 / usize::from(bits)).zip(words) {
        let word = u32::from_le_bytes(word);
        let code = |i: usize| (word >> (i * usize::from(bits)) & ((1 << bits) - 1)) as u8;
        values.iter_mut().enumerate().for_each(|(i, value)| *value = code(i));
    }
}

/// Rows of codes padded to whole words; with `perm`, in the order of inputs.
pub(super) fn padded(matrix: &Codes, perm: Option<&Permutation>) -> Vec<u8> {
    let (bits, row_bytes, cols) = (matrix.bits(), matrix.row_bytes(), matrix.cols());
    let line = row_bytes.next_multiple_of(4);
    let mut out = vec![0; matrix.rows() * line];
    out.par_chunks_mut((ROWS * line).max(1)).enumerate().for_each(|(i, lines)| {
        let (mut stored, mut values) = (vec![0; cols], vec![0; cols]);
        for (r, line) in lines.chunks_exact_mut(line.max(1)).enumerate() {
            let row = i * ROWS + r;
            match perm {
                None => line[..row_bytes].copy_from_slice(matrix.row(row)),
                Some(perm) => {
                    matrix.unpack_row(row, &mut stored);
                    perm.features().iter().zip(&stored).for_each(|(&f, &v)| values[f as usize] = v);
                    codes::pack(bits, &values, &mut line[..row_bytes]);
                }
            }
        }
    });
    out
}

/// Puts the codes of every row, which are in the order of inputs, in stored order.
pub(super) fn reorder(matrix: &mut Codes, perm: &Permutation) {
    let (bits, row_bytes, cols) = (matrix.bits(), matrix.row_bytes(), matrix.cols());
    let chunks: Vec<&mut [u8]> = matrix.row_chunks_mut(ROWS).collect();
    chunks.into_par_iter().for_each(|rows| {
        let (mut inputs, mut stored) = (vec![0; cols], vec![0; cols]);
        for row in rows.chunks_exact_mut(row_bytes.max(1)) {
            codes::unpack(bits, row, &mut inputs);
            stored.iter_mut().zip(perm.features()).for_each(|(s, &f)| *s = inputs[f as usize]);
            codes::pack(bits, &stored, row);
        }
    });
}

/// The map of inputs to groups where inputs are reordered, as bytes of I32. Without `allowed` there must be none.
pub(super) fn column_map(writing: &Writing<'_>, allowed: bool) -> Result<Option<Vec<u8>>, FormatError> {
    let matrix = &writing.linear.weight;
    let (cols, perm) = (matrix.cols(), matrix.input_perm.as_ref());
    let of_col: Box<dyn Fn(usize) -> usize> = match &matrix.groups {
        Groups::Index { of_col, .. } => Box::new(|c| of_col[c] as usize),
        &Groups::Row { len } if perm.is_some() => Box::new(move |c| c / len),
        _ if perm.is_none() => return Ok(None),
        _ => return Err(writing.unsupported("act-order", "over these groups", "choose gptq_v2").into()),
    };
    if !allowed {
        return Err(writing.unsupported("act-order", "(desc_act)", "choose ct_pack").into());
    }
    let mut map = vec![0i32; cols];
    for c in 0..cols {
        map[perm.map_or(c, |p| p.features()[c] as usize)] = of_col(c) as i32;
    }
    Ok(Some(map.iter().flat_map(|g| g.to_le_bytes()).collect()))
}

/// Signed bytes to codes of `bits` bits, whose zero is in the middle. `Err` is the index of a value out of range.
pub(in crate::layout) fn from_signed(bytes: &[u8], out: &mut Codes) -> Result<(), usize> {
    let (bits, row_bytes, cols) = (out.bits(), out.row_bytes(), out.cols());
    let middle = 1u8 << (bits - 1);
    let max = out.max();
    let chunks: Vec<&mut [u8]> = out.row_chunks_mut(ROWS).collect();
    let pieces = chunks.into_par_iter().zip(bytes.par_chunks((ROWS * cols).max(1))).enumerate();
    let pieces = pieces.map(|(i, (rows, values))| {
        let mut line = vec![0; cols];
        for (r, (row, values)) in rows.chunks_exact_mut(row_bytes).zip(values.chunks_exact(cols)).enumerate()
        {
            line.iter_mut().zip(values).for_each(|(code, &value)| *code = value.wrapping_add(middle));
            if let Some(c) = line.iter().position(|&code| code > max) {
                return Err((i * ROWS + r) * cols + c);
            }
            codes::pack(bits, &line, row);
        }
        Ok(())
    });
    // The first in order, whatever was found first.
    pieces.collect::<Vec<_>>().into_iter().collect()
}

/// The inverse of [`from_signed`].
pub(in crate::layout) fn signed_bytes(matrix: &Codes) -> Vec<u8> {
    let cols = matrix.cols();
    let middle = 1u8 << (matrix.bits() - 1);
    let mut out = vec![0; matrix.rows() * cols];
    out.par_chunks_mut((ROWS * cols).max(1)).enumerate().for_each(|(i, lines)| {
        for (r, line) in lines.chunks_exact_mut(cols.max(1)).enumerate() {
            matrix.unpack_row(i * ROWS + r, line);
            line.iter_mut().for_each(|code| *code = code.wrapping_sub(middle));
        }
    });
    out
}

/// Codes `[rows, cols]` packed along the rows: words `[words, cols]`.
pub(super) fn pack_columns(bits: u8, values: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let words = (rows * usize::from(bits)).div_ceil(32);
    let mut out = vec![0; 4 * words * cols];
    let mut line = vec![0; 4 * words];
    for c in 0..cols {
        let column: Vec<u8> = (0..rows).map(|r| values[r * cols + c]).collect();
        codes::pack(bits, &column, &mut line);
        for (w, word) in line.as_chunks::<4>().0.iter().enumerate() {
            out[4 * (w * cols + c)..][..4].copy_from_slice(word);
        }
    }
    out
}

/// The inverse of [`pack_columns`], also for words with gaps.
pub(super) fn unpack_columns(bits: u8, bytes: &[u8], rows: usize, cols: usize, dense: bool) -> Vec<u8> {
    let (words, _) = bytes.as_chunks::<4>();
    let mut values = vec![0; rows * cols];
    let mut column = vec![0; rows];
    for c in 0..cols {
        let line: Vec<u8> = words.iter().skip(c).step_by(cols).flatten().copied().collect();
        match dense {
            true => codes::unpack(bits, &line, &mut column),
            false => unpack_gapped(bits, &line, &mut column),
        }
        column.iter().enumerate().for_each(|(r, &value)| values[r * cols + c] = value);
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_lie_as_published() {
        let values: Vec<u8> = (0..32).map(|i| i % 8).collect();
        let codes = Codes::from_values(3, 1, 32, &values).unwrap();
        let words =
            |bytes: &[u8]| bytes.as_chunks().0.iter().map(|&w| u32::from_le_bytes(w)).collect::<Vec<_>>();
        assert_eq!(words(&padded(&codes, None)), [0x88fa_c688, 0xc688_fac6, 0xfac6_88fa]);
        // Ten codes of three bits in a word.
        let gapped: Vec<u8> = (0..4u32)
            .flat_map(|w| {
                let fields = (0..10).filter(|i| 10 * w + i < 32).map(|i| ((10 * w + i) % 8) << (3 * i));
                fields.sum::<u32>().to_le_bytes()
            })
            .collect();
        let mut read = Codes::zeros(3, 1, 32).unwrap();
        from_words(&gapped, &mut read, false);
        assert_eq!(read, codes);
        assert_eq!((words_of(32, 3, true), words_of(32, 3, false)), (Some(3), Some(4)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn packing_is_reversible(
            bits in 2u8..=8,
            (rows, cols, values) in (1usize..150, 1usize..70)
                .prop_flat_map(|(r, c)| (Just(r), Just(c), prop::collection::vec(any::<u8>(), r * c))),
        ) {
            let values: Vec<u8> = values.iter().map(|v| (u16::from(*v) & ((1 << bits) - 1)) as u8).collect();
            let codes = Codes::from_values(bits, rows, cols, &values).unwrap();
            let mut read = Codes::zeros(bits, rows, cols).unwrap();
            from_words(&padded(&codes, None), &mut read, true);
            prop_assert_eq!(&read, &codes);

            let bytes = signed_bytes(&codes);
            let middle = 1i16 << (bits - 1);
            prop_assert!(bytes.iter().zip(&values).all(|(&b, &v)| i16::from(b as i8) == i16::from(v) - middle));
            let mut read = Codes::zeros(bits, rows, cols).unwrap();
            prop_assert_eq!(from_signed(&bytes, &mut read), Ok(()));
            prop_assert_eq!(&read, &codes);

            let columns = pack_columns(bits, &values, rows, cols);
            prop_assert_eq!(unpack_columns(bits, &columns, rows, cols, true), values);
        }
    }

    #[test]
    fn values_beyond_the_bits_are_found() {
        let mut codes = Codes::zeros(4, 2, 3).unwrap();
        assert_eq!(from_signed(&[0, 7, 248, 1, 8, 9], &mut codes), Err(4));
    }
}
