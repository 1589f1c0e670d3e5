//! Round to nearest: every weight to the closest point of its group's grid. No calibration data.

use std::time::Instant;

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
use quant_core::{QuantSpec, SpecError};
use quant_math::{Affine, GridFit, ScaleOverflow, ScaleRule};
use rayon::prelude::*;

use crate::affine;
use crate::quantizer::{LayerReport, LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::stats::{LayerStats, Needs};

/// Options of [`Rtn`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RtnOptions {
    /// Shrink each group's range for the least `Σ |w - ŵ|^norm`; `None` is off.
    pub mse: Option<f32>,
}

/// Round to nearest on group-wise integer grids, symmetric or asymmetric (see [`GridFit`]).
///
/// Scales are rounded to f16, as they are stored, before codes are chosen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rtn {
    options: RtnOptions,
}

impl Rtn {
    /// With these options.
    pub fn new(options: RtnOptions) -> Self {
        Self { options }
    }
}

impl Quantizer for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn description(&self) -> &'static str {
        "round to nearest; no calibration"
    }

    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn default_spec(&self) -> QuantSpec {
        QuantSpec::default()
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        affine::validate(spec)?;
        affine::validate_mse(self.options.mse)?;
        if spec.act_order {
            let (found, allowed) = ("true".to_owned(), "false: rounding to nearest knows no activations");
            return Err(SpecError::Option { option: "act_order", found, allowed });
        }
        Ok(())
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize {
        // Results pile up while the weights of later layers wait.
        let weights: usize = shapes.iter().map(|(rows, cols)| 4 * rows * cols).sum();
        let results: usize = shapes.iter().map(|&(rows, cols)| result_bytes(rows, cols, spec)).sum();
        let grids = shapes.iter().map(|&(rows, cols)| grid_bytes(rows, cols, spec)).max().unwrap_or(0);
        weights + results + grids
    }

    fn quantize(&self, layers: Vec<LayerWeights>, _: LayerStats) -> Result<Vec<Quantized>, QuantizeError> {
        let layers = affine::checked(self, layers)?;
        let each = |(layer, LayerWeights { w, spec }): (usize, LayerWeights)| {
            let QuantSpec { bits, symmetric, .. } = spec;
            let fit = GridFit { bits, symmetric, mse: self.options.mse, scales: ScaleRule::StoredF16 };
            round_to_nearest(layer, w.view(), &spec, fit)
        };
        layers.into_iter().enumerate().map(each).collect()
    }
}

/// Bytes of a matrix of codes, f16 scales and byte zero points.
pub(crate) fn result_bytes(rows: usize, cols: usize, spec: &QuantSpec) -> usize {
    let groups = cols.div_ceil(spec.group.len(cols));
    rows * ((cols * usize::from(spec.bits)).div_ceil(8) + 3 * groups)
}

/// Bytes of the grids before they become parameters.
pub(crate) fn grid_bytes(rows: usize, cols: usize, spec: &QuantSpec) -> usize {
    rows * cols.div_ceil(spec.group.len(cols)) * size_of::<Affine>()
}

/// Rounds one layer of finite weights with contiguous rows.
pub(crate) fn round_to_nearest(
    layer: usize,
    w: ArrayView2<'_, f32>,
    spec: &QuantSpec,
    fit: GridFit,
) -> Result<Quantized, QuantizeError> {
    let start = Instant::now();
    let grids = fit_groups(layer, w, spec.group.len(w.ncols()), fit)?;
    let mut quantized = round_on(layer, w, spec, fit, &grids)?;
    quantized.report.seconds = start.elapsed().as_secs_f64();
    Ok(quantized)
}

/// Rounds one layer of finite weights with contiguous rows on the grids of its groups, `[rows, groups]`.
pub(crate) fn round_on(
    layer: usize,
    w: ArrayView2<'_, f32>,
    spec: &QuantSpec,
    fit: GridFit,
    grids: &Array2<Affine>,
) -> Result<Quantized, QuantizeError> {
    let (rows, cols) = w.dim();
    let len = spec.group.len(cols);
    let codes = affine::pack_rows(spec.bits, rows, cols, |r, codes| {
        let groups = contiguous(w.row(r)).chunks(len).zip(codes.chunks_mut(len));
        groups.zip(grids.row(r)).for_each(|((w, codes), grid)| grid.quantize(fit.max_code(), w, codes));
    })
    .map_err(|source| QuantizeError::Matrix { layer, source })?;
    let matrix = affine::matrix(codes, len, grids, None, None);
    let rel_error = affine::relative(affine::square_error(w, &matrix), affine::square_norm(w));
    Ok(Quantized { matrix, report: LayerReport { rel_error, ..LayerReport::default() } })
}

/// The grid of every group of `len` columns, `[rows, groups]`.
pub(crate) fn fit_groups(
    layer: usize,
    w: ArrayView2<'_, f32>,
    len: usize,
    fit: GridFit,
) -> Result<Array2<Affine>, QuantizeError> {
    let (rows, cols) = w.dim();
    let mut grids = Array2::default((rows, cols.div_ceil(len)));
    let pairs = grids.axis_iter_mut(Axis(0)).into_par_iter().zip(w.axis_iter(Axis(0))).enumerate();
    let failed = pairs.map(|(row, (mut grids, w))| {
        for (g, (grid, w)) in grids.iter_mut().zip(contiguous(w).chunks(len)).enumerate() {
            match fit.fit(w) {
                Ok(fitted) => *grid = fitted,
                Err(ScaleOverflow { index, value, scale }) => {
                    return Some(QuantizeError::ScaleOverflow {
                        layer,
                        row,
                        col: g * len + index,
                        value,
                        scale,
                    });
                }
            }
        }
        None
    });
    match failed.find_first(Option::is_some).flatten() {
        Some(error) => Err(error),
        None => Ok(grids),
    }
}

fn contiguous(row: ArrayView1<'_, f32>) -> &[f32] {
    row.to_slice().expect("rows are contiguous")
}
