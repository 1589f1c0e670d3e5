//! Choosing the next token.

use libm::exp;

use crate::error::ModelError;

/// How the next token is chosen. The steps apply in the order of the fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides positive logits of tokens already in the text, and multiplies negative ones; 1 is off.
    pub repetition_penalty: f32,
    /// Divides the logits; 0 takes the largest (the first of equal ones).
    pub temperature: f32,
    /// Keeps this many of the most probable tokens; 0 is off.
    pub top_k: usize,
    /// Keeps the fewest tokens that together have this probability; 1 is off.
    pub top_p: f32,
    /// Keeps tokens of at least this share of the largest probability; 0 is off.
    pub min_p: f32,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self { repetition_penalty: 1.0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks the ranges of all options.
    pub fn validate(&self) -> Result<(), ModelError> {
        let check = |fine: bool, option, found: f32, allowed| match fine {
            true => Ok(()),
            false => Err(ModelError::Option { option, found: found.to_string(), allowed }),
        };
        let (penalty, t, p, m) = (self.repetition_penalty, self.temperature, self.top_p, self.min_p);
        check(penalty > 0.0 && penalty.is_finite(), "repetition_penalty", penalty, "above 0")?;
        check(t >= 0.0 && t.is_finite(), "temperature", t, "0 (greedy) or above")?;
        check(p > 0.0 && p <= 1.0, "top_p", p, "above 0 and at most 1")?;
        check((0.0..=1.0).contains(&m), "min_p", m, "from 0 to 1")
    }
}

/// A sampler with its random numbers.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: Sampling,
    random: Random,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    pub fn new(options: Sampling) -> Result<Self, ModelError> {
        options.validate()?;
        Ok(Self { options, random: Random::new(options.seed) })
    }

    /// The next token for `logits` `[vocab]` after the text `seen`.
    pub fn sample(&mut self, logits: &mut [f32], seen: &[u32]) -> Result<u32, ModelError> {
        if let Some(token) = logits.iter().position(|x| x.is_nan()) {
            return Err(ModelError::NotANumber { token });
        }
        self.penalize(logits, seen);
        let first = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
        let best = (0..logits.len()).reduce(first).ok_or(ModelError::NotANumber { token: 0 })?;
        if self.options.temperature == 0.0 {
            return Ok(best as u32);
        }
        let candidates = self.candidates(logits, f64::from(logits[best]));
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        let mut left = self.random.unit() * total;
        for &(token, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return Ok(token);
            }
        }
        // Rounding can leave a crumb behind the last candidate.
        Ok(candidates.last().map_or(best as u32, |c| c.0))
    }

    fn penalize(&self, logits: &mut [f32], seen: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut tokens = seen.to_vec();
        tokens.sort_unstable();
        tokens.dedup();
        for token in tokens {
            if let Some(x) = logits.get_mut(token as usize) {
                *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
            }
        }
    }

    /// Tokens that may be drawn with their weights `exp((logit - max) / temperature)`, most probable first.
    fn candidates(&self, logits: &[f32], max: f64) -> Vec<(u32, f64)> {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.options;
        let weight = |x: f32| {
            if f64::from(x) == max { 1.0 } else { exp((f64::from(x) - max) / f64::from(temperature)) }
        };
        let mut list: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(i, &x)| (i as u32, weight(x))).collect();
        list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if top_k > 0 {
            list.truncate(top_k);
        }
        if top_p < 1.0 {
            let goal = f64::from(top_p) * list.iter().map(|c| c.1).sum::<f64>();
            let mut sum = 0.0;
            let enough = list.iter().position(|c| {
                sum += c.1;
                sum >= goal
            });
            list.truncate(enough.map_or(list.len(), |i| i + 1));
        }
        // The first weight is exactly 1.
        list.retain(|c| c.1 >= f64::from(min_p) && c.1 > 0.0);
        list
    }
}

/// xoshiro256++ of Blackman and Vigna, its state filled by SplitMix64 from the seed.
#[derive(Clone, Debug)]
struct Random([u64; 4]);

impl Random {
    fn new(seed: u64) -> Self {
        let mut state = seed;
        Self([(); 4].map(|()| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }))
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-53.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(options: Sampling, logits: &[f32], times: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..times {
            counts[sampler.sample(&mut logits.to_vec(), &[]).unwrap() as usize] += 1;
        }
        counts
    }

    /// The published first outputs for the state 1, 2, 3, 4.
    #[test]
    fn random_numbers_are_xoshiro() {
        let mut random = Random([1, 2, 3, 4]);
        let first = [(); 4].map(|()| random.next());
        assert_eq!(first, [41_943_041, 58_720_359, 3_588_806_011_781_223, 3_591_011_842_654_386]);
        // SplitMix64 of seed 0.
        assert_eq!(Random::new(0).0[0], 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(draw(Sampling::default(), &[1.0, 3.0, 3.0, f32::NEG_INFINITY], 3), [0, 3, 0, 0]);
    }

    /// Frequencies lie within five standard deviations of the probabilities 1/2, 1/4, 1/8, 1/8.
    #[test]
    fn draws_follow_the_probabilities() {
        let ln2 = std::f32::consts::LN_2;
        let logits = [3.0 * ln2, 2.0 * ln2, ln2, ln2];
        let n = 20_000.0;
        let counts = draw(Sampling { temperature: 1.0, seed: 7, ..Default::default() }, &logits, n as usize);
        for (count, p) in counts.into_iter().zip([0.5, 0.25, 0.125, 0.125f64]) {
            assert!((count as f64 - n * p).abs() < 5.0 * (n * p * (1.0 - p)).sqrt(), "{count} for {p}");
        }
    }

    #[test]
    fn filters_keep_the_most_probable() {
        let logits = [2.0, 1.0, 0.0, -1.0];
        let base = Sampling { temperature: 1.0, ..Default::default() };
        let kept =
            |options: Sampling| draw(options, &logits, 2000).iter().filter(|&&count| count > 0).count();
        assert_eq!(kept(base), 4);
        assert_eq!(kept(Sampling { top_k: 2, ..base }), 2);
        // Probabilities 0.644, 0.237, 0.087, 0.032.
        assert_eq!(kept(Sampling { top_p: 0.64, ..base }), 1);
        assert_eq!(kept(Sampling { top_p: 0.9, ..base }), 3);
        assert_eq!(kept(Sampling { min_p: 0.2, ..base }), 2);
        assert_eq!(kept(Sampling { temperature: 1e-30, ..base }), 1);
    }

    #[test]
    fn repetition_is_penalized_whatever_the_sign() {
        let options = Sampling { repetition_penalty: 2.0, ..Default::default() };
        let mut sampler = Sampler::new(options).unwrap();
        assert_eq!(sampler.sample(&mut [2.0, 1.5], &[0, 0]).unwrap(), 1);
        assert_eq!(sampler.sample(&mut [-1.0, -1.5], &[0, 9]).unwrap(), 1);
    }

    #[test]
    fn bad_options_and_logits_are_refused() {
        let base = Sampling::default();
        for bad in [
            Sampling { temperature: -1.0, ..base },
            Sampling { temperature: f32::NAN, ..base },
            Sampling { top_p: 0.0, ..base },
            Sampling { min_p: 1.5, ..base },
            Sampling { repetition_penalty: 0.0, ..base },
        ] {
            assert!(Sampler::new(bad).is_err(), "{bad:?}");
        }
        assert!(Sampler::new(base).unwrap().sample(&mut [0.0, f32::NAN], &[]).is_err());
    }
}
