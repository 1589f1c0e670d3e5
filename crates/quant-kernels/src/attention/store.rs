//! Keys and values of the positions already seen, in the order in which attention reads them.
//!
//! ```text
//! head: keys   | 32 keys: dimension 0 of all 32, dimension 1 of all 32, ... | next 32 keys | ...
//!       values | dimensions 0..32 of key 0, of key 1, ... |   | dimensions 32..64 of key 0, of key 1, ... |   ...
//! ```
//!
//! Both are the panels of a product as they lie: keys need not be turned over again at every step.

use std::ops::Range;

use half::f16;
use ndarray::ArrayView2;

use crate::error::ShapeError;
use crate::simd::{Vector, Work};
use crate::vec::{absmax_of, narrow_f16};
use crate::{dense, isa, pool, simd};

/// How keys and values are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum KvType {
    /// As computed.
    #[default]
    F32,
    /// Rounded to binary16.
    F16,
    /// Rounded to 127 steps of the largest magnitude in each key and each value of a head.
    Int8,
}

/// Keys side by side, and dimensions of values. A multiple of the columns of every register tile.
pub(super) const PANEL: usize = 32;

/// Numbers below which rows are stored by the calling thread.
const SERIAL: usize = 1 << 14;

/// Keys (after rope) and values of one layer, which grow.
#[derive(Clone, Debug)]
pub struct KvStore {
    dim: usize,
    len: usize,
    heads: Stores,
}

#[derive(Clone, Debug)]
enum Stores {
    F32(Vec<Store<f32>>),
    F16(Vec<Store<f16>>),
    Int8(Vec<Store<i8>>),
}

/// One head.
#[derive(Clone, Debug, Default)]
pub(super) struct Store<E> {
    /// `[panels, dim, PANEL]`; keys to come are zero.
    keys: Vec<E>,
    /// `[len, PANEL]` for each panel of dimensions; dimensions that do not exist are zero.
    values: Vec<Vec<E>>,
    /// What a code of 1 stands for, `[panels * PANEL]` and `[len]`; empty where numbers stand for themselves.
    key_steps: Vec<f32>,
    value_steps: Vec<f32>,
}

impl KvStore {
    /// Nothing yet, of `heads` heads of `dim` numbers.
    pub fn new(heads: usize, dim: usize, kind: KvType) -> KvStore {
        fn empty<E: Clone + Default>(heads: usize) -> Vec<Store<E>> {
            vec![Store::default(); heads]
        }
        let heads = match kind {
            KvType::F32 => Stores::F32(empty(heads)),
            KvType::F16 => Stores::F16(empty(heads)),
            KvType::Int8 => Stores::Int8(empty(heads)),
        };
        KvStore { dim, len: 0, heads }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Heads of keys and values.
    pub fn heads(&self) -> usize {
        match &self.heads {
            Stores::F32(heads) => heads.len(),
            Stores::F16(heads) => heads.len(),
            Stores::Int8(heads) => heads.len(),
        }
    }

    /// Numbers per head.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Bytes in memory, with those for positions to come.
    pub fn bytes(&self) -> usize {
        match &self.heads {
            Stores::F32(heads) => heads.iter().map(Store::bytes).sum(),
            Stores::F16(heads) => heads.iter().map(Store::bytes).sum(),
            Stores::Int8(heads) => heads.iter().map(Store::bytes).sum(),
        }
    }

    /// Adds positions, `keys` and `values`: `[t, heads * dim]`.
    pub fn append(
        &mut self,
        keys: ArrayView2<'_, f32>,
        values: ArrayView2<'_, f32>,
    ) -> Result<(), ShapeError> {
        let (t, width) = (keys.nrows(), self.heads() * self.dim);
        dense::check_shape("keys", [t, width], &keys)?;
        dense::check_shape("values", [t, width], &values)?;
        dense::check_rows("keys", &keys)?;
        dense::check_rows("values", &values)?;
        let (keys, values) = (dense::rows_of(keys), dense::rows_of(values));
        let from = (self.len, self.dim);
        match &mut self.heads {
            Stores::F32(heads) => append(heads, from, &keys, &values),
            Stores::F16(heads) => append(heads, from, &keys, &values),
            Stores::Int8(heads) => append(heads, from, &keys, &values),
        }
        self.len += t;
        Ok(())
    }

    /// Runs `work` on a head.
    #[inline(always)]
    pub(super) fn with_head<W: HeadWork>(&self, head: usize, work: W) {
        match &self.heads {
            Stores::F32(heads) => work.run(&heads[head]),
            Stores::F16(heads) => work.run(&heads[head]),
            Stores::Int8(heads) => work.run(&heads[head]),
        }
    }
}

/// Something to do with a head, whatever it is made of.
pub(super) trait HeadWork {
    fn run<E: Stored>(self, head: &Store<E>);
}

/// Adds rows to all heads, each of which holds `len` positions.
fn append<E: Stored>(heads: &mut [Store<E>], (len, dim): (usize, usize), keys: &[&[f32]], values: &[&[f32]]) {
    struct Append<'a, E> {
        head: &'a mut Store<E>,
        columns: Range<usize>,
        len: usize,
        keys: &'a [&'a [f32]],
        values: &'a [&'a [f32]],
    }
    impl<E: Stored> Work for Append<'_, E> {
        type Output = ();

        #[inline(always)]
        fn run<V: Vector>(self, _: V) {
            self.head.append(self.len, self.columns, self.keys, self.values);
        }
    }
    let serial = keys.len() * heads.len() * dim <= SERIAL;
    let mut heads: Vec<_> = heads.iter_mut().enumerate().collect();
    let isa = isa::active();
    let each = |(i, head): &mut (usize, &mut Store<E>)| {
        let columns = *i * dim..(*i + 1) * dim;
        simd::run(isa, Append { head, columns, len, keys, values });
    };
    if serial { heads.iter_mut().for_each(each) } else { pool::for_each(&mut heads, each) }
}

impl<E: Stored> Store<E> {
    fn bytes(&self) -> usize {
        let values = self.values.iter().map(Vec::capacity).sum::<usize>();
        size_of::<E>() * (self.keys.capacity() + values)
            + 4 * (self.key_steps.capacity() + self.value_steps.capacity())
    }

    /// Adds columns of rows after the first `len` positions.
    #[inline(always)]
    fn append(&mut self, len: usize, columns: Range<usize>, keys: &[&[f32]], values: &[&[f32]]) {
        let (dim, end) = (columns.len(), len + keys.len());
        self.values.resize_with(dim.div_ceil(PANEL), Vec::new);
        grow(&mut self.keys, end.next_multiple_of(PANEL) * dim, dim);
        self.values.iter_mut().for_each(|strip| grow(strip, end * PANEL, PANEL));
        if E::STEPS {
            grow(&mut self.key_steps, end.next_multiple_of(PANEL), 1);
            grow(&mut self.value_steps, end, 1);
        }
        let mut row = vec![E::default(); dim];
        for (at, (key, value)) in (len..end).zip(keys.iter().zip(values)) {
            let step = E::narrow(&key[columns.clone()], &mut row);
            let panel = &mut self.keys[at / PANEL * PANEL * dim..][..PANEL * dim];
            panel.iter_mut().skip(at % PANEL).step_by(PANEL).zip(&row).for_each(|(to, x)| *to = *x);
            if E::STEPS {
                self.key_steps[at] = step;
            }
            let step = E::narrow(&value[columns.clone()], &mut row);
            for (strip, part) in self.values.iter_mut().zip(row.chunks(PANEL)) {
                strip[at * PANEL..][..part.len()].copy_from_slice(part);
            }
            if E::STEPS {
                self.value_steps[at] = step;
            }
        }
    }

    /// Dimensions `depth` of `width` keys from `first` on, a multiple of `width`: a panel `[depth, width]`. `dim` is the
    /// number of dimensions, `room` holds two panels.
    #[inline(always)]
    pub(super) fn keys<'a, V: Vector>(
        &'a self,
        simd: V,
        first: usize,
        width: usize,
        depth: Range<usize>,
        dim: usize,
        room: [&'a mut [f32]; 2],
    ) -> &'a [f32] {
        let panel = first / PANEL * PANEL;
        let numbers = &self.keys[panel * dim + depth.start * PANEL..][..depth.len() * PANEL];
        let steps = if E::STEPS { Steps::Columns(&self.key_steps[panel..][..PANEL]) } else { Steps::None };
        columns(simd, numbers, steps, first % PANEL, width, room)
    }

    /// Dimensions `c..c + width` of the values of `keys`, with `c` a multiple of `width`: a panel `[keys, width]`.
    #[inline(always)]
    pub(super) fn values<'a, V: Vector>(
        &'a self,
        simd: V,
        keys: Range<usize>,
        c: usize,
        width: usize,
        room: [&'a mut [f32]; 2],
    ) -> &'a [f32] {
        let numbers = &self.values[c / PANEL][keys.start * PANEL..keys.end * PANEL];
        let steps = if E::STEPS { Steps::Rows(&self.value_steps[keys]) } else { Steps::None };
        columns(simd, numbers, steps, c % PANEL, width, room)
    }
}

/// Appends zeros up to `len`. Room is made for 256 pieces of `piece` elements at least, and a quarter of what is there,
/// so that growing costs little per element.
fn grow<E: Copy + Default>(store: &mut Vec<E>, len: usize, piece: usize) {
    if store.capacity() < len {
        store.reserve_exact((len - store.len()).max(256 * piece).max(store.len() / 4));
    }
    store.resize(len, E::default());
}

/// Factors of the numbers of a panel.
#[derive(Clone, Copy)]
enum Steps<'a> {
    None,
    Rows(&'a [f32]),
    Columns(&'a [f32]),
}

/// Columns `lane..lane + width` of `numbers: [n, PANEL]` in f32: the numbers themselves where that is possible.
#[inline(always)]
fn columns<'a, E: Stored, V: Vector>(
    simd: V,
    numbers: &'a [E],
    steps: Steps<'_>,
    lane: usize,
    width: usize,
    [wide, narrow]: [&'a mut [f32]; 2],
) -> &'a [f32] {
    let numbers = match E::as_f32(numbers) {
        Some(numbers) => numbers,
        None => {
            let wide = &mut wide[..numbers.len()];
            E::widen(simd, numbers, wide);
            let rows = wide.as_chunks_mut::<PANEL>().0;
            match steps {
                Steps::None => {}
                Steps::Rows(steps) => {
                    rows.iter_mut()
                        .zip(steps)
                        .for_each(|(row, step)| row.iter_mut().for_each(|x| *x *= step));
                }
                Steps::Columns(steps) => {
                    rows.iter_mut()
                        .for_each(|row| row.iter_mut().zip(steps).for_each(|(x, step)| *x *= step));
                }
            }
            wide
        }
    };
    if width == PANEL {
        return numbers;
    }
    let narrow = &mut narrow[..numbers.len() / PANEL * width];
    for (row, out) in numbers.as_chunks::<PANEL>().0.iter().zip(narrow.chunks_exact_mut(width)) {
        out.copy_from_slice(&row[lane..lane + width]);
    }
    narrow
}

/// A number as it is held.
pub(super) trait Stored: Copy + Default + Send + Sync {
    /// Whether a row has a step.
    const STEPS: bool = false;
    /// Rounds a row and returns its step.
    fn narrow(row: &[f32], out: &mut [Self]) -> f32;
    /// Makes f32 of them, in steps where there are steps.
    fn widen<V: Vector>(simd: V, from: &[Self], out: &mut [f32]);
    /// The numbers as they are, if they are f32.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn narrow(row: &[f32], out: &mut [f32]) -> f32 {
        out.copy_from_slice(row);
        1.0
    }

    #[inline(always)]
    fn widen<V: Vector>(_: V, from: &[f32], out: &mut [f32]) {
        out.copy_from_slice(from);
    }

    #[inline(always)]
    fn as_f32(numbers: &[f32]) -> Option<&[f32]> {
        Some(numbers)
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn narrow(row: &[f32], out: &mut [f16]) -> f32 {
        for (out, x) in out.iter_mut().zip(row) {
            *out = f16::from_bits(narrow_f16(*x));
        }
        1.0
    }

    #[inline(always)]
    fn widen<V: Vector>(simd: V, from: &[f16], out: &mut [f32]) {
        simd.widen(from, out);
    }
}

impl Stored for i8 {
    const STEPS: bool = true;

    #[inline(always)]
    fn narrow(row: &[f32], out: &mut [i8]) -> f32 {
        let max = absmax_of(row);
        let inverse = 127.0 / max;
        // Zeros, and what is too small to have a reciprocal, become zeros; NaN and infinity spread over the row.
        let (inverse, step) = match () {
            _ if !max.is_finite() => (0.0, f32::NAN),
            _ if !inverse.is_finite() => (0.0, 0.0),
            _ => (inverse, max / 127.0),
        };
        for (out, x) in out.iter_mut().zip(row) {
            *out = (x * inverse).round_ties_even() as i8;
        }
        step
    }

    #[inline(always)]
    fn widen<V: Vector>(_: V, from: &[i8], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(from) {
            *out = f32::from(*x);
        }
    }
}

/// The value of a stored number, for tests.
#[cfg(test)]
pub(super) fn rounded(kind: KvType, row: &[f32]) -> Vec<f32> {
    match kind {
        KvType::F32 => row.to_vec(),
        KvType::F16 => row.iter().map(|x| crate::simd::widen_f16(narrow_f16(*x))).collect(),
        KvType::Int8 => {
            let mut codes = vec![0; row.len()];
            let step = i8::narrow(row, &mut codes);
            codes.iter().map(|&code| f32::from(code) * step).collect()
        }
    }
}
