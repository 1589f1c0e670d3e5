//! Codes as sums of bit planes, so that they unpack with shifts and masks alone.
//!
//! Codes of `width` bits are stored in planes of 8, 4, 2 and 1 bits: those that are digits of `width` in binary.
//! A plane holds vectors of 64 bytes; dword lane `o` of a vector belongs to output `o` of a panel of 16. Byte `i`
//! of a lane holds in its bit field `f` (bits `f*p..(f+1)*p` of a plane of `p` bits) a part of the code of column
//! `4*f + i`. So a shift and a mask of a whole vector give four columns of sixteen outputs.
//!
//! ```text
//! a step: UNIT columns of 16 outputs, its planes one after the other, the widest first
//!   width 4, 16 columns:  | plane of 4 bits, columns 0..8 | plane of 4 bits, columns 8..16 |
//!   width 3, 32 columns:  | 2 bits, columns 0..16 | 2 bits, columns 16..32 | 1 bit, columns 0..32 |
//! the widest plane holds the lowest bits of a code
//! ```

/// Outputs of a panel.
pub(crate) const OUTPUTS: usize = 16;

/// Bytes of a vector of a plane.
pub(crate) const VECTOR: usize = 4 * OUTPUTS;

/// Columns of a step: the fewest that fill whole vectors of all planes, and never fewer than 16.
pub(crate) const fn unit(width: usize) -> usize {
    if width % 2 == 1 { 32 } else { 16 }
}

/// Fields of a step, of four columns each.
pub(crate) const fn fields(width: usize) -> usize {
    unit(width) / 4
}

/// Bytes of a step.
pub(crate) const fn step_bytes(width: usize) -> usize {
    unit(width) * width * OUTPUTS / 8
}

/// A part of the codes of a field: `code = OR over planes of (lane >> shift) & mask`, byte by byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Vector of the step.
    pub(crate) vector: usize,
    /// Bits to shift a lane to the right; to the left if negative.
    pub(crate) shift: i32,
    /// Bits of the code.
    pub(crate) mask: u8,
}

/// Where the plane of `plane` bits holds its part of the codes of a field, or `None` if there is no such plane.
#[inline(always)]
pub(crate) const fn part(width: usize, plane: usize, field: usize) -> Option<Part> {
    if width & plane == 0 {
        return None;
    }
    // What wider planes hold: so many bits of each code, in so many vectors.
    let wider = width & !(2 * plane - 1);
    let per_vector = 8 / plane;
    let vector = unit(width) * wider / 32 + field / per_vector;
    let shift = (plane * (field % per_vector)) as i32 - wider as i32;
    let mask = (((1u16 << plane) - 1) << wider) as u8;
    Some(Part { vector, shift, mask })
}

/// Writes the codes of a step for one output. `codes`: [`unit`] columns; `step`: [`step_bytes`], zeros before.
#[inline(always)]
pub(crate) fn write<const WIDTH: usize>(codes: &[u8], output: usize, step: &mut [u8]) {
    for (field, four) in codes.as_chunks::<4>().0.iter().enumerate() {
        let word = u32::from_le_bytes(*four);
        write_plane::<WIDTH, 8>(word, field, output, step);
        write_plane::<WIDTH, 4>(word, field, output, step);
        write_plane::<WIDTH, 2>(word, field, output, step);
        write_plane::<WIDTH, 1>(word, field, output, step);
    }
}

#[inline(always)]
fn write_plane<const WIDTH: usize, const PLANE: usize>(
    word: u32,
    field: usize,
    output: usize,
    step: &mut [u8],
) {
    let Some(Part { vector, shift, mask }) = part(WIDTH, PLANE, field) else { return };
    let lane = step[VECTOR * vector + 4 * output..].first_chunk_mut::<4>().expect("a lane");
    let bits = shifted(word & u32::from_le_bytes([mask; 4]), -shift);
    *lane = (u32::from_le_bytes(*lane) | bits).to_le_bytes();
}

/// The codes of a field of a step for outputs `first..first + L`, four columns in the bytes of each word.
#[inline(always)]
pub(crate) fn read<const WIDTH: usize, const L: usize>(step: &[u8], field: usize, first: usize) -> [u32; L] {
    let mut codes = [0; L];
    read_plane::<WIDTH, 8, L>(step, field, first, &mut codes);
    read_plane::<WIDTH, 4, L>(step, field, first, &mut codes);
    read_plane::<WIDTH, 2, L>(step, field, first, &mut codes);
    read_plane::<WIDTH, 1, L>(step, field, first, &mut codes);
    codes
}

#[inline(always)]
fn read_plane<const WIDTH: usize, const PLANE: usize, const L: usize>(
    step: &[u8],
    field: usize,
    first: usize,
    codes: &mut [u32; L],
) {
    let Some(Part { vector, shift, mask }) = part(WIDTH, PLANE, field) else { return };
    let lanes = step[VECTOR * vector + 4 * first..][..4 * L].as_chunks::<4>().0;
    for (code, lane) in codes.iter_mut().zip(lanes) {
        *code |= shifted(u32::from_le_bytes(*lane), shift) & u32::from_le_bytes([mask; 4]);
    }
}

/// A shift to the right, or to the left by a negative number.
#[inline(always)]
fn shifted(word: u32, right: i32) -> u32 {
    if right >= 0 { word >> right } else { word << -right }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const WIDTH: usize>() {
        let code =
            |output: usize, column: usize| ((output * 37 + column * 101 + column / 7) % (1 << WIDTH)) as u8;
        let mut step = vec![0; step_bytes(WIDTH)];
        for output in 0..OUTPUTS {
            let codes: Vec<u8> = (0..unit(WIDTH)).map(|column| code(output, column)).collect();
            write::<WIDTH>(&codes, output, &mut step);
        }
        for field in 0..fields(WIDTH) {
            let read = read::<WIDTH, OUTPUTS>(&step, field, 0);
            for (output, word) in read.into_iter().enumerate() {
                let expected = std::array::from_fn(|i| code(output, 4 * field + i));
                assert_eq!(word.to_le_bytes(), expected, "{WIDTH} bits, output {output}, field {field}");
            }
            assert_eq!(super::read::<WIDTH, 8>(&step, field, 8)[..], read[8..]);
        }
    }

    #[test]
    fn steps_are_read_as_they_were_written() {
        check::<1>();
        check::<2>();
        check::<3>();
        check::<4>();
        check::<5>();
        check::<6>();
        check::<7>();
        check::<8>();
    }

    #[test]
    fn a_nibble_plane_is_as_drawn() {
        let mut step = vec![0; step_bytes(4)];
        let codes: Vec<u8> = (0..16).collect();
        write::<4>(&codes, 2, &mut step);
        assert_eq!(step[8..12], [0x40, 0x51, 0x62, 0x73]);
        assert_eq!(step[64 + 8..][..4], [0xc8, 0xd9, 0xea, 0xfb]);
    }
}
