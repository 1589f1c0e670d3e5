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

/// Stored keys and values, appended piece by piece, against plain attention to the rounded numbers.
#[test]
fn stores_of_every_type_hold_what_they_round_to() {
    for (heads, total) in [
        (Heads { heads: 6, kv_heads: 2, dim: 20 }, KC + 70),
        (Heads { heads: 2, kv_heads: 2, dim: 64 }, 33),
        (Heads { heads: 4, kv_heads: 1, dim: 33 }, 5),
    ] {
        let width = heads.kv_heads * heads.dim;
        let (k, v) = (matrix(total, width, 5), matrix(total, width, 6));
        let q = matrix(total, heads.heads * heads.dim, 7);
        for kind in [KvType::F32, KvType::F16, KvType::Int8] {
            let round = |x: &Array2<f32>| {
                let heads = x.exact_chunks((1, heads.dim)).into_iter();
                let numbers: Vec<f32> = heads
                    .flat_map(|head| store::rounded(kind, &head.iter().copied().collect::<Vec<_>>()))
                    .collect();
                Array2::from_shape_vec((total, width), numbers).unwrap()
            };
            let (k_rounded, v_rounded) = (round(&k), round(&v));
            for &cap in isa::supported() {
                isa::with_cap(cap, || {
                    let mut store = KvStore::new(heads.kv_heads, heads.dim, kind);
                    for piece in [0..3, 3..4, 4..total] {
                        let rows = |x: &Array2<f32>| x.slice(s![piece.clone(), ..]).to_owned();
                        store.append(rows(&k).view(), rows(&v).view()).unwrap();
                        let mask = Mask::Causal { offset: piece.start, window: Some(KC + 40) };
                        let q = q.slice(s![piece.clone(), ..]);
                        let (mut found, mut expected) = (Array2::zeros(q.dim()), Array2::zeros(q.dim()));
                        attend_stored(heads, mask, 0.3, q, &store, found.view_mut()).unwrap();
                        let [k, v] = [&k_rounded, &v_rounded].map(|x| x.slice(s![..piece.end, ..]));
                        attend(heads, mask, 0.3, q, k, v, expected.view_mut()).unwrap();
                        assert!(
                            found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                            "{kind:?} {cap}"
                        );
                    }
                    assert_eq!(store.len(), total);
                });
            }
        }
    }
}

#[test]
fn int8_steps_are_those_of_the_largest_magnitude() {
    let rounded = |row: &[f32]| store::rounded(KvType::Int8, row);
    assert_eq!(rounded(&[0.0, 0.0]), [0.0, 0.0]);
    assert_eq!(rounded(&[127.0, -63.4, 0.5]), [127.0, -63.0, 0.0]);
    let row: Vec<f32> = (0..64).map(|i| (i as f32 - 20.0) * 0.37).collect();
    let step = 43.0 * 0.37 / 127.0;
    // Half a step, and the rounding of the products on the way.
    assert!(rounded(&row).iter().zip(&row).all(|(a, b)| (a - b).abs() <= 0.5 * step * (1.0 + 1e-5)));
    assert!(rounded(&[1.0, f32::INFINITY]).iter().all(|x| x.is_nan()));
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
    assert_eq!(error, ShapeError::Shape { operand: "keys", expected: [3, 4], found: [3, 8] });
    let odd = Heads { heads: 3, kv_heads: 2, dim: 4 };
    assert!(attend(odd, Mask::All, 1.0, q.view(), k.view(), k.view(), out.view_mut()).is_err());
    let empty = Array2::<f32>::zeros((0, 4));
    attend(heads, Mask::All, 1.0, q.view(), empty.view(), empty.view(), out.view_mut()).unwrap();
    assert!(out.iter().all(|x| *x == 0.0));
}

proptest! {
    #![proptest_config(crate::at_most(40))]

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
