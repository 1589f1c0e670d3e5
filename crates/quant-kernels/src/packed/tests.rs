//! Packed products and rows have the bits of the dense ones on the dequantized matrix.

use half::{bf16, f16};
use ndarray::{Array, Array2, s};
use proptest::prelude::*;
use quant_core::{
    Codes, ColScale, DenseTensor, Grid, Groups, NormalForm, Offset, Outliers, Params, Permutation,
};

use super::*;
use crate::Isa;

fn same_bits(a: &Array2<f32>, b: &Array2<f32>) -> bool {
    a.dim() == b.dim()
        && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
}

/// The feature of each column in the order of the sums.
fn order(packed: &PackedMatrix) -> Vec<usize> {
    let gather = match &packed.0 {
        Layout::Panels(panels) => panels.input.gather.as_ref(),
        Layout::Rows(_) => None,
    };
    match gather {
        Some(gather) => gather.iter().map(|&feature| feature as usize).collect(),
        None => (0..packed.shape().1).collect(),
    }
}

/// Checks products of a few heights and every row, on every instruction set.
fn check(matrix: &QuantizedMatrix) {
    let dense = matrix.dequantize();
    let (rows, cols) = dense.dim();
    let packed = PackedMatrix::pack(matrix.clone()).unwrap();
    assert_eq!(packed.shape(), (rows, cols));
    let order = order(&packed);
    let sorted = |matrix: &Array2<f32>| matrix.select(Axis(1), &order).as_standard_layout().into_owned();
    for m in [1, 2, 3, 7] {
        let x = Array::from_shape_fn((m, cols), |(i, k)| ((i * 31 + k * 17) % 23) as f32 * 0.37 - 4.0);
        let given = &x;
        let mut expected = Array2::zeros((m, rows));
        dense::matmul_nt(sorted(&x).view(), sorted(&dense).view(), expected.view_mut()).unwrap();
        for &cap in isa::supported() {
            let mut out = Array2::zeros((m, rows));
            isa::with_cap(cap, || packed.matmul(x.view(), out.view_mut())).unwrap();
            assert!(same_bits(&out, &expected), "{m} rows, {cap}, {matrix:?}");
            let mut rounded = Array2::zeros((m, rows));
            isa::with_cap(cap, || {
                let (x, w) = (sorted(&x), sorted(&dense));
                dense::matmul_bf16_of_f32(x.view(), w.view(), rounded.view_mut()).unwrap();
                packed.matmul_bf16(given.view(), out.view_mut()).unwrap();
            });
            assert!(same_bits(&out, &rounded), "bf16, {m} rows, {cap}, {matrix:?}");
        }
        check_fast(matrix, &packed, &x);
    }
    let mut decoded = Array2::zeros((rows, cols));
    for (r, mut out) in decoded.rows_mut().into_iter().enumerate() {
        packed.dequantize_row(r, out.as_slice_mut().unwrap()).unwrap();
    }
    assert!(same_bits(&decoded, &dense), "{matrix:?}");
}

/// Checks that the fast product has the same bits on every instruction set and row by row, and that it is as near
/// to the exact one as its rounding allows.
fn check_fast(matrix: &QuantizedMatrix, packed: &PackedMatrix, x: &Array2<f32>) {
    let Some(input) = packed.fast_input() else { return };
    for scales in [ActScales::Group, ActScales::Row, ActScales::Fixed(0.03)] {
        let product = |cap, x: ArrayView2<'_, f32>| {
            let mut out = Array2::zeros((x.nrows(), matrix.rows()));
            isa::with_cap(cap, || {
                let activations = Activations::new(x, input, scales).unwrap();
                packed.matmul_with(&activations, out.view_mut()).unwrap();
            });
            out
        };
        let scalar = product(Isa::Scalar, x.view());
        for &cap in isa::supported() {
            assert!(same_bits(&product(cap, x.view()), &scalar), "{cap}, {scales:?}, {matrix:?}");
        }
        let last = x.nrows() - 1;
        let alone = product(isa::detected(), x.slice(s![last.., ..]));
        assert!(same_bits(&alone, &scalar.slice(s![last.., ..]).to_owned()), "{scales:?}, {matrix:?}");
        if let Some(form) = matrix.normal_form() {
            for (x, fast) in x.rows().into_iter().zip(scalar.rows()) {
                check_bound(packed, &form, &x.to_vec(), fast.as_slice().unwrap(), scales);
            }
        }
    }
}

/// Holds a row of a fast product to the exact one.
///
/// With `x'` the activations after the prologue and `s` their scale, the errors are
///
/// - of an activation: half a scale, and 127 relative roundings of the quotient: `s * (1/2 + 2^-15)`; what is clamped;
/// - of a table's entry: half its step, times the activation, unless the table is exact;
/// - of f32: each block is rounded 8 times at most, outliers and the factor of the row once each, relative to the
///   sum of all magnitudes that appear.
fn check_bound(packed: &PackedMatrix, form: &NormalForm<'_>, x: &[f32], fast: &[f32], scales: ActScales) {
    let Layout::Panels(panels) = &packed.0 else { panic!("fast products have panels") };
    let exact = form.gemv(x);
    let cols = form.codes.cols();
    let input = &panels.input;
    let mut stored: Vec<f64> = (0..cols)
        .map(|c| {
            let feature = input.gather.as_ref().map_or(c, |gather| gather[c] as usize);
            f64::from(x[feature] * input.multiply.as_ref().map_or(1.0, |factors| factors[c]))
        })
        .collect();
    input.outliers.iter().for_each(|outlier| stored[outlier.column as usize] = 0.0);
    let absmax = |x: &[f64]| x.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    let of_row = absmax(&stored);
    let table_step = match (form.grid, panels.format.table) {
        (Grid::Table(values), Some(table)) => {
            let image = |i: usize| (f64::from(table.image[i]) - 128.0) * f64::from(table.step);
            values.iter().enumerate().fold(0.0f64, |max, (i, &x)| max.max((f64::from(x) - image(i)).abs()))
        }
        _ => 0.0,
    };

    let per_row = cols.div_ceil(form.group_len);
    let blocks = panels.blocks.list();
    let mut codes = vec![0; cols];
    for (n, (exact, fast)) in exact.into_iter().zip(fast).enumerate() {
        form.codes.unpack_row(n, &mut codes);
        let (mut bound, mut magnitude) = (0.0, exact.abs());
        for block in blocks {
            let columns = block.start as usize..(block.start + block.len) as usize;
            let group = n * per_row + columns.start / form.group_len;
            let (scale, bias) = (f64::from(form.scale[group]).abs(), f64::from(form.bias[group]));
            let here = &stored[columns.clone()];
            let step = match scales {
                ActScales::Group => absmax(here) / 127.0,
                ActScales::Row => of_row / 127.0,
                ActScales::Fixed(step) => f64::from(step),
            };
            for (&code, x) in codes[columns].iter().zip(here) {
                let value = f64::from(form.grid.value(code));
                let midpoint = f64::from(panels.format.midpoint);
                let weight = (f64::from(form.scale[group]) * value + bias).abs();
                let clamped = (x.abs() - 127.0 * step).max(0.0);
                let x = x.abs() + step;
                bound += weight * (step * (0.5 + 2f64.powi(-15)) + clamped) + scale * table_step * x;
                magnitude += (scale * (value.abs() + midpoint.abs() + 256.0 * table_step) + bias.abs()) * x;
            }
        }
        let kept: f64 = (0..input.outliers.len())
            .map(|i| {
                let weight = panels.outliers[i * panels.count() * planes::OUTPUTS + n];
                f64::from(weight * x[input.outliers[i].feature as usize]).abs()
            })
            .sum();
        let roundings = 8 * blocks.len() + input.outliers.len() + 4;
        bound += (magnitude + kept) * roundings as f64 * f64::from(f32::EPSILON) / 2.0;
        let error = (f64::from(*fast) - exact).abs();
        assert!(error <= bound, "output {n}: {fast} for {exact}, off by {error} of {bound}, {scales:?}");
    }
}

fn codes(bits: u8, rows: usize, cols: usize) -> Codes {
    let values: Vec<u8> = (0..rows * cols).map(|i| ((i * 7919 + i / 13) % (1 << bits)) as u8).collect();
    Codes::from_values(bits, rows, cols, &values).unwrap()
}

fn scales(n: usize) -> Vec<f32> {
    (0..n).map(|i| 0.01 + (i * 37 % 101) as f32 / 777.0).collect()
}

#[test]
fn usual_layouts_use_panels_and_keep_their_size() {
    let (rows, cols, group) = (32, 256, 64);
    for bits in 1..=8 {
        let groups = Groups::Row { len: group };
        let n = groups.count(rows, cols);
        let f16_scales = Params::F16(scales(n).into_iter().map(f16::from_f32).collect());
        let zeros = Params::U8((0..n).map(|i| (i % (1 << bits)) as u8).collect());
        let matrix =
            QuantizedMatrix::affine(codes(bits, rows, cols), groups, f16_scales, Offset::Zero(zeros), 0);
        let packed = PackedMatrix::pack(matrix.clone()).unwrap();
        assert_eq!(packed.bytes(), rows * cols * usize::from(bits) / 8 + 2 * n + n, "{bits} bits");
        check(&matrix);
    }
}

#[test]
fn act_order_and_symmetric_grids_use_panels() {
    let (rows, cols) = (20, 96);
    let perm: Vec<u32> = (0..cols as u32).map(|c| c * 35 % cols as u32).collect();
    for scales in [
        Params::F32(scales(rows * 6)),
        Params::BF16(scales(rows * 6).into_iter().map(bf16::from_f32).collect()),
    ] {
        let mut matrix =
            QuantizedMatrix::affine(codes(4, rows, cols), Groups::Row { len: 16 }, scales, Offset::None, 8);
        matrix.input_perm = Some(Permutation::new(perm.clone()).unwrap());
        let packed = PackedMatrix::pack(matrix.clone()).unwrap();
        assert!(matches!(packed.0, Layout::Panels(_)));
        check(&matrix);
    }
}

#[test]
fn one_zero_for_all_is_a_midpoint() {
    let (rows, cols) = (16, 64);
    let zeros = Offset::Zero(Params::U8(vec![7; 2 * rows]));
    let groups = Groups::Row { len: 32 };
    let mut matrix =
        QuantizedMatrix::affine(codes(4, rows, cols), groups, Params::F32(scales(2 * rows)), zeros, 1);
    let packed = PackedMatrix::pack(matrix.clone()).unwrap();
    let Layout::Panels(panels) = &packed.0 else { panic!("panels") };
    assert_eq!((panels.format.midpoint, panels.format.offset), (8, crate::ukr::Offset::None));
    check(&matrix);
    matrix.offset = Offset::None;
    let Grid::Int { midpoint } = &mut matrix.grid else { panic!("integers") };
    *midpoint = -3000;
    check(&matrix);
}

#[test]
fn empty_matrices_and_no_rows_multiply() {
    for (rows, cols) in [(0, 0), (0, 40), (3, 0), (17, 33)] {
        let groups = Groups::Row { len: 16 };
        let n = groups.count(rows, cols);
        let matrix =
            QuantizedMatrix::affine(codes(4, rows, cols), groups, Params::F32(scales(n)), Offset::None, 8);
        check(&matrix);
        let packed = PackedMatrix::pack(matrix).unwrap();
        let x = Array2::zeros((0, cols));
        let mut out = Array2::zeros((0, rows));
        packed.matmul(x.view(), out.view_mut()).unwrap();
        let activations = Activations::new(x.view(), packed.fast_input().unwrap(), ActScales::Group).unwrap();
        packed.matmul_with(&activations, out.view_mut()).unwrap();
    }
}

#[test]
fn many_rows_over_views_have_the_bits_of_each_row_alone() {
    let (rows, cols, m) = (70, 160, 27);
    let groups = Groups::Row { len: 32 };
    let n = groups.count(rows, cols);
    let zeros = Offset::Zero(Params::F32((0..n).map(|i| 7.0 + (i % 5) as f32 / 4.0).collect()));
    let packed = QuantizedMatrix::affine(codes(4, rows, cols), groups, Params::F32(scales(n)), zeros, 0);
    let packed = PackedMatrix::pack(packed).unwrap();
    let input = packed.fast_input().unwrap();
    // Views into larger arrays, at odd places.
    let large = Array::from_shape_fn((m, cols + 3), |(i, k)| ((i * 7 + k * 13) % 29) as f32 - 14.0);
    let x = large.slice(s![.., 1..=cols]);
    let mut wide = Array2::zeros((m, rows + 5));
    let activations = Activations::new(x, input, ActScales::Group).unwrap();
    packed.matmul_with(&activations, wide.slice_mut(s![.., 3..3 + rows])).unwrap();
    let mut reused = activations;
    for i in 0..m {
        let mut alone = Array2::zeros((1, rows));
        reused.quantize(x.slice(s![i..=i, ..]), input, ActScales::Group).unwrap();
        packed.matmul_with(&reused, alone.view_mut()).unwrap();
        assert!(same_bits(&alone, &wide.slice(s![i..=i, 3..3 + rows]).to_owned()), "row {i}");
    }
    assert!(wide.column(2).iter().chain(wide.column(3 + rows)).all(|&x| x == 0.0));
}

#[test]
fn several_products_at_once_are_those_one_by_one() {
    let (cols, m) = (96, 13);
    // Of very different sizes, so that threads get unequal parts.
    let matrices: Vec<_> = [200usize, 16, 7]
        .iter()
        .map(|&rows| {
            let groups = Groups::Row { len: 32 };
            let n = groups.count(rows, cols);
            let matrix = QuantizedMatrix::affine(
                codes(4, rows, cols),
                groups,
                Params::F32(scales(n)),
                Offset::None,
                8,
            );
            PackedMatrix::pack(matrix).unwrap()
        })
        .collect();
    for m in [1, m] {
        let x = Array::from_shape_fn((m, cols), |(i, k)| ((i * 7 + k * 13) % 29) as f32 - 14.0);
        let activations =
            Activations::new(x.view(), matrices[0].fast_input().unwrap(), ActScales::Group).unwrap();
        let outs =
            |value| matrices.iter().map(|w| Array2::from_elem((m, w.shape().0), value)).collect::<Vec<_>>();
        let (mut all, mut each) = (outs(f32::NAN), outs(0.0));
        matmul_all(&activations, matrices.iter().zip(all.iter_mut().map(|out| out.view_mut())).collect())
            .unwrap();
        for (matrix, out) in matrices.iter().zip(&mut each) {
            matrix.matmul_with(&activations, out.view_mut()).unwrap();
        }
        assert!(all.iter().zip(&each).all(|(a, b)| same_bits(a, b)));
    }
}

#[test]
fn a_row_that_is_not_finite_is_nan_and_disturbs_no_other() {
    let (rows, cols) = (20, 64);
    let matrix = QuantizedMatrix::affine(
        codes(8, rows, cols),
        Groups::Row { len: 32 },
        Params::F32(scales(2 * rows)),
        Offset::None,
        128,
    );
    let packed = PackedMatrix::pack(matrix).unwrap();
    let clean = Array::from_shape_fn((3, cols), |(i, k)| (i * cols + k) as f32 / 50.0 - 1.0);
    let payload = f32::from_bits(0x7f80_0181);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, payload, -payload] {
        let mut x = clean.clone();
        x[[1, 40]] = bad;
        for scales in [ActScales::Group, ActScales::Row, ActScales::Fixed(0.01)] {
            for &cap in isa::supported() {
                let product = |x: &Array2<f32>| {
                    let mut out = Array2::zeros((3, rows));
                    let input = packed.fast_input().unwrap();
                    isa::with_cap(cap, || {
                        let activations = Activations::new(x.view(), input, scales).unwrap();
                        packed.matmul_with(&activations, out.view_mut()).unwrap();
                    });
                    out
                };
                let (with, without) = (product(&x), product(&clean));
                assert!(with.row(1).iter().all(|x| x.is_nan()), "{bad} {cap}");
                assert_eq!(with.select(Axis(0), &[0, 2]), without.select(Axis(0), &[0, 2]));
            }
        }
    }
}

#[test]
fn bad_matrices_and_shapes_are_refused() {
    let groups = Groups::Row { len: 8 };
    let good = QuantizedMatrix::affine(codes(4, 3, 8), groups, Params::F32(scales(3)), Offset::None, 8);
    let mut bad = good.clone();
    bad.scales = Params::F32(scales(2));
    assert!(matches!(PackedMatrix::pack(bad), Err(PackError::Matrix(MatrixError::Size { .. }))));
    let packed = PackedMatrix::pack(good).unwrap();
    let mut out = Array2::zeros((2, 3));
    let error = packed.matmul(Array2::zeros((2, 7)).view(), out.view_mut()).unwrap_err();
    assert_eq!(error, ShapeError::Shape { operand: "x", expected: [2, 8], found: [2, 7] });
    assert_eq!(packed.dequantize_row(3, &mut [0.0; 8]), Err(ShapeError::Row { found: 3, rows: 3 }));
    assert!(matches!(
        packed.dequantize_row(0, &mut [0.0; 7]),
        Err(ShapeError::Length { operand: "out", .. })
    ));
}

fn any_matrix() -> impl Strategy<Value = QuantizedMatrix> {
    (1usize..40, 1usize..70, 1u8..=8).prop_flat_map(|(rows, cols, bits)| {
        let entries = 1usize << bits;
        let groups = prop_oneof![
            Just(Groups::Tensor),
            (1usize..80).prop_map(|len| Groups::Row { len }),
            (1usize..4, 1usize..40).prop_map(|(rows, cols)| Groups::Tile { rows, cols }),
            (1usize..80).prop_map(|len| Groups::Flat { len }),
            (1usize..4).prop_map(move |n| Groups::Flat { len: n * cols }),
            (1..=rows * cols).prop_map(|count| Groups::Strided { count }),
            prop::collection::vec(0u32..3, cols).prop_map(|v| Groups::Index { of_col: v.into(), count: 3 }),
        ];
        let grid = prop_oneof![
            (-20i32..200).prop_map(|midpoint| Grid::Int { midpoint }),
            prop::collection::vec(-2.0f32..2.0, entries).prop_map(|t| Grid::Table(t.into())),
        ];
        let perm = prop::option::of(Just((0..cols as u32).collect::<Vec<_>>()).prop_shuffle());
        let extra = (0u8..8, 0u8..8, 0u8..8);
        (Just((rows, cols, bits)), groups, grid, perm, 0u8..4, extra).prop_map(
            |((rows, cols, bits), groups, grid, perm, offset, extra)| {
                let n = groups.count(rows, cols);
                let odd: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
                let vector = |n: usize| (0..n).map(|i| 0.5 + (i % 7) as f32 / 3.0).collect::<Vec<_>>();
                QuantizedMatrix {
                    codes: codes(bits, rows, cols),
                    dtype: None,
                    grid,
                    groups,
                    scales: Params::F32(scales(n)),
                    offset: match offset {
                        0 => Offset::None,
                        1 => Offset::Zero(Params::F32(odd)),
                        2 => Offset::Zero(Params::U8((0..n).map(|i| i as u8).collect())),
                        _ => Offset::Shift { param: Params::F32(odd), sign: -1.0 },
                    },
                    row_scale: (extra.0 == 0).then(|| vector(rows)),
                    col_scale: (extra.1 == 0)
                        .then(|| ColScale { values: vector(cols), rows_per_block: rows }),
                    input_perm: perm.map(|p| Permutation::new(p).unwrap()),
                    outliers: (extra.2 == 0).then(|| Outliers {
                        columns: vec![cols as u32 - 1],
                        values: DenseTensor::from_f32(&[rows, 1], &vector(rows)),
                    }),
                }
            },
        )
    })
}

proptest! {
    #![proptest_config(crate::at_most(96))]

    #[test]
    fn any_matrix_multiplies_as_its_dequantized_copy(matrix in any_matrix()) {
        check(&matrix);
    }
}
