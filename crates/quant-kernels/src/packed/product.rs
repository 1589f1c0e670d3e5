//! The fast product: int8 activations times packed weights, tile by tile.

use std::array::from_fn;
use std::ops::Range;

use ndarray::{ArrayViewMut2, Axis};

use super::act::{Activations, Tile};
use super::panels::Panels;
use super::planes::OUTPUTS;
use crate::simd::{self, Vector, Work};
use crate::ukr::{Call, HEIGHTS, Kernel, MOST_PANELS, Weights, table};
use crate::{isa, pool};

/// Bytes of activations that a thread goes through again and again, panel after panel: three quarters of a level-2
/// cache of 1 MiB.
const ROWS_BUDGET: usize = 768 << 10;

/// Multiplications below which a product stays on the calling thread.
const SERIAL: usize = 1 << 18;

/// `out = x · wᵀ` for several weights in one region. Shapes, inputs and weights are checked by the caller.
pub(super) fn multiply(x: &Activations, products: Vec<(&Panels, Weights, ArrayViewMut2<'_, f32>)>) {
    let isa = isa::active();
    let (mut list, mut outs, mut work) = (Vec::with_capacity(products.len()), Vec::new(), 0usize);
    for (panels, weights, out) in products {
        let kernels = HEIGHTS.map(|height| table::select(isa, weights, height));
        let starts = x.starts(panels.format.midpoint, kernels[0].center);
        list.push(Product { panels, x, starts, kernels });
        outs.push(out);
        work = work.saturating_add(x.rows().saturating_mul(panels.rows).saturating_mul(panels.cols));
    }
    // Each thread gets its part of every product.
    let threads = if work <= SERIAL { 1 } else { pool::threads() };
    let mut tasks = Vec::new();
    for thread in 0..threads {
        for (product, out) in list.iter().zip(&mut outs) {
            product.cut(thread, threads, out, &mut tasks);
        }
    }
    let run = |task: &mut Task<'_>| simd::run(isa, task);
    if threads == 1 { tasks.iter_mut().for_each(run) } else { pool::for_each(&mut tasks, run) }
}

struct Product<'a> {
    panels: &'a Panels,
    x: &'a Activations,
    /// See [`Activations::starts`].
    starts: Vec<i32>,
    /// One for each of [`HEIGHTS`].
    kernels: [&'static Kernel; HEIGHTS.len()],
}

/// Some tiles times some panels.
struct Task<'a> {
    product: &'a Product<'a>,
    tiles: Range<usize>,
    panels: Range<usize>,
    out: ArrayViewMut2<'a, f32>,
}

impl Product<'_> {
    /// The panels of one thread, times blocks of rows that stay in cache. `right` is what is left of the output.
    fn cut<'a>(
        &'a self,
        thread: usize,
        threads: usize,
        right: &mut ArrayViewMut2<'a, f32>,
        tasks: &mut Vec<Task<'a>>,
    ) {
        let tiles = self.x.tiles();
        let tile_bytes = HEIGHTS[HEIGHTS.len() - 1] * self.panels.blocks.padded();
        let together = (ROWS_BUDGET / tile_bytes.max(1)).max(1);
        let panels = pool::part(self.panels.count(), MOST_PANELS, thread, threads);
        if panels.is_empty() {
            return;
        }
        let outputs = (panels.len() * OUTPUTS).min(right.ncols());
        let empty = ArrayViewMut2::from_shape((0, 0), &mut []).expect("nothing");
        let (mut below, rest) = std::mem::replace(right, empty).split_at(Axis(1), outputs);
        *right = rest;
        for first in (0..tiles.len()).step_by(together) {
            let here = first..tiles.len().min(first + together);
            let rows = tiles[here.clone()].iter().map(|tile| tile.rows.len()).sum();
            let (out, rest) = below.split_at(Axis(0), rows);
            below = rest;
            tasks.push(Task { product: self, tiles: here, panels: panels.clone(), out });
        }
    }

    fn kernel(&self, tile: &Tile) -> &'static Kernel {
        let index =
            HEIGHTS.iter().position(|&height| height == tile.height).expect("tiles have these heights");
        self.kernels[index]
    }
}

impl Work for &mut Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        let tiles = &self.product.x.tiles()[self.tiles.clone()];
        // All tiles but the last have the greatest height, and one kernel.
        let full = tiles.iter().take_while(|tile| tile.height == HEIGHTS[HEIGHTS.len() - 1]).count();
        // Each stream of weights goes on where it left off at the call before: one that jumps costs some cache misses
        // in a row, a quarter of the time where panels are short and rows are few.
        let calls = self.panels.len().div_ceil(MOST_PANELS);
        for call in 0..calls {
            let at: [usize; MOST_PANELS] = from_fn(|stream| self.panels.start + stream * calls + call);
            let there = at.partition_point(|panel| *panel < self.panels.end);
            for tiles in [0..full, full..tiles.len()] {
                self.multiply(tiles, &at[..there]);
            }
        }
    }
}

impl Task<'_> {
    /// Tiles of one kernel times some panels.
    #[inline(always)]
    fn multiply(&mut self, tiles: Range<usize>, panels: &[usize]) {
        let Product { panels: weights, x, starts, .. } = self.product;
        let Some(tile) = x.tiles()[self.tiles.clone()].get(tiles.start) else { return };
        let kernel = self.product.kernel(tile);
        let mut sums = [0.0; HEIGHTS[HEIGHTS.len() - 1] * MOST_PANELS * OUTPUTS];
        let width = kernel.panels * OUTPUTS;
        let sums = &mut sums[..kernel.height * width];
        for panels in panels.chunks(kernel.panels) {
            // Where panels run out, the last stands in and what comes of it is dropped.
            let streams: [&[u8]; MOST_PANELS] = from_fn(|i| weights.panel(panels[i.min(panels.len() - 1)]));
            for t in tiles.clone() {
                let index = self.tiles.start + t;
                kernel.run(Call {
                    blocks: &weights.blocks,
                    format: &weights.format,
                    panels: &streams[..kernel.panels],
                    height: kernel.height,
                    rows: x.tile(index, starts),
                    out: sums,
                });
                for (row, sums) in x.tiles()[index].rows.clone().zip(sums.chunks_exact_mut(width)) {
                    for (panel, sums) in panels.iter().zip(sums.chunks_exact_mut(OUTPUTS)) {
                        self.store(row, *panel, sums);
                    }
                }
            }
        }
    }

    /// Writes the sums of a row for the outputs of a panel.
    #[inline(always)]
    fn store(&mut self, row: usize, panel: usize, sums: &mut [f32]) {
        let Product { panels: weights, x, .. } = self.product;
        let output = panel * OUTPUTS;
        let outputs = sums.len().min(weights.rows - output);
        let sums = &mut sums[..outputs];
        if let Some(scale) = &weights.row_scale {
            sums.iter_mut().zip(&scale[output..]).for_each(|(sum, scale)| *sum *= scale);
        }
        let padded = weights.count() * OUTPUTS;
        for (i, x) in x.outliers(row).iter().enumerate() {
            let column = &weights.outliers[i * padded + output..];
            sums.iter_mut().zip(column).for_each(|(sum, weight)| *sum = x.mul_add(*weight, *sum));
        }
        let top = self.product.x.tiles()[self.tiles.start].rows.start;
        let left = (panel - self.panels.start) * OUTPUTS;
        let mut out = self.out.row_mut(row - top);
        let out = out.as_slice_mut().expect("rows are contiguous");
        out[left..][..outputs].copy_from_slice(sums);
    }
}
