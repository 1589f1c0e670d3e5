//! Attention of a block of queries to cached keys and values.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

use crate::dense::{self, KC, SPILL, add, parts};
use crate::error::ShapeError;
use crate::isa;
use crate::scratch::Scratch;
use crate::simd::{self, Vector, Work};
use crate::vec::softmax_visible;

#[cfg(test)]
mod tests;

/// Heads of an attention layer. Query head `h` looks at key-value head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Numbers per head.
    pub dim: usize,
}

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All of them (encoders).
    All,
    /// Row `i` of the queries sits at position `offset + i` and sees the keys up to its own position, the last
    /// `window` of them if there is a window.
    Causal {
        /// Position of the first query.
        offset: usize,
        /// Greatest number of keys seen.
        window: Option<usize>,
    },
}

impl Mask {
    /// The keys that query `row` sees, of `keys`.
    fn visible(self, row: usize, keys: usize) -> Range<usize> {
        match self {
            Mask::All => 0..keys,
            Mask::Causal { offset, window } => {
                let end = offset + row + 1;
                end.saturating_sub(window.unwrap_or(end))..end
            }
        }
    }
}

/// Query rows that one task handles: their scores over some thousand keys fit a level-2 cache.
const ROWS: usize = 48;

/// Multiplications below which everything stays on the calling thread (see [`crate::dense`]).
const SERIAL: usize = 1 << 18;

/// `out = softmax(scale · q · kᵀ) · v` for each head.
///
/// `q`, `out`: `[t, heads * dim]`; `k`, `v`: `[s, kv_heads * dim]`. A causal mask needs `s >= offset + t`. What a
/// query does not see has no influence, not even as a zero times infinity. Row `i` depends on its query and on the
/// keys and values that it sees, not on `t`: scores are the products of [`crate::matmul_nt`]; values are summed by
/// fused multiply-adds in the order of the keys, in blocks of [`KC`] keys counted from the first key of all.
pub fn attend(
    heads: Heads,
    mask: Mask,
    scale: f32,
    q: ArrayView2<'_, f32>,
    k: ArrayView2<'_, f32>,
    v: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    let Heads { heads: count, kv_heads, dim } = heads;
    let (t, s) = (q.nrows(), k.nrows());
    if kv_heads == 0 || !count.is_multiple_of(kv_heads) {
        return Err(ShapeError::Length { operand: "heads", expected: kv_heads, found: count });
    }
    dense::check_shape("q", [t, count * dim], &q)?;
    dense::check_shape("k", [s, kv_heads * dim], &k)?;
    dense::check_shape("v", [s, kv_heads * dim], &v)?;
    dense::check_shape("out", [t, count * dim], &out)?;
    dense::check_rows("q", &q)?;
    dense::check_rows("k", &k)?;
    dense::check_rows("v", &v)?;
    dense::check_rows("out", &out)?;
    if let Mask::Causal { offset, .. } = mask
        && s < offset + t
    {
        return Err(ShapeError::Length { operand: "k", expected: offset + t, found: s });
    }

    if count * dim == 0 {
        return Ok(());
    }
    let group = count / kv_heads;
    let height = (ROWS / group).max(1);
    let (q, k, v) = (dense::rows_of(q), dense::rows_of(k), dense::rows_of(v));
    let mut tasks = Vec::new();
    let mut below = out;
    for rows in parts(0..t, height) {
        let (mut strip, rest) = below.split_at(Axis(0), rows.len());
        for kv_head in 0..kv_heads {
            let (out, right) = strip.split_at(Axis(1), group * dim);
            tasks.push(Task {
                dim,
                group,
                kv_head,
                mask,
                scale,
                rows: rows.clone(),
                q: &q,
                k: &k,
                v: &v,
                out,
            });
            strip = right;
        }
        below = rest;
    }
    let isa = isa::active();
    if tasks.len() < 2 || t.saturating_mul(s).saturating_mul(count * dim) <= SERIAL {
        tasks.into_iter().for_each(|task| simd::run(isa, task));
    } else {
        tasks.into_par_iter().for_each(|task| simd::run(isa, task));
    }
    Ok(())
}

/// Some queries of the heads that share a key-value head.
struct Task<'a> {
    dim: usize,
    group: usize,
    kv_head: usize,
    mask: Mask,
    scale: f32,
    /// Rows of `q`.
    rows: Range<usize>,
    q: &'a [&'a [f32]],
    k: &'a [&'a [f32]],
    v: &'a [&'a [f32]],
    /// `[rows, group * dim]`.
    out: ArrayViewMut2<'a, f32>,
}

impl Work for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self, simd: V) {
        let (dim, group, keys) = (self.dim, self.group, self.k.len());
        // Query and head `i` of this task: queries outermost, so that neighbours see nearly the same keys.
        let count = self.rows.len() * group;
        let visible = |i: usize| self.mask.visible(self.rows.start + i / group, keys);
        // Keys that any of some queries sees.
        let seen = |some: Range<usize>| visible(some.start).start..visible(some.end - 1).end;
        let all = seen(0..count);
        let tile_rows = count.div_ceil(count.div_ceil(V::MR));

        if all.is_empty() {
            self.out.fill(0.0);
            return;
        }

        let mut scratch = Scratch::take();
        let [scores, left, panel, sums] =
            scratch.split([count * all.len(), count * KC + SPILL, KC * V::NR, tile_rows * V::NR]);

        // Scores, a panel of keys at a time.
        let columns = self.kv_head * dim..(self.kv_head + 1) * dim;
        let queries: Vec<&[f32]> = (0..count)
            .map(|i| {
                let head = self.kv_head * group + i % group;
                &self.q[self.rows.start + i / group][head * dim..(head + 1) * dim]
            })
            .collect();
        for block in parts(0..dim, KC) {
            for tile in parts(0..count, tile_rows) {
                dense::pack_rows(
                    simd,
                    &queries[tile.clone()],
                    block.clone(),
                    &mut left[tile.start * block.len()..],
                );
            }
            for j in all.clone().step_by(V::NR) {
                let depth = columns.start + block.start..columns.start + block.end;
                let panel = &mut panel[..block.len() * V::NR];
                dense::pack_turned(simd, &self.k[..all.end], j, depth, V::NR, panel);
                for tile in parts(0..count, tile_rows) {
                    let keys = seen(tile.clone());
                    if j >= keys.end || j + V::NR <= keys.start {
                        continue;
                    }
                    let sums = &mut sums[..tile.len() * V::NR];
                    sums.fill(0.0);
                    let a = &left[tile.start * block.len()..tile.end * block.len()];
                    simd.tile(tile.len(), V::NR, a, panel, sums);
                    let width = V::NR.min(all.end - j);
                    let beta = if block.start == 0 { 0.0 } else { 1.0 };
                    for (i, sums) in tile.zip(sums.chunks_exact(V::NR)) {
                        let at = i * all.len() + j - all.start;
                        add(self.scale, &sums[..width], beta, &mut scores[at..at + width]);
                    }
                }
            }
        }

        for (i, row) in scores.chunks_exact_mut(all.len()).enumerate() {
            let visible = visible(i);
            softmax_visible(row, visible.start - all.start..visible.end - all.start);
        }

        // Values, a block of keys at a time; blocks are counted from key 0.
        self.out.fill(0.0);
        let mut out: Vec<&mut [f32]> = Vec::with_capacity(count);
        for row in self.out.into_outer_iter_mut() {
            out.extend(row.into_slice().expect("rows are contiguous").chunks_exact_mut(dim));
        }
        for block in parts(all.start / KC * KC..all.end, KC) {
            let block = block.start.max(all.start)..block.end;
            let scores = |i: usize, keys: Range<usize>| {
                &scores[i * all.len()..][keys.start - all.start..keys.end - all.start]
            };
            let values =
                |keys: Range<usize>| (keys.start - block.start) * V::NR..(keys.end - block.start) * V::NR;
            // The keys that all rows of a tile see; a row sees some more before and behind.
            let middle = |tile: &Range<usize>| {
                let start = visible(tile.end - 1).start.clamp(block.start, block.end);
                start..visible(tile.start).end.clamp(start, block.end)
            };
            for tile in parts(0..count, tile_rows) {
                let middle = middle(&tile);
                let rows: Vec<&[f32]> = tile.clone().map(|i| scores(i, middle.clone())).collect();
                dense::pack_rows(simd, &rows, 0..middle.len(), &mut left[tile.start * KC..]);
            }
            for c in (0..dim).step_by(V::NR) {
                dense::pack_plain(&self.v[block.clone()], columns.start + c, V::NR, panel);
                for tile in parts(0..count, tile_rows) {
                    let sums = &mut sums[..tile.len() * V::NR];
                    sums.fill(0.0);
                    let middle = middle(&tile);
                    for (i, sums) in tile.clone().zip(sums.chunks_exact_mut(V::NR)) {
                        let before = visible(i).start.clamp(block.start, middle.start)..middle.start;
                        simd.tile(1, V::NR, scores(i, before.clone()), &panel[values(before)], sums);
                    }
                    let a = &left[tile.start * KC..][..tile.len() * middle.len()];
                    simd.tile(tile.len(), V::NR, a, &panel[values(middle.clone())], sums);
                    for (i, sums) in tile.clone().zip(sums.chunks_exact_mut(V::NR)) {
                        let behind = middle.end..visible(i).end.clamp(middle.end, block.end);
                        simd.tile(1, V::NR, scores(i, behind.clone()), &panel[values(behind)], sums);
                    }
                    for (i, sums) in tile.zip(sums.chunks_exact(V::NR)) {
                        let width = V::NR.min(dim - c);
                        add(1.0, &sums[..width], 1.0, &mut out[i][c..c + width]);
                    }
                }
            }
        }
    }
}
