//! A weight matrix held in few bits, and the one formula that says what it means.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, ArrayViewMut2};

use crate::codes::Codes;
use crate::dtype::{DType, DenseTensor};
use crate::error::MatrixError;
use crate::grid::Grid;
use crate::groups::Groups;
use crate::params::Params;
use crate::spec::{GroupSize, QuantSpec};

/// A weight matrix `[rows, cols]` = `[out, in]` held in few bits. A plain value: no file, no method, no CPU.
///
/// ```text
/// W[r, k(c)] = row_scale[r] * col_scale[k(c)] * (scale[g] * grid(code[r, c]) + offset[g])
/// k = input_perm, g = groups.index(r, c)
/// ```
///
/// `offset` is nothing, `-scale[g] * zero[g]`, or `sign * shift[g]`. In f32 the steps are evaluated and rounded
/// one by one, in this order: `grid(code) - zero` (exact for integers), `* scale`, `+ shift`, `* row_scale`,
/// `* col_scale`. Columns listed in `outliers` replace the result.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    /// Codes `[out, in]` in stored column order.
    pub codes: Codes,
    /// Values of the codes.
    pub grid: Grid,
    /// Which elements share parameters, in stored column order.
    pub groups: Groups,
    /// One scale per group.
    pub scales: Params,
    /// Zero point or shift per group.
    pub offset: Offset,
    /// A factor per output `[out]` (SINQ).
    pub row_scale: Option<Vec<f32>>,
    /// A factor per input (SINQ, AWQ or SmoothQuant scales that were not absorbed).
    pub col_scale: Option<ColScale>,
    /// Stored column to input feature (act-order). `None` is the identity.
    pub input_perm: Option<Permutation>,
    /// Columns kept in 16 bits (LLM.int8 and its like).
    pub outliers: Option<Outliers>,
    /// Type that the weights had and that their library decodes them to, where the file records it
    /// (bitsandbytes). No part of the formula.
    pub dtype: Option<DType>,
}

/// What is added to `scale * grid(code)`.
#[derive(Clone, Debug, PartialEq)]
pub enum Offset {
    /// Nothing: a symmetric grid.
    None,
    /// `-scale * zero`.
    Zero(Params),
    /// `sign * shift`, with `sign` 1 or -1.
    Shift {
        /// One shift per group.
        param: Params,
        /// 1 or -1.
        sign: f32,
    },
}

/// Factors per input feature: one row of them, or one row per block of `rows_per_block` outputs (SINQ 2D).
#[derive(Clone, Debug, PartialEq)]
pub struct ColScale {
    /// `[row_blocks, in]`, row-major.
    pub values: Vec<f32>,
    /// Outputs that share a row of factors; at least the number of outputs where there is only one.
    pub rows_per_block: usize,
}

/// Input features kept outside the grid.
#[derive(Clone, Debug)]
pub struct Outliers {
    /// The features.
    pub columns: Vec<u32>,
    /// Their weights `[out, columns]`.
    pub values: DenseTensor,
}

impl PartialEq for Outliers {
    fn eq(&self, other: &Self) -> bool {
        self.columns == other.columns
            && self.values.shape() == other.values.shape()
            && self.values.dtype() == other.values.dtype()
            && self.values.bytes() == other.values.bytes()
    }
}

/// A permutation of columns: stored position to input feature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permutation(Arc<[u32]>);

impl Permutation {
    /// Checks that every index below the length appears exactly once.
    pub fn new(features: Vec<u32>) -> Result<Self, MatrixError> {
        let mut seen = vec![false; features.len()];
        for &f in &features {
            match seen.get_mut(f as usize) {
                Some(s) if !*s => *s = true,
                _ => {
                    let (limit, found) = (features.len(), f as usize);
                    return Err(MatrixError::Range { part: "permutation", limit, found });
                }
            }
        }
        Ok(Self(features.into()))
    }

    /// Sorts columns by their group, stably. With groups of equal length the columns of group `i` then are
    /// `i * len ..`. The identity gives `None`.
    pub fn sorting_groups(of_col: &[u32]) -> Option<Self> {
        let mut order: Vec<u32> = (0..of_col.len() as u32).collect();
        order.sort_by_key(|&c| of_col[c as usize]);
        (!order.is_sorted()).then(|| Self(order.into()))
    }

    /// Input feature of each stored column.
    pub fn features(&self) -> &[u32] {
        &self.0
    }

    /// Stored column of each input feature.
    pub fn inverse(&self) -> Vec<u32> {
        let mut inverse = vec![0; self.0.len()];
        self.0.iter().enumerate().for_each(|(c, &f)| inverse[f as usize] = c as u32);
        inverse
    }
}

impl QuantizedMatrix {
    /// Integer codes with one scale per group: the common case. `zeros` `None` is a grid around `midpoint`.
    pub fn affine(codes: Codes, groups: Groups, scales: Params, offset: Offset, midpoint: i32) -> Self {
        Self {
            codes,
            grid: Grid::Int { midpoint },
            groups,
            scales,
            offset,
            row_scale: None,
            col_scale: None,
            input_perm: None,
            outliers: None,
            dtype: None,
        }
    }

    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.codes.rows()
    }

    /// Number of input features.
    pub fn cols(&self) -> usize {
        self.codes.cols()
    }

    /// Checks that all parts fit each other. Every other method relies on it and may panic without.
    pub fn validate(&self) -> Result<(), MatrixError> {
        let (rows, cols) = (self.rows(), self.cols());
        let size = |part, expected, found| {
            if expected == found { Ok(()) } else { Err(MatrixError::Size { part, expected, found }) }
        };
        if let Groups::Row { len: 0 }
        | Groups::Flat { len: 0 }
        | Groups::Strided { count: 0 }
        | Groups::Tile { rows: 0, .. }
        | Groups::Tile { cols: 0, .. } = self.groups
        {
            return Err(MatrixError::Range { part: "group length", limit: 0, found: 0 });
        }
        if let Groups::Index { of_col, count } = &self.groups {
            size("g_idx", cols, of_col.len())?;
            if let Some(&found) = of_col.iter().find(|&&g| g as usize >= *count) {
                return Err(MatrixError::Range { part: "g_idx", limit: *count, found: found as usize });
            }
        }
        let groups = self.groups.count(rows, cols);
        size("scales", groups, self.scales.len())?;
        match &self.offset {
            Offset::None => {}
            Offset::Zero(p) => size("zeros", groups, p.len())?,
            Offset::Shift { param, .. } => size("shifts", groups, param.len())?,
        }
        if let Grid::Table(table) = &self.grid {
            size("table", usize::from(self.codes.max()) + 1, table.len())?;
        }
        if let Some(s) = &self.row_scale {
            size("row scales", rows, s.len())?;
        }
        if let Some(s) = &self.col_scale {
            size("column scales", rows.div_ceil(s.rows_per_block.max(1)) * cols, s.values.len())?;
        }
        if let Some(p) = &self.input_perm {
            size("permutation", cols, p.0.len())?;
        }
        if let Some(o) = &self.outliers {
            size("outliers", rows * o.columns.len(), o.values.len())?;
            if let Some(&found) = o.columns.iter().find(|&&c| c as usize >= cols) {
                return Err(MatrixError::Range { part: "outliers", limit: cols, found: found as usize });
            }
        }
        Ok(())
    }

    /// The weights `[out, in]` in f32.
    pub fn dequantize(&self) -> Array2<f32> {
        let mut out = Array2::zeros((self.rows(), self.cols()));
        self.dequantize_rows(0..self.rows(), out.view_mut());
        out
    }

    /// The weights `[out, in]` as a library computes them that rounds every step of the formula by `round`: to its own
    /// 16-bit type, say.
    pub fn dequantize_rounded(&self, round: fn(f32) -> f32) -> Array2<f32> {
        let mut out = Array2::zeros((self.rows(), self.cols()));
        self.decode_rows(0..self.rows(), out.view_mut(), round);
        out
    }

    /// Row `r`, `out`: `[in]` (embedding lookup).
    pub fn dequantize_row(&self, r: usize, out: &mut [f32]) {
        let out = ArrayViewMut2::from_shape((1, self.cols()), out).expect("one row");
        self.dequantize_rows(r..r + 1, out);
    }

    /// Rows `rows`, `out`: `[rows.len(), in]` with contiguous rows.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: ArrayViewMut2<'_, f32>) {
        self.decode_rows(rows, out, |w| w);
    }

    fn decode_rows(
        &self,
        rows: Range<usize>,
        mut out: ArrayViewMut2<'_, f32>,
        round: impl Fn(f32) -> f32 + Copy,
    ) {
        let cols = self.cols();
        assert_eq!(out.dim(), (rows.len(), cols), "one output row per row asked for");
        let mut codes = vec![0; cols];
        let mut stored = vec![0.0; if self.input_perm.is_some() { cols } else { 0 }];
        for (r, mut out) in rows.zip(out.rows_mut()) {
            let out = out.as_slice_mut().expect("rows are contiguous");
            self.codes.unpack_row(r, &mut codes);
            match &self.input_perm {
                None => self.decode_row(r, &codes, out, round),
                Some(perm) => {
                    self.decode_row(r, &codes, &mut stored, round);
                    perm.0.iter().zip(&stored).for_each(|(&f, &v)| out[f as usize] = v);
                }
            }
            if let Some(s) = &self.row_scale {
                out.iter_mut().for_each(|w| *w = round(*w * s[r]));
            }
            if let Some(s) = &self.col_scale {
                let factors = &s.values[r / s.rows_per_block.max(1) * cols..][..cols];
                out.iter_mut().zip(factors).for_each(|(w, f)| *w = round(*w * f));
            }
            if let Some(o) = &self.outliers {
                let n = o.columns.len();
                let mut values = vec![0.0; n];
                o.values.read_f32(r * n..(r + 1) * n, &mut values).expect("outliers are floats");
                o.columns.iter().zip(values).for_each(|(&c, v)| out[c as usize] = v);
            }
        }
    }

    /// Scale, zero and grid of one row, in stored column order.
    fn decode_row(&self, r: usize, codes: &[u8], out: &mut [f32], round: impl Fn(f32) -> f32) {
        let cols = self.cols();
        let mut c = 0;
        while c < cols {
            let end = self.groups.run_end(r, c, cols);
            let g = self.groups.index(r, c, cols);
            let scale = self.scales.get(g);
            let (zero, shift) = match &self.offset {
                Offset::None => (0.0, None),
                Offset::Zero(zeros) => (zeros.get(g), None),
                Offset::Shift { param, sign } => (0.0, Some(sign * param.get(g))),
            };
            let run = codes[c..end].iter().zip(&mut out[c..end]);
            match (&self.grid, shift) {
                (Grid::Int { midpoint }, None) => {
                    let zero = zero + *midpoint as f32;
                    run.for_each(|(&code, w)| *w = round(round(f32::from(code) - zero) * scale));
                }
                // Without a sum: it would turn -0 into 0.
                (grid, None) => {
                    run.for_each(|(&code, w)| *w = round(round(grid.value(code) - zero) * scale));
                }
                (grid, Some(shift)) => {
                    run.for_each(|(&code, w)| {
                        *w = round(round(round(grid.value(code) - zero) * scale) + shift)
                    });
                }
            }
            c = end;
        }
    }

    /// What this matrix is, in the terms a method was asked in. Derived, never stored.
    pub fn spec(&self) -> QuantSpec {
        let (rows, cols) = (self.rows(), self.cols());
        QuantSpec {
            bits: self.codes.bits(),
            grid: self.grid.kind(),
            group: match self.groups {
                Groups::Tensor => GroupSize::Tensor,
                Groups::Row { len } if len >= cols => GroupSize::Row,
                Groups::Row { len } => GroupSize::Columns(len),
                Groups::Tile { rows, cols } => GroupSize::Tile { rows, cols },
                Groups::Flat { len } => GroupSize::Flat(len),
                Groups::Strided { count } => GroupSize::Strided((rows * cols).div_ceil(count.max(1))),
                Groups::Index { count, .. } => GroupSize::Columns(cols.div_ceil(count.max(1))),
            },
            scales: self.scales.kind(),
            symmetric: self.is_symmetric(),
            act_order: self.input_perm.is_some() || matches!(self.groups, Groups::Index { .. }),
        }
    }

    /// True if every zero point is the middle of the code range, or there is none beside a table.
    fn is_symmetric(&self) -> bool {
        let middle = f32::from(1u8 << (self.codes.bits() - 1));
        match (&self.grid, &self.offset) {
            (Grid::Int { midpoint }, Offset::None) => *midpoint as f32 == middle,
            (Grid::Int { midpoint }, Offset::Zero(zeros)) => {
                (0..zeros.len()).all(|i| zeros.get(i) + *midpoint as f32 == middle)
            }
            (Grid::Table(_), Offset::None) => true,
            (Grid::Table(_), Offset::Zero(_)) | (_, Offset::Shift { .. }) => false,
        }
    }

    /// Bytes in memory, and nearly on disk: codes and parameters.
    pub fn byte_len(&self) -> usize {
        let offset = match &self.offset {
            Offset::None => 0,
            Offset::Zero(p) | Offset::Shift { param: p, .. } => p.bits(),
        };
        let floats = self.row_scale.as_ref().map_or(0, Vec::len)
            + self.col_scale.as_ref().map_or(0, |s| s.values.len())
            + self.input_perm.as_ref().map_or(0, |p| p.0.len());
        self.codes.bytes().len()
            + (self.scales.bits() + offset).div_ceil(8)
            + 4 * floats
            + self.outliers.as_ref().map_or(0, |o| o.values.bytes().len() + 4 * o.columns.len())
    }
}

#[cfg(test)]
#[path = "matrix_tests.rs"]
mod tests;
