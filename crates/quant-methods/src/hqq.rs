//! HQQ: half-quadratic quantization. No calibration data.
//!
//! The scale of a group spans its weights, `s = (max - min) / (2^b - 1)`; the zero point, no integer, is then moved so
//! that `‖w - ŵ‖_p` with `p < 1` becomes small, which forgives few large errors for many small ones (see
//! [`quant_math::proximal`]; Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023).
//!
//! Differences from the library, all undone by [`HqqOptions::library`]:
//! - scales up to 5 % smaller and larger are tried first, and a step that did not help is undone (options of the library's
//!   second solver, there off);
//! - the solver works with the scale as it is stored (f16), and codes are chosen for the stored zero point;
//! - groups whose weights hardly differ keep them, where the library falls back to a scale of 1.

use half::f16;
use ndarray::ArrayView2;
use quant_core::{
    GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec, QuantizedMatrix, SpecError,
};
use quant_math::affine::code_bits;
use quant_math::{Grouped, Proximal, ZeroGrid};

use crate::affine;
use crate::quantizer::{LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::stats::{LayerStats, Needs};

/// Options of [`Hqq`]. The names in brackets are those of the library.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HqqOptions {
    /// The solver of zero points; `None` leaves them where the range puts them (`optimize`).
    pub solver: Option<Proximal>,
    /// Begin at integer zero points (`round_zero`); `None` does with 4 bits.
    pub round_zero: Option<bool>,
    /// Reproduce the codes of the library.
    pub compat: bool,
}

impl Default for HqqOptions {
    fn default() -> Self {
        Self { solver: Some(Proximal::default()), round_zero: None, compat: false }
    }
}

impl HqqOptions {
    /// The defaults of the library, and its codes.
    pub fn library() -> Self {
        Self { solver: Some(Proximal::library()), round_zero: None, compat: true }
    }
}

/// Half-quadratic quantization with float zero points, in groups along the inputs (axis 1) or strided over the
/// flattened matrix (axis 0, [`GroupSize::Strided`]).
#[derive(Clone, Copy, Debug, Default)]
pub struct Hqq {
    options: HqqOptions,
}

impl Hqq {
    /// With these options.
    pub fn new(options: HqqOptions) -> Self {
        Self { options }
    }

    /// The grid that spans a group, or the weight that is too large.
    fn range_grid(&self, w: &[f32], max: f32, round_zero: bool) -> Result<ZeroGrid, usize> {
        let low = w.iter().copied().fold(f32::INFINITY, f32::min);
        let high = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // Of groups without weights, too.
        if !(self.options.compat || low < 0.0 || high > 0.0) {
            return Ok(ZeroGrid { inverse: 1.0, zero: 0.0 });
        }
        let inverse = match self.options.compat {
            true if high - low <= 1e-4 => 1.0,
            // The library multiplies with a reciprocal.
            true => (1.0 / (high - low) * max).min(2e4),
            false => {
                // Zero points are f16 as well: none is beyond 2^15.
                let least = low.abs().max(high.abs()) / 32768.0;
                1.0 / f16::from_f32(((high - low) / max).max(least)).max(f16::MIN_POSITIVE_SUBNORMAL).to_f32()
            }
        };
        if !f16::from_f32(1.0 / inverse).is_finite() {
            let largest = w.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
            return Err(largest.map_or(0, |(i, _)| i));
        }
        let zero = -low * inverse;
        Ok(ZeroGrid { inverse, zero: if round_zero { zero.round_ties_even() } else { zero } })
    }

    fn encode(
        &self,
        layer: usize,
        w: ArrayView2<'_, f32>,
        spec: &QuantSpec,
    ) -> Result<QuantizedMatrix, QuantizeError> {
        let (rows, cols) = w.dim();
        let flat = w.to_slice().expect("rows are contiguous");
        let groups = spec.group.groups(rows, cols);
        let view = match groups {
            Groups::Strided { count } => Grouped::strided(flat, count),
            Groups::Flat { len } => Grouped::runs(flat, flat.len().max(1), len),
            Groups::Row { len } => Grouped::runs(flat, cols.max(1), len),
            _ => unreachable!("other groups are not valid for this method"),
        };
        let max = f32::from(u8::MAX >> (8 - spec.bits));
        let round_zero = self.options.round_zero.unwrap_or(spec.bits == 4);
        let found = view.map(|_, w| self.range_grid(w, max, round_zero));
        let overflow = |(g, i): (usize, usize)| {
            let at = view.index(g, i);
            let (row, col, value) = (at / cols, at % cols, flat[at]);
            QuantizeError::ScaleOverflow { layer, row, col, value, scale: value.abs() / max }
        };
        let grids = found.into_iter().enumerate().map(|(g, grid)| grid.map_err(|i| overflow((g, i))));
        let mut grids = grids.collect::<Result<Vec<ZeroGrid>, _>>()?;
        if let Some(solver) = &self.options.solver {
            solver.solve(view, &mut grids, max);
        }
        let zeros: Vec<f16> = grids.iter().map(|grid| f16::from_f32(grid.zero)).collect();
        if !self.options.compat {
            grids.iter_mut().zip(&zeros).for_each(|(grid, zero)| grid.zero = zero.to_f32());
        }
        let codes = affine::pack_rows(spec.bits, rows, cols, |r, codes| {
            let mut start = 0;
            while start < cols {
                let end = groups.run_end(r, start, cols);
                let grid = grids[groups.index(r, start, cols)];
                let weights = &flat[r * cols + start..r * cols + end];
                let run = weights.iter().zip(&mut codes[start..end]);
                run.for_each(|(&w, code)| *code = code_bits(grid.code(max, w)));
                start = end;
            }
        })
        .map_err(|source| QuantizeError::Matrix { layer, source })?;
        let scales = grids.iter().map(|grid| f16::from_f32(1.0 / grid.inverse)).collect();
        let zeros = Offset::Zero(Params::F16(zeros));
        Ok(QuantizedMatrix::affine(codes, groups, Params::F16(scales), zeros, 0))
    }
}

impl Quantizer for Hqq {
    fn name(&self) -> &'static str {
        "hqq"
    }

    fn description(&self) -> &'static str {
        "half-quadratic: float zero points that forgive outliers; no calibration"
    }

    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn layouts(&self) -> &'static [&'static str] {
        &["hqq"]
    }

    fn default_spec(&self) -> QuantSpec {
        let group = GroupSize::Columns(64);
        QuantSpec { group, scales: ParamsKind::F16, symmetric: false, ..QuantSpec::default() }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        spec.validate()?;
        let option = |option, found: String, allowed| Err(SpecError::Option { option, found, allowed });
        if ![8, 6, 5, 4, 3, 2, 1].contains(&spec.bits) {
            return Err(SpecError::Bits { found: spec.bits, allowed: &[1, 2, 3, 4, 5, 6, 8] });
        }
        if spec.grid != GridKind::Int {
            return option("grid", "a table".to_owned(), "integers");
        }
        if spec.symmetric {
            return option("symmetric", "true".to_owned(), "false: zero points are what HQQ finds");
        }
        if spec.act_order {
            return option("act_order", "true".to_owned(), "false: HQQ knows no activations");
        }
        if !matches!(
            spec.group,
            GroupSize::Row | GroupSize::Columns(_) | GroupSize::Flat(_) | GroupSize::Strided(_)
        ) {
            let (found, allowed) = (spec.group.as_config(), "give a number of weights, or -1 for whole rows");
            return Err(SpecError::Group { found, allowed });
        }
        let Some(solver) = self.options.solver else { return Ok(()) };
        if !(solver.lp_norm > 0.0 && solver.lp_norm <= 1.0) {
            return option("lp_norm", solver.lp_norm.to_string(), "above 0, at most 1");
        }
        if !(solver.beta > 0.0 && solver.beta.is_finite()) {
            return option("beta", solver.beta.to_string(), "above 0");
        }
        if !(1.0..=2.0).contains(&solver.kappa) {
            return option("kappa", solver.kappa.to_string(), "1 to 2");
        }
        if !(1..=10_000).contains(&solver.iters) {
            return option("iters", solver.iters.to_string(), "1 to 10000");
        }
        Ok(())
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize {
        // Grids, next zero points with their errors twice while they are put together, and the zero points before.
        let per_group = size_of::<ZeroGrid>() + 2 * 8 + 4 + 4;
        let of = |&(rows, cols): &(usize, usize)| {
            let groups = spec.group.groups(rows, cols).count(rows, cols);
            4 * rows * cols + rows * (cols * usize::from(spec.bits)).div_ceil(8) + groups * per_group
        };
        shapes.iter().map(of).sum()
    }

    fn quantize(&self, layers: Vec<LayerWeights>, _: LayerStats) -> Result<Vec<Quantized>, QuantizeError> {
        affine::each_layer(self, layers, |layer, w, spec| self.encode(layer, w, spec))
    }
}
