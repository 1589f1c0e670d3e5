//! Activations in eight bits, in the order in which the kernels read them.

use std::ops::Range;
use std::sync::Arc;

use ndarray::ArrayView2;

use super::blocks::{Blocks, LONGEST};
use crate::dense;
use crate::error::ShapeError;
use crate::simd::{self, Vector, Work};
use crate::ukr::{HEIGHTS, Rows};
use crate::{isa, pool, scratch::Scratch};

/// What a packed matrix asks of the activations that it is multiplied by: their cut into blocks, and what is done
/// to them first. Matrices with equal inputs (`==`) can share one [`Activations`].
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    pub(super) cols: usize,
    pub(super) blocks: Arc<Blocks>,
    /// Input feature of each stored column.
    pub(super) gather: Option<Arc<[u32]>>,
    /// Factor of each stored column.
    pub(super) multiply: Option<Arc<[f32]>>,
    /// Features that are multiplied in f32, apart, and count as zero in the integers.
    pub(super) outliers: Arc<[Outlier]>,
}

/// An input feature that is multiplied apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outlier {
    pub(super) feature: u32,
    /// Its stored column.
    pub(super) column: u32,
}

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub enum ActScales {
    /// A block of a row: a weight group, or 128 columns where that is longer.
    #[default]
    Group,
    /// A row.
    Row,
    /// All rows, which have this step, found beforehand: positive and normal. What lies beyond 127 steps is clamped.
    Fixed(f32),
}

/// A matrix `[m, in]` of activations, rounded to `q = round(x * (127 / absmax))` (half to even) with the largest
/// magnitude of each group or row; or `q = clamp(round(x / step), -127, 127)` with a fixed step.
///
/// A group or row with a NaN or an infinity gets the scale NaN, so that its row of a product is all NaN. One whose
/// largest magnitude is below `127 / f32::MAX = 3.7e-37` counts as zeros.
#[derive(Clone, Debug, Default)]
pub struct Activations {
    input: Option<Input>,
    scales: ActScales,
    tiles: Vec<Tile>,
    /// `[padded columns / 4, height]` for each tile.
    codes: Vec<[i8; 4]>,
    /// `[blocks, height]` for each tile.
    scale: Vec<f32>,
    /// Sums of the codes, as `scale`.
    sum: Vec<i32>,
    /// `scale * sum`.
    scaled_sum: Vec<f32>,
    /// `[m, outliers]` in f32.
    outliers: Vec<f32>,
}

/// Rows that are multiplied together.
#[derive(Clone, Debug)]
pub(super) struct Tile {
    /// Which of the matrix.
    pub(super) rows: Range<usize>,
    /// How many with the padding: one of [`HEIGHTS`].
    pub(super) height: usize,
}

impl Activations {
    /// The activations of one product. To quantize again and again without asking for memory, keep one value and
    /// call [`Activations::quantize`].
    pub fn new(x: ArrayView2<'_, f32>, input: &Input, scales: ActScales) -> Result<Activations, ShapeError> {
        let mut activations = Activations::default();
        activations.quantize(x, input, scales)?;
        Ok(activations)
    }

    /// Replaces the contents by `x: [m, in]` as `input` asks.
    pub fn quantize(
        &mut self,
        x: ArrayView2<'_, f32>,
        input: &Input,
        scales: ActScales,
    ) -> Result<(), ShapeError> {
        dense::check_rows("x", &x)?;
        dense::check_shape("x", [x.nrows(), input.cols], &x)?;
        let rows = dense::rows_of(x);
        self.tiles = tiles(rows.len());
        let padded_rows = self.tiles.iter().map(|tile| tile.height).sum::<usize>();
        let (fours, blocks) = (input.blocks.padded() / 4, input.blocks.list().len());
        self.codes.resize(padded_rows * fours, [0; 4]);
        self.scale.resize(padded_rows * blocks, 0.0);
        self.sum.resize(padded_rows * blocks, 0);
        self.scaled_sum.resize(padded_rows * blocks, 0.0);

        let mut parts = Vec::with_capacity(self.tiles.len());
        let (mut codes, mut scale) = (&mut self.codes[..], &mut self.scale[..]);
        let (mut sum, mut scaled_sum) = (&mut self.sum[..], &mut self.scaled_sum[..]);
        for tile in &self.tiles {
            parts.push(Part {
                input,
                scales,
                rows: &rows[tile.rows.clone()],
                height: tile.height,
                codes: codes.split_off_mut(..tile.height * fours).expect("resized above"),
                scale: scale.split_off_mut(..tile.height * blocks).expect("resized above"),
                sum: sum.split_off_mut(..tile.height * blocks).expect("resized above"),
                scaled_sum: scaled_sum.split_off_mut(..tile.height * blocks).expect("resized above"),
            });
        }
        let isa = isa::active();
        if parts.len() > 1 {
            pool::for_each(&mut parts, |part| simd::run(isa, part));
        } else {
            parts.iter_mut().for_each(|part| simd::run(isa, part));
        }

        self.outliers.clear();
        for row in &rows {
            self.outliers.extend(input.outliers.iter().map(|outlier| row[outlier.feature as usize]));
        }
        self.input = Some(input.clone());
        self.scales = scales;
        Ok(())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tiles.last().map_or(0, |tile| tile.rows.end)
    }

    /// What shares a scale.
    pub fn scales(&self) -> ActScales {
        self.scales
    }

    /// Whether they were made for this input.
    pub fn is_for(&self, input: &Input) -> bool {
        self.input.as_ref() == Some(input)
    }

    pub(super) fn tiles(&self) -> &[Tile] {
        &self.tiles
    }

    /// The outlier features of a row.
    pub(super) fn outliers(&self, row: usize) -> &[f32] {
        let n = self.input.as_ref().map_or(0, |input| input.outliers.len());
        &self.outliers[row * n..][..n]
    }

    /// First summands of the integers of all tiles, for kernels that take codes less `center`.
    pub(super) fn starts(&self, midpoint: i32, center: i32) -> Vec<i32> {
        self.sum.iter().map(|sum| (center - midpoint) * sum).collect()
    }

    /// The rows of a tile as a kernel reads them; `starts` are those of all tiles.
    pub(super) fn tile<'a>(&'a self, index: usize, starts: &'a [i32]) -> Rows<'a> {
        let input = self.input.as_ref().expect("tiles come with an input");
        let (fours, blocks) = (input.blocks.padded() / 4, input.blocks.list().len());
        // All tiles but the last are of the greatest height.
        let (first, height) = (index * HEIGHTS[HEIGHTS.len() - 1], self.tiles[index].height);
        Rows {
            codes: &self.codes[first * fours..][..height * fours],
            start: &starts[first * blocks..][..height * blocks],
            scale: &self.scale[first * blocks..][..height * blocks],
            sum: &self.scaled_sum[first * blocks..][..height * blocks],
        }
    }
}

impl Input {
    /// Number of input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether rows are taken as they are.
    fn is_plain(&self) -> bool {
        self.gather.is_none() && self.multiply.is_none() && self.outliers.is_empty()
    }

    /// The prologue: gather, multiply, outliers to zero. `row` and `stored`: `[in]`.
    #[inline(always)]
    fn prepare(&self, row: &[f32], stored: &mut [f32]) {
        match &self.gather {
            None => stored.copy_from_slice(row),
            Some(features) => stored.iter_mut().zip(&features[..]).for_each(|(x, &f)| *x = row[f as usize]),
        }
        if let Some(factors) = &self.multiply {
            stored.iter_mut().zip(&factors[..]).for_each(|(x, factor)| *x *= factor);
        }
        self.outliers.iter().for_each(|outlier| stored[outlier.column as usize] = 0.0);
    }
}

/// Cuts rows into tiles of the greatest height and one lower one for the rest.
fn tiles(rows: usize) -> Vec<Tile> {
    let most = HEIGHTS[HEIGHTS.len() - 1];
    (0..rows)
        .step_by(most)
        .map(|start| {
            let end = rows.min(start + most);
            let height =
                HEIGHTS.into_iter().find(|&height| height >= end - start).expect("at most the greatest");
            Tile { rows: start..end, height }
        })
        .collect()
}

/// The work of one tile.
struct Part<'a> {
    input: &'a Input,
    scales: ActScales,
    rows: &'a [&'a [f32]],
    height: usize,
    codes: &'a mut [[i8; 4]],
    scale: &'a mut [f32],
    sum: &'a mut [i32],
    scaled_sum: &'a mut [f32],
}

impl Work for &mut Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        let mut scratch = Scratch::take();
        let [stored] = scratch.split([self.input.cols]);
        for r in 0..self.height {
            match self.rows.get(r) {
                Some(row) if self.input.is_plain() => self.quantize_row(r, row),
                Some(row) => {
                    self.input.prepare(row, stored);
                    self.quantize_row(r, stored);
                }
                None => self.clear_row(r),
            }
        }
    }
}

impl Part<'_> {
    /// Writes row `r`, given in stored order.
    #[inline(always)]
    fn quantize_row(&mut self, r: usize, row: &[f32]) {
        let of_row = Scale::of(row);
        let mut at = r;
        for (b, block) in self.input.blocks.list().iter().enumerate() {
            let x = &row[block.start as usize..][..block.len as usize];
            let scale = match self.scales {
                ActScales::Group => Scale::of(x),
                ActScales::Row => of_row,
                // Also here, a row with a NaN or an infinity is all NaN.
                ActScales::Fixed(_) if of_row.step.is_nan() => of_row,
                ActScales::Fixed(step) => Scale { step, inverse: 1.0 / step },
            };
            let mut q = [0; LONGEST];
            match self.scales {
                _ if scale.step.is_nan() => {}
                ActScales::Fixed(step) => {
                    let clamped = |x: f32| round((x / step).clamp(-127.0, 127.0));
                    q.iter_mut().zip(x).for_each(|(q, x)| *q = clamped(*x));
                }
                _ => q.iter_mut().zip(x).for_each(|(q, x)| *q = round(x * scale.inverse)),
            }
            let fours = q[..block.padded as usize].as_chunks::<4>().0;
            for (to, four) in self.codes[at..].iter_mut().step_by(self.height).zip(fours) {
                *to = *four;
            }
            at += fours.len() * self.height;
            let sum = q.iter().map(|&q| i32::from(q)).sum();
            self.finish(b * self.height + r, scale.step, sum);
        }
    }

    /// Writes zeros for a row of padding.
    #[inline(always)]
    fn clear_row(&mut self, r: usize) {
        self.codes.iter_mut().skip(r).step_by(self.height).for_each(|four| *four = [0; 4]);
        for b in 0..self.input.blocks.list().len() {
            self.finish(b * self.height + r, 0.0, 0);
        }
    }

    #[inline(always)]
    fn finish(&mut self, i: usize, scale: f32, sum: i32) {
        self.scale[i] = scale;
        self.sum[i] = sum;
        self.scaled_sum[i] = scale * sum as f32;
    }
}

/// How some numbers are rounded.
#[derive(Clone, Copy)]
struct Scale {
    /// What a code of 1 stands for.
    step: f32,
    inverse: f32,
}

impl Scale {
    #[inline(always)]
    fn of(x: &[f32]) -> Scale {
        // Magnitudes order as their bits do, with NaN above infinity; the maximum of integers knows no order.
        let mut max = 0;
        for x in x {
            max = (x.to_bits() & 0x7fff_ffff).max(max);
        }
        let max = f32::from_bits(max);
        let inverse = 127.0 / max;
        match () {
            _ if !max.is_finite() => Scale { step: f32::NAN, inverse: 0.0 },
            _ if !inverse.is_finite() => Scale { step: 0.0, inverse: 0.0 },
            _ => Scale { step: max / 127.0, inverse },
        }
    }
}

/// The nearest integer, the even one of two, for magnitudes below 127.5.
#[inline(always)]
fn round(x: f32) -> i8 {
    // The unit in the last place of 1.5 * 2^23 is one, so the sum's low bits are the integer.
    const ONES: f32 = 12_582_912.0;
    (x + ONES).to_bits() as u8 as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even() {
        for i in -1270..=1270 {
            let x = i as f32 / 10.0;
            assert_eq!(f32::from(round(x)), x.round_ties_even(), "{x}");
        }
    }

    #[test]
    fn rows_fall_into_full_tiles_and_a_rest() {
        let cut =
            |rows| tiles(rows).into_iter().map(|tile| (tile.rows.len(), tile.height)).collect::<Vec<_>>();
        assert_eq!(cut(0), []);
        assert_eq!(cut(1), [(1, 1)]);
        assert_eq!(cut(7), [(7, 8)]);
        assert_eq!(cut(27), [(12, 12), (12, 12), (3, 4)]);
    }
}
