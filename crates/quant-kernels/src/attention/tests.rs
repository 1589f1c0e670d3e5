//! Against the products and the softmax taken one by one, and one query at a time.

use ndarray::{Array2, ArrayView1, s};
use proptest::prelude::*;

use super::*;
use crate::vec;

fn matrix(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
    let mut state = seed.wrapping_mul(2_654_435_769) | 1;
    Array2::from_shape_simple_fn((rows, cols), || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 22) as f32 - 2.0
    })
}

/// One head of one query as the documentation defines it.
fn defined(
    q: ArrayView1<'_, f32>,
    k: ArrayView2<'_, f32>,
    v: ArrayView2<'_, f32>,
    seen: Range<usize>,
    scale: f32,
) -> Vec<f32> {
    let q = q.insert_axis(Axis(0)).as_standard_layout().into_owned();
    let k = k.as_standard_layout();
    let mut scores = Array2::zeros((1, k.nrows()));
    crate::gemm_nt(scale, q.view(), k.view(), 0.0, scores.view_mut()).unwrap();
    let scores = scores.as_slice_mut().unwrap();
    vec::softmax(scores, seen.clone()).unwrap();
    let sum = |c: usize| {
        let blocks = parts(0..seen.end, KC).map(|block| {
            let keys = block.start.max(seen.start)..block.end.max(seen.start);
            keys.fold(0.0f32, |sum, j| scores[j].mul_add(v[[j, c]], sum))
        });
        blocks.fold(0.0, |out, sum| out + sum)
    };
    (0..v.ncols()).map(sum).collect()
}

fn check(heads: Heads, mask: Mask, t: usize, s: usize, seed: u32) {
    let Heads { heads: count, kv_heads, dim } = heads;
    let q = matrix(t, count * dim, seed);
    let (k, v) = (matrix(s, kv_heads * dim, seed ^ 1), matrix(s, kv_heads * dim, seed ^ 2));
    let mut expected = Array2::zeros((t, count * dim));
    for i in 0..t {
        for h in 0..count {
            let kv = h / (count / kv_heads) * dim;
            let head = defined(
                q.slice(s![i, h * dim..(h + 1) * dim]),
                k.slice(s![.., kv..kv + dim]),
                v.slice(s![.., kv..kv + dim]),
                mask.visible(i, s),
                0.3,
            );
            expected.slice_mut(s![i, h * dim..(h + 1) * dim]).assign(&ArrayView1::from(&head));
        }
    }
    for &cap in isa::supported() {
        let mut out = Array2::from_elem((t, count * dim), f32::NAN);
        isa::with_cap(cap, || attend(heads, mask, 0.3, q.view(), k.view(), v.view(), out.view_mut()))
            .unwrap();
        for (at, (found, expected)) in out.iter().zip(&expected).enumerate() {
            assert_eq!(
                found.to_bits(),
                expected.to_bits(),
                "{found} {expected} at {at}: {heads:?} {mask:?} {t} {s} {cap}"
            );
        }
    }
}

#[test]
fn long_contexts_cross_the_blocks_of_keys() {
    let heads = Heads { heads: 2, kv_heads: 1, dim: 20 };
    let s = 2 * KC + 30;
    for (t, window) in [(40, None), (1, None), (40, Some(KC + 5)), (30, Some(7)), (1, Some(1))] {
        check(heads, Mask::Causal { offset: s - t, window }, t, s, 7);
    }
    check(heads, Mask::All, 5, s, 8);
}

#[test]
fn one_query_at_a_time_gives_the_bits_of_all_at_once() {
    let heads = Heads { heads: 6, kv_heads: 2, dim: 16 };
    let (t, window) = (70, Some(33));
    let (q, k, v) = (matrix(t, 96, 1), matrix(t, 32, 2), matrix(t, 32, 3));
    let mut all = Array2::zeros((t, 96));
    let mask = |offset| Mask::Causal { offset, window };
    attend(heads, mask(0), 0.25, q.view(), k.view(), v.view(), all.view_mut()).unwrap();
    for i in 0..t {
        let mut one = Array2::zeros((1, 96));
        let (k, v) = (k.slice(s![..=i, ..]), v.slice(s![..=i, ..]));
        attend(heads, mask(i), 0.25, q.slice(s![i..=i, ..]), k, v, one.view_mut()).unwrap();
        assert!(one.iter().zip(all.row(i)).all(|(a, b)| a.to_bits() == b.to_bits()), "query {i}");
    }
}

#[test]
fn what_is_not_seen_has_no_influence() {
    let heads = Heads { heads: 1, kv_heads: 1, dim: 8 };
    let (q, mut k, mut v) = (matrix(9, 8, 1), matrix(9, 8, 2), matrix(9, 8, 3));
    for j in [0, 8] {
        k.row_mut(j).fill(f32::INFINITY);
        v.row_mut(j).fill(f32::NAN);
    }
    let mut out = Array2::zeros((9, 8));
    let mask = Mask::Causal { offset: 0, window: Some(4) };
    attend(heads, mask, 1.0, q.view(), k.view(), v.view(), out.view_mut()).unwrap();
    for (i, row) in out.rows().into_iter().enumerate() {
        assert_eq!(row.iter().all(|x| x.is_finite()), (4..8).contains(&i), "row {i}");
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let heads = Heads { heads: 2, kv_heads: 1, dim: 4 };
    let (q, k) = (matrix(3, 8, 1), matrix(3, 4, 2));
    let mut out = Array2::zeros((3, 8));
    let mask = Mask::Causal { offset: 1, window: None };
    let error = attend(heads, mask, 1.0, q.view(), k.view(), k.view(), out.view_mut()).unwrap_err();
    assert_eq!(error, ShapeError::Length { operand: "k", expected: 4, found: 3 });
    let error = attend(heads, Mask::All, 1.0, q.view(), q.view(), k.view(), out.view_mut()).unwrap_err();
    assert_eq!(error, ShapeError::Shape { operand: "k", expected: [3, 4], found: [3, 8] });
    let odd = Heads { heads: 3, kv_heads: 2, dim: 4 };
    assert!(attend(odd, Mask::All, 1.0, q.view(), k.view(), k.view(), out.view_mut()).is_err());
    let empty = Array2::<f32>::zeros((0, 4));
    attend(heads, Mask::All, 1.0, q.view(), empty.view(), empty.view(), out.view_mut()).unwrap();
    assert!(out.iter().all(|x| *x == 0.0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_shape_obeys_the_definition(
        group in 1usize..5, kv_heads in 1usize..4, dim in 1usize..40, t in 0usize..30, past in 0usize..40,
        window in prop::option::of(0usize..50), causal in any::<bool>(), seed in any::<u32>(),
    ) {
        let heads = Heads { heads: group * kv_heads, kv_heads, dim };
        let mask = if causal { Mask::Causal { offset: past, window } } else { Mask::All };
        check(heads, mask, t, past + t, seed);
    }
}
