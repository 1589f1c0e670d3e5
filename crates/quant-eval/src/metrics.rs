//! What one position of a text says about a model, in f64.

use libm::exp;
use quant_kernels::vec::log_sum_exp;

/// The score of one position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Position {
    /// Negative log likelihood of the token that came, in nats.
    pub nll: f64,
    /// Against a reference.
    pub divergence: Option<Divergence>,
}

/// How far the prediction at a position is from the reference's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// Negative log likelihood that the reference gives, in nats.
    pub reference_nll: f64,
    /// `D(reference ‖ model)` in nats.
    pub kl: f64,
    /// Both find the same token the most likely.
    pub same_top: bool,
}

/// Scores `logits` `[vocab]` before the token `next`, against `reference` `[vocab]` if there is one.
pub fn score(logits: &[f32], reference: Option<&[f32]>, next: usize) -> Position {
    let normalizer = log_sum_exp(logits);
    let divergence = reference.map(|reference| {
        let reference_normalizer = log_sum_exp(reference);
        let terms = reference.iter().zip(logits).map(|(&p, &q)| {
            let log_p = f64::from(p) - reference_normalizer;
            let difference = log_p - (f64::from(q) - normalizer);
            // A token that the reference excludes adds nothing.
            if log_p == f64::NEG_INFINITY { 0.0 } else { exp(log_p) * difference }
        });
        Divergence {
            reference_nll: reference_normalizer - f64::from(reference[next]),
            // Rounding can leave a tiny negative sum where both are equal.
            kl: terms.sum::<f64>().max(0.0),
            same_top: top(logits) == top(reference),
        }
    });
    Position { nll: normalizer - f64::from(logits[next]), divergence }
}

/// The first of the largest.
fn top(x: &[f32]) -> usize {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best })
}

/// The `q` quantile of ascending values, with linear interpolation between neighbours.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> f64 {
    let last = sorted.len() - 1;
    let at = q * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs(p: &[f64]) -> Vec<f32> {
        p.iter().map(|&p| libm::log(p) as f32).collect()
    }

    /// Logits in f32 carry a relative error of 2^-24 of their size.
    const CLOSE: f64 = 1e-6;

    #[test]
    fn known_distributions() {
        let (p, q) = (logs(&[0.5, 0.25, 0.25]), logs(&[0.25, 0.25, 0.5]));
        let position = score(&q, Some(&p), 0);
        let divergence = position.divergence.unwrap();
        let ln2 = std::f64::consts::LN_2;
        assert!((position.nll - 2.0 * ln2).abs() < CLOSE);
        assert!((divergence.reference_nll - ln2).abs() < CLOSE);
        // 0.5 ln 2 + 0 - 0.25 ln 2
        assert!((divergence.kl - 0.25 * ln2).abs() < CLOSE);
        assert!(!divergence.same_top);
        let same = score(&p, Some(&p), 1).divergence.unwrap();
        assert_eq!((same.kl, same.same_top), (0.0, true));
        assert_eq!(score(&p, None, 1).divergence, None);
    }

    #[test]
    fn constants_do_not_matter_and_large_logits_do_not_overflow() {
        let base = [1.0f32, 2.0, 3.0];
        let shifted = base.map(|x| x + 2048.0);
        assert!((score(&shifted, None, 1).nll - score(&base, None, 1).nll).abs() < 1e-12);
        assert_eq!(score(&[1e30, 0.0], Some(&[1e30, 0.0]), 0).divergence.unwrap().kl, 0.0);
    }

    #[test]
    fn excluded_tokens() {
        let never = f32::NEG_INFINITY;
        assert_eq!(score(&[0.0, never], Some(&[0.0, never]), 0).divergence.unwrap().kl, 0.0);
        assert_eq!(score(&[0.0, never], Some(&[0.0, 0.0]), 0).divergence.unwrap().kl, f64::INFINITY);
        assert!(score(&[0.0, f32::NAN], None, 0).nll.is_nan());
    }

    #[test]
    fn quantiles_interpolate() {
        let values: Vec<f64> = (0..101).map(f64::from).collect();
        assert!((quantile(&values, 0.99) - 99.0).abs() < 1e-12);
        assert_eq!(quantile(&[1.0, 3.0], 0.5), 2.0);
        assert_eq!(quantile(&[4.0], 0.99), 4.0);
    }
}
