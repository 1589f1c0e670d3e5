//! The loop nest of all products: output tiles in parallel, blocks of the inner dimension in order.

use std::cell::RefCell;

use ndarray::{ArrayViewMut2, Axis};
use rayon::prelude::*;

use super::KC;
use super::operand::{Left, Right, SPILL};
use crate::simd::{self, Vector, Work, prefetch};

/// Rows of a task. The packed block of the left operand, `ROWS * KC` floats = 240 KiB, shares a level-2 cache of
/// 512 KiB or more with what streams through; 240 is a multiple of every register tile's rows.
const ROWS: usize = 240;

/// Columns of a task: its packed left block is used this often, so packing costs a few percent.
const COLUMNS: usize = 1024;

/// Floats of the left operand that a task packs at a time, if more than one block of [`KC`] fits.
const LEFT_BUDGET: usize = ROWS * KC;

/// Tasks that a large product is cut into at least, whatever the number of threads.
const TASKS: usize = 64;

/// Multiplications below which a product stays on the calling thread: about 10 us of one core, which is what
/// handing work to the pool costs.
const SERIAL: usize = 1 << 19;

/// Multiplications of one task at least.
const TASK: usize = 1 << 18;

/// `out = alpha * left * right + beta * out` over the inner dimension `depth`.
pub(crate) struct Product<L, R> {
    pub(crate) alpha: f32,
    pub(crate) left: L,
    pub(crate) right: R,
    pub(crate) beta: f32,
    pub(crate) depth: usize,
    /// Only elements on or above the diagonal are touched.
    pub(crate) upper: bool,
}

impl<L: Left, R: Right> Product<L, R> {
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
        let tiles = self.tiles(out);
        let work = m.saturating_mul(n).saturating_mul(self.depth);
        if tiles.len() < 2 || work <= SERIAL {
            tiles.into_iter().for_each(|tile| simd::run(isa, Task { product: self, tile }));
        } else {
            tiles.into_par_iter().for_each(|tile| simd::run(isa, Task { product: self, tile }));
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

thread_local! {
    /// Packed operands; kept, since the pages of a fresh allocation cost more than a small product.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Task<'a, L, R> {
    product: &'a Product<L, R>,
    tile: Tile<'a>,
}

impl<L: Left, R: Right> Work for Task<'_, L, R> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, simd: V) {
        let Task { product, tile: Tile { row, column, out } } = self;
        let (m, n) = out.dim();
        let pass = KC * (LEFT_BUDGET / (m * KC)).max(1);
        let mut rows: Vec<&mut [f32]> =
            out.into_outer_iter_mut().map(|row| row.into_slice().expect("rows are contiguous")).collect();

        let mut scratch = SCRATCH.take();
        let (packed, panel, sums) = split_aligned(
            &mut scratch,
            m * pass.min(product.depth) + SPILL,
            KC.min(product.depth) * V::NR,
            V::MR * V::NR,
        );
        for start in (0..product.depth).step_by(pass) {
            let end = (start + pass).min(product.depth);
            for block in blocks(start, end) {
                for i in (0..m).step_by(V::MR) {
                    let here = row + i..row + (i + V::MR).min(m);
                    let at = (block.start - start) * m + i * block.len();
                    product.left.pack(simd, here, block.clone(), &mut packed[at..]);
                }
            }
            for j in (0..n).step_by(V::NR) {
                for block in blocks(start, end) {
                    let panel = &mut panel[..block.len() * V::NR];
                    product.right.pack(simd, column + j, block.clone(), panel);
                    let beta = if block.start == 0 { product.beta } else { 1.0 };
                    for (i, rows) in (0..m).step_by(V::MR).zip(rows.chunks_mut(V::MR)) {
                        // Columns of row r of the tile that are below the diagonal.
                        let below = |r: usize| match product.upper {
                            true => (row + i + r).saturating_sub(column + j),
                            false => 0,
                        };
                        if below(0) >= V::NR {
                            break;
                        }
                        rows.iter().for_each(|row| prefetch(&raw const row[j]));
                        let at = (block.start - start) * m + i * block.len();
                        simd.tile(rows.len(), &packed[at..at + rows.len() * block.len()], panel, sums);
                        for (r, (out, sums)) in rows.iter_mut().zip(sums.chunks_exact(V::NR)).enumerate() {
                            let end = (j + V::NR).min(n);
                            match (below(r), out.get_mut(j..j + V::NR)) {
                                (0, Some(out)) => add(product.alpha, sums, beta, out),
                                (skip, _) if j + skip < end => {
                                    add(product.alpha, &sums[skip..], beta, &mut out[j + skip..end]);
                                }
                                _ => {}
                            }
                        }
                    }
                }
            }
        }
        SCRATCH.set(scratch);
    }
}

/// The parts of `start..end` that are summed apart.
fn blocks(start: usize, end: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (start..end).step_by(KC).map(move |p| p..(p + KC).min(end))
}

/// `out = alpha * sums + beta * out`, as long as `out`.
#[inline(always)]
fn add(alpha: f32, sums: &[f32], beta: f32, out: &mut [f32]) {
    if beta == 0.0 {
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = alpha.mul_add(*sum, 0.0));
    } else {
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = alpha.mul_add(*sum, beta * *out));
    }
}

/// Three slices of the given lengths in one allocation, each on a cache line of its own.
fn split_aligned(
    scratch: &mut Vec<f32>,
    a: usize,
    b: usize,
    c: usize,
) -> (&mut [f32], &mut [f32], &mut [f32]) {
    const LINE: usize = 16;
    let (a_end, b_end) = (a.next_multiple_of(LINE), b.next_multiple_of(LINE));
    let length = a_end + b_end + c + LINE;
    if scratch.len() < length {
        scratch.resize(length, 0.0);
    }
    let start = scratch.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    let (first, rest) = scratch[start..].split_at_mut(a_end);
    let (second, third) = rest.split_at_mut(b_end);
    (&mut first[..a], &mut second[..b], &mut third[..c])
}
