use proptest::prelude::*;

use super::*;
use crate::cholesky::tests::positive_definite;
use crate::cholesky::{Blocked, Cholesky};
use crate::range::ScaleRule;

fn weights(n: usize, k: usize, seed: u32) -> Array2<f32> {
    let mut state = seed | 1;
    Array2::from_shape_simple_fn((n, k), || {
        // Sums of four uniform numbers: tails, but no outliers.
        (0..4)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .sum()
    })
}

fn factor(h: &Array2<f32>) -> Array2<f32> {
    let mut r = h.clone();
    Blocked.reverse_factor(r.view_mut()).unwrap();
    r
}

fn fit(bits: u8, symmetric: bool) -> GridFit {
    GridFit { bits, symmetric, mse: None, scales: ScaleRule::StoredF16 }
}

/// What the textbook gives: codes, and how far each was from a rounding tie, in steps.
struct Textbook {
    codes: Array2<u8>,
    grids: Array2<Affine>,
    tie: Array2<f64>,
}

/// `U` with `UᵀU = H⁻¹`, in f64 and by definition: the inverse of the reverse factor.
fn upper_factor_of_inverse(h: &Array2<f32>) -> Array2<f64> {
    let k = h.nrows();
    let mut r = h.mapv(f64::from);
    for c in (0..k).rev() {
        let tail = |r: &Array2<f64>, i: usize| (c + 1..k).map(|j| r[[i, j]] * r[[c, j]]).sum::<f64>();
        r[[c, c]] = (r[[c, c]] - tail(&r, c)).sqrt();
        for i in 0..c {
            r[[i, c]] = (r[[i, c]] - tail(&r, i)) / r[[c, c]];
        }
    }
    let mut u = Array2::zeros((k, k));
    for j in 0..k {
        u[[j, j]] = 1.0 / r[[j, j]];
        for i in (0..j).rev() {
            let dot: f64 = (i..j).map(|p| u[[i, p]] * r[[p, j]]).sum();
            u[[i, j]] = -dot * u[[j, j]];
        }
    }
    u
}

/// The column loop as the papers write it: errors are pushed forward with rows of `U`, at once or block by block.
/// `T` stands for the precision of the arithmetic.
fn textbook(
    w: &Array2<f32>,
    u: &Array2<f64>,
    len: usize,
    fit: GridFit,
    block: usize,
    single: bool,
) -> Textbook {
    let (n, k) = w.dim();
    let round = |x: f64| if single { f64::from(x as f32) } else { x };
    let mut outer = w.mapv(f64::from);
    let mut out = Textbook {
        codes: Array2::zeros((n, k)),
        grids: Array2::default((n, k.div_ceil(len))),
        tie: Array2::zeros((n, k)),
    };
    for start in (0..k).step_by(block) {
        let end = (start + block).min(k);
        for row in 0..n {
            let mut inner = outer.row(row).to_vec();
            for i in start..end {
                if i % len == 0 {
                    let group: Vec<f32> = (i..(i + len).min(k)).map(|j| outer[[row, j]] as f32).collect();
                    out.grids[[row, i / len]] = fit.fit(&group).unwrap();
                }
                let grid = out.grids[[row, i / len]];
                let (scale, zero) = (f64::from(grid.scale), f64::from(grid.zero));
                let steps = round(inner[i] / scale);
                let code = (steps.round_ties_even() + zero).clamp(0.0, f64::from(fit.max_code()));
                out.codes[[row, i]] = code as u8;
                out.tie[[row, i]] = ((steps - steps.floor()) - 0.5).abs();
                let error = round((inner[i] - round((code - zero) * scale)) / u[[i, i]]);
                for j in i..k {
                    let moved = round(inner[j] - round(error * round(u[[i, j]])));
                    if j < end {
                        inner[j] = moved;
                    } else {
                        outer[[row, j]] = round(outer[[row, j]] - round(error * round(u[[i, j]])));
                    }
                }
            }
        }
    }
    out
}

/// Asserts that two roundings part only where the first difference of a row is a tie up to f32 rounding.
fn assert_equal_up_to_ties(ours: &Rounded, exact: &Textbook) {
    let mut parted = 0;
    for (row, (ours, theirs)) in ours.codes.rows().into_iter().zip(exact.codes.rows()).enumerate() {
        if let Some(c) = ours.iter().zip(theirs).position(|(a, b)| a != b) {
            parted += 1;
            assert!(exact.tie[[row, c]] < 1e-3, "row {row} column {c}: {}", exact.tie[[row, c]]);
        }
    }
    assert!(parted * 20 <= exact.codes.nrows(), "{parted} rows part");
}

#[test]
fn codes_are_those_of_the_textbook() {
    let (n, k) = (40, 96);
    let w = weights(n, k, 5);
    let h = positive_definite(k, 2 * k, 0.05, 9);
    let (r, u) = (factor(&h), upper_factor_of_inverse(&h));
    for (bits, symmetric) in [(2, false), (3, true), (4, false), (8, true)] {
        for len in [16, 40, 96] {
            let fit = fit(bits, symmetric);
            // Fitted on up-to-date weights: the textbook without lazy updates, where every block is one column.
            let exact = textbook(&w, &u, len, fit, 1, false);
            for block in [1, 16, 40, 64, 128] {
                let grouping = Grouping::Fitted { len, fit, timing: GroupTiming::Reached };
                let ours = round_columns(w.clone().view_mut(), r.view(), block, grouping).unwrap();
                assert_equal_up_to_ties(&ours, &exact);
                let moved = ours.grids.iter().zip(&exact.grids).filter(|(a, b)| a != b).count();
                assert!(moved * 20 <= exact.grids.len(), "{moved} grids differ");
            }
            // Fitted at the start of the block.
            let exact = textbook(&w, &u, len, fit, 80, false);
            if 80 % len == 0 || len == 96 {
                let grouping = Grouping::Fitted { len, fit, timing: GroupTiming::BlockStart };
                let ours = round_columns(w.clone().view_mut(), r.view(), 80, grouping).unwrap();
                assert_equal_up_to_ties(&ours, &exact);
            }
        }
    }
}

#[test]
fn both_forms_are_equally_exact() {
    // Inputs of low rank with a thousandth of the usual damping: hard enough that f32 shows at all.
    let (n, k) = (64, 256);
    let w = weights(n, k, 77);
    let h = positive_definite(k, 16, 2e-5, 3);
    let fit = GridFit { scales: ScaleRule::GptqModel, ..fit(4, true) };
    let exact = textbook(&w, &upper_factor_of_inverse(&h), k, fit, 128, false);

    // The U form, all in f32 as the reference runs it: inverse, then its factor.
    let mut inverse = h.clone();
    Blocked.inverse(inverse.view_mut()).unwrap();
    Blocked.factor(inverse.view_mut()).unwrap();
    let u = inverse.t().mapv(f64::from);
    let reference = textbook(&w, &u, k, fit, 128, true);

    let grouping = Grouping::Fitted { len: k, fit, timing: GroupTiming::Reached };
    let ours = round_columns(w.clone().view_mut(), factor(&h).view(), 128, grouping).unwrap();
    let parted = |codes: &Array2<u8>| {
        let pairs = codes.rows().into_iter().zip(exact.codes.rows());
        pairs.filter(|(a, b)| a != b).count()
    };
    let (ours, reference) = (parted(&ours.codes), parted(&reference.codes));
    // Rows part from the exact result where a tie is closer than the factor's error; half as many again is the
    // spread of such a count.
    assert!(reference > 0 && 2 * ours <= 3 * reference, "{ours} rows of ours, {reference} of the U form");
}

#[test]
fn the_loss_is_that_of_the_errors() {
    let (n, k) = (35, 130);
    let w = weights(n, k, 1);
    let h = positive_definite(k, 2 * k, 0.05, 2);
    let r = factor(&h);
    let grouping = Grouping::Fitted { len: 32, fit: fit(3, false), timing: GroupTiming::Reached };
    let mut e = w.clone();
    let rounded = round_columns(e.view_mut(), r.view(), 128, grouping).unwrap();
    let e64 = e.mapv(f64::from);
    let direct = (&e64.dot(&h.mapv(f64::from)) * &e64).sum();
    // R is exact to about 1e-5 relative to the scale of each feature, and so is the sum of squares.
    assert!((rounded.loss - direct).abs() <= 1e-4 * direct, "{} {direct}", rounded.loss);
    for ((row, c), &w) in w.indexed_iter() {
        let mut back = [0.0];
        rounded.grids[[row, c / 32]].dequantize(&[rounded.codes[[row, c]]], &mut back);
        assert_eq!(e[[row, c]], w - back[0]);
    }
}

#[test]
fn fixed_grids_are_taken_as_they_are() {
    let (n, k) = (33, 64);
    let w = weights(n, k, 4);
    let r = factor(&positive_definite(k, 100, 0.1, 8));
    let fit = fit(4, true);
    let fitted = Grouping::Fitted { len: k, fit, timing: GroupTiming::Reached };
    let whole_row = round_columns(w.clone().view_mut(), r.view(), 16, fitted).unwrap();
    let of_col = vec![0; k];
    let fixed = Grouping::Fixed { of_col: &of_col, grids: whole_row.grids.view(), max: 15 };
    let again = round_columns(w.clone().view_mut(), r.view(), 16, fixed).unwrap();
    assert_eq!(again.codes, whole_row.codes);
    assert_eq!(again.loss, whole_row.loss);
}

#[test]
fn overflowing_groups_are_located() {
    let mut w = weights(40, 64, 4);
    w[[37, 50]] = 1e30;
    w[[39, 2]] = 1e30;
    let r = factor(&positive_definite(64, 100, 0.1, 8));
    for len in [16, 64] {
        let grouping = Grouping::Fitted { len, fit: fit(4, true), timing: GroupTiming::Reached };
        let error = round_columns(w.clone().view_mut(), r.view(), 32, grouping).unwrap_err();
        assert_eq!((error.row, error.col), if len == 64 { (37, 50) } else { (39, 2) });
    }
}

#[test]
fn nothing_is_rounded_to_nothing() {
    let grouping = Grouping::Fitted { len: 16, fit: fit(4, true), timing: GroupTiming::Reached };
    for dim in [(0, 20), (3, 0)] {
        let r = Array2::eye(dim.1);
        let rounded = round_columns(Array2::zeros(dim).view_mut(), r.view(), 128, grouping).unwrap();
        assert_eq!((rounded.codes.dim(), rounded.loss), (dim, 0.0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn threads_do_not_change_a_bit(n in 1usize..80, k in 1usize..200, len in 1usize..220, seed: u32) {
        let w = weights(n, k, seed);
        let r = factor(&positive_definite(k, k + 5, 0.05, seed));
        let grouping = Grouping::Fitted { len, fit: fit(4, false), timing: GroupTiming::Reached };
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut e = w.clone();
            let rounded = pool.install(|| round_columns(e.view_mut(), r.view(), 64, grouping)).unwrap();
            (rounded.codes, rounded.grids, rounded.loss.to_bits(), e)
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            prop_assert!(run(threads) == one);
        }
    }
}
