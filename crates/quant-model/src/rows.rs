//! Rows of matrices on all threads, and memory for matrices.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use quant_kernels::{Activations, pool};

/// Numbers below which rows stay on the calling thread: about a microsecond of it.
const SERIAL: usize = 1 << 13;

/// Calls `f` with the index of every row, the row of `x` and that of `out`. Panics if there are more rows of `out`, or
/// if rows are not contiguous.
pub(crate) fn each_row(
    x: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f32>,
    f: impl Fn(usize, &[f32], &mut [f32]) + Sync,
) {
    let numbers = x.len();
    let mut rows: Vec<_> = (0..).zip(slices(x).into_iter().zip(slices_mut(out))).collect();
    each(numbers, &mut rows, |(i, (x, out))| f(*i, x, out));
}

/// Calls `f` with every row of `x`, of `a` and of `b`.
pub(crate) fn each_row_pair(
    x: ArrayView2<'_, f32>,
    a: ArrayViewMut2<'_, f32>,
    b: ArrayViewMut2<'_, f32>,
    f: impl Fn(&[f32], &mut [f32], &mut [f32]) + Sync,
) {
    let numbers = x.len();
    let mut rows: Vec<_> = slices(x).into_iter().zip(slices_mut(a).into_iter().zip(slices_mut(b))).collect();
    each(numbers, &mut rows, |(x, (a, b))| f(x, a, b));
}

/// Calls `f` with the index of every row and the row.
pub(crate) fn each_row_mut(x: ArrayViewMut2<'_, f32>, f: impl Fn(usize, &mut [f32]) + Sync) {
    let numbers = x.len();
    let mut rows: Vec<_> = slices_mut(x).into_iter().enumerate().collect();
    each(numbers, &mut rows, |(i, row)| f(*i, row));
}

fn each<T: Send>(numbers: usize, rows: &mut [T], f: impl Fn(&mut T) + Sync) {
    if numbers <= SERIAL { rows.iter_mut().for_each(f) } else { pool::for_each(rows, f) }
}

fn slices<'a>(x: ArrayView2<'a, f32>) -> Vec<&'a [f32]> {
    x.into_outer_iter().map(|row| row.to_slice().expect("rows are contiguous")).collect()
}

fn slices_mut<'a>(x: ArrayViewMut2<'a, f32>) -> Vec<&'a mut [f32]> {
    x.into_outer_iter_mut().map(|row| row.into_slice().expect("rows are contiguous")).collect()
}

/// Memory that goes from stage to stage, since the pages of fresh memory cost as much as a pass over them.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    free: Vec<Vec<f32>>,
    /// Of one stage at a time, each for another input.
    pub(crate) activations: Vec<Activations>,
}

impl Workspace {
    /// A matrix `[rows, cols]` with any contents.
    pub(crate) fn matrix(&mut self, rows: usize, cols: usize) -> Array2<f32> {
        let len = rows * cols;
        // The smallest that is large enough, else the largest.
        let rank = |numbers: &Vec<f32>| match numbers.len() {
            n if n >= len => (0, n),
            n => (1, usize::MAX - n),
        };
        let best = (0..self.free.len()).min_by_key(|&i| rank(&self.free[i]));
        let mut numbers = best.map(|i| self.free.swap_remove(i)).unwrap_or_default();
        numbers.resize(len, 0.0);
        Array2::from_shape_vec((rows, cols), numbers).expect("as many numbers as elements")
    }

    /// Takes back the memory of a matrix.
    pub(crate) fn recycle(&mut self, matrix: Array2<f32>) {
        self.free.push(matrix.into_raw_vec_and_offset().0);
    }
}
