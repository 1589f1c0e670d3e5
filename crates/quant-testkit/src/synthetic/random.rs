//! Random numbers as a pure function of a key and a counter.

/// A stream of random numbers that can be read at any position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stream {
    key: u64,
}

impl Stream {
    /// The stream of this name.
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        // FNV-1a, then mixed with the seed.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
        Self { key: mix(hash ^ mix(seed)) }
    }

    /// 64 random bits.
    pub(crate) fn bits(self, i: u64) -> u64 {
        // SplitMix64 (Steele, Lea and Flood 2014), whose state is a counter.
        mix(self.key.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// A whole number below `limit`.
    pub(crate) fn below(self, i: u64, limit: usize) -> usize {
        ((u128::from(self.bits(i)) * limit as u128) >> 64) as usize
    }

    /// A draw from the standard normal distribution.
    pub(crate) fn normal(self, i: u64) -> f32 {
        let uniform = ((self.bits(i) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        inverse_normal_cdf(uniform) as f32
    }

    /// `count` different numbers below `limit`, sorted; all of them if there are no more.
    pub(crate) fn choose(self, count: usize, limit: usize) -> Vec<usize> {
        let mut chosen = std::collections::BTreeSet::new();
        for i in 0.. {
            if chosen.len() >= count.min(limit) {
                break;
            }
            chosen.insert(self.below(i, limit));
        }
        chosen.into_iter().collect()
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Acklam's rational approximation, relative error below 1.2e-9; only the tails need a logarithm. The form
/// without fused operations gives the same bits everywhere.
fn inverse_normal_cdf(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e1,
        2.209460984245205e2,
        -2.759285104469687e2,
        1.38357751867269e2,
        -3.066479806614716e1,
        2.506628277459239,
    ];
    const B: [f64; 6] = [
        -5.447609879822406e1,
        1.615858368580409e2,
        -1.556989798598866e2,
        6.680131188771972e1,
        -1.328068155288572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-3,
        -3.223964580411365e-1,
        -2.400758277161838,
        -2.549732539343734,
        4.374664141464968,
        2.938163982698783,
    ];
    const D: [f64; 5] =
        [7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1.0];
    const TAIL: f64 = 0.02425;
    let polynomial = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    let tail = |p: f64| {
        let q = (-2.0 * libm::log(p)).sqrt();
        polynomial(&C, q) / polynomial(&D, q)
    };
    if p < TAIL {
        tail(p)
    } else if p > 1.0 - TAIL {
        -tail(1.0 - p)
    } else {
        let q = p - 0.5;
        q * polynomial(&A, q * q) / polynomial(&B, q * q)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        // Published values of the distribution function.
        for (p, x) in [(0.5, 0.0), (0.975, 1.959_963_985), (0.01, -2.326_347_874), (1e-9, -5.997_807_015)] {
            let found = inverse_normal_cdf(p);
            assert!((found - x).abs() <= 1.2e-9 * x.abs() + 1e-9, "{p}: {found}, expected {x}");
        }
    }

    #[test]
    fn moments_are_right() {
        const N: u64 = 100_000;
        let stream = Stream::new(7, "moments");
        let values: Vec<f64> = (0..N).map(|i| f64::from(stream.normal(i))).collect();
        let moment = |k: i32| values.iter().map(|v| v.powi(k)).sum::<f64>() / N as f64;
        // Five standard errors: sqrt(Var(x^k) / N) with Var 1, 2, 96.
        assert!(moment(1).abs() < 5.0 * (1.0 / N as f64).sqrt());
        assert!((moment(2) - 1.0).abs() < 5.0 * (2.0 / N as f64).sqrt());
        assert!((moment(4) - 3.0).abs() < 5.0 * (96.0 / N as f64).sqrt());
    }

    #[test]
    fn streams_differ_by_name_seed_and_position() {
        let first = Stream::new(1, "a").bits(0);
        assert_ne!(first, Stream::new(1, "b").bits(0));
        assert_ne!(first, Stream::new(2, "a").bits(0));
        assert_ne!(first, Stream::new(1, "a").bits(1));
    }

    #[test]
    fn choices_are_distinct_and_bounded() {
        assert_eq!(Stream::new(1, "a").choose(9, 4), [0, 1, 2, 3]);
        let some = Stream::new(1, "a").choose(5, 1000);
        assert!(some.len() == 5 && some.iter().all(|&c| c < 1000));
    }
}
