//! Packed products and rows have the bits of the dense ones on the dequantized matrix.

use half::{bf16, f16};
use ndarray::{Array, Array2};
use proptest::prelude::*;
use quant_core::{Codes, ColScale, DenseTensor, Grid, Groups, Offset, Outliers, Params, Permutation};

use super::*;

fn same_bits(a: &Array2<f32>, b: &Array2<f32>) -> bool {
    a.dim() == b.dim()
        && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
}

/// Checks products of a few heights and every row, on every instruction set.
fn check(matrix: &QuantizedMatrix) {
    let dense = matrix.dequantize();
    let (rows, cols) = dense.dim();
    let packed = PackedMatrix::pack(matrix.clone()).unwrap();
    assert_eq!(packed.shape(), (rows, cols));
    for m in [1, 2, 3, 7] {
        let x = Array::from_shape_fn((m, cols), |(i, k)| ((i * 31 + k * 17) % 23) as f32 * 0.37 - 4.0);
        let mut expected = Array2::zeros((m, rows));
        dense::matmul_nt(x.view(), dense.view(), expected.view_mut()).unwrap();
        for &cap in isa::supported() {
            let mut out = Array2::zeros((m, rows));
            isa::with_cap(cap, || packed.matmul(x.view(), out.view_mut())).unwrap();
            assert!(same_bits(&out, &expected), "{m} rows, {cap}, {matrix:?}");
        }
    }
    let mut decoded = Array2::zeros((rows, cols));
    for (r, mut out) in decoded.rows_mut().into_iter().enumerate() {
        packed.dequantize_row(r, out.as_slice_mut().unwrap()).unwrap();
    }
    assert!(same_bits(&decoded, &dense), "{matrix:?}");
}

fn codes(bits: u8, rows: usize, cols: usize) -> Codes {
    let values: Vec<u8> = (0..rows * cols).map(|i| ((i * 7919 + i / 13) % (1 << bits)) as u8).collect();
    Codes::from_values(bits, rows, cols, &values).unwrap()
}

fn scales(n: usize) -> Vec<f32> {
    (0..n).map(|i| 0.01 + (i * 37 % 101) as f32 / 777.0).collect()
}

#[test]
fn usual_layouts_use_octets_and_keep_their_size() {
    let (rows, cols, group) = (24, 256, 64);
    for bits in 1..=8 {
        let groups = Groups::Row { len: group };
        let n = groups.count(rows, cols);
        let f16_scales = Params::F16(scales(n).into_iter().map(f16::from_f32).collect());
        let zeros = Params::U8((0..n).map(|i| (i % (1 << bits)) as u8).collect());
        let matrix =
            QuantizedMatrix::affine(codes(bits, rows, cols), groups, f16_scales, Offset::Zero(zeros), 0);
        let packed = PackedMatrix::pack(matrix.clone()).unwrap();
        assert!(matches!(packed.0, Layout::Octets(_)));
        let stored = if bits <= 4 { usize::from(bits) } else { 8 };
        assert_eq!(packed.bytes(), rows * cols * stored / 8 + 2 * n + n, "{bits} bits");
        check(&matrix);
    }
}

#[test]
fn act_order_and_symmetric_grids_use_octets() {
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
        assert!(matches!(packed.0, Layout::Octets(_)));
        check(&matrix);
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
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_matrix_multiplies_as_its_dequantized_copy(matrix in any_matrix()) {
        check(&matrix);
    }
}
