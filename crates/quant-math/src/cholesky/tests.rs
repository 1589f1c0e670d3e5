use proptest::prelude::*;

use super::*;

/// `B Bᵀ + δ I` with uncorrelated `B: [n, rank]`, so that `δ` bounds the eigenvalues from below.
pub(crate) fn positive_definite(n: usize, rank: usize, shift: f32, seed: u32) -> Array2<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    let b = Array2::from_shape_simple_fn((n, rank), || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    });
    let mut h = b.dot(&b.t()) / rank as f32;
    h.diag_mut().iter_mut().for_each(|d| *d += shift);
    h
}

fn upper(m: &Array2<f32>) -> Array2<f64> {
    Array2::from_shape_fn(m.dim(), |(i, j)| if i <= j { f64::from(m[[i, j]]) } else { 0.0 })
}

fn lower(m: &Array2<f32>) -> Array2<f64> {
    Array2::from_shape_fn(m.dim(), |(i, j)| if i >= j { f64::from(m[[i, j]]) } else { 0.0 })
}

/// `max |a - b| / √(h_ii h_jj)`: the measure in which Cholesky is backward stable.
fn distance(a: &Array2<f64>, b: &Array2<f32>, h: &Array2<f32>) -> f64 {
    let scale = |i: usize, j: usize| f64::from(h[[i, i]]).sqrt() * f64::from(h[[j, j]]).sqrt();
    a.indexed_iter().map(|((i, j), a)| (a - f64::from(b[[i, j]])).abs() / scale(i, j)).fold(0.0, f64::max)
}

/// Each entry of a factor's product sums at most `n` terms, whose absolute values sum to `√(h_ii h_jj)`, with at most
/// `256 + n/256` roundings to each, plus a solve of at most 128 steps: twice the sum of these bounds it safely.
fn bound(n: usize) -> f64 {
    2.0 * (256.0 + n as f64 / 256.0 + 128.0).min(3.0 * n as f64 + 4.0) * f64::from(f32::EPSILON) / 2.0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn factors_multiply_to_the_matrix(n in 0usize..300, seed: u32) {
        let h = positive_definite(n, n / 2 + 1, 0.05, seed);
        let mut r = h.clone();
        Blocked.reverse_factor(r.view_mut()).unwrap();
        prop_assert!(distance(&upper(&r).dot(&upper(&r).t()), &h, &h) <= bound(n));
        let mut l = h.clone();
        Blocked.factor(l.view_mut()).unwrap();
        prop_assert!(distance(&lower(&l).dot(&lower(&l).t()), &h, &h) <= bound(n));
        for ((i, j), &original) in h.indexed_iter() {
            prop_assert!(i <= j || r[[i, j]] == original, "the other triangle is kept");
            prop_assert!(i >= j || l[[i, j]] == original, "the other triangle is kept");
        }
    }

    #[test]
    fn inverses_invert(n in 1usize..300, seed: u32) {
        let h = positive_definite(n, 2 * n, 0.5, seed);
        let mut u = h.clone();
        Blocked.upper_factor_of_inverse(u.view_mut()).unwrap();
        prop_assert!(u.indexed_iter().all(|((i, j), &v)| i <= j || v == 0.0));
        let mut inverse = h.clone();
        Blocked.inverse(inverse.view_mut()).unwrap();
        let exact = h.mapv(f64::from);
        let identity = Array2::<f64>::eye(n);
        // |H| <= 6 and |H⁻¹| <= 2 here, so that errors relative to the factors grow by at most 6 * 2 * √n.
        let bound = bound(n) * 12.0 * (n as f64).sqrt();
        for inverse in [upper(&u).t().dot(&upper(&u)), inverse.mapv(f64::from)] {
            let off = (exact.dot(&inverse) - &identity).fold(0.0f64, |a, v| a.max(v.abs()));
            prop_assert!(off <= bound, "{} {}", off, bound);
        }
    }
}

#[test]
fn features_of_any_scale_are_factored_alike() {
    // Massive activations: a few features a thousand times larger than the rest. Backward stability must hold
    // relative to each feature's own scale.
    let n = 200;
    let mut h = positive_definite(n, 400, 0.05, 7);
    let scale = |i: usize| if i.is_multiple_of(37) { 1e3f32 } else { 1.0 };
    h.indexed_iter_mut().for_each(|((i, j), v)| *v *= scale(i) * scale(j));
    let mut r = h.clone();
    Blocked.reverse_factor(r.view_mut()).unwrap();
    assert!(distance(&upper(&r).dot(&upper(&r).t()), &h, &h) <= bound(n));
}

#[test]
fn bad_matrices_are_refused() {
    let mut h = positive_definite(150, 300, 0.1, 1);
    h[[20, 20]] = -1.0;
    assert_eq!(Blocked.reverse_factor(h.clone().view_mut()), Err(NotPositiveDefinite { column: 20 }));
    assert_eq!(Blocked.factor(h.clone().view_mut()), Err(NotPositiveDefinite { column: 20 }));
    for bad in [f32::NAN, f32::INFINITY] {
        h[[20, 20]] = bad;
        assert!(Blocked.inverse(h.clone().view_mut()).is_err());
        assert!(Blocked.upper_factor_of_inverse(h.clone().view_mut()).is_err());
    }
    assert!(Blocked.reverse_factor(Array2::zeros((3, 3)).view_mut()).is_err());
}

#[test]
fn threads_do_not_change_a_bit() {
    let h = positive_definite(300, 400, 0.01, 3);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (mut r, mut inverse) = (h.clone(), h.clone());
        pool.install(|| {
            Blocked.reverse_factor(r.view_mut()).unwrap();
            Blocked.inverse(inverse.view_mut()).unwrap();
        });
        (r, inverse)
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}

#[cfg(feature = "lapack")]
#[test]
fn lapack_gives_the_same() {
    for n in [1, 2, 127, 128, 129, 300] {
        // Eigenvalues between 0.5 and 1.5, so that factors differ by no more than three times what products do.
        let h = positive_definite(n, 2 * n, 0.5, n as u32);
        type Run = fn(&dyn Cholesky, ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite>;
        let all: [Run; 4] = [
            |c, h| c.reverse_factor(h),
            |c, h| c.factor(h),
            |c, h| c.upper_factor_of_inverse(h),
            |c, h| c.inverse(h),
        ];
        for (which, run) in all.into_iter().enumerate() {
            let (mut ours, mut theirs) = (h.clone(), h.clone());
            run(&Blocked, ours.view_mut()).unwrap();
            run(&Lapack, theirs.view_mut()).unwrap();
            let off = (&ours - &theirs).fold(0.0f32, |a, v| a.max(v.abs()));
            assert!(f64::from(off) <= 3.0 * bound(n), "{which} at {n}: {off}");
            let mut bad = h.clone();
            bad[[n - 1, n - 1]] = -1.0;
            assert!(run(&Lapack, bad.view_mut()).is_err());
        }
    }
}
