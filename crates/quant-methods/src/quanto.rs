//! Quanto: integers of 2 and 4 bits in groups with a shift, integers and floats of 8 bits per row. No calibration.
//!
//! | type | scale | code | weight |
//! |---|---|---|---|
//! | `qint2`, `qint4` | `s = (max - min) / (2^b - 1)`, shift `m = -min` | `clamp(rne((w + m) / s), 0, 2^b - 1)` | `s q - m` |
//! | `qint8` | `s = max abs(w) / 127` | `clamp(rne(w / s), -128, 127)` | `s q` |
//! | `qfloat8` | `s = max abs(w) / largest` | nearest 8-bit float to `w / s` | `s q` |
//!
//! Groups have 128 inputs where that divides them, else 96, 64 or 32; up to 128 inputs are one group.
//!
//! Differences from optimum-quanto, undone by [`QuantoOptions::compat`]: shifts and scales of narrow codes are found as HQQ
//! does ([`quant_math::proximal`]), which the library offers, but only for shifts and not by default; parameters are
//! f16, and codes chosen for them, where the library keeps the type of the weights.

use half::f16;
use ndarray::ArrayView2;
use quant_core::{
    Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec, QuantizedMatrix, SpecError,
};
use quant_math::affine::code_bits;
use quant_math::{Codebook, Grouped, Proximal, ZeroGrid};

use crate::affine;
use crate::quantizer::{LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::stats::{LayerStats, Needs};

/// Options of [`Quanto`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct QuantoOptions {
    /// What weights become.
    pub weights: QuantoType,
    /// Where scales and shifts of narrow codes come from; `None` is [`QuantoOptimizer::Hqq`], with `compat` the range.
    pub optimizer: Option<QuantoOptimizer>,
    /// Reproduce the codes and parameters of the library for weights of f32.
    pub compat: bool,
}

/// Types of weights, with the library's names.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QuantoType {
    Qint2,
    #[default]
    Qint4,
    Qint8,
    Qfloat8E4m3fn,
    Qfloat8E4m3fnuz,
    Qfloat8E5m2,
}

/// Where scales and shifts of 2 and 4 bits come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantoOptimizer {
    /// The range of the weights (`MaxOptimizer`).
    Max,
    /// HQQ's solver (`HqqOptimizer`).
    Hqq,
}

impl QuantoType {
    fn bits(self) -> u8 {
        match self {
            QuantoType::Qint2 => 2,
            QuantoType::Qint4 => 4,
            _ => 8,
        }
    }

    fn grid(self) -> GridKind {
        match self {
            QuantoType::Qint2 | QuantoType::Qint4 | QuantoType::Qint8 => GridKind::Int,
            QuantoType::Qfloat8E4m3fn => GridKind::E4M3,
            QuantoType::Qfloat8E4m3fnuz => GridKind::E4M3Fnuz,
            QuantoType::Qfloat8E5m2 => GridKind::E5M2,
        }
    }
}

/// The method.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quanto {
    options: QuantoOptions,
}

impl Quanto {
    /// With these options.
    pub fn new(options: QuantoOptions) -> Self {
        Self { options }
    }

    /// A parameter as it is stored.
    fn stored(&self, value: f32) -> f32 {
        if self.options.compat { value } else { f16::from_f32(value).to_f32() }
    }

    fn params(&self, values: Vec<f32>) -> Params {
        match self.options.compat {
            true => Params::F32(values),
            false => Params::F16(values.into_iter().map(f16::from_f32).collect()),
        }
    }

    /// A scale that can be stored and divided by.
    fn scale(&self, exact: f32) -> f32 {
        let least =
            if self.options.compat { f32::MIN_POSITIVE } else { f16::MIN_POSITIVE_SUBNORMAL.to_f32() };
        self.stored(exact).max(least)
    }

    /// Codes of 2 and 4 bits.
    fn encode_narrow(
        &self,
        layer: usize,
        w: ArrayView2<'_, f32>,
        bits: u8,
        len: usize,
    ) -> Result<QuantizedMatrix, QuantizeError> {
        let (rows, cols) = w.dim();
        let flat = w.to_slice().expect("rows are contiguous");
        let view = Grouped::runs(flat, cols.max(1), len);
        let max = f32::from(u8::MAX >> (8 - bits));
        let range = |w: &[f32]| {
            let low = w.iter().copied().fold(f32::INFINITY, f32::min);
            let high = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            (self.scale((high - low) / max), self.stored(-low))
        };
        let mut grids = view.map(|_, w| range(w));
        let default = if self.options.compat { QuantoOptimizer::Max } else { QuantoOptimizer::Hqq };
        if self.options.optimizer.unwrap_or(default) == QuantoOptimizer::Hqq {
            let solved =
                |&(scale, shift): &(f32, f32)| ZeroGrid { inverse: 1.0 / scale, zero: shift / scale };
            let mut zeros: Vec<ZeroGrid> = grids.iter().map(solved).collect();
            // Ranges that overflow are refused below.
            if zeros.iter().all(|grid| grid.inverse.is_normal() && grid.zero.is_finite()) {
                let solver = match self.options.compat {
                    true => Proximal { scale_search: false, ..Proximal::default() },
                    false => Proximal::default(),
                };
                solver.solve(view, &mut zeros, max);
                let back = |grid: &ZeroGrid| {
                    let scale = self.scale(1.0 / grid.inverse);
                    (scale, self.stored(grid.zero * scale))
                };
                grids = zeros.iter().map(back).collect();
            }
        }
        if let Some(g) = grids.iter().position(|(scale, shift)| !scale.is_finite() || !shift.is_finite()) {
            return Err(overflow(layer, w, view.index(g, 0), len, max));
        }
        let per_row = cols.div_ceil(len);
        let codes = affine::pack_rows(bits, rows, cols, |r, codes| {
            let row = &flat[r * cols..][..cols];
            let groups = row.chunks(len).zip(codes.chunks_mut(len)).zip(&grids[r * per_row..]);
            for ((w, codes), &(scale, shift)) in groups {
                let code = |w: f32| code_bits(((w + shift) / scale).round_ties_even().clamp(0.0, max));
                codes.iter_mut().zip(w).for_each(|(c, &w)| *c = code(w));
            }
        })
        .map_err(|source| QuantizeError::Matrix { layer, source })?;
        let (scales, shifts) = grids.into_iter().unzip();
        let offset = Offset::Shift { param: self.params(shifts), sign: -1.0 };
        Ok(QuantizedMatrix::affine(codes, Groups::Row { len }, self.params(scales), offset, 0))
    }

    /// Codes of 8 bits.
    fn encode_wide(
        &self,
        layer: usize,
        w: ArrayView2<'_, f32>,
        grid: GridKind,
    ) -> Result<QuantizedMatrix, QuantizeError> {
        let (rows, cols) = w.dim();
        let flat = w.to_slice().expect("rows are contiguous");
        let table = grid.table();
        let book = table.as_deref().map(Codebook::of_floats);
        let finite = |table: &[f32]| table.iter().copied().filter(|v| v.is_finite()).fold(0.0, f32::max);
        let largest = table.as_deref().map_or(127.0, finite);
        let absmax = |w: &[f32]| w.iter().fold(0.0f32, |a, w| a.max(w.abs()));
        let view = Grouped::runs(flat, cols.max(1), cols.max(1));
        let scales = view.map(|_, w| self.scale(absmax(w) / largest));
        if let Some(r) = scales.iter().position(|scale| !scale.is_finite()) {
            return Err(overflow(layer, w, r * cols, cols, largest));
        }
        let codes = affine::pack_rows(8, rows, cols, |r, codes| {
            let scale = scales[r];
            let row = flat[r * cols..][..cols].iter().zip(codes);
            match &book {
                Some(book) => row.for_each(|(&w, code)| *code = book.code(w / scale)),
                None => row.for_each(|(&w, code)| {
                    *code = code_bits((w / scale).round_ties_even().clamp(-128.0, 127.0) + 128.0)
                }),
            }
        })
        .map_err(|source| QuantizeError::Matrix { layer, source })?;
        let groups = Groups::whole_row(cols);
        let mut matrix = QuantizedMatrix::affine(codes, groups, self.params(scales), Offset::None, 128);
        if let Some(table) = table {
            matrix.grid = Grid::Table(table);
        }
        Ok(matrix)
    }
}

/// The largest weight of a group from element `start` on needs a scale beyond f16.
fn overflow(layer: usize, w: ArrayView2<'_, f32>, start: usize, len: usize, steps: f32) -> QuantizeError {
    let (cols, flat) = (w.ncols(), w.to_slice().expect("rows are contiguous"));
    let end = (start + len).min((start / cols + 1) * cols);
    let worst = flat[start..end].iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
    let (i, &value) = worst.unwrap_or((0, &f32::NAN));
    let (row, col) = ((start + i) / cols, (start + i) % cols);
    QuantizeError::ScaleOverflow { layer, row, col, value, scale: value.abs() / steps }
}

impl Quantizer for Quanto {
    fn name(&self) -> &'static str {
        "quanto"
    }

    fn description(&self) -> &'static str {
        "2 and 4 bits with shifts, 8-bit integers and floats per row; no calibration"
    }

    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn layouts(&self) -> &'static [&'static str] {
        &["quanto"]
    }

    fn default_spec(&self) -> QuantSpec {
        let (bits, grid) = (self.options.weights.bits(), self.options.weights.grid());
        let group = if bits == 8 { GroupSize::Row } else { GroupSize::Columns(128) };
        let scales = if self.options.compat { ParamsKind::F32 } else { ParamsKind::F16 };
        QuantSpec { bits, grid, group, scales, symmetric: bits == 8, act_order: false }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        spec.validate()?;
        let own = self.default_spec();
        let group = match spec.group {
            GroupSize::Row | GroupSize::Columns(_) if spec.bits != 8 => spec.group,
            _ => own.group,
        };
        if *spec == (QuantSpec { group, ..own }) {
            return Ok(());
        }
        let found = format!(
            "{} bits of {} in groups of {}, symmetric: {}",
            spec.bits, spec.grid, spec.group, spec.symmetric
        );
        let allowed = "2 and 4 bits asymmetric in groups, 8 bits symmetric in whole rows (-1)";
        Err(SpecError::Option { option: "type", found, allowed })
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize {
        // Ranges, grids, next zero points with errors twice, zero points before.
        let of = |&(rows, cols): &(usize, usize)| {
            let groups = rows * cols.div_ceil(spec.group.len(cols));
            rows * (4 * cols + (cols * usize::from(spec.bits)).div_ceil(8)) + 40 * groups
        };
        shapes.iter().map(of).sum()
    }

    fn quantize(&self, layers: Vec<LayerWeights>, _: LayerStats) -> Result<Vec<Quantized>, QuantizeError> {
        affine::each_layer(self, layers, |layer, w, spec| match spec.bits {
            8 => self.encode_wide(layer, w, spec.grid),
            bits => self.encode_narrow(layer, w, bits, spec.group.len(w.ncols())),
        })
    }
}
