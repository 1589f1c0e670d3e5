//! SINQ: Sinkhorn-normalised quantization, with a scale per input beside the scale per group. No calibration data.
//!
//! A tile of the matrix, all outputs by one group of inputs (1D) or a square (2D), is evened out by factors per row and
//! column ([`quant_math::sinkhorn`]): `W = μ2 M̂ μ1`. The rows of `M̂` are rounded on a grid each, `M̂ ≈ s (q - z)`, so that
//! `Ŵ = (s μ2) (q - z) μ1`: outlying columns no longer widen the grids of all rows (Müller et al., "SINQ:
//! Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision LLM Weights", 2025).
//!
//! Differences from the library, all undone by [`SinqOptions::compat`]:
//! - codes are chosen for scales, factors and zero points as they are stored, not as they were before;
//! - zero points of integer grids stay within 8 bits, so that their 8-bit form is exact;
//! - weights are not rounded to f16 first;
//! - every layer is evened out, where the library rounds those with a kurtosis above 5 to nearest, without a word.

use half::f16;
use ndarray::{ArrayView1, ArrayView2};
use quant_core::{
    ColScale, Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec, QuantizedMatrix,
    SpecError,
};
use quant_math::affine::code_bits;
use quant_math::sinkhorn::{self, Balance};
use quant_math::{Codebook, Proximal, ZeroGrid};
use rayon::prelude::*;

use crate::affine;
use crate::aux8;
use crate::quantizer::{LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::stats::{LayerStats, Needs};

/// Kurtosis of the weights above which the library does not even them out.
const KURTOSIS_LIMIT: f64 = 5.0;

/// Options of [`Sinq`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SinqOptions {
    /// How the rows of an evened-out tile are rounded.
    pub rounding: SinqRounding,
    /// Store scales in 8 bits (`quantAux`); `None` does where groups have zero points and tiles are columns.
    pub quant_aux: Option<bool>,
    /// Reproduce the codes of the library.
    pub compat: bool,
}

/// How the rows of an evened-out tile are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SinqRounding {
    /// To integers between the least and the greatest weight (`sinq`).
    #[default]
    Range,
    /// To integers around a fixed zero point (`sinq_noz`).
    NoZero,
    /// To NF4, around the mean (`sinq_nf4`).
    Nf4,
    /// To integers with HQQ's zero points (`sinq_hqq`).
    Hqq,
}

/// Sinkhorn-normalised quantization. Groups of columns are tiles of all rows; square tiles are asked for as such.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sinq {
    options: SinqOptions,
}

/// What a row of a tile is rounded with.
#[derive(Clone, Copy, Default)]
struct RowGrid {
    /// Factor of the row (`μ2`).
    factor: f32,
    /// Step on the evened-out tile; the inverse for HQQ's.
    step: f32,
    /// Zero point.
    zero: f32,
    /// Zero point that the library chooses codes with.
    code_zero: f32,
}

impl RowGrid {
    /// The scale of the weights, column factors apart.
    fn scale(&self, rounding: SinqRounding) -> f32 {
        self.factor * if rounding == SinqRounding::Hqq { 1.0 / self.step } else { self.step }
    }
}

/// Tiles of a matrix.
#[derive(Clone, Copy)]
struct Tiles {
    rows: usize,
    cols: usize,
    /// Rows and columns of a tile; those at the edges may be short.
    tile: (usize, usize),
}

impl Tiles {
    fn across(&self) -> usize {
        self.cols.div_ceil(self.tile.1)
    }

    fn count(&self) -> usize {
        self.rows.div_ceil(self.tile.0) * self.across()
    }

    /// First row and column, rows and columns of a tile.
    fn at(&self, i: usize) -> [usize; 4] {
        let (r, c) = (i / self.across() * self.tile.0, i % self.across() * self.tile.1);
        [r, c, self.tile.0.min(self.rows - r), self.tile.1.min(self.cols - c)]
    }
}

/// A fitted layer: column factors `[row blocks, cols]` and a grid per row and tile across.
struct Fitted {
    cols: Vec<f32>,
    grids: Vec<RowGrid>,
}

impl Sinq {
    /// With these options.
    pub fn new(options: SinqOptions) -> Self {
        Self { options }
    }

    /// A weight as it is prepared.
    fn prepared(&self, w: f32) -> f32 {
        if self.options.compat { f16::from_f32(w).to_f32() } else { w }
    }

    /// Evens out every tile and fits its rows.
    fn fit(&self, w: ArrayView2<'_, f32>, tiles: Tiles, bits: u8, even: bool) -> Fitted {
        let tile = |buffer: &mut Vec<f32>, i: usize| {
            let [row, col, rows, cols] = tiles.at(i);
            buffer.clear();
            for r in row..row + rows {
                let part = &contiguous(w.row(r))[col..col + cols];
                buffer.extend(part.iter().map(|&w| self.prepared(w)));
            }
            let balance = match even || self.options.compat {
                true => sinkhorn::balance(buffer, cols, sinkhorn::STEPS),
                false => Balance::identity(rows, cols),
            };
            for (line, &factor) in buffer.chunks_exact_mut(cols.max(1)).zip(&balance.rows) {
                for (w, &by) in line.iter_mut().zip(&balance.cols) {
                    // Not evened out, the library multiplies again, and rounds.
                    *w = if even { *w / by / factor } else { *w / by / factor * by * factor };
                }
            }
            let balance = if even { balance } else { Balance::identity(rows, cols) };
            let mut grids: Vec<_> =
                buffer.chunks_exact(cols.max(1)).map(|row| self.fit_row(row, bits)).collect();
            if self.options.rounding == SinqRounding::Hqq {
                self.improve_zeros(buffer, cols, bits, &mut grids);
            }
            grids.iter_mut().zip(&balance.rows).for_each(|(grid, &factor)| grid.factor = factor);
            (balance.cols, grids)
        };
        let fitted: Vec<_> = (0..tiles.count()).into_par_iter().map_init(Vec::new, tile).collect();
        let mut all = Fitted {
            cols: vec![1.0; tiles.rows.div_ceil(tiles.tile.0) * tiles.cols],
            grids: vec![RowGrid::default(); tiles.rows * tiles.across()],
        };
        for (i, (factors, grids)) in fitted.into_iter().enumerate() {
            let [row, col, ..] = tiles.at(i);
            let block = row / tiles.tile.0;
            all.cols[block * tiles.cols + col..][..factors.len()].copy_from_slice(&factors);
            for (r, grid) in grids.into_iter().enumerate() {
                all.grids[(row + r) * tiles.across() + i % tiles.across()] = grid;
            }
        }
        all
    }

    /// The grid of one row of a tile.
    fn fit_row(&self, row: &[f32], bits: u8) -> RowGrid {
        let max = f32::from(u8::MAX >> (8 - bits));
        let low = row.iter().copied().fold(f32::INFINITY, f32::min);
        let high = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let size = low.abs().max(high.abs());
        let (step, zero) = match (self.options.rounding, self.options.compat) {
            (SinqRounding::Range, true) => {
                let step = (high - low).max(1e-4) / max;
                (step, -(low / step).round_ties_even())
            }
            (SinqRounding::Range, false) => {
                // Zero points from -beyond to max + beyond are 256 integers.
                let beyond = ((255.0 - max) / 2.0).floor();
                let step = ((high - low) / max).max(size / (max + beyond)).max(f32::MIN_POSITIVE);
                (step, (-low / step).round_ties_even().clamp(-beyond, max + beyond))
            }
            (SinqRounding::NoZero, _) => {
                let greatest = (max / 2.0).floor() - 1.0;
                (size.max(1e-5) / greatest, (max / 2.0).floor())
            }
            (SinqRounding::Nf4, _) => {
                let mean = row.iter().sum::<f32>() / row.len().max(1) as f32;
                let step = row.iter().fold(1e-4f32, |size, w| size.max((w - mean).abs()));
                (step, -mean / step)
            }
            (SinqRounding::Hqq, _) => {
                let inverse = match high - low {
                    range if range <= 1e-4 => 1.0,
                    range => (1.0 / range * max).min(2e4),
                };
                (inverse.clamp(1e-5, 1e5), -low * inverse)
            }
        };
        RowGrid { factor: 1.0, step, zero, code_zero: zero }
    }

    /// HQQ's steps on all rows of a tile together. The library keeps the zero points that follow the step of the least
    /// error, and the codes of the last step.
    fn improve_zeros(&self, tile: &[f32], cols: usize, bits: u8, grids: &mut [RowGrid]) {
        let max = f32::from(u8::MAX >> (8 - bits));
        let solver = Proximal::library();
        let mut least = f32::INFINITY;
        let mut zeros: Vec<f32> = grids.iter().map(|grid| grid.zero).collect();
        for _ in 0..solver.iters {
            let mut total = 0.0;
            for ((row, grid), zero) in tile.chunks_exact(cols.max(1)).zip(&mut *grids).zip(&mut zeros) {
                grid.code_zero = *zero;
                let (next, errors) = solver.step(row, ZeroGrid { inverse: grid.step, zero: *zero }, max);
                total += f64::from(errors);
                *zero = next;
            }
            let error = (total / tile.len() as f64) as f32;
            if error < least {
                least = error;
                // Their own library's codes aside, the zero points that gave this error are the better ones.
                let keep = |(grid, &next): (&mut RowGrid, &f32)| {
                    grid.zero = if self.options.compat { next } else { grid.code_zero };
                };
                grids.iter_mut().zip(&zeros).for_each(keep);
            }
        }
    }

    fn encode(
        &self,
        layer: usize,
        w: ArrayView2<'_, f32>,
        spec: &QuantSpec,
    ) -> Result<QuantizedMatrix, QuantizeError> {
        let (rows, cols) = w.dim();
        let SinqOptions { rounding, compat, .. } = self.options;
        let len = spec.group.len(cols);
        let tile = match spec.group {
            GroupSize::Tile { rows, cols } => (rows, cols),
            _ => (rows.max(1), len),
        };
        let tiles = Tiles { rows, cols, tile };
        let even = !compat || kurtosis(w) <= KURTOSIS_LIMIT;
        // Without evening out the library falls back to integers; its files still say NF4.
        let method = if even {
            *self
        } else {
            Self { options: SinqOptions { rounding: SinqRounding::Range, ..self.options } }
        };
        let Fitted { cols: factors, grids } = method.fit(w, tiles, spec.bits, even);
        let across = tiles.across();

        let stored: Vec<f16> =
            grids.iter().map(|grid| f16::from_f32(grid.scale(method.options.rounding))).collect();
        if let Some(g) = stored.iter().position(|scale| !scale.is_finite()) {
            return Err(overflow(layer, w, g / across, g % across * tile.1, tile.1, spec.bits));
        }
        // Zero is no scale: the least f16 takes its place.
        let stored: Vec<f16> =
            stored.into_iter().map(|scale| scale.max(f16::MIN_POSITIVE_SUBNORMAL)).collect();
        let zeros: Vec<f16> = grids.iter().map(|grid| f16::from_f32(grid.zero)).collect();
        let second: Vec<f32> = factors.iter().map(|&factor| f16::from_f32(factor).to_f32()).collect();
        let (scales, zeros) = match spec.scales {
            ParamsKind::Affine8 => (aux8::by_columns(&stored, compat), aux8::whole(&zeros, compat)),
            ParamsKind::F32 => {
                let wide = |halves: Vec<f16>| Params::F32(halves.into_iter().map(f16::to_f32).collect());
                (wide(stored), wide(zeros))
            }
            _ => (Params::F16(stored), Params::F16(zeros)),
        };

        let max = f32::from(u8::MAX >> (8 - spec.bits));
        let book = Codebook::new(&GridKind::Nf4.table().unwrap_or_default());
        let nf4 = method.options.rounding == SinqRounding::Nf4;
        let codes = affine::pack_rows(spec.bits, rows, cols, |r, codes| {
            let row = contiguous(w.row(r));
            let line = r / tile.0 * cols;
            for (t, codes) in codes.chunks_mut(tile.1).enumerate() {
                let (g, start) = (r * across + t, t * tile.1);
                let weights = row[start..].iter().zip(codes).zip(start..);
                let grid = &grids[g];
                if compat {
                    for ((&w, code), c) in weights {
                        let by = factors[line + c];
                        let w = self.prepared(w);
                        let even = w / by / grid.factor;
                        *code = grid.library_code(method.options.rounding, &book, max, even);
                    }
                } else {
                    let (scale, zero) = (scales.get(g), zeros.get(g));
                    for ((&w, code), c) in weights {
                        let steps = w / (scale * second[line + c]) + zero;
                        *code = if nf4 { book.code(steps) } else { nearest(steps, max) };
                    }
                }
            }
        })
        .map_err(|source| QuantizeError::Matrix { layer, source })?;

        let (grid, offset) = match rounding {
            SinqRounding::NoZero => (Grid::Int { midpoint: max as i32 / 2 }, Offset::None),
            SinqRounding::Nf4 => (GridKind::Nf4.grid(4).unwrap_or(Grid::UNSIGNED), Offset::Zero(zeros)),
            SinqRounding::Range | SinqRounding::Hqq => (Grid::UNSIGNED, Offset::Zero(zeros)),
        };
        let mut matrix = QuantizedMatrix::affine(codes, Groups::Row { len: tile.1 }, scales, offset, 0);
        matrix.grid = grid;
        matrix.col_scale = Some(ColScale { values: second, rows_per_block: tile.0 });
        Ok(matrix)
    }
}

impl RowGrid {
    /// The library's code of an evened-out weight.
    fn library_code(&self, rounding: SinqRounding, book: &Codebook, max: f32, even: f32) -> u8 {
        match rounding {
            SinqRounding::Hqq => {
                code_bits(ZeroGrid { inverse: self.step, zero: self.code_zero }.code(max, even))
            }
            SinqRounding::Nf4 => book.code(even / self.step + self.zero),
            SinqRounding::Range => nearest(even / self.step + self.zero, max),
            SinqRounding::NoZero => {
                let (below, above) = ((max / 2.0).ceil(), (max / 2.0).floor());
                let steps = (even / self.step).round_ties_even();
                code_bits(steps.clamp(-below, above - 1.0) + above)
            }
        }
    }
}

fn nearest(steps: f32, max: f32) -> u8 {
    code_bits(steps.clamp(0.0, max).round_ties_even())
}

fn contiguous(row: ArrayView1<'_, f32>) -> &[f32] {
    row.to_slice().expect("rows are contiguous")
}

/// The error of a group whose scale is no finite f16.
fn overflow(
    layer: usize,
    w: ArrayView2<'_, f32>,
    row: usize,
    start: usize,
    len: usize,
    bits: u8,
) -> QuantizeError {
    let weights = contiguous(w.row(row));
    let group = &weights[start..(start + len).min(weights.len())];
    let largest = group.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
    let (i, &value) = largest.unwrap_or((0, &f32::NAN));
    let scale = value.abs() / f32::from(u8::MAX >> (8 - bits));
    QuantizeError::ScaleOverflow { layer, row, col: start + i, value, scale }
}

/// `E (w - mean)⁴ / (E (w - mean)²)²` of all weights, rounded to f16, the variance not below 1e-6; 3 for normal ones.
fn kurtosis(w: ArrayView2<'_, f32>) -> f64 {
    let n = w.len().max(1) as f64;
    let rows = |f: &(dyn Fn(f64) -> f64 + Sync)| -> f64 {
        let row = |r: usize| w.row(r).iter().map(|&w| f(f64::from(f16::from_f32(w).to_f32()))).sum::<f64>();
        (0..w.nrows()).into_par_iter().map(row).collect::<Vec<f64>>().into_iter().sum()
    };
    let mean = rows(&|w| w) / n;
    let variance = (rows(&|w| (w - mean).powi(2)) / n).max(1e-6);
    rows(&|w| (w - mean).powi(4)) / n / (variance * variance)
}

impl Quantizer for Sinq {
    fn name(&self) -> &'static str {
        "sinq"
    }

    fn description(&self) -> &'static str {
        "Sinkhorn-normalised: a second scale per input evens the matrix out; no calibration"
    }

    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn layouts(&self) -> &'static [&'static str] {
        &["sinq"]
    }

    fn default_spec(&self) -> QuantSpec {
        let with_zeros = matches!(self.options.rounding, SinqRounding::Range | SinqRounding::Hqq);
        let nf4 = self.options.rounding == SinqRounding::Nf4;
        let scales = match self.options.quant_aux.unwrap_or(with_zeros) {
            true => ParamsKind::Affine8,
            // The library computes with tables in the type of their scales.
            false if nf4 => ParamsKind::F32,
            false => ParamsKind::F16,
        };
        let grid = if nf4 { GridKind::Nf4 } else { GridKind::Int };
        let symmetric = self.options.rounding == SinqRounding::NoZero;
        QuantSpec { grid, group: GroupSize::Columns(64), scales, symmetric, ..QuantSpec::default() }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        spec.validate()?;
        let option = |option, found: String, allowed| Err(SpecError::Option { option, found, allowed });
        let own = self.default_spec();
        if spec.grid == GridKind::Nf4 && spec.bits != 4 {
            return Err(SpecError::Bits { found: spec.bits, allowed: &[4] });
        }
        if spec.symmetric && !(3..=8).contains(&spec.bits) {
            return Err(SpecError::Bits { found: spec.bits, allowed: &[3, 4, 5, 6, 8] });
        }
        if spec.bits == 7 {
            return Err(SpecError::Bits { found: 7, allowed: &[1, 2, 3, 4, 5, 6, 8] });
        }
        if spec.grid != own.grid {
            return option("grid", spec.grid.to_string(), "integers, or nf4 with the rounding of that name");
        }
        if spec.symmetric != own.symmetric {
            let allowed = "true with the rounding without zero points (noz), else false";
            return option("symmetric", spec.symmetric.to_string(), allowed);
        }
        if spec.act_order {
            return option("act_order", "true".to_owned(), "false: SINQ knows no activations");
        }
        match (spec.group, spec.scales) {
            (GroupSize::Tile { .. }, ParamsKind::Affine8) => {
                option("quant_aux", "true".to_owned(), "false with square tiles, whose scales are f16")
            }
            (_, ParamsKind::Affine8) if spec.symmetric || spec.grid != GridKind::Int => {
                option("quant_aux", "true".to_owned(), "false without zero points and with nf4")
            }
            (_, scales) if spec.grid == GridKind::Nf4 && scales == own.scales => Ok(()),
            (_, ParamsKind::Affine8 | ParamsKind::F16) if spec.grid == GridKind::Int => Ok(()),
            (_, other) => option("scales", format!("{other:?}"), "f16, 8 bits (quant_aux), or f32 with nf4"),
        }?;
        match spec.group {
            GroupSize::Row | GroupSize::Columns(_) => Ok(()),
            GroupSize::Tile { rows, cols } if rows == cols => Ok(()),
            other => {
                let allowed = "give a number of inputs, -1 for all of them, or a square tile such as 64x64";
                Err(SpecError::Group { found: other.as_config(), allowed })
            }
        }
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize {
        let of = |&(rows, cols): &(usize, usize)| {
            let len = spec.group.len(cols);
            let groups = rows * cols.div_ceil(len);
            let (tile_rows, blocks) = match spec.group {
                GroupSize::Tile { rows: tile, .. } => (tile.min(rows), rows.div_ceil(tile)),
                _ => (rows, 1),
            };
            // A tile for each thread with its factors twice; grids twice while they are put in order, then parameters.
            let tile = rayon::current_num_threads() * tile_rows * (4 * len + 16);
            let params = groups * (2 * size_of::<RowGrid>() + 8) + 8 * blocks * cols;
            4 * rows * cols + rows * (cols * usize::from(spec.bits)).div_ceil(8) + tile + params
        };
        shapes.iter().map(of).sum()
    }

    fn quantize(&self, layers: Vec<LayerWeights>, _: LayerStats) -> Result<Vec<Quantized>, QuantizeError> {
        affine::each_layer(self, layers, |layer, w, spec| {
            let too_large = |r: usize| {
                contiguous(w.row(r)).iter().position(|&w| !f16::from_f32(w).is_finite()).map(|c| (r, c))
            };
            if self.options.compat
                && let Some((row, col)) = (0..w.nrows()).into_par_iter().find_map_first(too_large)
            {
                return Err(overflow(layer, w, row, col, 1, spec.bits));
            }
            self.encode(layer, w, spec)
        })
    }
}
