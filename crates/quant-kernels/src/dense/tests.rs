//! The definition of a product in plain loops, and that every instruction set and partition obeys it to the bit.

use half::{bf16, f16};
use ndarray::{Array2, ArrayView2, Axis, s};
use proptest::prelude::*;

use super::*;
use crate::isa;

/// A reproducible matrix with numbers of different sizes and signs.
fn matrix(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
    let mut state = seed.wrapping_mul(2_654_435_769) | 1;
    Array2::from_shape_simple_fn((rows, cols), || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let magnitude = [1.0, 0.01, 30.0, 1e-6][(state & 3) as usize];
        magnitude * ((state >> 8) as f32 / (1u32 << 23) as f32 - 1.0)
    })
}

/// The definition in the module's documentation.
fn defined(alpha: f32, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, beta: f32, out: &mut Array2<f32>) {
    for ((i, j), out) in out.indexed_iter_mut() {
        let mut value = if beta == 0.0 { 0.0 } else { beta * *out };
        for p0 in (0..a.ncols()).step_by(KC) {
            let end = (p0 + KC).min(a.ncols());
            let sum = (p0..end).fold(0.0f32, |sum, p| a[[i, p]].mul_add(b[[p, j]], sum));
            value = alpha.mul_add(sum, value);
        }
        *out = value;
    }
}

/// NaN equals NaN: which payload survives is not defined.
fn assert_same_bits(found: &Array2<f32>, expected: &Array2<f32>, what: &str) {
    assert_eq!(found.dim(), expected.dim());
    for ((at, found), expected) in found.indexed_iter().zip(expected) {
        let same = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
        assert!(same, "{what}: {found:?} instead of {expected:?} at {at:?}");
    }
}

/// Runs on every instruction set of this machine, each with 1 and 3 threads.
fn everywhere(check: impl Fn(&str) + Sync) {
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for &cap in isa::supported() {
            pool.install(|| isa::with_cap(cap, || check(&format!("{cap}, {threads} threads"))));
        }
    }
}

/// Sizes around the tiles of all instruction sets.
const EDGES: [usize; 14] = [0, 1, 2, 5, 6, 7, 8, 11, 12, 13, 16, 17, 31, 33];

#[test]
fn tile_edges_obey_the_definition() {
    for m in EDGES {
        for n in EDGES {
            for k in [0, 1, 3, 7, 8, 9, 20] {
                let (a, b) = (matrix(m, k, 1), matrix(k, n, 2));
                let bt = b.t().as_standard_layout().into_owned();
                let start = matrix(m, n, 3);
                let mut expected = start.clone();
                defined(-0.5, a.view(), b.view(), 1.0, &mut expected);
                for &cap in isa::supported() {
                    isa::with_cap(cap, || {
                        let mut out = start.clone();
                        matmul_nn(-0.5, a.view(), b.view(), 1.0, out.view_mut()).unwrap();
                        assert_same_bits(&out, &expected, &format!("nn {m}x{n}x{k} {cap}"));
                        let mut out = start.clone();
                        gemm_nt(-0.5, a.view(), bt.view(), 1.0, out.view_mut()).unwrap();
                        assert_same_bits(&out, &expected, &format!("nt {m}x{n}x{k} {cap}"));
                    });
                }
            }
        }
    }
}

#[test]
fn several_blocks_and_tasks_obey_the_definition() {
    let (m, n, k) = (250, 1100, 2 * KC + 19);
    let (x, w) = (matrix(m, k, 4), matrix(n, k, 5));
    let mut expected = Array2::zeros((m, n));
    defined(1.0, x.view(), w.t(), 0.0, &mut expected);
    everywhere(|what| {
        if !what.starts_with("scalar, 3") {
            let mut out = Array2::from_elem((m, n), f32::NAN);
            matmul_nt(x.view(), w.view(), out.view_mut()).unwrap();
            assert_same_bits(&out, &expected, what);
        }
    });
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    let (m, n, k) = (23, 70, KC + 40);
    let (x, w) = (matrix(m, k, 6), matrix(n, k, 7));
    let mut whole = Array2::zeros((m, n));
    matmul_nt(x.view(), w.view(), whole.view_mut()).unwrap();
    everywhere(|what| {
        for rows in 1..m {
            let mut parts = Array2::zeros((m, n));
            for (x, out) in x.axis_chunks_iter(Axis(0), rows).zip(parts.axis_chunks_iter_mut(Axis(0), rows)) {
                matmul_nt(x, w.view(), out).unwrap();
            }
            assert_same_bits(&parts, &whole, &format!("{rows} rows at a time, {what}"));
        }
    });
}

#[test]
fn gram_matrices_touch_the_upper_triangle_only() {
    for (t, k) in [(0, 4), (1, 1), (5, 33), (KC + 3, 90), (40, 300)] {
        let x = matrix(t, k, 8);
        let start = matrix(k, k, 9);
        let mut expected = start.clone();
        defined(2.0, x.t(), x.view(), 1.0, &mut expected);
        for ((i, j), h) in expected.indexed_iter_mut() {
            if j < i {
                *h = start[[i, j]];
            }
        }
        everywhere(|what| {
            let mut h = start.clone();
            syrk_tn_acc(x.view(), 2.0, h.view_mut()).unwrap();
            assert_same_bits(&h, &expected, &format!("{t}x{k} {what}"));
        });
    }
}

#[test]
fn mirroring_makes_the_matrix_symmetric() {
    for k in [0, 1, 2, 63, 64, 65, 200] {
        let start = matrix(k, k, 10);
        let mut h = start.clone();
        mirror_upper_to_lower(h.view_mut()).unwrap();
        for ((i, j), found) in h.indexed_iter() {
            assert_eq!(*found, start[[i.min(j), i.max(j)]]);
        }
    }
}

#[test]
fn half_weights_give_the_bits_of_their_widened_copy() {
    let (m, n, k) = (9, 37, KC + 21);
    let (x, w) = (matrix(m, k, 11), matrix(n, k, 12));
    let (b, h) = (w.mapv(bf16::from_f32), w.mapv(f16::from_f32));
    let (mut from_b, mut from_h) = (Array2::zeros((m, n)), Array2::zeros((m, n)));
    matmul_nt(x.view(), b.mapv(bf16::to_f32).view(), from_b.view_mut()).unwrap();
    matmul_nt(x.view(), h.mapv(f16::to_f32).view(), from_h.view_mut()).unwrap();
    everywhere(|what| {
        let mut out = Array2::zeros((m, n));
        matmul_nt_half(x.view(), HalfView::Bf16(b.view()), out.view_mut()).unwrap();
        assert_same_bits(&out, &from_b, what);
        matmul_nt_half(x.view(), HalfView::F16(h.view()), out.view_mut()).unwrap();
        assert_same_bits(&out, &from_h, what);
    });
}

#[test]
fn nan_and_infinity_reach_their_row_and_column_only() {
    let (m, n, k) = (13, 35, 21);
    let (mut x, mut w) = (matrix(m, k, 13), matrix(n, k, 14));
    x[[4, 20]] = f32::NAN;
    w[[33, 0]] = f32::INFINITY;
    everywhere(|what| {
        let mut out = Array2::zeros((m, n));
        matmul_nt(x.view(), w.view(), out.view_mut()).unwrap();
        for ((i, j), out) in out.indexed_iter() {
            if i == 4 {
                assert!(out.is_nan(), "{what}");
            } else {
                assert_eq!(out.is_infinite(), j == 33, "{what}");
            }
        }
    });
}

#[test]
fn beta_zero_forgets_what_was_there() {
    let (x, w) = (matrix(3, 4, 15), matrix(5, 4, 16));
    let mut out = Array2::from_elem((3, 5), f32::NAN);
    matmul_nt(x.view(), w.view(), out.view_mut()).unwrap();
    assert!(out.iter().all(|x| x.is_finite()));
    let (x, w) = (Array2::zeros((3, 0)), Array2::zeros((5, 0)));
    let mut out = Array2::from_elem((3, 5), f32::NAN);
    matmul_nt(x.view(), w.view(), out.view_mut()).unwrap();
    assert!(out.iter().all(|x| *x == 0.0));
}

#[test]
fn parts_of_one_matrix_multiply_in_place() {
    let mut whole = matrix(40, 60, 17);
    let before = whole.clone();
    let (left, mut right) = whole.view_mut().split_at(Axis(1), 20);
    let b = before.slice(s![..20, 20..60]);
    matmul_nn(-1.0, left.view(), b, 1.0, right.view_mut()).unwrap();
    let mut expected = before.slice(s![.., 20..60]).to_owned();
    defined(-1.0, before.slice(s![.., ..20]), b, 1.0, &mut expected);
    assert_same_bits(&whole.slice(s![.., 20..60]).to_owned(), &expected, "right part");
    assert_same_bits(
        &whole.slice(s![.., ..20]).to_owned(),
        &before.slice(s![.., ..20]).to_owned(),
        "left part",
    );
}

#[test]
fn wrong_shapes_and_strides_are_named() {
    let (x, w) = (matrix(3, 4, 18), matrix(5, 6, 19));
    let mut out = Array2::zeros((3, 5));
    let error = matmul_nt(x.view(), w.view(), out.view_mut()).unwrap_err();
    assert_eq!(error, ShapeError::Shape { operand: "w", expected: [5, 4], found: [5, 6] });
    let error = matmul_nt(x.t(), w.view(), out.view_mut()).unwrap_err();
    assert_eq!(error, ShapeError::Strided { operand: "x", stride: 4 });
    let error = matmul_nn(1.0, x.view(), matrix(4, 6, 0).view(), 0.0, out.view_mut()).unwrap_err();
    assert_eq!(error, ShapeError::Shape { operand: "out", expected: [3, 6], found: [3, 5] });
    assert!(matches!(
        syrk_tn_acc(x.view(), 1.0, out.view_mut()),
        Err(ShapeError::Shape { operand: "h", .. })
    ));
    assert!(matches!(mirror_upper_to_lower(out.view_mut()), Err(ShapeError::Shape { operand: "h", .. })));
}

proptest! {
    #![proptest_config(crate::at_most(48))]

    #[test]
    fn any_shape_obeys_the_definition_and_the_error_bound(
        m in 0usize..40, n in 0usize..80, k in 0usize..(2 * KC + 30), seed in any::<u32>(),
        alpha in prop_oneof![Just(1.0f32), Just(-1.0), -2.0f32..2.0],
        beta in prop_oneof![Just(0.0f32), Just(1.0), -2.0f32..2.0],
    ) {
        // Rows of wider matrices: contiguous, but far from each other.
        let (a, w) = (matrix(m, k + 3, seed), matrix(n, k + 5, seed ^ 1));
        let (a, w) = (a.slice(s![.., 2..k + 2]), w.slice(s![.., 5..]));
        let start = matrix(m, n, seed ^ 2);
        let mut expected = start.clone();
        defined(alpha, a, w.t(), beta, &mut expected);
        for &cap in isa::supported() {
            let mut out = start.clone();
            isa::with_cap(cap, || gemm_nt(alpha, a, w, beta, out.view_mut())).unwrap();
            assert_same_bits(&out, &expected, cap.name());
        }

        // Each fused step adds at most eps/2 of a partial sum, each of which is bounded by the sum of magnitudes;
        // beside the k steps there are k/KC + 1 block sums, one product with beta and one with alpha.
        let steps = (k + k / KC + 3) as f64;
        for ((i, j), found) in expected.indexed_iter() {
            let old = f64::from(beta) * f64::from(start[[i, j]]);
            let terms = (0..k).map(|p| f64::from(a[[i, p]]) * f64::from(w[[j, p]]));
            let exact = old + f64::from(alpha) * terms.clone().sum::<f64>();
            let size = old.abs() + f64::from(alpha).abs() * terms.map(f64::abs).sum::<f64>();
            let bound = steps * f64::from(f32::EPSILON) * size + f64::from(f32::MIN_POSITIVE);
            prop_assert!((f64::from(*found) - exact).abs() <= bound, "{found} for {exact} +- {bound}");
        }
    }
}
