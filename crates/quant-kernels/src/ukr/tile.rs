//! One micro-kernel for all formats, over vectors whose lanes are outputs.

use super::{Call, Offset};
use crate::packed::params::Kind;
use crate::packed::planes::{self, OUTPUTS, PLANES, Part, VECTOR};

/// Vectors of `LANES` outputs: integers of 32 bits (or four bytes each) and f32.
///
/// # Safety
/// Every function needs the instructions that the implementing type stands for. Pointers need not be aligned.
pub(super) trait Vector {
    /// Outputs of a vector: a divisor of 16.
    const LANES: usize;
    /// What [`Vector::dot`] expects subtracted from codes of 8 bits and tables: 0 or 128.
    const CENTER: u8;
    /// Integers.
    type Int: Copy;
    /// Floats.
    type Float: Copy;

    /// How many fields [`Vector::dot`] likes to take at once when no code is above `max`: 1, 2, 4 or 8.
    fn fields(max: u8) -> usize;
    /// `LANES` words.
    unsafe fn load(at: *const u8) -> Self::Int;
    /// The same word in all lanes.
    unsafe fn splat(word: i32) -> Self::Int;
    /// Every word shifted to the right, or to the left by a negative number.
    unsafe fn shift(words: Self::Int, right: i32) -> Self::Int;
    unsafe fn and(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn or(a: Self::Int, b: Self::Int) -> Self::Int;
    unsafe fn xor(a: Self::Int, b: Self::Int) -> Self::Int;
    /// A table for [`Vector::lookup`].
    unsafe fn table(entries: &[u8; 16]) -> Self::Int;
    /// `table[byte]` for all bytes, which are below 16.
    unsafe fn lookup(table: Self::Int, bytes: Self::Int) -> Self::Int;
    /// `acc + sum of weights[i] * activations[i]` over the four bytes of each lane. Activations are signed.
    /// Weights are signed if `wide` and [`Vector::CENTER`] is 128; otherwise unsigned, below 128 unless `wide`.
    unsafe fn dot(acc: Self::Int, weights: &[Self::Int], activations: &[Self::Int], wide: bool) -> Self::Int;

    unsafe fn to_float(words: Self::Int) -> Self::Float;
    unsafe fn splat_float(x: f32) -> Self::Float;
    /// `LANES` numbers of a type.
    unsafe fn load_params(kind: Kind, at: *const u8) -> Self::Float;
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `-(a * b)`.
    unsafe fn neg_mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    unsafe fn store(x: Self::Float, at: *mut f32);
}

/// How far ahead of its use a stream of weights is asked for, where few rows make memory the limit.
const AHEAD: usize = 2048;

/// The tile of `HEIGHT` rows and `PANELS` panels, `ROWS` rows (a divisor) and `COLS` vectors at a time.
///
/// # Safety
/// The processor has the instructions of `V`; [`Call::check`] has passed for this tile.
#[inline(always)]
pub(super) unsafe fn tile<
    V: Vector,
    const WIDTH: usize,
    const TABLE: bool,
    const HEIGHT: usize,
    const PANELS: usize,
    const ROWS: usize,
    const COLS: usize,
>(
    call: &mut Call<'_>,
) {
    const { assert!(HEIGHT.is_multiple_of(ROWS) && (PANELS * OUTPUTS).is_multiple_of(COLS * V::LANES)) };
    for vector in (0..PANELS * OUTPUTS / V::LANES).step_by(COLS) {
        for row in (0..HEIGHT).step_by(ROWS) {
            // SAFETY: passed on.
            unsafe { part::<V, WIDTH, TABLE, HEIGHT, PANELS, ROWS, COLS>(call, row, vector) }
        }
    }
}

/// Rows `row..row + ROWS` and vectors `vector..vector + COLS` of a tile.
///
/// # Safety
/// As [`tile`].
#[expect(clippy::needless_range_loop, reason = "loops over arrays of registers, several at once")]
#[inline(always)]
unsafe fn part<
    V: Vector,
    const WIDTH: usize,
    const TABLE: bool,
    const HEIGHT: usize,
    const PANELS: usize,
    const ROWS: usize,
    const COLS: usize,
>(
    call: &mut Call<'_>,
    row: usize,
    vector: usize,
) {
    let Call { blocks, format, panels, rows, out } = call;
    let fields = planes::fields(WIDTH);
    let wide = TABLE || WIDTH == 8;
    let at_once = V::fields(if wide { 255 } else { ((1u16 << WIDTH) - 1) as u8 }).min(fields);
    let header_bytes = format.header_bytes();
    let second = OUTPUTS * format.scale.size();

    // SAFETY: `Call::check` has compared the lengths with the blocks, which are
    // followed here from first to last; the caller vouches for the instructions.
    unsafe {
        let image = format.table.map(|table| table.image.map(|x| x ^ V::CENTER));
        let table = V::table(&image.unwrap_or([0; 16]));
        let center = V::splat(i32::from_ne_bytes([V::CENTER; 4]));
        let step = V::splat_float(format.table.map_or(1.0, |table| table.step));

        let mut header = [std::ptr::null(); COLS];
        let mut at = [std::ptr::null(); COLS];
        let mut lane = [0; COLS];
        for c in 0..COLS {
            at[c] = panels[(vector + c) * V::LANES / OUTPUTS].as_ptr();
            lane[c] = (vector + c) * V::LANES % OUTPUTS;
        }
        let mut q = rows.codes.as_ptr().add(row);
        let mut sums = [[V::splat_float(0.0); COLS]; ROWS];
        for (b, block) in blocks.list().iter().enumerate() {
            if block.first {
                for c in 0..COLS {
                    header[c] = at[c];
                    at[c] = at[c].add(header_bytes);
                }
            }
            let rest = b * HEIGHT + row;
            let mut acc = [[V::splat(0); COLS]; ROWS];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = [V::splat(*rows.start.as_ptr().add(rest + r)); COLS];
            }
            for _ in 0..block.padded as usize / planes::unit(WIDTH) {
                if ROWS == HEIGHT && HEIGHT <= 8 {
                    for at in at {
                        for line in (0..planes::step_bytes(WIDTH)).step_by(64) {
                            crate::simd::prefetch(at.wrapping_add(AHEAD + line));
                        }
                    }
                }
                for field in (0..fields).step_by(at_once) {
                    let mut w = [[center; 8]; COLS];
                    for c in 0..COLS {
                        for i in 0..at_once {
                            let codes = unpack::<V, WIDTH>(at[c].add(4 * lane[c]), field + i);
                            w[c][i] = match () {
                                _ if TABLE => V::lookup(table, codes),
                                _ if wide && V::CENTER != 0 => V::xor(codes, center),
                                _ => codes,
                            };
                        }
                    }
                    for r in 0..ROWS {
                        let mut x = [center; 8];
                        for i in 0..at_once {
                            x[i] = V::splat(q.add((field + i) * HEIGHT + r).cast::<i32>().read());
                        }
                        for c in 0..COLS {
                            acc[r][c] = V::dot(acc[r][c], &w[c][..at_once], &x[..at_once], wide);
                        }
                    }
                }
                q = q.add(fields * HEIGHT);
                for at in &mut at {
                    *at = at.add(planes::step_bytes(WIDTH));
                }
            }

            for c in 0..COLS {
                let stored = V::load_params(format.scale, header[c].add(lane[c] * format.scale.size()));
                let scale = if TABLE { V::mul(stored, step) } else { stored };
                for r in 0..ROWS {
                    let by = V::splat_float(*rows.scale.as_ptr().add(rest + r));
                    sums[r][c] = V::fma(V::mul(V::to_float(acc[r][c]), scale), by, sums[r][c]);
                }
                if let Some(kind) = format.offset.kind() {
                    let number = V::load_params(kind, header[c].add(second + lane[c] * kind.size()));
                    let offset = match format.offset {
                        Offset::Zero(_) => V::neg_mul(stored, number),
                        _ => number,
                    };
                    for r in 0..ROWS {
                        let sum = V::splat_float(*rows.sum.as_ptr().add(rest + r));
                        sums[r][c] = V::fma(sum, offset, sums[r][c]);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (c, sum) in sums.iter().enumerate() {
                let to = (row + r) * PANELS * OUTPUTS + (vector + c) * V::LANES;
                V::store(*sum, out.as_mut_ptr().add(to));
            }
        }
    }
}

/// The codes of a field of the step at `at`, which points at the first of the lanes asked for.
///
/// # Safety
/// The processor has the instructions of `V`, and all vectors of the step can be read.
#[inline(always)]
unsafe fn unpack<V: Vector, const WIDTH: usize>(at: *const u8, field: usize) -> V::Int {
    // SAFETY: the caller's; all vectors lie within the step.
    unsafe {
        let mut codes = None;
        for plane in PLANES {
            let Some(Part { vector, shift, mask }) = planes::part(WIDTH, plane, field) else { continue };
            let mut words = V::load(at.add(VECTOR * vector));
            if shift != 0 {
                words = V::shift(words, shift);
            }
            if plane != 8 {
                words = V::and(words, V::splat(i32::from_ne_bytes([mask; 4])));
            }
            codes = Some(codes.map_or(words, |codes| V::or(codes, words)));
        }
        codes.unwrap_or(V::splat(0))
    }
}
