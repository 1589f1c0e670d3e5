use half::f16;
use proptest::prelude::*;

use super::*;
use crate::grid::GridKind;
use crate::normal::NormalForm;
use crate::params::ParamsKind;

/// Every kind of part the type has, in random combination.
fn any_matrix() -> impl Strategy<Value = QuantizedMatrix> {
    (1usize..6, 1usize..24, 1u8..=8).prop_flat_map(|(rows, cols, bits)| {
        let entries = 1usize << bits;
        let float = -2.0f32..2.0;
        let groups = prop_oneof![
            Just(Groups::Tensor),
            (1usize..30).prop_map(|len| Groups::Row { len }),
            (1usize..4, 1usize..9).prop_map(|(rows, cols)| Groups::Tile { rows, cols }),
            (1usize..40).prop_map(|len| Groups::Flat { len }),
            (1..=rows * cols).prop_map(|count| Groups::Strided { count }),
            prop::collection::vec(0u32..3, cols).prop_map(|v| Groups::Index { of_col: v.into(), count: 3 }),
        ];
        let values = prop::collection::vec(any::<u8>(), rows * cols);
        let grid = prop_oneof![
            (-200i32..200).prop_map(|midpoint| Grid::Int { midpoint }),
            prop::collection::vec(float.clone(), entries).prop_map(|t| Grid::Table(t.into())),
        ];
        let params = move |n: usize| {
            prop_oneof![
                prop::collection::vec(-2.0f32..2.0, n).prop_map(Params::F32),
                prop::collection::vec(-2.0f32..2.0, n)
                    .prop_map(|v| Params::F16(v.into_iter().map(f16::from_f32).collect())),
                prop::collection::vec(120u8..130, n).prop_map(Params::E8M0),
            ]
        };
        (Just((rows, cols, bits)), groups, values, grid).prop_flat_map(move |(dims, groups, values, grid)| {
            let (rows, cols, bits) = dims;
            let n = groups.count(rows, cols);
            let offset = prop_oneof![
                Just(Offset::None),
                params(n).prop_map(Offset::Zero),
                prop::collection::vec(any::<u8>(), n).prop_map(|z| Offset::Zero(Params::U8(z))),
                (params(n), prop_oneof![Just(1.0f32), Just(-1.0)])
                    .prop_map(|(param, sign)| Offset::Shift { param, sign }),
            ];
            let vector = |n| prop::option::of(prop::collection::vec(-2.0f32..2.0, n));
            let col_scale = prop_oneof![
                vector(cols).prop_map(move |v| v.map(|values| ColScale { values, rows_per_block: rows })),
                vector(cols * rows.div_ceil(2))
                    .prop_map(|v| v.map(|values| ColScale { values, rows_per_block: 2 })),
            ];
            let perm = prop::option::of(Just((0..cols as u32).collect::<Vec<_>>()).prop_shuffle());
            let outliers = prop::option::of(prop::collection::vec(-2.0f32..2.0, rows).prop_map(move |v| {
                Outliers { columns: vec![cols as u32 - 1], values: DenseTensor::from_f32(&[rows, 1], &v) }
            }));
            (params(n), offset, vector(rows), col_scale, perm, outliers).prop_map(
                move |(scales, offset, row_scale, col_scale, perm, outliers)| {
                    let max = (entries - 1) as u8;
                    let codes: Vec<u8> = values.iter().map(|v| v & max).collect();
                    QuantizedMatrix {
                        codes: Codes::from_values(bits, rows, cols, &codes).unwrap(),
                        grid: grid.clone(),
                        groups: groups.clone(),
                        scales,
                        offset,
                        row_scale,
                        col_scale,
                        input_perm: perm.map(|p| Permutation::new(p).unwrap()),
                        outliers,
                        dtype: None,
                    }
                },
            )
        })
    })
}

/// The formula of the type's documentation, element by element in f64.
fn by_formula(q: &QuantizedMatrix) -> Array2<f64> {
    let (rows, cols) = (q.rows(), q.cols());
    let mut w = Array2::zeros((rows, cols));
    for r in 0..rows {
        for c in 0..cols {
            let k = q.input_perm.as_ref().map_or(c, |p| p.features()[c] as usize);
            let g = q.groups.index(r, c, cols);
            let scale = f64::from(q.scales.get(g));
            let offset = match &q.offset {
                Offset::None => 0.0,
                Offset::Zero(z) => -scale * f64::from(z.get(g)),
                Offset::Shift { param, sign } => f64::from(*sign) * f64::from(param.get(g)),
            };
            let row = q.row_scale.as_ref().map_or(1.0, |s| f64::from(s[r]));
            let col =
                q.col_scale.as_ref().map_or(1.0, |s| f64::from(s.values[r / s.rows_per_block * cols + k]));
            w[[r, k]] = row * col * (scale * f64::from(q.grid.value(q.codes.get(r, c))) + offset);
        }
    }
    if let Some(o) = &q.outliers {
        let values = o.values.to_f32().unwrap();
        for r in 0..rows {
            for (i, &c) in o.columns.iter().enumerate() {
                w[[r, c as usize]] = f64::from(values[r * o.columns.len() + i]);
            }
        }
    }
    w
}

/// Largest magnitude any intermediate of an element can have; all generated parts are at most 2 but for codes,
/// midpoints and zeros of at most 511 together.
const MAGNITUDE: f64 = 2.0 * 2.0 * 2.0 * 512.0 * 2.0;
/// At most six roundings of half an ulp each on values up to [`MAGNITUDE`].
const BOUND: f64 = 6.0 * MAGNITUDE * (f32::EPSILON as f64) / 2.0;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn dequantize_is_the_formula(q in any_matrix()) {
        q.validate().unwrap();
        let (w, exact) = (q.dequantize(), by_formula(&q));
        for (w, e) in w.iter().zip(&exact) {
            prop_assert!((f64::from(*w) - e).abs() <= BOUND, "{} {}", w, e);
        }
        for r in 0..q.rows() {
            let mut row = vec![0.0; q.cols()];
            q.dequantize_row(r, &mut row);
            prop_assert_eq!(w.row(r).to_vec(), row);
        }
    }

    #[test]
    fn normal_form_multiplies_as_the_weights_do(q in any_matrix(), seed in any::<u64>()) {
        let x: Vec<f32> = (0..q.cols()).map(|i| ((seed >> (i % 57)) as u8 as f32 - 128.0) / 64.0).collect();
        let Some(normal) = q.normal_form() else {
            let strided = matches!(q.groups, Groups::Strided { .. } | Groups::Index { .. });
            let blocks = q.col_scale.as_ref().is_some_and(|s| s.rows_per_block < q.rows());
            prop_assert!(strided || blocks);
            return Ok(());
        };
        let y = NormalForm::gemv(&normal, &x);
        let w = by_formula(&q);
        for (r, y) in y.iter().enumerate() {
            let exact: f64 = w.row(r).iter().zip(&x).map(|(w, &x)| w * f64::from(x)).sum();
            // Scale and bias carry three f32 roundings each; the rest is f64. Activations are at most 2.
            let bound = 2.0 * BOUND * q.cols() as f64;
            prop_assert!((y - exact).abs() <= bound, "{} {}", y, exact);
        }
    }
}

#[test]
fn inconsistent_parts_are_named() {
    let codes = Codes::zeros(4, 2, 8).unwrap();
    let q = |groups, n| {
        QuantizedMatrix::affine(codes.clone(), groups, Params::F32(vec![1.0; n]), Offset::None, 8)
    };
    assert!(q(Groups::Row { len: 4 }, 4).validate().is_ok());
    assert_eq!(
        q(Groups::Row { len: 4 }, 3).validate(),
        Err(MatrixError::Size { part: "scales", expected: 4, found: 3 })
    );
    assert!(q(Groups::Row { len: 0 }, 4).validate().is_err());
    let bad = Groups::Index { of_col: vec![2; 8].into(), count: 2 };
    assert_eq!(q(bad, 4).validate(), Err(MatrixError::Range { part: "g_idx", limit: 2, found: 2 }));
    assert!(Permutation::new(vec![0, 0]).is_err());
}

#[test]
fn act_order_is_a_permutation() {
    let perm = Permutation::sorting_groups(&[1, 0, 1, 0]).unwrap();
    assert_eq!(perm.features(), [1, 3, 0, 2]);
    assert_eq!(perm.inverse(), [2, 0, 3, 1]);
    assert_eq!(Permutation::sorting_groups(&[0, 0, 1, 1]), None);
}

#[test]
fn spec_is_derived() {
    let codes = Codes::zeros(4, 2, 8).unwrap();
    let zeros = Offset::Zero(Params::U8(vec![8; 4]));
    let mut q = QuantizedMatrix::affine(codes, Groups::Row { len: 4 }, Params::F32(vec![1.0; 4]), zeros, 0);
    let spec = q.spec();
    assert_eq!((spec.bits, spec.group, spec.symmetric), (4, GroupSize::Columns(4), true));
    assert_eq!((spec.grid, spec.scales), (GridKind::Int, ParamsKind::F32));
    q.offset = Offset::Zero(Params::U8(vec![8, 8, 8, 7]));
    assert!(!q.spec().symmetric);
    q.offset = Offset::None;
    assert!(!q.spec().symmetric, "codes around 0 are not");
    q.grid = Grid::signed(4);
    assert!(q.spec().symmetric);
    q.grid = GridKind::Nf4.grid(4).unwrap();
    for group in [GroupSize::Tensor, GroupSize::Row, GroupSize::Tile { rows: 2, cols: 4 }, GroupSize::Flat(4)]
    {
        q.groups = group.groups(2, 8);
        assert_eq!((q.spec().grid, q.spec().group, q.spec().symmetric), (GridKind::Nf4, group, true));
    }
    q.groups = GroupSize::Strided(4).groups(2, 8);
    assert_eq!((q.spec().group, &q.groups), (GroupSize::Strided(4), &Groups::Strided { count: 4 }));
}
