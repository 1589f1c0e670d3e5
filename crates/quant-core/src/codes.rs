//! Integer codes of 1 to 8 bits, packed.

use crate::error::MatrixError;

/// A matrix of unsigned codes `[rows, cols]` of 1 to 8 bits each.
///
/// Each row is a little-endian bit stream, code `c` in bits `c * bits ..`, padded with zero bits to a
/// whole byte, so that rows can be read and written independently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Codes {
    bits: u8,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Codes {
    /// All codes zero. Fails if `bits` is not in 1..=8 or the size overflows.
    pub fn zeros(bits: u8, rows: usize, cols: usize) -> Result<Self, MatrixError> {
        if !(1..=8).contains(&bits) {
            return Err(MatrixError::Bits { found: bits });
        }
        let len = Self::row_bytes_of(bits, cols).and_then(|row| row.checked_mul(rows));
        let len = len.ok_or(MatrixError::TooLarge { rows, cols })?;
        Ok(Self { bits, rows, cols, bytes: vec![0; len] })
    }

    /// Packs `values` `[rows, cols]`. Panics on a wrong length; codes above the maximum are an error.
    pub fn from_values(bits: u8, rows: usize, cols: usize, values: &[u8]) -> Result<Self, MatrixError> {
        let mut codes = Self::zeros(bits, rows, cols)?;
        assert_eq!(values.len(), rows * cols, "one value per code");
        if let Some(&found) = values.iter().find(|&&v| v > codes.max()) {
            return Err(MatrixError::Code { found, max: codes.max() });
        }
        if cols > 0 {
            values.chunks_exact(cols).enumerate().for_each(|(r, row)| codes.set_row(r, row));
        }
        Ok(codes)
    }

    fn row_bytes_of(bits: u8, cols: usize) -> Option<usize> {
        cols.checked_mul(usize::from(bits)).map(|n| n.div_ceil(8))
    }

    /// Bits per code.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Largest code, `2^bits - 1`.
    pub fn max(&self) -> u8 {
        (u16::MAX >> (16 - self.bits)) as u8
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that hold one row.
    pub fn row_bytes(&self) -> usize {
        (self.cols * usize::from(self.bits)).div_ceil(8)
    }

    /// All rows, one after the other.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of row `r`.
    pub fn row(&self, r: usize) -> &[u8] {
        &self.bytes[r * self.row_bytes()..][..self.row_bytes()]
    }

    /// The code at `(r, c)`.
    pub fn get(&self, r: usize, c: usize) -> u8 {
        assert!(c < self.cols, "column {c} of {}", self.cols);
        let row = self.row(r);
        let bit = c * usize::from(self.bits);
        let low = u16::from(row[bit / 8]);
        let high = row.get(bit / 8 + 1).map_or(0, |&b| u16::from(b));
        ((low | high << 8) >> (bit % 8)) as u8 & self.max()
    }

    /// Unpacks row `r` into `out`, one code per byte. `out` must have `cols` elements.
    pub fn unpack_row(&self, r: usize, out: &mut [u8]) {
        assert_eq!(out.len(), self.cols, "one byte per code");
        unpack(self.bits, self.row(r), out);
    }

    /// Replaces row `r`. Values must not exceed [`Codes::max`]; higher bits are cut.
    pub fn set_row(&mut self, r: usize, values: &[u8]) {
        assert_eq!(values.len(), self.cols, "one byte per code");
        let (bits, row_bytes) = (self.bits, self.row_bytes());
        pack(bits, values, &mut self.bytes[r * row_bytes..][..row_bytes]);
    }

    /// Mutable chunks of whole rows' bytes, `rows` rows each, for filling in parallel with [`pack`].
    pub fn row_chunks_mut(&mut self, rows: usize) -> std::slice::ChunksMut<'_, u8> {
        let len = (self.row_bytes() * rows).max(1);
        self.bytes.chunks_mut(len)
    }
}

/// Unpacks the bit stream `bytes` into one code per byte of `out`.
pub fn unpack(bits: u8, bytes: &[u8], out: &mut [u8]) {
    match bits {
        1 => octets::<1>(bytes, out),
        2 => octets::<2>(bytes, out),
        3 => octets::<3>(bytes, out),
        4 => octets::<4>(bytes, out),
        5 => octets::<5>(bytes, out),
        6 => octets::<6>(bytes, out),
        7 => octets::<7>(bytes, out),
        _ => out.copy_from_slice(&bytes[..out.len()]),
    }
}

/// Unpacks codes of `BITS` bits: eight of them fill as many whole bytes.
fn octets<const BITS: usize>(bytes: &[u8], out: &mut [u8]) {
    let (octets, last) = out.as_chunks_mut::<8>();
    let (stored, rest) = bytes.as_chunks::<BITS>();
    let codes = |stored: &[u8]| {
        let mut word = [0; 8];
        word[..stored.len()].copy_from_slice(stored);
        spread(BITS as u8, u64::from_le_bytes(word)).to_le_bytes()
    };
    octets.iter_mut().zip(stored).for_each(|(octet, stored)| *octet = codes(stored));
    let rest = stored.get(octets.len()).map_or(rest, |stored| &stored[..]);
    last.copy_from_slice(&codes(rest)[..last.len()]);
}

/// Packs codes into a bit stream; the last byte is padded with zero bits. The inverse of [`unpack`].
pub fn pack(bits: u8, values: &[u8], bytes: &mut [u8]) {
    match bits {
        1 => pack_octets::<1>(values, bytes),
        2 => pack_octets::<2>(values, bytes),
        3 => pack_octets::<3>(values, bytes),
        4 => pack_octets::<4>(values, bytes),
        5 => pack_octets::<5>(values, bytes),
        6 => pack_octets::<6>(values, bytes),
        7 => pack_octets::<7>(values, bytes),
        _ => bytes[..values.len()].copy_from_slice(values),
    }
}

/// The inverse of [`octets`].
fn pack_octets<const BITS: usize>(values: &[u8], bytes: &mut [u8]) {
    let (octets, last) = values.as_chunks::<8>();
    let (whole, rest) = bytes.split_at_mut(BITS * octets.len());
    for (octet, stored) in octets.iter().zip(whole.as_chunks_mut::<BITS>().0) {
        stored.copy_from_slice(&gather(BITS as u8, u64::from_le_bytes(*octet)).to_le_bytes()[..BITS]);
    }
    let mut codes = [0; 8];
    codes[..last.len()].copy_from_slice(last);
    let word = gather(BITS as u8, u64::from_le_bytes(codes)).to_le_bytes();
    // Bytes beyond the last code are left as they are.
    rest.iter_mut().zip(&word[..(BITS * last.len()).div_ceil(8)]).for_each(|(byte, packed)| *byte = *packed);
}

/// Eight codes of `bits` bits (1 to 8), side by side from bit 0 on, to one code per byte. Higher bits are ignored.
#[inline]
pub fn spread(bits: u8, word: u64) -> u64 {
    HALVES.into_iter().fold(word, |word, (width, lanes)| {
        let codes = u32::from(bits) * width / 8;
        let low = lanes * (u64::MAX >> (64 - codes));
        word & low | word << (width - codes) & low << width
    })
}

/// The inverse of [`spread`]. Bits above a code are ignored.
#[inline]
pub fn gather(bits: u8, codes: u64) -> u64 {
    HALVES.into_iter().rev().fold(codes, |word, (width, lanes)| {
        let codes = u32::from(bits) * width / 8;
        let low = lanes * (u64::MAX >> (64 - codes));
        word & low | word >> (width - codes) & low << codes
    })
}

/// Halving lanes of a word: the width of half a lane, and a one at the bottom of every lane.
const HALVES: [(u32, u64); 3] = [(32, 1), (16, 0x1_0000_0001), (8, 0x0001_0001_0001_0001)];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn three_bits_straddle_bytes() {
        // The published vector of 32 three-bit codes i mod 8.
        let values: Vec<u8> = (0..32).map(|i| i % 8).collect();
        let codes = Codes::from_values(3, 1, 32, &values).unwrap();
        let words: Vec<u32> = codes.bytes().as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        assert_eq!(words, [0x88fa_c688, 0xc688_fac6, 0xfac6_88fa]);
    }

    #[test]
    fn rejects_bad_bits_and_codes() {
        assert!(Codes::zeros(0, 1, 1).is_err());
        assert!(Codes::zeros(9, 1, 1).is_err());
        assert!(Codes::zeros(8, usize::MAX, 2).is_err());
        assert!(Codes::from_values(2, 1, 1, &[4]).is_err());
    }

    proptest! {
        #[test]
        fn words_spread_to_bytes(bits in 1u8..=8, word in any::<u64>(), noise in any::<u64>()) {
            let bytes = spread(bits, word).to_le_bytes();
            for (i, &byte) in bytes.iter().enumerate() {
                let code = word >> (i * usize::from(bits)) & ((1 << bits) - 1);
                prop_assert_eq!(u64::from(byte), code);
            }
            let codes = u64::MAX >> (64 - 8 * u32::from(bits));
            let above = !spread(bits, u64::MAX);
            prop_assert_eq!(gather(bits, spread(bits, word) | noise & above), word & codes);
        }

        #[test]
        fn pack_and_unpack_are_inverse(
            bits in 1u8..=8,
            (cols, values) in (0usize..40, 0usize..5)
                .prop_flat_map(|(c, r)| (Just(c), prop::collection::vec(any::<u8>(), r * c))),
        ) {
            let values: Vec<u8> = values.iter().map(|v| (u16::from(*v) & ((1 << bits) - 1)) as u8).collect();
            let rows = values.len().checked_div(cols).unwrap_or(0);
            let codes = Codes::from_values(bits, rows, cols, &values).unwrap();
            let mut row = vec![0; cols];
            for r in 0..rows {
                codes.unpack_row(r, &mut row);
                prop_assert_eq!(&row[..], &values[r * cols..][..cols]);
                for c in 0..cols {
                    prop_assert_eq!(codes.get(r, c), values[r * cols + c]);
                }
            }
        }
    }
}
