//! Random layers for the benches.

use half::f16;
use ndarray::Array2;
use quant_core::{Codes, Grid, Groups, Offset, Params, QuantizedMatrix};
use quant_kernels::PackedMatrix;

/// Uniform numbers in -1..1.
pub(crate) fn random(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_simple_fn((rows, cols), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// A matrix `[n, k]` of random codes around the middle of their range, with scales in f16.
pub(crate) fn quantized(n: usize, k: usize, bits: u8, group: usize, seed: u64) -> QuantizedMatrix {
    let random = random(n, k, seed);
    let mut codes = Codes::zeros(bits, n, k).expect("1 to 8 bits");
    let middle = 1u16 << (bits - 1);
    let mut row = vec![0; k];
    for (r, numbers) in random.rows().into_iter().enumerate() {
        let code = |x: f32| (f32::from(middle) * (1.0 + x)) as u8;
        row.iter_mut().zip(numbers).for_each(|(to, x)| *to = code(*x));
        codes.set_row(r, &row);
    }
    let groups = Groups::Row { len: group };
    let count = groups.count(n, k);
    QuantizedMatrix {
        codes,
        grid: Grid::signed(bits),
        groups,
        scales: Params::F16(vec![f16::from_f32(0.01); count]),
        offset: Offset::None,
        row_scale: None,
        col_scale: None,
        input_perm: None,
        outliers: None,
        dtype: None,
    }
}

/// Panics unless a product of `x` with some rows of the matrix is as near to the exact one as two operands with
/// `half_step` of their largest magnitude allow.
#[allow(dead_code, reason = "not every bench multiplies")]
pub(crate) fn check(packed: &PackedMatrix, x: &Array2<f32>, out: &Array2<f32>, half_step: f32) {
    let mut weights = vec![0.0; x.ncols()];
    let largest = |row: &[f32]| row.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let x = x.row(0).to_vec();
    for output in (0..out.ncols()).step_by(out.ncols() / 16 + 1) {
        packed.dequantize_row(output, &mut weights).expect("a row of the matrix");
        let exact: f64 = weights.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        let product = f64::from(largest(&weights) * largest(&x)) * x.len() as f64;
        let bound = product * (2.0 * f64::from(half_step) + x.len() as f64 * f64::from(f32::EPSILON));
        let found = f64::from(out[[0, output]]);
        assert!((found - exact).abs() <= bound, "output {output}: {found} instead of {exact}");
    }
}
