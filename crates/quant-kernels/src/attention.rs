//! Attention of a block of queries to stored keys and values.

mod store;
#[cfg(test)]
mod tests;

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, Axis};

use self::store::{HeadWork, PANEL, Store, Stored};
pub use self::store::{KvStore, KvType};
use crate::dense::{self, KC, SPILL, add, parts};
use crate::error::ShapeError;
use crate::scratch::Scratch;
use crate::simd::{self, Vector, Work};
use crate::vec::softmax_visible;
use crate::{isa, pool};

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

/// Multiplications below which everything stays on the calling thread: about a microsecond of it.
const SERIAL: usize = 1 << 16;

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
    let mut store = KvStore::new(heads.kv_heads, heads.dim, KvType::F32);
    store.append(k, v)?;
    attend_stored(heads, mask, scale, q, &store, out)
}

/// [`attend`] to stored keys and values of `heads.kv_heads` heads of `heads.dim` numbers. In f32 the bits are the same;
/// otherwise they are those of the stored numbers made f32 again.
pub fn attend_stored(
    heads: Heads,
    mask: Mask,
    scale: f32,
    q: ArrayView2<'_, f32>,
    store: &KvStore,
    out: ArrayViewMut2<'_, f32>,
) -> Result<(), ShapeError> {
    let Heads { heads: count, kv_heads, dim } = heads;
    let (t, s) = (q.nrows(), store.len());
    if kv_heads == 0 || !count.is_multiple_of(kv_heads) {
        return Err(ShapeError::Length { operand: "heads", expected: kv_heads, found: count });
    }
    dense::check_shape("q", [t, count * dim], &q)?;
    dense::check_shape("out", [t, count * dim], &out)?;
    dense::check_rows("q", &q)?;
    dense::check_rows("out", &out)?;
    if (kv_heads, dim) != (store.heads(), store.dim()) {
        let (expected, found) = ([kv_heads, dim], [store.heads(), store.dim()]);
        return Err(ShapeError::Shape { operand: "heads", expected, found });
    }
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
    let q = dense::rows_of(q);
    let mut tasks = Vec::new();
    let mut below = out;
    for rows in parts(0..t, height) {
        let (mut strip, rest) = below.split_at(Axis(0), rows.len());
        for kv_head in 0..kv_heads {
            let (out, right) = strip.split_at(Axis(1), group * dim);
            tasks.push(Task { dim, group, kv_head, mask, scale, rows: rows.clone(), q: &q, store, out });
            strip = right;
        }
        below = rest;
    }
    let isa = isa::active();
    let run = |task: &mut Task<'_>| simd::run(isa, Run(task));
    if t.saturating_mul(s).saturating_mul(count * dim) <= SERIAL {
        tasks.iter_mut().for_each(run);
    } else {
        pool::for_each(&mut tasks, run);
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
    store: &'a KvStore,
    /// `[rows, group * dim]`.
    out: ArrayViewMut2<'a, f32>,
}

/// A task on its way to the code of its vectors and of its store.
struct Run<'t, 'a>(&'t mut Task<'a>);

impl Work for Run<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, simd: V) {
        struct On<'t, 'a, V>(&'t mut Task<'a>, V);
        impl<V: Vector> HeadWork for On<'_, '_, V> {
            #[inline(always)]
            fn run<E: Stored>(self, head: &Store<E>) {
                self.0.attend(self.1, head);
            }
        }
        let (store, head) = (self.0.store, self.0.kv_head);
        store.with_head(head, On(self.0, simd));
    }
}

impl Task<'_> {
    #[inline(always)]
    fn attend<V: Vector, E: Stored>(&mut self, simd: V, store: &Store<E>) {
        const { assert!(PANEL.is_multiple_of(V::NR)) };
        let (dim, group, keys) = (self.dim, self.group, self.store.len());
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

        // Scores begin with a panel of keys; those of keys before `all` count for nothing.
        let base = all.start / V::NR * V::NR;
        let width = all.end - base;
        let mut scratch = Scratch::take();
        let [scores, left, wide, narrow, sums] =
            scratch.split([count * width, count * KC + SPILL, KC * PANEL, KC * V::NR, tile_rows * V::NR]);

        // Scores, a panel of keys at a time.
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
            for j in (base..all.end).step_by(V::NR) {
                let panel = store.keys(simd, j, V::NR, block.clone(), dim, [&mut *wide, &mut *narrow]);
                for tile in parts(0..count, tile_rows) {
                    let keys = seen(tile.clone());
                    if j >= keys.end || j + V::NR <= keys.start {
                        continue;
                    }
                    let sums = &mut sums[..tile.len() * V::NR];
                    sums.fill(0.0);
                    let a = &left[tile.start * block.len()..tile.end * block.len()];
                    simd.tile(tile.len(), V::NR, a, panel, sums);
                    let here = V::NR.min(all.end - j);
                    let beta = if block.start == 0 { 0.0 } else { 1.0 };
                    for (i, sums) in tile.zip(sums.chunks_exact(V::NR)) {
                        let at = i * width + j - base;
                        add(self.scale, &sums[..here], beta, &mut scores[at..at + here]);
                    }
                }
            }
        }

        for (i, row) in scores.chunks_exact_mut(width).enumerate() {
            let visible = visible(i);
            softmax_visible(row, visible.start - base..visible.end - base);
        }

        // Values, a block of keys at a time; blocks are counted from key 0.
        self.out.fill(0.0);
        let mut out: Vec<&mut [f32]> = Vec::with_capacity(count);
        for row in self.out.view_mut().into_outer_iter_mut() {
            out.extend(row.into_slice().expect("rows are contiguous").chunks_exact_mut(dim));
        }
        for block in parts(all.start / KC * KC..all.end, KC) {
            let block = block.start.max(all.start)..block.end;
            let scores =
                |i: usize, keys: Range<usize>| &scores[i * width..][keys.start - base..keys.end - base];
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
                let panel = store.values(simd, block.clone(), c, V::NR, [&mut *wide, &mut *narrow]);
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
                        let here = V::NR.min(dim - c);
                        add(1.0, &sums[..here], 1.0, &mut out[i][c..c + here]);
                    }
                }
            }
        }
    }
}
