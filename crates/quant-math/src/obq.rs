//! The column loop of GPTQ.
//!
//! # Formulation
//!
//! GPTQ rounds the columns of `W` one after the other; the error of a column is made up for by the columns after it.
//! The reference code pushes each error forward with rows of `U`, `UᵀU = H⁻¹`. The same numbers come out of the
//! upper factor `R` of `R Rᵀ = H`, without any inverse: with `E = W - Ŵ` (original minus rounded) the column `j`
//! that is about to be rounded is
//!
//! ```text
//! w'_j = w_j + (Σ_{i<j} E_i R_ij) / R_jj            Ŵ_j = Q(w'_j)            E_j = w_j - Ŵ_j
//! ```
//!
//! That is Babai's nearest-plane rounding with the basis `R`, run from the first column; that GPTQ is this algorithm
//! is shown in Chen, Shabanzadeh, Crnčević, Hoefler, Alistarh, "The Geometry of LLM Quantization: GPTQ as Babai's
//! Nearest Plane Algorithm" (2025). Direct check: the loss is `tr(E H Eᵀ) = ‖E R‖²`, its part of column `j` is
//! `(E R)_j = (w'_j - Ŵ_j) R_jj`, and the choice of column `j` does not touch the parts before it.
//!
//! What this buys: a third of the work on `H` (no inverse, no second factor); stored errors that are those of the
//! original weights, so that `‖E‖` and the loss need no second pass; and `E` takes the place of `W`. Both forms are
//! equally exact (`tests::both_forms_are_equally_exact`: with a Hessian ill-conditioned enough for f32 to matter, 11
//! and 12 of 64 rows part from the f64 result); in both it is the factorization of `H` in f32 that decides.
//!
//! # Blocks
//!
//! Columns go in blocks (128). What all earlier columns contribute to a block is one dense product,
//! `A = E[:, ..s] R[.., s..t]`; inside the block the sums are kept up to date column by column, in tiles of 32 rows
//! whose loops run across rows. Rows are independent, so the split over threads never changes a bit.
//!
//! # Groups fitted on the way
//!
//! A group's grid is fitted when its first column is reached, on the weights as the errors so far have moved them,
//! `w'_G = w_G + x` with `x R_GG = a_G` (what rounding the group exactly would have to hit). The reference code lets
//! groups inside a block miss the updates of that block; [`GroupTiming::BlockStart`] does the same.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, Slice};
use quant_kernels::{matmul_nn, vectorized};
use rayon::prelude::*;

use crate::affine::{Affine, code_bits, nearest_code};
use crate::range::{GridFit, ScaleOverflow};

/// Rows of a tile: eight vectors of four floats, so that a column of errors stays in registers.
const LANES: usize = 32;

/// One value per row of a tile.
type Lanes = [f32; LANES];

/// Where the grids come from.
#[derive(Clone, Copy, Debug)]
pub enum Grouping<'a> {
    /// Runs of `len` columns in rounding order, fitted on the way; the last may be short.
    Fitted {
        /// Columns per group.
        len: usize,
        /// How a grid follows from weights.
        fit: GridFit,
        /// Which updates a group's weights have seen.
        timing: GroupTiming,
    },
    /// Known beforehand.
    Fixed {
        /// Group of each column, in rounding order `[k]`.
        of_col: &'a [u32],
        /// Grid of each group in each row, `[n, groups]`.
        grids: ArrayView2<'a, Affine>,
        /// The largest code.
        max: u8,
    },
}

/// Which updates the weights have seen that a group is fitted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupTiming {
    /// All of them.
    Reached,
    /// Those of earlier blocks, as in the reference code. Groups must divide the block or be multiples of it.
    BlockStart,
}

/// What [`round_columns`] found.
#[derive(Clone, Debug)]
pub struct Rounded {
    /// Codes `[n, k]`, in rounding order.
    pub codes: Array2<u8>,
    /// Grids `[n, groups]` in rounding order; empty if they were given.
    pub grids: Array2<Affine>,
    /// `tr(E H Eᵀ)` for the `H` whose factor was given, damping included.
    pub loss: f64,
}

/// A group has no finite scale.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("row {row}, column {col} in rounding order: {error}")]
pub struct GroupOverflow {
    /// Row.
    pub row: usize,
    /// Column of the offending weight, in rounding order.
    pub col: usize,
    /// The weight and its scale.
    pub error: ScaleOverflow,
}

/// Rounds all columns of `w` in order. On return `w` holds the errors, original minus rounded.
///
/// `w`: `[n, k]` with contiguous rows. `r`: `[k, k]`, upper triangular factor `R Rᵀ = H`; what lies below the diagonal
/// is not read. Columns are processed in blocks of `block`, groups longer than that in windows of a whole group.
pub fn round_columns(
    mut w: ArrayViewMut2<'_, f32>,
    r: ArrayView2<'_, f32>,
    block: usize,
    grouping: Grouping<'_>,
) -> Result<Rounded, GroupOverflow> {
    let (n, k) = w.dim();
    assert_eq!(r.dim(), (k, k), "one row and column of the factor per column of the weights");
    assert!(block > 0, "blocks have columns");
    let (len, groups) = match grouping {
        Grouping::Fitted { len, .. } => (len, k.div_ceil(len)),
        Grouping::Fixed { .. } => (1, 0),
    };
    // Windows hold whole groups, so that a fit never has to look beyond.
    let window = if len > block { len } else { block / len * len };
    let mut out = Rounded { codes: Array2::zeros((n, k)), grids: Array2::default((n, groups)), loss: 0.0 };
    let mut sums = Array2::zeros((n, window.min(k)));
    for start in (0..k).step_by(window) {
        let end = (start + window).min(k);
        let mut sums = columns_mut(sums.view_mut(), 0, end - start);
        sums.fill(0.0);
        add_product(columns(w.view(), 0, start), block_of(r, 0..start, start..end), 1.0, sums.view_mut());
        if let Grouping::Fitted { fit, .. } = grouping
            && len > block
        {
            let grids = columns_mut(out.grids.view_mut(), start / len, start / len + 1);
            fit_window(columns(w.view(), start, end), sums.view(), r, start, block, fit, grids)?;
        }
        for from in (start..end).step_by(block.min(window)) {
            let to = (from + block).min(end);
            let factor = Factor::new(r, from, to);
            let (before, here) = w.view_mut().split_at(Axis(1), from);
            let mut sums = columns_mut(sums.view_mut(), from - start, to - start);
            let errors = columns(before.view(), start, from);
            add_product(errors, block_of(r, start..from, from..to), 1.0, sums.view_mut());
            let here = columns_mut(here, 0, to - from);
            let codes = columns_mut(out.codes.view_mut(), from, to);
            out.loss +=
                round_block(here, sums.view(), &factor, grouping, block, codes, out.grids.view_mut())?;
        }
    }
    Ok(out)
}

fn columns<'a, T>(m: ArrayView2<'a, T>, from: usize, to: usize) -> ArrayView2<'a, T> {
    m.slice_axis_move(Axis(1), Slice::from(from..to))
}

fn columns_mut<'a, T>(m: ArrayViewMut2<'a, T>, from: usize, to: usize) -> ArrayViewMut2<'a, T> {
    m.slice_axis_move(Axis(1), Slice::from(from..to))
}

fn block_of(
    r: ArrayView2<'_, f32>,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
) -> ArrayView2<'_, f32> {
    columns(r.slice_axis_move(Axis(0), Slice::from(rows)), cols.start, cols.end)
}

/// `out += sign · a · b`.
fn add_product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, sign: f32, out: ArrayViewMut2<'_, f32>) {
    if a.ncols() > 0 {
        matmul_nn(sign, a, b, 1.0, out).expect("the inner dimensions are the same columns");
    }
}

/// The block of the factor that belongs to the columns `from..to`.
struct Factor<'a> {
    from: usize,
    /// `[b, b]`, upper triangle.
    r: ArrayView2<'a, f32>,
    diagonal: Vec<f32>,
    reciprocal: Vec<f32>,
}

impl<'a> Factor<'a> {
    fn new(r: ArrayView2<'a, f32>, from: usize, to: usize) -> Self {
        let r = block_of(r, from..to, from..to);
        let diagonal = r.diag().to_vec();
        let reciprocal = diagonal.iter().map(|d| 1.0 / d).collect();
        Self { from, r, diagonal, reciprocal }
    }

    fn len(&self) -> usize {
        self.diagonal.len()
    }

    /// `R[i, i+1..end]`.
    fn after(&self, i: usize, end: usize) -> &[f32] {
        &self.r.row(i).to_slice().expect("rows of the factor are contiguous")[i + 1..end]
    }
}

/// Fits one long group on `w + x`, `x R_GG = sums`. `w`, `sums`: `[n, len]`; `grids`: `[n, 1]`.
fn fit_window(
    w: ArrayView2<'_, f32>,
    sums: ArrayView2<'_, f32>,
    r: ArrayView2<'_, f32>,
    start: usize,
    block: usize,
    fit: GridFit,
    mut grids: ArrayViewMut2<'_, Affine>,
) -> Result<(), GroupOverflow> {
    let mut x = sums.to_owned();
    if start > 0 {
        for from in (0..x.ncols()).step_by(block) {
            let to = (from + block).min(x.ncols());
            let factor = Factor::new(r, start + from, start + to);
            let (done, rest) = x.view_mut().split_at(Axis(1), from);
            let mut here = columns_mut(rest, 0, to - from);
            let above = block_of(r, start..start + from, start + from..start + to);
            add_product(done.view(), above, -1.0, here.view_mut());
            here.axis_chunks_iter_mut(Axis(0), LANES).into_par_iter().for_each(|mut rows| {
                for mut row in rows.rows_mut() {
                    let row = row.as_slice_mut().expect("rows are contiguous");
                    for i in 0..factor.len() {
                        let (solved, rest) = row.split_at_mut(i + 1);
                        solved[i] *= factor.reciprocal[i];
                        let after = factor.after(i, factor.len());
                        rest.iter_mut().zip(after).for_each(|(x, r)| *x -= solved[i] * r);
                    }
                }
            });
        }
    }
    let rows = x.axis_iter_mut(Axis(0)).into_par_iter().zip(w.axis_iter(Axis(0)));
    let fitted: Vec<_> = rows
        .map(|(mut x, w)| {
            x.iter_mut().zip(w).for_each(|(x, w)| *x += w);
            fit.fit(x.as_slice().expect("rows are contiguous"))
        })
        .collect();
    for (row, (fitted, grid)) in fitted.into_iter().zip(&mut grids).enumerate() {
        *grid = fitted.map_err(|error| GroupOverflow { row, col: start + error.index, error })?;
    }
    Ok(())
}

/// Rounds the columns of a block. `w`, `codes`: `[n, b]`; `sums`: `[n, b]`, what earlier blocks contribute; `grids`:
/// `[n, groups]`. Returns the loss.
fn round_block(
    mut w: ArrayViewMut2<'_, f32>,
    sums: ArrayView2<'_, f32>,
    factor: &Factor<'_>,
    grouping: Grouping<'_>,
    block: usize,
    mut codes: ArrayViewMut2<'_, u8>,
    mut grids: ArrayViewMut2<'_, Affine>,
) -> Result<f64, GroupOverflow> {
    let tiles = w.axis_chunks_iter_mut(Axis(0), LANES).into_par_iter();
    let tiles = tiles.zip(sums.axis_chunks_iter(Axis(0), LANES));
    let tiles = tiles.zip(codes.axis_chunks_iter_mut(Axis(0), LANES));
    let tiles = tiles.zip(grids.axis_chunks_iter_mut(Axis(0), LANES)).enumerate();
    let losses: Vec<_> = tiles
        .map_init(Tile::default, |tile, (i, (((w, sums), codes), grids))| {
            tile.load(w.view(), sums);
            let at = |e: GroupOverflow| GroupOverflow { row: i * LANES + e.row, ..e };
            let loss = vectorized(
                #[inline(always)]
                || tile.round(factor, grouping, block, i * LANES, grids),
            )
            .map_err(at)?;
            tile.store(w, codes);
            Ok(loss)
        })
        .collect();
    // The sum in the order of rows, and the error of the first row that has one.
    losses.into_iter().sum()
}

/// Up to [`LANES`] rows of a block, column by column.
#[derive(Default)]
struct Tile {
    rows: usize,
    /// Weights, then errors.
    w: Vec<Lanes>,
    /// `Σ E_i R_ij` over all earlier columns.
    sums: Vec<Lanes>,
    codes: Vec<[u8; LANES]>,
    /// Scratch of a fit: `x`, and a row of `w + x`.
    x: Vec<Lanes>,
    row: Vec<f32>,
}

/// The grids of a column, as floats.
struct LaneGrids {
    scale: Lanes,
    zero: Lanes,
}

impl Tile {
    fn load(&mut self, w: ArrayView2<'_, f32>, sums: ArrayView2<'_, f32>) {
        let columns = w.ncols();
        self.rows = w.nrows();
        for (to, from) in [(&mut self.w, w), (&mut self.sums, sums)] {
            to.clear();
            to.resize(columns, [0.0; LANES]);
            for (lane, row) in from.rows().into_iter().enumerate() {
                to.iter_mut().zip(row).for_each(|(to, &v)| to[lane] = v);
            }
        }
        self.codes.clear();
        self.codes.resize(columns, [0; LANES]);
    }

    fn store(&self, mut w: ArrayViewMut2<'_, f32>, mut codes: ArrayViewMut2<'_, u8>) {
        for (lane, mut row) in w.rows_mut().into_iter().enumerate() {
            row.iter_mut().zip(&self.w).for_each(|(to, from)| *to = from[lane]);
        }
        for (lane, mut row) in codes.rows_mut().into_iter().enumerate() {
            row.iter_mut().zip(&self.codes).for_each(|(to, from)| *to = from[lane]);
        }
    }

    /// Rounds all columns. `first_row` is the tile's first in the matrix, `grids` are those of its rows.
    #[inline(always)]
    fn round(
        &mut self,
        factor: &Factor<'_>,
        grouping: Grouping<'_>,
        block: usize,
        first_row: usize,
        mut grids: ArrayViewMut2<'_, Affine>,
    ) -> Result<f64, GroupOverflow> {
        let columns = factor.len();
        let max = match grouping {
            Grouping::Fitted { fit, .. } => f32::from(fit.max_code()),
            Grouping::Fixed { max, .. } => f32::from(max),
        };
        let mut lanes = LaneGrids { scale: [1.0; LANES], zero: [0.0; LANES] };
        let mut group = None;
        let mut loss = [0.0f64; LANES];
        if let Grouping::Fitted { len, fit, timing: GroupTiming::BlockStart } = grouping
            && len <= block
        {
            self.solve(factor, 0, columns);
            self.fit_groups(factor.from, 0..columns, len, fit, grids.view_mut())?;
        }
        for c in 0..columns {
            let col = factor.from + c;
            let g = match grouping {
                Grouping::Fixed { of_col, .. } => of_col[col] as usize,
                Grouping::Fitted { len, fit, timing } => {
                    if timing == GroupTiming::Reached && len <= block && col.is_multiple_of(len) {
                        let end = (c + len).min(columns);
                        self.solve(factor, c, end);
                        self.fit_groups(factor.from, c..end, len, fit, grids.view_mut())?;
                    }
                    col / len
                }
            };
            if group.replace(g) != Some(g) {
                let grid = |lane: usize| match grouping {
                    Grouping::Fixed { grids, .. } => grids[[first_row + lane, g]],
                    Grouping::Fitted { .. } => grids[[lane, g]],
                };
                for lane in 0..self.rows {
                    (lanes.scale[lane], lanes.zero[lane]) = (grid(lane).scale, f32::from(grid(lane).zero));
                }
            }
            self.round_column(c, factor, &lanes, max, &mut loss);
        }
        // Lanes beyond the last row hold zeros, and lose nothing.
        Ok(loss.iter().sum())
    }

    /// Rounds column `c` and adds its error to the sums of the columns after it.
    #[inline(always)]
    fn round_column(
        &mut self,
        c: usize,
        factor: &Factor<'_>,
        grids: &LaneGrids,
        max: f32,
        loss: &mut [f64; LANES],
    ) {
        let (diagonal, reciprocal) = (factor.diagonal[c], factor.reciprocal[c]);
        let (w, sums, codes) = (&mut self.w[c], &self.sums[c], &mut self.codes[c]);
        let mut missed = [0.0; LANES];
        for lane in 0..LANES {
            let target = w[lane] + sums[lane] * reciprocal;
            let code = nearest_code(target, grids.scale[lane], grids.zero[lane], max);
            let rounded = (code - grids.zero[lane]) * grids.scale[lane];
            codes[lane] = code_bits(code);
            missed[lane] = (target - rounded) * diagonal;
            w[lane] -= rounded;
        }
        for (loss, missed) in loss.iter_mut().zip(missed) {
            *loss += f64::from(missed) * f64::from(missed);
        }
        let error = *w;
        for (sums, &r) in self.sums[c + 1..].iter_mut().zip(factor.after(c, factor.len())) {
            sums.iter_mut().zip(error).for_each(|(sum, error)| *sum += error * r);
        }
    }

    /// `x <- sums[from..to] R⁻¹` with the factor's block of these columns.
    #[inline(always)]
    fn solve(&mut self, factor: &Factor<'_>, from: usize, to: usize) {
        self.x.clear();
        self.x.extend_from_slice(&self.sums[from..to]);
        for i in from..to {
            let (solved, rest) = self.x.split_at_mut(i - from + 1);
            let solved = &mut solved[i - from];
            solved.iter_mut().for_each(|x| *x *= factor.reciprocal[i]);
            for (x, &r) in rest.iter_mut().zip(factor.after(i, to)) {
                x.iter_mut().zip(&*solved).for_each(|(x, solved)| *x -= solved * r);
            }
        }
    }

    /// Fits the groups of `len` columns in `range` on `w + x`, where `x` was solved for that range.
    fn fit_groups(
        &mut self,
        first_col: usize,
        range: std::ops::Range<usize>,
        len: usize,
        fit: GridFit,
        mut grids: ArrayViewMut2<'_, Affine>,
    ) -> Result<(), GroupOverflow> {
        for from in range.clone().step_by(len) {
            let to = (from + len).min(range.end);
            let (w, x) = (&self.w[from..to], &self.x[from - range.start..to - range.start]);
            let group = (first_col + from) / len;
            for row in 0..self.rows {
                self.row.clear();
                self.row.extend(w.iter().zip(x).map(|(w, x)| w[row] + x[row]));
                let overflow =
                    |error: ScaleOverflow| GroupOverflow { row, col: first_col + from + error.index, error };
                grids[[row, group]] = fit.fit(&self.row).map_err(overflow)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
