//! Dense weights in the order in which the products read them.
//!
//! A panel is 16 rows side by side, so that it is one stream of memory and no product has to turn it over:
//!
//! ```text
//! f32, f16: | column 0: rows 0..16 | column 1: rows 0..16 | ...
//! bf16:     | columns 0, 1: rows 0..16 | columns 2, 3: rows 0..16 | ...    words of two, see `simd::pair`
//! ```
//!
//! Rows beyond the last are zeros, and so is the second half of a last word that has but one column.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use ndarray::{ArrayView2, ArrayViewMut2};
use pulp::bytemuck::{Pod, cast_slice, cast_slice_mut};

use super::operand::{Plain, Right, rows_of};
use super::pairs::{Rounded, multiply_pairs};
use super::{check_rows, check_shape, multiply, multiply_bf16};
use crate::error::ShapeError;
use crate::isa;
use crate::mem::Bytes;
use crate::simd::{Vector, widen_f16};

/// Rows of a panel.
const ROWS: usize = 16;

/// Columns that are turned over at a time, so that their part of a panel stays in the level-1 cache.
const COLUMNS: usize = 64;

/// A matrix `[n, k]` of floats, to be packed.
#[derive(Clone, Copy, Debug)]
pub enum DenseView<'a> {
    /// IEEE binary32.
    F32(ArrayView2<'a, f32>),
    /// IEEE binary16.
    F16(ArrayView2<'a, f16>),
    /// The upper half of an f32.
    Bf16(ArrayView2<'a, bf16>),
}

/// A dense weight matrix `[n, k]`, ready to multiply, as many bytes per number as before. A clone shares them.
#[derive(Clone, Debug)]
pub struct DensePanels {
    rows: usize,
    cols: usize,
    kind: Kind,
    /// Panels one after the other.
    bytes: Arc<Bytes>,
}

/// What the numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    F32,
    F16,
    Bf16,
}

impl DensePanels {
    /// Packs a matrix, several panels at a time.
    pub fn pack(matrix: DenseView<'_>) -> Result<Self, ShapeError> {
        match matrix {
            DenseView::F32(w) => Self::interleave(Kind::F32, w),
            DenseView::F16(w) => Self::interleave(Kind::F16, w),
            DenseView::Bf16(w) => Self::pair(w),
        }
    }

    /// Panels of numbers.
    fn interleave<E: Pod + Send + Sync>(kind: Kind, w: ArrayView2<'_, E>) -> Result<Self, ShapeError> {
        check_rows("w", &w)?;
        let ((rows, cols), source) = (w.dim(), rows_of(w));
        let bytes = Bytes::filled(rows.div_ceil(ROWS), cols * ROWS * size_of::<E>(), |panel, out| {
            let out: &mut [E] = cast_slice_mut(out);
            for (i, out) in out.chunks_mut(COLUMNS * ROWS).enumerate() {
                for (lane, row) in source[panel * ROWS..].iter().take(ROWS).enumerate() {
                    for (out, x) in out.chunks_exact_mut(ROWS).zip(&row[i * COLUMNS..]) {
                        out[lane] = *x;
                    }
                }
            }
        });
        Ok(DensePanels { rows, cols, kind, bytes: Arc::new(bytes) })
    }

    /// Panels of words of two.
    fn pair(w: ArrayView2<'_, bf16>) -> Result<Self, ShapeError> {
        check_rows("w", &w)?;
        let ((rows, cols), source) = (w.dim(), rows_of(w));
        let word = |first: bf16, second: bf16| u32::from(first.to_bits()) << 16 | u32::from(second.to_bits());
        let bytes = Bytes::filled(rows.div_ceil(ROWS), cols.div_ceil(2) * ROWS * 4, |panel, out| {
            let out: &mut [u32] = cast_slice_mut(out);
            for (i, out) in out.chunks_mut(COLUMNS / 2 * ROWS).enumerate() {
                for (lane, row) in source[panel * ROWS..].iter().take(ROWS).enumerate() {
                    let (pairs, rest) = row[i * COLUMNS..].as_chunks::<2>();
                    let words = pairs.iter().map(|[first, second]| word(*first, *second));
                    let last = rest.iter().map(|first| word(*first, bf16::ZERO));
                    for (out, word) in out.chunks_exact_mut(ROWS).zip(words.chain(last)) {
                        out[lane] = word;
                    }
                }
            }
        });
        Ok(DensePanels { rows, cols, kind: Kind::Bf16, bytes: Arc::new(bytes) })
    }

    /// `[n, k]`.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.rows.div_ceil(ROWS) * self.panel_bytes()
    }

    /// Bytes of a panel.
    fn panel_bytes(&self) -> usize {
        match self.kind {
            Kind::F32 => 4 * ROWS * self.cols,
            Kind::F16 => 2 * ROWS * self.cols,
            Kind::Bf16 => 4 * ROWS * self.cols.div_ceil(2),
        }
    }

    /// `out = x · wᵀ` with `x: [m, k]`, `out: [m, n]`: the bits of [`crate::matmul_nt`] on the widened weights.
    pub fn matmul(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ShapeError> {
        let shape = self.check(&x)?;
        multiply(shape, 1.0, Plain::new(x), Singles(self), 0.0, out)
    }

    /// Whether [`DensePanels::matmul_bf16`] rounds: weights of 32 bits have the exact product only.
    pub fn has_bf16(&self) -> bool {
        self.kind != Kind::F32
    }

    /// The same with operands rounded to bf16: the bits of [`crate::matmul_nt_bf16`]. Weights of 32 bits are not
    /// rounded, nor are their activations: that product is the exact one.
    pub fn matmul_bf16(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ShapeError> {
        let shape = self.check(&x)?;
        let x = Plain::new(x);
        match (self.kind, isa::bf16_dot()) {
            (Kind::F32, _) => multiply(shape, 1.0, x, Singles(self), 0.0, out),
            (Kind::Bf16, Some(dot)) if self.cols.is_multiple_of(2) => {
                multiply_pairs(dot, shape, x, Words(self), out)
            }
            (Kind::Bf16, _) => multiply(shape, 1.0, Rounded(x), Singles(self), 0.0, out),
            (Kind::F16, _) => multiply_bf16(shape, x, Singles(self), out),
        }
    }

    /// Checks the activations; `[m, k, n]`.
    fn check(&self, x: &ArrayView2<'_, f32>) -> Result<[usize; 3], ShapeError> {
        check_rows("x", x)?;
        check_shape("x", [x.nrows(), self.cols], x)?;
        Ok([x.nrows(), self.cols, self.rows])
    }

    /// Row `r` in f32, `out: [k]` (embedding lookup).
    pub fn dequantize_row(&self, r: usize, out: &mut [f32]) -> Result<(), ShapeError> {
        if out.len() != self.cols {
            return Err(ShapeError::Length { operand: "out", expected: self.cols, found: out.len() });
        }
        if r >= self.rows {
            return Err(ShapeError::Row { found: r, rows: self.rows });
        }
        let (panel, lane) = (r / ROWS, r % ROWS);
        match self.kind {
            Kind::F32 => {
                let column = self.panel::<f32>(panel).iter().skip(lane).step_by(ROWS);
                out.iter_mut().zip(column).for_each(|(out, x)| *out = *x);
            }
            Kind::F16 => {
                let column = self.panel::<u16>(panel).iter().skip(lane).step_by(ROWS);
                out.iter_mut().zip(column).for_each(|(out, x)| *out = widen_f16(*x));
            }
            Kind::Bf16 => {
                let column = self.panel::<u32>(panel).iter().skip(lane).step_by(ROWS);
                for (out, word) in out.chunks_mut(2).zip(column) {
                    out.iter_mut().zip(halves(*word)).for_each(|(out, x)| *out = x);
                }
            }
        }
        Ok(())
    }

    /// A panel as its elements: f32, the bits of f16, or words.
    #[inline(always)]
    fn panel<E: Pod>(&self, panel: usize) -> &[E] {
        let size = self.panel_bytes();
        cast_slice(&self.bytes[panel * size..][..size])
    }
}

/// The numbers of a word.
#[inline(always)]
fn halves(word: u32) -> [f32; 2] {
    [f32::from_bits(word & 0xffff_0000), f32::from_bits(word << 16)]
}

/// Panels as f32.
struct Singles<'a>(&'a DensePanels);

/// Panels of bf16 as words.
struct Words<'a>(&'a DensePanels);

impl Right for Singles<'_> {
    const WIDE: bool = true;

    #[inline(always)]
    fn pack<V: Vector>(&self, simd: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        if width.is_multiple_of(ROWS) {
            self.pack_lanes::<V, ROWS>(simd, j, depth, width, panel);
        } else {
            self.pack_lanes::<V, 8>(simd, j, depth, width, panel);
        }
    }
}

impl Singles<'_> {
    /// [`Right::pack`] by so many columns of the panel at a time.
    #[inline(always)]
    fn pack_lanes<V: Vector, const LANES: usize>(
        &self,
        simd: V,
        j: usize,
        depth: Range<usize>,
        width: usize,
        panel: &mut [f32],
    ) {
        for at in (0..width.min(self.0.rows - j)).step_by(LANES) {
            let (source, lane) = ((j + at) / ROWS, (j + at) % ROWS);
            let out = panel.chunks_exact_mut(width).map(|row| lanes_mut::<LANES>(row, at));
            match self.0.kind {
                Kind::F32 => {
                    let rows = self.0.panel::<f32>(source)[depth.start * ROWS..].as_chunks::<ROWS>().0;
                    out.zip(rows).for_each(|(out, row)| *out = *lanes::<f32, LANES>(row, lane));
                }
                Kind::F16 => {
                    let rows = &self.0.panel::<f16>(source)[depth.start * ROWS..depth.end * ROWS];
                    widen_rows::<V, LANES>(simd, rows.as_chunks().0, lane, out);
                }
                Kind::Bf16 => {
                    let first = depth.start;
                    debug_assert!(first.is_multiple_of(2), "blocks begin with a word");
                    let words = self.0.panel::<u32>(source)[first / 2 * ROWS..].as_chunks::<ROWS>().0;
                    let mut out = out;
                    for words in words {
                        let words = lanes::<u32, LANES>(words, lane);
                        let Some(out_first) = out.next() else { break };
                        *out_first = words.map(|word| halves(word)[0]);
                        let Some(out_second) = out.next() else { break };
                        *out_second = words.map(|word| halves(word)[1]);
                    }
                }
            }
        }
    }
}

/// Widens rows of a panel of f16, some at a time.
#[inline(always)]
fn widen_rows<'a, V: Vector, const LANES: usize>(
    simd: V,
    rows: &[[f16; ROWS]],
    lane: usize,
    mut out: impl Iterator<Item = &'a mut [f32; LANES]>,
) {
    const STEP: usize = 16;
    let mut wide = [[0.0; ROWS]; STEP];
    for rows in rows.chunks(STEP) {
        simd.widen(rows.as_flattened(), wide[..rows.len()].as_flattened_mut());
        for (row, out) in wide[..rows.len()].iter().zip(out.by_ref()) {
            *out = *lanes::<f32, LANES>(row, lane);
        }
    }
}

impl Right for Words<'_> {
    const WIDE: bool = true;

    #[inline(always)]
    fn pack<V: Vector>(&self, _: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        for at in (0..width.min(self.0.rows - j)).step_by(ROWS) {
            let words = &self.0.panel::<f32>((j + at) / ROWS)[depth.start * ROWS..];
            let out = panel.chunks_exact_mut(width).map(|row| lanes_mut::<ROWS>(row, at));
            out.zip(words.as_chunks::<ROWS>().0).for_each(|(out, words)| *out = *words);
        }
    }
}

/// Columns `at..at + LANES` of a row.
#[inline(always)]
fn lanes<E, const LANES: usize>(row: &[E], at: usize) -> &[E; LANES] {
    row[at..].first_chunk().expect("whole vectors")
}

/// The same, to be written.
#[inline(always)]
fn lanes_mut<const LANES: usize>(row: &mut [f32], at: usize) -> &mut [f32; LANES] {
    row[at..].first_chunk_mut().expect("whole vectors")
}
