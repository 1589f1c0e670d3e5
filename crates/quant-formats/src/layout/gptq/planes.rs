//! GPTQModel's planar packing (`gptq_p`): codes cut in bit planes.
//!
//! Of every 32 codes of `b` bits the low bits come first, then the higher ones, each plane a bit stream of its own
//! whose fields do not cross words. Both forms take `b` words, so that one becomes the other in place.

use quant_core::codes::{gather, spread};

/// Width of each plane and its lowest bit in the code, for 2 to 8 bits.
#[inline(always)]
fn planes(bits: u8) -> &'static [(u8, u8)] {
    match bits {
        3 => &[(2, 0), (1, 2)],
        5 => &[(4, 0), (1, 4)],
        6 => &[(4, 0), (2, 4)],
        7 => &[(4, 0), (2, 4), (1, 6)],
        2 => &[(2, 0)],
        4 => &[(4, 0)],
        _ => &[(8, 0)],
    }
}

/// Planes to codes side by side, in blocks of 32 codes.
pub(super) fn join(bits: u8, bytes: &mut [u8]) {
    // With the number of bits known to the compiler, loops unroll and shifts are constants.
    match bits {
        3 => rewrite::<12>(bytes, |block, out| join_block(3, block, out)),
        5 => rewrite::<20>(bytes, |block, out| join_block(5, block, out)),
        6 => rewrite::<24>(bytes, |block, out| join_block(6, block, out)),
        7 => rewrite::<28>(bytes, |block, out| join_block(7, block, out)),
        // One plane is the bit stream itself.
        _ => {}
    }
}

/// The inverse of [`join`].
pub(super) fn cut(bits: u8, bytes: &mut [u8]) {
    match bits {
        3 => rewrite::<12>(bytes, |block, out| cut_block(3, block, out)),
        5 => rewrite::<20>(bytes, |block, out| cut_block(5, block, out)),
        6 => rewrite::<24>(bytes, |block, out| cut_block(6, block, out)),
        7 => rewrite::<28>(bytes, |block, out| cut_block(7, block, out)),
        _ => {}
    }
}

#[inline(always)]
fn rewrite<const N: usize>(bytes: &mut [u8], block: impl Fn(&[u8; N], &mut [u8; N])) {
    for old in bytes.as_chunks_mut::<N>().0 {
        let mut new = [0; N];
        block(old, &mut new);
        *old = new;
    }
}

#[inline(always)]
fn join_block<const N: usize>(bits: u8, block: &[u8; N], out: &mut [u8; N]) {
    for (octet, out) in out.chunks_exact_mut(usize::from(bits)).enumerate() {
        let mut codes = 0;
        let mut start = 0;
        for &(width, offset) in planes(bits) {
            let w = usize::from(width);
            codes |= spread(width, load(&block[start + w * octet..][..w])) << offset;
            start += 4 * w;
        }
        out.copy_from_slice(&gather(bits, codes).to_le_bytes()[..usize::from(bits)]);
    }
}

#[inline(always)]
fn cut_block<const N: usize>(bits: u8, block: &[u8; N], out: &mut [u8; N]) {
    for (octet, codes) in block.chunks_exact(usize::from(bits)).enumerate() {
        let codes = spread(bits, load(codes));
        let mut start = 0;
        for &(width, offset) in planes(bits) {
            let w = usize::from(width);
            let plane = gather(width, codes >> offset).to_le_bytes();
            out[start + w * octet..][..w].copy_from_slice(&plane[..w]);
            start += 4 * w;
        }
    }
}

#[inline(always)]
fn load(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use quant_core::Codes;

    #[test]
    fn planes_lie_as_published() {
        const LOW: [u32; 4] = [0x7654_3210, 0xfedc_ba98, 0x7654_3210, 0xfedc_ba98];
        for (bits, low, high) in [
            (3, &[0xe4e4_e4e4, 0xe4e4_e4e4][..], &[0xf0f0_f0f0][..]),
            (5, &LOW, &[0xffff_0000]),
            (6, &LOW, &[0x0000_0000, 0x5555_5555]),
            (7, &LOW, &[0x0000_0000, 0x5555_5555, 0x0000_0000]),
            (4, &LOW, &[]),
        ] {
            let values: Vec<u8> = (0..32u16).map(|i| (i % (1 << bits)) as u8).collect();
            let stream = Codes::from_values(bits, 1, 32, &values).unwrap().bytes().to_vec();
            let mut bytes = stream.clone();
            cut(bits, &mut bytes);
            let words: Vec<u32> = bytes.as_chunks().0.iter().map(|&w| u32::from_le_bytes(w)).collect();
            assert_eq!(words, [low, high].concat(), "{bits} bits");
            join(bits, &mut bytes);
            assert_eq!(bytes, stream, "{bits} bits");
        }
    }
}
