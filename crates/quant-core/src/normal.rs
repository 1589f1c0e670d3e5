//! The one algebra that kernels consume.

use crate::codes::Codes;
use crate::grid::Grid;
use crate::groups::Groups;
use crate::matrix::{Offset, Outliers, QuantizedMatrix};

/// A quantized matrix as a kernel sees it: `w = grid(code) * scale + bias` in each group of `group_len`
/// consecutive stored columns of a row, after [`Prologue`] has been applied to the activations.
#[derive(Debug)]
pub struct NormalForm<'a> {
    /// Codes `[out, in]`, stored order.
    pub codes: &'a Codes,
    /// Values of the codes.
    pub grid: &'a Grid,
    /// Columns per group; the last group of a row may be short.
    pub group_len: usize,
    /// `[out, ceil(in / group_len)]`.
    pub scale: Vec<f32>,
    /// `[out, ceil(in / group_len)]`.
    pub bias: Vec<f32>,
    /// To be done to the activations first.
    pub prologue: Prologue<'a>,
    /// Columns (input features) that replace the matrix.
    pub outliers: Option<&'a Outliers>,
}

/// Gather, then multiply: `x'[c] = x[gather[c]] * multiply[gather[c]]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prologue<'a> {
    /// Input feature of each stored column.
    pub gather: Option<&'a [u32]>,
    /// Factor of each input feature.
    pub multiply: Option<&'a [f32]>,
}

impl QuantizedMatrix {
    /// The matrix in kernel terms, or `None` where its geometry has no row groups (HQQ axis 0, ungrouped
    /// `g_idx`, column scales that differ between rows): then a kernel works on dequantized panels.
    pub fn normal_form(&self) -> Option<NormalForm<'_>> {
        let (rows, cols) = (self.rows(), self.cols());
        let group_len = match self.groups {
            Groups::Tensor => cols.max(1),
            Groups::Row { len } | Groups::Tile { cols: len, .. } => len.min(cols.max(1)),
            // Runs across row ends: the greatest length that starts anew at every row and every run.
            Groups::Flat { len } => gcd(len, cols.max(1)),
            Groups::Strided { .. } | Groups::Index { .. } => return None,
        };
        let multiply = match &self.col_scale {
            None => None,
            Some(s) if s.rows_per_block >= rows => Some(&s.values[..]),
            Some(_) => return None,
        };
        let per_row = cols.div_ceil(group_len);
        let mut scale = Vec::with_capacity(rows * per_row);
        let mut bias = Vec::with_capacity(rows * per_row);
        for r in 0..rows {
            let row_scale = self.row_scale.as_ref().map_or(1.0, |s| s[r]);
            for i in 0..per_row {
                let g = self.groups.index(r, i * group_len, cols);
                let s = self.scales.get(g) * row_scale;
                scale.push(s);
                bias.push(match &self.offset {
                    Offset::None => 0.0,
                    Offset::Zero(zeros) => -(s * zeros.get(g)),
                    Offset::Shift { param, sign } => sign * param.get(g) * row_scale,
                });
            }
        }
        let prologue = Prologue { gather: self.input_perm.as_ref().map(|p| p.features()), multiply };
        let (codes, grid, outliers) = (&self.codes, &self.grid, self.outliers.as_ref());
        Some(NormalForm { codes, grid, group_len, scale, bias, prologue, outliers })
    }
}

impl NormalForm<'_> {
    /// `y = W x` in f64: the oracle every kernel is held to. `x`: `[in]`, result: `[out]`.
    pub fn gemv(&self, x: &[f32]) -> Vec<f64> {
        let (rows, cols) = (self.codes.rows(), self.codes.cols());
        assert_eq!(x.len(), cols, "one activation per input feature");
        let mut scaled: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        if let Some(o) = self.outliers {
            o.columns.iter().for_each(|&c| scaled[c as usize] = 0.0);
        }
        if let Some(m) = self.prologue.multiply {
            scaled.iter_mut().zip(m).for_each(|(v, &m)| *v *= f64::from(m));
        }
        let gathered: Vec<f64> = match self.prologue.gather {
            Some(features) => features.iter().map(|&f| scaled[f as usize]).collect(),
            None => scaled,
        };
        let per_row = cols.div_ceil(self.group_len);
        let mut row = vec![0; cols];
        (0..rows)
            .map(|r| {
                self.codes.unpack_row(r, &mut row);
                let groups = row.chunks(self.group_len).zip(gathered.chunks(self.group_len));
                let mut y = 0.0;
                for (i, (codes, x)) in groups.enumerate() {
                    let (scale, bias) = (self.scale[r * per_row + i], self.bias[r * per_row + i]);
                    let terms = codes.iter().zip(x);
                    let dot: f64 = terms.map(|(&c, x)| f64::from(self.grid.value(c)) * x).sum();
                    y += f64::from(scale) * dot + f64::from(bias) * x.iter().sum::<f64>();
                }
                if let Some(o) = self.outliers {
                    let n = o.columns.len();
                    let mut kept = vec![0.0; n];
                    o.values.read_f32(r * n..(r + 1) * n, &mut kept).expect("outliers are floats");
                    let terms = o.columns.iter().zip(kept);
                    y += terms.map(|(&c, w)| f64::from(w) * f64::from(x[c as usize])).sum::<f64>();
                }
                y
            })
            .collect()
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
