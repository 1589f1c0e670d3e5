//! One micro-kernel for all formats, over vectors whose lanes are outputs.

use super::{Call, Offset};
use crate::packed::params::Kind;
use crate::packed::planes::{self, OUTPUTS, Part, VECTOR};

/// Vectors of `LANES` outputs: integers of 32 bits (or four bytes each) and f32.
///
/// # Safety
/// Every function needs the instructions that the implementing type stands for. Pointers need not be aligned.
pub(super) trait Vector: Sized {
    /// Outputs of a vector: a divisor of 16.
    const LANES: usize;
    /// What [`Vector::dot`] expects subtracted from codes of 8 bits and tables: 0 or 128.
    const CENTER: u8;
    /// Integers.
    type Int: Copy;
    /// Floats.
    type Float: Copy;

    /// How many fields [`Vector::dot`] likes to take at once when no code is above `max`: 1, 2 or 4.
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
    /// `acc + sum of weights[i] * activations[i]` over the first `n` vectors, 1, 2 or 4, and the four bytes of each
    /// lane. Activations are signed. Weights are signed if `wide` and [`Vector::CENTER`] is 128; otherwise unsigned,
    /// below 128 unless `wide`.
    unsafe fn dot(
        acc: Self::Int,
        weights: [Self::Int; 4],
        activations: [Self::Int; 4],
        n: usize,
        wide: bool,
    ) -> Self::Int;
    /// `acc[r][c] += sum over i below n of weights[c][i] * activations[i * height + r]`, as [`Vector::dot`] does.
    #[inline(always)]
    unsafe fn accumulate<const ROWS: usize, const COLS: usize>(
        acc: &mut [[Self::Int; COLS]; ROWS],
        weights: &[[Self::Int; 4]; COLS],
        activations: *const i32,
        height: usize,
        n: usize,
        wide: bool,
    ) {
        // SAFETY: passed on.
        unsafe { accumulate_rows::<Self, ROWS, COLS>(acc, weights, activations, height, n, wide) }
    }
    /// From rows to the order in which [`Vector::accumulate`] keeps its sums.
    #[inline(always)]
    unsafe fn interleave<const ROWS: usize, const COLS: usize>(_: &mut [[Self::Int; COLS]; ROWS]) {}
    /// Back from that order.
    #[inline(always)]
    unsafe fn separate<const ROWS: usize, const COLS: usize>(_: &mut [[Self::Int; COLS]; ROWS]) {}

    unsafe fn to_float(words: Self::Int) -> Self::Float;
    unsafe fn splat_float(x: f32) -> Self::Float;
    /// `LANES` numbers of a type.
    unsafe fn load_params(kind: Kind, at: *const u8) -> Self::Float;
    unsafe fn load_float(at: *const f32) -> Self::Float;
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `-(a * b)`.
    unsafe fn neg_mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    unsafe fn store(x: Self::Float, at: *mut f32);
}

/// A block for each field that a step may have, whose number is a constant there. The compiler leaves loops as they
/// are when their bodies are as large as a step of a tile.
macro_rules! unrolled {
    ($field:ident => $body:block) => {
        unrolled!($field, $body, 0 1 2 3 4 5 6 7)
    };
    ($field:ident, $body:block, $($number:literal)+) => {
        $({
            const $field: usize = $number;
            $body
        })+
    };
}

/// The tile of `call.height` rows and `PANELS` panels, `ROWS` rows (a divisor) and `COLS` vectors at a time.
///
/// # Safety
/// The processor has the instructions of `V`; [`Call::check`] has passed for this tile.
#[inline(always)]
pub(super) unsafe fn tile<
    V: Vector,
    const WIDTH: usize,
    const TABLE: bool,
    const PANELS: usize,
    const ROWS: usize,
    const COLS: usize,
>(
    call: &mut Call<'_>,
) {
    const { assert!((PANELS * OUTPUTS).is_multiple_of(COLS * V::LANES)) };
    let height = call.height;
    assert!(height.is_multiple_of(ROWS), "whole parts");
    let vectors = PANELS * OUTPUTS / V::LANES;
    let blocks = call.blocks.list();
    let mut place = Place::default();
    call.out.fill(0.0);
    while place.block < blocks.len() {
        // One part goes through all blocks; several go through some at a time, while these sit in cache.
        let last = blocks[place.block].start as usize + DEPTH;
        let end = match (ROWS, COLS) == (height, vectors) {
            true => blocks.len(),
            false => {
                place.block + blocks[place.block..].partition_point(|block| (block.start as usize) < last)
            }
        };
        let mut next = place;
        for vector in (0..vectors).step_by(COLS) {
            for row in (0..height).step_by(ROWS) {
                next = place;
                // SAFETY: passed on.
                unsafe { part::<V, WIDTH, TABLE, PANELS, ROWS, COLS>(call, row, vector, &mut next, end) }
            }
        }
        place = next;
    }
}

/// How far ahead of its use a stream of weights is asked for where computing and reading take about as long: with
/// eight rows on Zen 4 that saves 10 %. With fewer rows the processor's own prefetching is better (by 20 % with one),
/// with more the weights are in cache.
const AHEAD: usize = 2048;

/// Columns that the parts of a tile go through together: 16 KiB of activations and 8 of weights of 4 bits, in a
/// level-1 cache of 32.
const DEPTH: usize = 1024;

/// Where a part has got to.
#[derive(Clone, Copy, Default)]
struct Place {
    /// The next block.
    block: usize,
    /// Its parameters in a panel, unless they come next.
    header: usize,
    /// What comes next in a panel.
    at: usize,
    /// Its activations.
    fours: usize,
}

/// Adds the blocks `place.block..end` to rows `row..row + ROWS` and vectors `vector..vector + COLS` of a tile.
///
/// # Safety
/// As [`tile`]; `place` was left by this function at the block before, or is the beginning.
#[expect(clippy::needless_range_loop, reason = "loops over arrays of registers, several at once")]
#[inline(always)]
unsafe fn part<
    V: Vector,
    const WIDTH: usize,
    const TABLE: bool,
    const PANELS: usize,
    const ROWS: usize,
    const COLS: usize,
>(
    call: &mut Call<'_>,
    row: usize,
    vector: usize,
    place: &mut Place,
    end: usize,
) {
    let Call { blocks, format, panels, height, rows, out } = call;
    let height = *height;
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
        let zero = V::splat_float(0.0);
        let step = V::splat_float(format.table.map_or(1.0, |table| table.step));

        let mut at = [std::ptr::null(); COLS];
        let mut header = [std::ptr::null(); COLS];
        let mut lane = [0; COLS];
        let out = out.as_mut_ptr().add(row * PANELS * OUTPUTS + vector * V::LANES);
        for c in 0..COLS {
            let panel = panels[(vector + c) * V::LANES / OUTPUTS].as_ptr();
            (at[c], header[c]) = (panel.add(place.at), panel.add(place.header));
            lane[c] = (vector + c) * V::LANES % OUTPUTS;
        }
        let first = rows.codes.as_ptr().add(place.fours + row);
        let mut q = first;
        for (b, block) in blocks.list().iter().enumerate().take(end).skip(place.block) {
            if block.first {
                for c in 0..COLS {
                    header[c] = at[c];
                    at[c] = at[c].add(header_bytes);
                }
            }
            let rest = b * height + row;
            let mut acc = [[V::splat(0); COLS]; ROWS];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = [V::splat(*rows.start.as_ptr().add(rest + r)); COLS];
            }
            V::interleave(&mut acc);
            for _ in 0..block.padded as usize / planes::unit(WIDTH) {
                if ROWS == 8 {
                    for at in at {
                        for line in (0..planes::step_bytes(WIDTH)).step_by(64) {
                            crate::simd::prefetch(at.wrapping_add(AHEAD + line));
                        }
                    }
                }
                unrolled!(FIELD => {
                    if FIELD < fields && FIELD.is_multiple_of(at_once) {
                        let mut w = [[center; 4]; COLS];
                        for c in 0..COLS {
                            let at = at[c].add(4 * lane[c]);
                            w[c][0] = unpack::<V, WIDTH, TABLE, FIELD>(at, table, center);
                            if at_once > 1 {
                                w[c][1] = unpack::<V, WIDTH, TABLE, { FIELD | 1 }>(at, table, center);
                            }
                            if at_once > 2 {
                                w[c][2] = unpack::<V, WIDTH, TABLE, { FIELD | 2 }>(at, table, center);
                                w[c][3] = unpack::<V, WIDTH, TABLE, { FIELD | 3 }>(at, table, center);
                            }
                        }
                        V::accumulate(&mut acc, &w, q.add(FIELD * height).cast(), height, at_once, wide);
                    }
                });
                q = q.add(fields * height);
                for at in &mut at {
                    *at = at.add(planes::step_bytes(WIDTH));
                }
            }
            V::separate(&mut acc);

            let (mut scale, mut offset) = ([zero; COLS], [zero; COLS]);
            for c in 0..COLS {
                let stored = V::load_params(format.scale, header[c].add(lane[c] * format.scale.size()));
                scale[c] = if TABLE { V::mul(stored, step) } else { stored };
                if let Some(kind) = format.offset.kind() {
                    let number = V::load_params(kind, header[c].add(second + lane[c] * kind.size()));
                    offset[c] = match format.offset {
                        Offset::Zero(_) => V::neg_mul(stored, number),
                        _ => number,
                    };
                }
            }
            // The sums stay in memory, in the nearest cache: registers are for the integers. These loops are short,
            // so that they are unrolled; an index into `acc` that is no constant would put it into memory as well.
            for r in 0..ROWS {
                let by = V::splat_float(*rows.scale.as_ptr().add(rest + r));
                for c in 0..COLS {
                    let sum = out.add(r * PANELS * OUTPUTS + c * V::LANES);
                    let scaled = V::mul(V::to_float(acc[r][c]), scale[c]);
                    V::store(V::fma(scaled, by, V::load_float(sum)), sum);
                }
            }
            if format.offset != Offset::None {
                for r in 0..ROWS {
                    let by = V::splat_float(*rows.sum.as_ptr().add(rest + r));
                    for c in 0..COLS {
                        let sum = out.add(r * PANELS * OUTPUTS + c * V::LANES);
                        V::store(V::fma(by, offset[c], V::load_float(sum)), sum);
                    }
                }
            }
        }
        let panel = panels[vector * V::LANES / OUTPUTS].as_ptr();
        *place = Place {
            block: end,
            header: header[0].offset_from_unsigned(panel),
            at: at[0].offset_from_unsigned(panel),
            fours: place.fours + q.offset_from_unsigned(first),
        };
    }
}

/// [`Vector::accumulate`] with a splat of each activation.
///
/// # Safety
/// The processor has the instructions of `V`; `activations` points at `n` times `height` words, of which the first
/// `ROWS` of each field are used.
#[expect(clippy::needless_range_loop, reason = "loops over arrays of registers, several at once")]
#[inline(always)]
pub(super) unsafe fn accumulate_rows<V: Vector, const ROWS: usize, const COLS: usize>(
    acc: &mut [[V::Int; COLS]; ROWS],
    weights: &[[V::Int; 4]; COLS],
    activations: *const i32,
    height: usize,
    n: usize,
    wide: bool,
) {
    for r in 0..ROWS {
        // SAFETY: the caller's.
        unsafe {
            let fours = activations.add(r);
            let mut x = [V::splat(fours.read_unaligned()); 4];
            if n > 1 {
                x[1] = V::splat(fours.add(height).read_unaligned());
            }
            if n > 2 {
                x[2] = V::splat(fours.add(2 * height).read_unaligned());
                x[3] = V::splat(fours.add(3 * height).read_unaligned());
            }
            for c in 0..COLS {
                acc[r][c] = V::dot(acc[r][c], weights[c], x, n, wide);
            }
        }
    }
}

/// The images of the codes of a field of the step at `at`, which points at the first of the lanes asked for.
///
/// # Safety
/// The processor has the instructions of `V`, and all vectors of the step can be read.
#[inline(always)]
unsafe fn unpack<V: Vector, const WIDTH: usize, const TABLE: bool, const FIELD: usize>(
    at: *const u8,
    table: V::Int,
    center: V::Int,
) -> V::Int {
    // SAFETY: the caller's.
    unsafe {
        let codes = plane::<V, 8>(at, const { planes::part(WIDTH, 8, FIELD) }, None);
        let codes = plane::<V, 4>(at, const { planes::part(WIDTH, 4, FIELD) }, codes);
        let codes = plane::<V, 2>(at, const { planes::part(WIDTH, 2, FIELD) }, codes);
        let codes = plane::<V, 1>(at, const { planes::part(WIDTH, 1, FIELD) }, codes);
        match codes {
            Some(codes) if TABLE => V::lookup(table, codes),
            Some(codes) if WIDTH == 8 && V::CENTER != 0 => V::xor(codes, center),
            Some(codes) => codes,
            None => center,
        }
    }
}

/// Joins a part of the codes to those of wider planes.
///
/// # Safety
/// As [`unpack`].
#[inline(always)]
unsafe fn plane<V: Vector, const PLANE: usize>(
    at: *const u8,
    part: Option<Part>,
    codes: Option<V::Int>,
) -> Option<V::Int> {
    let Some(Part { vector, shift, mask }) = part else { return codes };
    // SAFETY: the caller's.
    unsafe {
        let mut words = V::load(at.add(VECTOR * vector));
        if shift != 0 {
            words = V::shift(words, shift);
        }
        if PLANE != 8 {
            words = V::and(words, V::splat(i32::from_ne_bytes([mask; 4])));
        }
        Some(match codes {
            Some(codes) => V::or(codes, words),
            None => words,
        })
    }
}

/// How many products of unsigned codes up to `max` and signed bytes up to 127, in pairs, fit sixteen bits when
/// `most` at most are summed: a power of two.
pub(super) const fn presums(max: u8, most: usize) -> usize {
    let pair = 2 * 127 * max as usize;
    let mut sums = most;
    while sums > 1 && sums * pair > i16::MAX as usize {
        sums /= 2;
    }
    sums
}
