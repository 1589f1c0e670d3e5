//! Rotary position embeddings: the frequencies of every variant, and tables of sines and cosines.

use std::f64::consts::PI;

use libm::{ceil, cos, floor, log, pow, sin};
use ndarray::Array2;

use crate::arch::Fields;
use crate::error::ConfigError;

/// Rotary embedding of a model. The first half of a head is paired with the second:
/// `(a, b) -> (a cos - b sin, b cos + a sin)`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the geometric series of wave lengths.
    pub theta: f64,
    /// Features of a head; even.
    pub dim: usize,
    /// How the frequencies are stretched to longer texts.
    pub kind: RopeKind,
}

/// How frequencies are stretched to longer texts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeKind {
    /// Not at all.
    Default,
    /// All divided.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// The base grows with the text once it exceeds the trained length. Keys already cached keep the base of their
    /// time, so beyond that length a cached step differs from a full pass, as it does in transformers.
    Dynamic {
        /// Growth.
        factor: f64,
        /// Trained length.
        trained: usize,
    },
    /// Low frequencies divided, high ones kept, the middle blended.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Low are those of fewer periods than this in `trained`.
        low: f64,
        /// High are those of more periods than this in `trained`.
        high: f64,
        /// Trained length.
        trained: f64,
    },
    /// The same with a ramp over the index of the frequency, and larger attention scores.
    Yarn {
        /// Divisor.
        factor: f64,
        /// Periods in the trained length above which a frequency is kept.
        beta_fast: f64,
        /// Periods in the trained length below which a frequency is divided.
        beta_slow: f64,
        /// Round the ends of the ramp to whole indices.
        truncate: bool,
        /// Trained length.
        trained: f64,
        /// Factor of sines and cosines.
        attention_factor: f64,
    },
}

impl RopeSpec {
    /// Reads `rope_parameters`, or `rope_theta` and `rope_scaling` of files before transformers 5.
    pub(crate) fn from_config(f: Fields<'_>, dim: usize, max_positions: usize) -> Result<Self, ConfigError> {
        let new = f.object("rope_parameters", "rope_parameters.")?;
        let old = f.object("rope_scaling", "rope_scaling.")?;
        let theta = f.positive_or("rope_theta", 10_000.0)?;
        let rope = old.or(new).unwrap_or(f);
        if let Some(found) = rope.get("full_attention") {
            return Err(rope.bad("full_attention", "the same rope parameters for all layers", found));
        }
        for whole in [f, rope] {
            if let Some(part) = whole.positive("partial_rotary_factor")?.filter(|&part| part != 1.0) {
                return Err(whole.bad("partial_rotary_factor", "1, or nothing", &part.into()));
            }
        }
        let theta = rope.positive_or("rope_theta", theta)?;
        let name = match rope.text("rope_type")? {
            Some(name) => name,
            None => rope.text("type")?.unwrap_or("default"),
        };
        let factor = || rope.positive("factor")?.ok_or_else(|| rope.missing("factor", "a positive number"));
        let trained = || -> Result<f64, ConfigError> {
            let outer = f.count_or("original_max_position_embeddings", max_positions)?;
            Ok(rope.count_or("original_max_position_embeddings", outer)? as f64)
        };
        let kind = match name {
            "default" => RopeKind::Default,
            "linear" => RopeKind::Linear { factor: factor()? },
            "dynamic" => {
                let factor = factor()?;
                if dim <= 2 || factor < 1.0 {
                    let expected = "a factor of at least 1 and heads of more than 2 features";
                    return Err(rope.bad("factor", expected, &factor.into()));
                }
                RopeKind::Dynamic { factor, trained: max_positions }
            }
            "llama3" => {
                let number =
                    |name| rope.positive(name)?.ok_or_else(|| rope.missing(name, "a positive number"));
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if high <= low {
                    let expected = format!("more than low_freq_factor {low}");
                    return Err(rope.bad("high_freq_factor", expected, &high.into()));
                }
                RopeKind::Llama3 { factor: factor()?, low, high, trained: trained()? }
            }
            "yarn" => {
                if theta <= 1.0 {
                    return Err(rope.bad("rope_theta", "more than 1 for yarn", &theta.into()));
                }
                yarn(rope, max_positions, trained()?)?
            }
            found => {
                let expected = "one of default, linear, dynamic, llama3, yarn";
                return Err(rope.bad("rope_type", expected, &found.into()));
            }
        };
        let spec = Self { theta, dim, kind };
        let scale = spec.attention_factor();
        if theta < 1.0 || !scale.is_finite() || spec.frequencies(1).iter().any(|f| !f.is_finite()) {
            let expected = "rope parameters with theta of at least 1 that give finite angles";
            return Err(rope.bad("rope_theta", expected, &theta.into()));
        }
        Ok(spec)
    }

    /// Angular frequency of each pair `[dim / 2]` for a text of `len` positions.
    ///
    /// Computed in f64 and rounded once to f32, for the reference holds them in f32.
    pub fn frequencies(&self, len: usize) -> Vec<f32> {
        let dim = self.dim as f64;
        let theta = match self.kind {
            RopeKind::Dynamic { factor, trained } if len > trained => {
                let growth = factor * len as f64 / trained as f64 - (factor - 1.0);
                self.theta * pow(growth, dim / (dim - 2.0))
            }
            _ => self.theta,
        };
        (0..self.dim / 2).map(|i| self.stretch(i, pow(theta, -2.0 * i as f64 / dim)) as f32).collect()
    }

    /// Frequency `i` after stretching.
    fn stretch(&self, i: usize, inv: f64) -> f64 {
        match self.kind {
            RopeKind::Default | RopeKind::Dynamic { .. } => inv,
            RopeKind::Linear { factor } => inv / factor,
            RopeKind::Llama3 { factor, low, high, trained } => {
                let periods = trained * inv / (2.0 * PI);
                let keep = ((periods - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - keep) * inv / factor + keep * inv
            }
            RopeKind::Yarn { factor, beta_fast, beta_slow, truncate, trained, .. } => {
                let dim = self.dim as f64;
                let index =
                    |periods: f64| dim * log(trained / (periods * 2.0 * PI)) / (2.0 * log(self.theta));
                let (mut low, mut high) = (index(beta_fast), index(beta_slow));
                if truncate {
                    (low, high) = (floor(low), ceil(high));
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                inv / factor * ramp + inv * (1.0 - ramp)
            }
        }
    }

    /// Factor of sines and cosines.
    pub fn attention_factor(&self) -> f32 {
        match self.kind {
            RopeKind::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Sines and cosines for the positions `start .. start + len` of a text of `text_len` positions.
    pub fn table(&self, start: usize, len: usize, text_len: usize) -> RopeTable {
        let frequencies = self.frequencies(text_len);
        let factor = self.attention_factor();
        // The reference rounds the angle to f32 before it takes the sine; at high positions that matters.
        let angle = |(t, i): (usize, usize)| f64::from((start + t) as f32 * frequencies[i]);
        let shape = (len, self.dim / 2);
        RopeTable {
            cos: Array2::from_shape_fn(shape, |at| cos(angle(at)) as f32 * factor),
            sin: Array2::from_shape_fn(shape, |at| sin(angle(at)) as f32 * factor),
        }
    }
}

fn yarn(rope: Fields<'_>, max_positions: usize, trained: f64) -> Result<RopeKind, ConfigError> {
    let factor = rope.positive_or("factor", max_positions as f64 / trained)?;
    let gain = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * log(factor) + 1.0 };
    // Zero stands for absence here.
    let scale = |name| match rope.get(name).and_then(|value| value.as_f64()) {
        Some(0.0) => Ok(None),
        _ => rope.positive(name),
    };
    let attention_factor =
        match (rope.positive("attention_factor")?, scale("mscale")?, scale("mscale_all_dim")?) {
            (Some(factor), _, _) => factor,
            (None, Some(mscale), Some(all)) => gain(mscale) / gain(all),
            _ => gain(1.0),
        };
    Ok(RopeKind::Yarn {
        factor,
        beta_fast: rope.positive_or("beta_fast", 32.0)?,
        beta_slow: rope.positive_or("beta_slow", 1.0)?,
        truncate: rope.flag_or("truncate", true)?,
        trained,
        attention_factor,
    })
}

/// Sines and cosines of successive positions.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// `[positions, dim / 2]`.
    pub cos: Array2<f32>,
    /// `[positions, dim / 2]`.
    pub sin: Array2<f32>,
}
