//! The bytes of one block of each type: codes in the order of the columns, and what scales them.
//!
//! Two functions for each type, each the other's inverse on all bytes. They are drawn in `docs/layouts/gguf.md`.

/// What scales the codes of a block, as its bytes say it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Side {
    /// Bits of the f16 scale of the block; the exponent of MXFP4.
    pub(super) d: u16,
    /// Bits of the f16 shift of the block, or of the scale of its sub-shifts.
    pub(super) m: u16,
    /// Integer scale of each group.
    pub(super) sub: [i8; 16],
    /// Integer shift of each group.
    pub(super) min: [i8; 16],
}

fn half(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// 16 bytes, 32 codes of four bits: the low halves first, then the high ones.
fn nibbles(qs: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(qs.len());
    for ((low, high), &q) in low.iter_mut().zip(high).zip(qs) {
        (*low, *high) = (q & 15, q >> 4);
    }
}

fn put_nibbles(codes: &[u8], qs: &mut [u8]) {
    let (low, high) = codes.split_at(qs.len());
    qs.iter_mut().zip(low.iter().zip(high)).for_each(|(q, (low, high))| *q = low & 15 | high << 4);
}

/// Adds bit `i` of `bits` to code `i` as its fifth.
fn fifth_bits(bits: &[u8], codes: &mut [u8]) {
    for (codes, &byte) in codes.chunks_exact_mut(8).zip(bits) {
        codes.iter_mut().enumerate().for_each(|(i, code)| *code |= (byte >> i & 1) << 4);
    }
}

fn put_fifth_bits(codes: &[u8], bits: &mut [u8]) {
    for (codes, byte) in codes.chunks_exact(8).zip(bits) {
        *byte = codes.iter().rev().fold(0, |byte, code| byte << 1 | code >> 4 & 1);
    }
}

pub(super) fn read_q4_0(b: &[u8], codes: &mut [u8], side: &mut Side) {
    side.d = half(b);
    nibbles(&b[2..18], codes);
}

pub(super) fn write_q4_0(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[..2].copy_from_slice(&side.d.to_le_bytes());
    put_nibbles(codes, &mut b[2..18]);
}

pub(super) fn read_q4_1(b: &[u8], codes: &mut [u8], side: &mut Side) {
    (side.d, side.m) = (half(b), half(&b[2..]));
    nibbles(&b[4..20], codes);
}

pub(super) fn write_q4_1(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[..2].copy_from_slice(&side.d.to_le_bytes());
    b[2..4].copy_from_slice(&side.m.to_le_bytes());
    put_nibbles(codes, &mut b[4..20]);
}

pub(super) fn read_q5_0(b: &[u8], codes: &mut [u8], side: &mut Side) {
    side.d = half(b);
    nibbles(&b[6..22], codes);
    fifth_bits(&b[2..6], codes);
}

pub(super) fn write_q5_0(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[..2].copy_from_slice(&side.d.to_le_bytes());
    put_fifth_bits(codes, &mut b[2..6]);
    put_nibbles(codes, &mut b[6..22]);
}

pub(super) fn read_q5_1(b: &[u8], codes: &mut [u8], side: &mut Side) {
    (side.d, side.m) = (half(b), half(&b[2..]));
    nibbles(&b[8..24], codes);
    fifth_bits(&b[4..8], codes);
}

pub(super) fn write_q5_1(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[..2].copy_from_slice(&side.d.to_le_bytes());
    b[2..4].copy_from_slice(&side.m.to_le_bytes());
    put_fifth_bits(codes, &mut b[4..8]);
    put_nibbles(codes, &mut b[8..24]);
}

/// Signed bytes; codes count from -128.
pub(super) fn read_q8_0(b: &[u8], codes: &mut [u8], side: &mut Side) {
    side.d = half(b);
    codes.iter_mut().zip(&b[2..34]).for_each(|(code, q)| *code = q ^ 0x80);
}

pub(super) fn write_q8_0(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[..2].copy_from_slice(&side.d.to_le_bytes());
    b[2..34].iter_mut().zip(codes).for_each(|(q, code)| *q = code ^ 0x80);
}

pub(super) fn read_mxfp4(b: &[u8], codes: &mut [u8], side: &mut Side) {
    side.d = b[0].into();
    nibbles(&b[1..17], codes);
}

pub(super) fn write_mxfp4(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[0] = side.d as u8;
    put_nibbles(codes, &mut b[1..17]);
}

/// 64 bytes, 256 codes of two bits: 32 bytes hold 128 codes, of each byte first the lowest bits.
fn pairs(qs: &[u8], codes: &mut [u8]) {
    for (codes, qs) in codes.chunks_exact_mut(128).zip(qs.chunks_exact(32)) {
        for (j, codes) in codes.chunks_exact_mut(32).enumerate() {
            codes.iter_mut().zip(qs).for_each(|(code, q)| *code = q >> (2 * j) & 3);
        }
    }
}

fn put_pairs(codes: &[u8], qs: &mut [u8]) {
    for (codes, qs) in codes.chunks_exact(128).zip(qs.chunks_exact_mut(32)) {
        qs.fill(0);
        for (j, codes) in codes.chunks_exact(32).enumerate() {
            qs.iter_mut().zip(codes).for_each(|(q, code)| *q |= (code & 3) << (2 * j));
        }
    }
}

pub(super) fn read_q2_k(b: &[u8], codes: &mut [u8], side: &mut Side) {
    for (i, &scale) in b[..16].iter().enumerate() {
        (side.sub[i], side.min[i]) = ((scale & 15) as i8, (scale >> 4) as i8);
    }
    pairs(&b[16..80], codes);
    (side.d, side.m) = (half(&b[80..]), half(&b[82..]));
}

pub(super) fn write_q2_k(codes: &[u8], side: &Side, b: &mut [u8]) {
    for (i, scale) in b[..16].iter_mut().enumerate() {
        *scale = side.sub[i] as u8 & 15 | (side.min[i] as u8) << 4;
    }
    put_pairs(codes, &mut b[16..80]);
    b[80..82].copy_from_slice(&side.d.to_le_bytes());
    b[82..84].copy_from_slice(&side.m.to_le_bytes());
}

/// The third bit is set where four is not subtracted, so codes count from -4. Scales have six bits and count from
/// -32.
pub(super) fn read_q3_k(b: &[u8], codes: &mut [u8], side: &mut Side) {
    pairs(&b[32..96], codes);
    for (i, codes) in codes.chunks_exact_mut(32).enumerate() {
        codes.iter_mut().zip(&b[..32]).for_each(|(code, mask)| *code |= (mask >> i & 1) << 2);
    }
    let scales = &b[96..108];
    for (k, sub) in side.sub.iter_mut().enumerate() {
        let low = if k < 8 { scales[k] & 15 } else { scales[k - 8] >> 4 };
        let high = scales[8 + k % 4] >> (2 * (k / 4)) & 3;
        *sub = (low | high << 4) as i8 - 32;
    }
    side.d = half(&b[108..]);
}

pub(super) fn write_q3_k(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[..32].fill(0);
    for (i, codes) in codes.chunks_exact(32).enumerate() {
        b[..32].iter_mut().zip(codes).for_each(|(mask, code)| *mask |= (code >> 2 & 1) << i);
    }
    put_pairs(codes, &mut b[32..96]);
    let scales = &mut b[96..108];
    scales.fill(0);
    for (k, sub) in side.sub.iter().enumerate() {
        let scale = (sub + 32) as u8;
        scales[k % 8] |= (scale & 15) << (4 * (k / 8));
        scales[8 + k % 4] |= (scale >> 4 & 3) << (2 * (k / 4));
    }
    b[108..110].copy_from_slice(&side.d.to_le_bytes());
}

/// 12 bytes, eight scales and eight shifts of six bits.
fn sixes(s: &[u8], side: &mut Side) {
    for j in 0..4 {
        side.sub[j] = (s[j] & 63) as i8;
        side.min[j] = (s[j + 4] & 63) as i8;
        side.sub[j + 4] = (s[j + 8] & 15 | (s[j] >> 6) << 4) as i8;
        side.min[j + 4] = (s[j + 8] >> 4 | (s[j + 4] >> 6) << 4) as i8;
    }
}

fn put_sixes(side: &Side, s: &mut [u8]) {
    for j in 0..4 {
        let (low, high) = (side.sub[j] as u8, side.sub[j + 4] as u8);
        let (min_low, min_high) = (side.min[j] as u8, side.min[j + 4] as u8);
        s[j] = low & 63 | (high >> 4) << 6;
        s[j + 4] = min_low & 63 | (min_high >> 4) << 6;
        s[j + 8] = high & 15 | min_high << 4;
    }
}

pub(super) fn read_q4_k(b: &[u8], codes: &mut [u8], side: &mut Side) {
    (side.d, side.m) = (half(b), half(&b[2..]));
    sixes(&b[4..16], side);
    for (codes, qs) in codes.chunks_exact_mut(64).zip(b[16..144].chunks_exact(32)) {
        nibbles(qs, codes);
    }
}

pub(super) fn write_q4_k(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[..2].copy_from_slice(&side.d.to_le_bytes());
    b[2..4].copy_from_slice(&side.m.to_le_bytes());
    put_sixes(side, &mut b[4..16]);
    for (codes, qs) in codes.chunks_exact(64).zip(b[16..144].chunks_exact_mut(32)) {
        put_nibbles(codes, qs);
    }
}

pub(super) fn read_q5_k(b: &[u8], codes: &mut [u8], side: &mut Side) {
    (side.d, side.m) = (half(b), half(&b[2..]));
    sixes(&b[4..16], side);
    for (codes, qs) in codes.chunks_exact_mut(64).zip(b[48..176].chunks_exact(32)) {
        nibbles(qs, codes);
    }
    for (j, codes) in codes.chunks_exact_mut(32).enumerate() {
        codes.iter_mut().zip(&b[16..48]).for_each(|(code, high)| *code |= (high >> j & 1) << 4);
    }
}

pub(super) fn write_q5_k(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[..2].copy_from_slice(&side.d.to_le_bytes());
    b[2..4].copy_from_slice(&side.m.to_le_bytes());
    put_sixes(side, &mut b[4..16]);
    b[16..48].fill(0);
    for (j, codes) in codes.chunks_exact(32).enumerate() {
        b[16..48].iter_mut().zip(codes).for_each(|(high, code)| *high |= (code >> 4 & 1) << j);
    }
    for (codes, qs) in codes.chunks_exact(64).zip(b[48..176].chunks_exact_mut(32)) {
        put_nibbles(codes, qs);
    }
}

/// 64 bytes of low halves and 32 of high pairs hold 128 codes, which count from -32.
pub(super) fn read_q6_k(b: &[u8], codes: &mut [u8], side: &mut Side) {
    let halves = b[..128].chunks_exact(64).zip(b[128..192].chunks_exact(32));
    for (codes, (low, high)) in codes.chunks_exact_mut(128).zip(halves) {
        nibbles(low, codes);
        for (j, codes) in codes.chunks_exact_mut(32).enumerate() {
            codes.iter_mut().zip(high).for_each(|(code, high)| *code |= (high >> (2 * j) & 3) << 4);
        }
    }
    side.sub.iter_mut().zip(&b[192..208]).for_each(|(sub, &scale)| *sub = scale as i8);
    side.d = half(&b[208..]);
}

pub(super) fn write_q6_k(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[128..192].fill(0);
    for (h, codes) in codes.chunks_exact(128).enumerate() {
        put_nibbles(codes, &mut b[64 * h..][..64]);
        let high = &mut b[128 + 32 * h..][..32];
        for (j, codes) in codes.chunks_exact(32).enumerate() {
            high.iter_mut().zip(codes).for_each(|(high, code)| *high |= (code >> 4 & 3) << (2 * j));
        }
    }
    b[192..208].iter_mut().zip(side.sub).for_each(|(scale, sub)| *scale = sub as u8);
    b[208..210].copy_from_slice(&side.d.to_le_bytes());
}

/// Scales have six bits and count from -32: four bits each in `scales_l`, two in `scales_h`.
pub(super) fn read_iq4_xs(b: &[u8], codes: &mut [u8], side: &mut Side) {
    side.d = half(b);
    let high = half(&b[2..]);
    for (i, sub) in side.sub[..8].iter_mut().enumerate() {
        let low = b[4 + i / 2] >> (4 * (i % 2)) & 15;
        *sub = (low | ((high >> (2 * i) & 3) as u8) << 4) as i8 - 32;
    }
    for (codes, qs) in codes.chunks_exact_mut(32).zip(b[8..136].chunks_exact(16)) {
        nibbles(qs, codes);
    }
}

pub(super) fn write_iq4_xs(codes: &[u8], side: &Side, b: &mut [u8]) {
    b[..2].copy_from_slice(&side.d.to_le_bytes());
    b[4..8].fill(0);
    let mut high = 0;
    for (i, sub) in side.sub[..8].iter().enumerate() {
        let scale = (sub + 32) as u8;
        b[4 + i / 2] |= (scale & 15) << (4 * (i % 2));
        high |= u16::from(scale >> 4 & 3) << (2 * i);
    }
    b[2..4].copy_from_slice(&high.to_le_bytes());
    for (codes, qs) in codes.chunks_exact(32).zip(b[8..136].chunks_exact_mut(16)) {
        put_nibbles(codes, qs);
    }
}
