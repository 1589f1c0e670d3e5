//! The loop nest of all products: output tiles in parallel, blocks of the inner dimension in order.

use std::ops::Range;

use ndarray::{ArrayViewMut2, Axis};
use rayon::prelude::*;

use super::KC;
use super::operand::{Left, Right, SPILL};
use super::word::Word;
use crate::pool;
use crate::scratch::Scratch;
use crate::simd::{self, Vector, Work, prefetch};

/// Rows of a task. The packed block of the left operand, `ROWS * KC` words = 240 KiB, shares a level-2 cache of
/// 512 KiB or more with what streams through; 240 is a multiple of every register tile's rows.
const ROWS: usize = 240;

/// Columns of a task: its packed left block is used this often, so packing costs a few percent.
const COLUMNS: usize = 1024;

/// Words of the left operand that a task packs at a time, if more than one block of [`KC`] fits.
const LEFT_BUDGET: usize = ROWS * KC;

/// Tasks that a large product is cut into at least, whatever the number of threads.
const TASKS: usize = 64;

/// Multiplications below which a product stays on the calling thread: about 10 us of one core, which is what
/// handing work to the pool costs.
const SERIAL: usize = 1 << 19;

/// Rows up to which a product is limited by memory and shared out statically, as part of a generation of text:
/// handing it to rayon would cost a good part of the time of a small one.
const FEW: usize = 8;

/// Multiplications of one task at least.
const TASK: usize = 1 << 18;

/// `out = alpha * left * right + beta * out` over the inner dimension `depth`.
pub(crate) struct Product<W, L, R> {
    /// What the words of the packed operands hold.
    pub(crate) word: W,
    pub(crate) alpha: f32,
    pub(crate) left: L,
    pub(crate) right: R,
    pub(crate) beta: f32,
    /// In words.
    pub(crate) depth: usize,
    /// Only elements on or above the diagonal are touched.
    pub(crate) upper: bool,
}

impl<W: Word, L: Left, R: Right> Product<W, L, R> {
    /// Computes the product. Shapes and strides are checked by the caller.
    pub(crate) fn run(&self, mut out: ArrayViewMut2<'_, f32>) {
        if self.depth == 0 {
            if self.beta == 0.0 {
                out.fill(0.0);
            } else if self.beta != 1.0 {
                out.mapv_inplace(|x| self.beta * x);
            }
            return;
        }
        let isa = crate::isa::active();
        let (m, n) = out.dim();
        let mut tiles = self.tiles(out);
        let work = m.saturating_mul(n).saturating_mul(self.depth);
        let run = |tile: &mut Tile<'_>| simd::run(isa, Task { product: self, tile });
        if tiles.len() < 2 || work <= SERIAL {
            tiles.iter_mut().for_each(run);
        } else if m <= FEW {
            pool::for_each(&mut tiles, run);
        } else {
            tiles.par_iter_mut().for_each(run);
        }
    }

    /// Cuts the output. The cut depends on the shape alone, and the result not even on that.
    fn tiles<'a>(&self, out: ArrayViewMut2<'a, f32>) -> Vec<Tile<'a>> {
        let (m, n) = out.dim();
        if m == 0 || n == 0 {
            return Vec::new();
        }
        let height = m.div_ceil(m.div_ceil(ROWS)).next_multiple_of(12);
        let wanted = n.div_ceil(TASKS.div_ceil(m.div_ceil(height)));
        let least = TASK.div_ceil(height.min(m).saturating_mul(self.depth));
        let width = wanted.max(least).min(COLUMNS).next_multiple_of(32);

        let mut tiles = Vec::new();
        let mut rest = out;
        let mut column = 0;
        while rest.ncols() > 0 {
            let here = width.min(rest.ncols());
            let (mut strip, right) = rest.split_at(Axis(1), here);
            let mut row = 0;
            while strip.nrows() > 0 && !(self.upper && row >= column + here) {
                let (tile, below) = {
                    let h = height.min(strip.nrows());
                    strip.split_at(Axis(0), h)
                };
                tiles.push(Tile { row, column, out: tile });
                strip = below;
                row += height;
            }
            rest = right;
            column += here;
        }
        tiles
    }
}

/// A part of the output.
struct Tile<'a> {
    /// Its first row in the whole.
    row: usize,
    /// Its first column in the whole.
    column: usize,
    out: ArrayViewMut2<'a, f32>,
}

struct Task<'a, 'o, W, L, R> {
    product: &'a Product<W, L, R>,
    tile: &'a mut Tile<'o>,
}

impl<W: Word, L: Left, R: Right> Work for Task<'_, '_, W, L, R> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, simd: V) {
        let Task { product, tile: Tile { row, column, out } } = self;
        let (row, column, (m, n)) = (*row, *column, out.dim());
        let mut out: Vec<&mut [f32]> = out
            .view_mut()
            .into_outer_iter_mut()
            .map(|row| row.into_slice().expect("rows are contiguous"))
            .collect();

        // Rows spread evenly over the register tiles. One tile alone may be wide; its panel then is as much
        // shorter as it is wider, so that it stays in the level-1 cache.
        let tile_rows = m.div_ceil(m.div_ceil(V::MR));
        let width = if tile_rows == m && R::WIDE { V::width(m) } else { V::NR };
        let step = W::BLOCK * V::NR / width;
        let pass = W::BLOCK * (LEFT_BUDGET / (m * W::BLOCK)).max(1);

        let mut scratch = Scratch::take();
        let [left, panel, sums] = scratch.split([
            m * pass.min(product.depth) + SPILL,
            step.min(product.depth) * width,
            tile_rows * width,
        ]);
        for start in (0..product.depth).step_by(pass) {
            let end = (start + pass).min(product.depth);
            // Packed rows `i..i + rows` of the left operand, over one block.
            let place = |block: &Range<usize>, i: usize, rows: usize| {
                let at = (block.start - start) * m + i * block.len();
                at..at + rows * block.len()
            };
            for block in parts(start..end, W::BLOCK) {
                for tile in parts(0..m, tile_rows) {
                    let to = &mut left[place(&block, tile.start, tile.len()).start..];
                    product.left.pack(simd, row + tile.start..row + tile.end, block.clone(), to);
                }
            }
            for j in (0..n).step_by(width) {
                for block in parts(start..end, W::BLOCK) {
                    for part in parts(block.clone(), step) {
                        let panel = &mut panel[..part.len() * width];
                        product.right.pack(simd, column + j, part.clone(), width, panel);
                        for tile in parts(0..m, tile_rows) {
                            let to = Corner { row: row + tile.start, column: column + j };
                            if product.upper && to.row >= to.column + width {
                                break;
                            }
                            let rows = tile.len();
                            let sums = &mut sums[..rows * width];
                            let out = &mut out[tile.clone()];
                            if part.start == block.start {
                                sums.fill(0.0);
                                out.iter().for_each(|row| prefetch(&raw const row[j]));
                            }
                            let skip = (part.start - block.start) * rows;
                            let a = &left[place(&block, tile.start, rows)][skip..skip + part.len() * rows];
                            product.word.tile(simd, rows, width, a, panel, sums);
                            if part.end == block.end {
                                product.store(block.start == 0, to, sums, width, out, j);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Where a register tile lies in the whole product.
#[derive(Clone, Copy)]
struct Corner {
    row: usize,
    column: usize,
}

impl<W, L, R> Product<W, L, R> {
    /// Adds the sums `[rows, width]` of a block to columns `j..j + width` of the rows, as far as they reach.
    #[inline(always)]
    fn store(
        &self,
        first: bool,
        corner: Corner,
        sums: &[f32],
        width: usize,
        rows: &mut [&mut [f32]],
        j: usize,
    ) {
        let beta = if first { self.beta } else { 1.0 };
        for (r, (row, sums)) in rows.iter_mut().zip(sums.chunks_exact(width)).enumerate() {
            let end = (j + width).min(row.len());
            let skip = if self.upper { (corner.row + r).saturating_sub(corner.column) } else { 0 };
            if j + skip < end {
                add(self.alpha, &sums[skip..], beta, &mut row[j + skip..end]);
            }
        }
    }
}

/// A range cut into parts of `length`, the last of which may be shorter.
pub(crate) fn parts(range: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(length).map(move |start| start..(start + length).min(range.end))
}

/// `out = alpha * sums + beta * out`, as long as `out`.
#[inline(always)]
pub(crate) fn add(alpha: f32, sums: &[f32], beta: f32, out: &mut [f32]) {
    if beta == 0.0 {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = alpha.mul_add(*sum, 0.0);
        }
    } else {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = alpha.mul_add(*sum, beta * *out);
        }
    }
}
