//! What methods with integer codes and a scale per row group share: checks, measures, and the way from codes and
//! grids to a [`QuantizedMatrix`].

use std::time::Instant;

use half::f16;
use ndarray::{Array2, ArrayView2, Axis};
use quant_core::{
    Codes, GridKind, GroupSize, Groups, MatrixError, Offset, Params, Permutation, QuantSpec, QuantizedMatrix,
    SpecError, codes,
};
use quant_math::Affine;
use rayon::prelude::*;

use crate::quantizer::{LayerReport, LayerWeights, QuantizeError, Quantized, Quantizer};

/// Rows in one piece of parallel work.
pub(crate) const ROWS: usize = 32;

/// Checks what all these methods ask of a specification.
pub(crate) fn validate(spec: &QuantSpec) -> Result<(), SpecError> {
    spec.validate()?;
    if !(2..=8).contains(&spec.bits) {
        return Err(SpecError::Bits { found: spec.bits, allowed: &[2, 3, 4, 5, 6, 7, 8] });
    }
    if spec.grid != GridKind::Int {
        return Err(SpecError::Option { option: "grid", found: "a table".to_owned(), allowed: "integers" });
    }
    if !matches!(spec.group, GroupSize::Row | GroupSize::Columns(_)) {
        let (found, allowed) = (spec.group.as_config(), "give columns per group, or -1 for whole rows");
        return Err(SpecError::Group { found, allowed });
    }
    Ok(())
}

/// Checks the exponent of a range search.
pub(crate) fn validate_mse(mse: Option<f32>) -> Result<(), SpecError> {
    match mse {
        Some(norm) if !(norm > 0.0 && norm <= 10.0) => {
            Err(SpecError::Option { option: "mse", found: norm.to_string(), allowed: "above 0, at most 10" })
        }
        _ => Ok(()),
    }
}

/// Checks all layers of a call before any work, and gives them contiguous rows.
pub(crate) fn checked(
    method: &dyn Quantizer,
    layers: Vec<LayerWeights>,
) -> Result<Vec<LayerWeights>, QuantizeError> {
    for (layer, LayerWeights { w, spec }) in layers.iter().enumerate() {
        method.validate(spec).map_err(|source| QuantizeError::Spec { layer, source })?;
        check_finite(layer, w.view())?;
    }
    let standard = |LayerWeights { w, spec }| {
        let w = if w.is_standard_layout() { w } else { w.as_standard_layout().into_owned() };
        LayerWeights { w, spec }
    };
    Ok(layers.into_iter().map(standard).collect())
}

/// Finds the first weight, row by row, that is NaN or infinite.
fn check_finite(layer: usize, w: ArrayView2<'_, f32>) -> Result<(), QuantizeError> {
    let rows = w.axis_iter(Axis(0)).into_par_iter().enumerate();
    let bad = rows.map(|(row, w)| {
        let col = w.iter().position(|w| !w.is_finite())?;
        Some(QuantizeError::NonFinite { layer, row, col, value: w[col] })
    });
    bad.find_first(Option::is_some).flatten().map_or(Ok(()), Err)
}

/// `‖m‖²` in f64, summed in the order of rows.
pub(crate) fn square_norm(m: ArrayView2<'_, f32>) -> f64 {
    let row = |row: ndarray::ArrayView1<'_, f32>| row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    m.axis_iter(Axis(0)).into_par_iter().map(row).collect::<Vec<f64>>().into_iter().sum()
}

/// `‖W - Ŵ‖²` in f64, summed in the order of rows.
pub(crate) fn square_error(w: ArrayView2<'_, f32>, matrix: &QuantizedMatrix) -> f64 {
    let rows = w.axis_iter(Axis(0)).into_par_iter().enumerate();
    let errors = rows.map_init(
        || vec![0.0; matrix.cols()],
        |rounded, (r, w)| {
            matrix.dequantize_row(r, rounded);
            w.iter().zip(&*rounded).map(|(&w, &q)| (f64::from(w) - f64::from(q)).powi(2)).sum::<f64>()
        },
    );
    errors.collect::<Vec<f64>>().into_iter().sum()
}

/// `‖error‖ / ‖w‖` from the squares of both.
pub(crate) fn relative(error: f64, w: f64) -> f64 {
    if w > 0.0 { (error / w).sqrt() } else { 0.0 }
}

/// Checks the layers of a call, makes a matrix of each with `encode(layer, weights, spec)`, and measures time and error.
pub(crate) fn each_layer(
    method: &dyn Quantizer,
    layers: Vec<LayerWeights>,
    encode: impl Fn(usize, ArrayView2<'_, f32>, &QuantSpec) -> Result<QuantizedMatrix, QuantizeError>,
) -> Result<Vec<Quantized>, QuantizeError> {
    let layers = checked(method, layers)?;
    let each = |(layer, LayerWeights { w, spec }): (usize, LayerWeights)| {
        let start = Instant::now();
        let matrix = encode(layer, w.view(), &spec)?;
        let rel_error = relative(square_error(w.view(), &matrix), square_norm(w.view()));
        let report =
            LayerReport { rel_error, seconds: start.elapsed().as_secs_f64(), ..LayerReport::default() };
        Ok(Quantized { matrix, report })
    };
    layers.into_iter().enumerate().map(each).collect()
}

/// Fills the codes of each row with `fill(row, out)`, in parallel.
pub(crate) fn pack_rows(
    bits: u8,
    rows: usize,
    cols: usize,
    fill: impl Fn(usize, &mut [u8]) + Sync,
) -> Result<Codes, MatrixError> {
    let mut codes = Codes::zeros(bits, rows, cols)?;
    let row_bytes = codes.row_bytes().max(1);
    let chunks: Vec<_> = codes.row_chunks_mut(ROWS).collect();
    chunks.into_par_iter().enumerate().for_each_init(
        || vec![0; cols],
        |values, (chunk, bytes)| {
            for (i, bytes) in bytes.chunks_mut(row_bytes).enumerate() {
                fill(chunk * ROWS + i, values);
                codes::pack(bits, values, bytes);
            }
        },
    );
    Ok(codes)
}

/// A matrix of row groups of `len` columns with f16 scales and integer zero points. `grids`: `[rows, groups]`, taken
/// in the order `group_order`, or as they are.
pub(crate) fn matrix(
    codes: Codes,
    len: usize,
    grids: &Array2<Affine>,
    group_order: Option<&[usize]>,
    input_perm: Option<Permutation>,
) -> QuantizedMatrix {
    let groups = grids.ncols();
    let each = |i: usize| {
        let group = group_order.map_or(i % groups, |order| order[i % groups]);
        grids[[i / groups, group]]
    };
    // Grids fitted for f16 are f16 already; others are rounded here, and must not become zero.
    let stored = |scale: f32| f16::from_f32(scale).max(f16::MIN_POSITIVE_SUBNORMAL);
    let scales = (0..grids.len()).map(|i| stored(each(i).scale)).collect();
    let zeros = (0..grids.len()).map(|i| each(i).zero).collect();
    let groups = Groups::Row { len };
    let mut matrix =
        QuantizedMatrix::affine(codes, groups, Params::F16(scales), Offset::Zero(Params::U8(zeros)), 0);
    matrix.input_perm = input_perm;
    matrix
}
