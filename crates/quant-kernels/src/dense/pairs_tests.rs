//! That products in bf16 are those of [`matmul_nt`] on rounded operands, and what `vdpbf16ps` computes.

use half::{bf16, f16};
use ndarray::{Array2, Axis};
use proptest::prelude::*;

use super::*;
use crate::isa;
use crate::simd::round_bf16;

/// A reproducible matrix whose products are far from the subnormal numbers.
fn matrix(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
    let mut state = seed.wrapping_mul(2_654_435_769) | 1;
    Array2::from_shape_simple_fn((rows, cols), || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let magnitude = [1.0, 0.01, 30.0, 1e-4][(state & 3) as usize];
        magnitude * ((state >> 8 | 1) as f32 / (1u32 << 23) as f32 - 1.0)
    })
}

/// The definition, on operands rounded by the crate `half`.
fn defined(x: ArrayView2<'_, f32>, w: ArrayView2<'_, f32>) -> Array2<f32> {
    let round = |m: ArrayView2<'_, f32>| m.mapv(|x| bf16::from_f32(x).to_f32());
    let mut out = Array2::zeros((x.nrows(), w.nrows()));
    matmul_nt(round(x).view(), round(w).view(), out.view_mut()).unwrap();
    out
}

/// Zeros have one sign here: `vdpbf16ps` keeps that of a sum that it flushes.
fn assert_same_bits(found: &Array2<f32>, expected: &Array2<f32>, what: &str) {
    assert_eq!(found.dim(), expected.dim());
    for ((at, found), expected) in found.indexed_iter().zip(expected) {
        let same = found.to_bits() == expected.to_bits()
            || (found.is_nan() && expected.is_nan())
            || (*found == 0.0 && *expected == 0.0);
        assert!(same, "{what}: {found:?} instead of {expected:?} at {at:?}");
    }
}

#[test]
fn rounding_is_that_of_half() {
    for high in 0..=u16::MAX {
        for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits(u32::from(high) << 16 | low);
            assert_eq!(round_bf16(x).to_bits() >> 16, u32::from(bf16::from_f32(x).to_bits()), "{x:?}");
        }
    }
}

#[test]
fn every_tile_and_both_kinds_of_weights_obey_the_definition() {
    for m in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25] {
        for n in [0, 1, 8, 31, 32, 33, 65, 130] {
            for k in [0, 1, 2, 7, 8, 18, 33] {
                let (x, w) = (matrix(m, k, 1), matrix(n, k, 2));
                let (b, h) = (w.mapv(bf16::from_f32), w.mapv(f16::from_f32));
                let from_b = defined(x.view(), b.mapv(bf16::to_f32).view());
                let from_h = defined(x.view(), h.mapv(f16::to_f32).view());
                for &cap in isa::supported() {
                    isa::with_cap(cap, || {
                        let mut out = Array2::from_elem((m, n), f32::NAN);
                        matmul_nt_bf16(x.view(), HalfView::Bf16(b.view()), out.view_mut()).unwrap();
                        assert_same_bits(&out, &from_b, &format!("bf16 {m}x{n}x{k} {cap}"));
                        let mut out = Array2::from_elem((m, n), f32::NAN);
                        matmul_nt_bf16(x.view(), HalfView::F16(h.view()), out.view_mut()).unwrap();
                        assert_same_bits(&out, &from_h, &format!("f16 {m}x{n}x{k} {cap}"));
                    });
                }
            }
        }
    }
}

#[test]
fn blocks_tasks_and_row_counts_change_no_bit() {
    let (m, n, k) = (250, 300, 2 * KC + 18);
    let (x, w) = (matrix(m, k, 3), matrix(n, k, 4).mapv(bf16::from_f32));
    let expected = defined(x.view(), w.mapv(bf16::to_f32).view());
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for &cap in isa::supported().iter().filter(|&&cap| cap != isa::Isa::Scalar) {
            pool.install(|| {
                isa::with_cap(cap, || {
                    for rows in [1, 2, 3, 7, m] {
                        let mut out = Array2::zeros((m, n));
                        let parts = x.axis_chunks_iter(Axis(0), rows);
                        for (x, out) in parts.zip(out.axis_chunks_iter_mut(Axis(0), rows)) {
                            matmul_nt_bf16(x, HalfView::Bf16(w.view()), out).unwrap();
                        }
                        assert_same_bits(&out, &expected, &format!("{rows} rows, {cap}, {threads} threads"));
                    }
                })
            });
        }
    }
}

#[test]
fn nan_and_infinity_reach_their_row_and_column_only() {
    let (m, n, k) = (13, 35, 22);
    let (mut x, mut w) = (matrix(m, k, 5), matrix(n, k, 6).mapv(bf16::from_f32));
    x[[4, 21]] = f32::NAN;
    w[[33, 0]] = bf16::INFINITY;
    for &cap in isa::supported() {
        let mut out = Array2::zeros((m, n));
        isa::with_cap(cap, || matmul_nt_bf16(x.view(), HalfView::Bf16(w.view()), out.view_mut())).unwrap();
        for ((i, j), out) in out.indexed_iter() {
            let expected = if i == 4 { out.is_nan() } else { out.is_infinite() == (j == 33) };
            assert!(expected, "{out} at {i}, {j} on {cap}");
        }
    }
}

#[test]
fn wrong_shapes_are_named() {
    let (x, w) = (matrix(3, 4, 7), matrix(5, 6, 8).mapv(bf16::from_f32));
    let mut out = Array2::zeros((3, 5));
    let error = matmul_nt_bf16(x.view(), HalfView::Bf16(w.view()), out.view_mut()).unwrap_err();
    assert_eq!(error, ShapeError::Shape { operand: "w", expected: [5, 4], found: [5, 6] });
    let x = matrix(2, 6, 7);
    let error = matmul_nt_bf16(x.view(), HalfView::Bf16(w.view()), out.view_mut()).unwrap_err();
    assert_eq!(error, ShapeError::Shape { operand: "out", expected: [2, 5], found: [3, 5] });
}

/// Zero for a subnormal number.
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x }
}

/// One step of `vdpbf16ps` on the words of [`crate::simd::pair`].
fn dot_step(sum: f32, a: f32, b: f32) -> f32 {
    let first = |word: f32| flush(f32::from_bits(word.to_bits() & 0xffff_0000));
    let second = |word: f32| flush(f32::from_bits(word.to_bits() << 16));
    let sum = flush(first(a).mul_add(first(b), flush(sum)));
    flush(second(a).mul_add(second(b), sum))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any bits: subnormal numbers, infinities, NaN, overflow.
    #[test]
    fn the_instruction_is_the_scalar_model(seed in any::<u64>(), exponents in 1u32..256) {
        let Some(dot) = isa::bf16_dot() else { return Ok(()) };
        let mut state = seed | 1;
        let mut bits = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 32) as u32
        };
        // Exponents around each other, so that sums cancel and underflow.
        let mut halves = || { let x = bits(); (x & 0x807f) | (((x >> 16) % exponents) << 7) };
        let mut words = |n: usize| -> Vec<f32> {
            (0..n).map(|_| f32::from_bits(halves() << 16 | halves())).collect()
        };
        let (rows, width, depth) = (5, 32, 4);
        let (a, b, start) = (words(depth * rows), words(depth * width), words(rows * width));
        let mut sums = start.clone();
        crate::simd::pair_tile(dot, rows, width, &a, &b, &mut sums);
        for (i, found) in sums.into_iter().enumerate() {
            let (r, j) = (i / width, i % width);
            let steps = (0..depth).map(|p| (a[p * rows + r], b[p * width + j]));
            let expected = steps.fold(start[i], |sum, (a, b)| dot_step(sum, a, b));
            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            prop_assert!(same, "{found:e} instead of {expected:e}");
        }
    }

    /// Operands near the smallest numbers: the definition up to what flushing may lose in each step.
    #[test]
    fn flushing_loses_no_more_than_stated(k in 1usize..600, seed in any::<u32>(), scale in 0i32..40) {
        let x = matrix(3, k, seed).mapv(|x| x * 2.0f32.powi(-60 - scale));
        let w = matrix(40, k, seed ^ 1).mapv(|w| bf16::from_f32(w * 2.0f32.powi(-60 - scale)));
        let expected = defined(x.view(), w.mapv(bf16::to_f32).view());
        let largest = x.iter().copied().chain(w.iter().map(|w| w.to_f32())).fold(0.0, |m: f32, x| m.max(x.abs()));
        // Besides, a sum that was off by this much may round the other way.
        let bound = k as f32 * f32::MIN_POSITIVE * (1.0 + largest) * (1.0 + 1e-3);
        for &cap in isa::supported() {
            let mut out = Array2::zeros((3, 40));
            isa::with_cap(cap, || matmul_nt_bf16(x.view(), HalfView::Bf16(w.view()), out.view_mut())).unwrap();
            for (found, expected) in out.iter().zip(&expected) {
                prop_assert!((found - expected).abs() <= bound, "{found:e} for {expected:e} on {cap}");
            }
        }
    }
}
