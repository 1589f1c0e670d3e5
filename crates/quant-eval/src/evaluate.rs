//! Running models over windows.

use std::time::Instant;

use libm::exp;
use ndarray::{Array2, ArrayView2, Axis, Slice};
use quant_model::{Decoder, ModelError};
use rayon::prelude::*;
use serde::Serialize;

use crate::metrics::{Position, quantile, score};

/// Tokens that run through a model together; more only takes memory.
const BATCH_TOKENS: usize = 2048;
/// Logits held at a time, per model.
const LOGITS: usize = 8 << 20;

/// Results over all scored tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Scored tokens: all but the first of each window.
    pub tokens: usize,
    /// Mean negative log likelihood in nats.
    pub nll: f64,
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Mean of `D(reference ‖ model)` in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_mean: Option<f64>,
    /// 99th percentile of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_p99: Option<f64>,
    /// The largest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_max: Option<f64>,
    /// Share of positions where both find the same token the most likely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
    /// Perplexity of the reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_perplexity: Option<f64>,
    /// Time spent in the model, without its reference and without scoring.
    pub seconds: f64,
    /// Tokens, scored or not, that the model read per second.
    pub tokens_per_second: f64,
}

/// An evaluation that has no result.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// No window has a token to score.
    #[error("nothing to score: every window has fewer than two tokens; give a longer text")]
    Empty,
    /// The reference predicts other tokens.
    #[error(
        "the reference has {reference} tokens (vocab_size), the model {model}; they must be of one family"
    )]
    Vocabulary {
        /// Tokens of the model.
        model: usize,
        /// Tokens of the reference.
        reference: usize,
    },
    /// A prediction with NaN, or with no chance for the token that came.
    #[error(
        "window {window}, position {position}: the likelihood is not finite; the weights may hold NaN or infinity"
    )]
    NotFinite {
        /// Index of the window.
        window: usize,
        /// Position inside it.
        position: usize,
    },
}

/// Scores `model` over `windows`, against `reference` if there is one. `progress` is told the tokens done and in all.
pub fn evaluate(
    model: &Decoder,
    reference: Option<&Decoder>,
    windows: &[Vec<u32>],
    mut progress: impl FnMut(usize, usize),
) -> Result<Report, EvalError> {
    let vocab = model.spec().vocab_size;
    if let Some(found) = reference.map(|r| r.spec().vocab_size).filter(|&found| found != vocab) {
        return Err(EvalError::Vocabulary { model: vocab, reference: found });
    }
    let total = windows.iter().map(Vec::len).sum();
    let mut scores = Vec::with_capacity(total);
    let mut done = 0;
    let mut seconds = 0.0;
    let mut rest = windows;
    while let Some(first) = rest.first() {
        let len = first.len();
        let most = (BATCH_TOKENS / len.max(1)).max(1);
        let count = rest.iter().take(most).take_while(|window| window.len() == len).count();
        let (batch, later) = rest.split_at(count);
        let index = windows.len() - rest.len();
        rest = later;
        if len >= 2 {
            let batch = Array2::from_shape_fn((count, len), |(n, t)| batch[n][t]);
            let from = scores.len();
            seconds += score_batch(model, reference, batch.view(), &mut scores)?;
            if let Some(bad) = scores[from..].iter().position(|position| !position.nll.is_finite()) {
                let (window, position) = (index + bad / (len - 1), bad % (len - 1) + 1);
                return Err(EvalError::NotFinite { window, position });
            }
        }
        done += count * len;
        progress(done, total);
    }
    report(&scores, total, seconds)
}

/// Appends the scores of windows `ids`: `[n, len]`. Returns the seconds spent in the model.
fn score_batch(
    model: &Decoder,
    reference: Option<&Decoder>,
    ids: ArrayView2<'_, u32>,
    scores: &mut Vec<Position>,
) -> Result<f64, ModelError> {
    let (count, len) = ids.dim();
    let start = Instant::now();
    let hidden = model.forward_batch(ids)?;
    let mut seconds = start.elapsed().as_secs_f64();
    let reference = match reference {
        Some(reference) => Some((reference, reference.forward_batch(ids)?)),
        None => None,
    };
    let vocab = model.spec().vocab_size;
    let rows = (LOGITS / vocab).clamp(1, count * len);
    let mut logits = Array2::zeros((rows, vocab));
    let mut other = Array2::zeros((if reference.is_some() { rows } else { 0 }, vocab));
    for first in (0..count * len).step_by(rows) {
        let chunk = first..(first + rows).min(count * len);
        let part = Slice::from(..chunk.len());
        let rows = Slice::from(chunk.clone());
        let start = Instant::now();
        model.project(hidden.slice_axis(Axis(0), rows), logits.slice_axis_mut(Axis(0), part))?;
        seconds += start.elapsed().as_secs_f64();
        if let Some((reference, hidden)) = &reference {
            reference.project(hidden.slice_axis(Axis(0), rows), other.slice_axis_mut(Axis(0), part))?;
        }
        let chunk_scores: Vec<Position> = chunk
            .into_par_iter()
            .filter(|at| at % len + 1 < len)
            .map(|at| {
                let next = ids[[at / len, at % len + 1]] as usize;
                let (logits, other) = (logits.row(at - first), other.rows().into_iter().nth(at - first));
                let other = other.as_ref().and_then(|row| row.as_slice());
                score(logits.as_slice().expect("rows are contiguous"), other, next)
            })
            .collect();
        scores.extend(chunk_scores);
    }
    Ok(seconds)
}

/// Sums in the order of the text.
fn report(scores: &[Position], read: usize, seconds: f64) -> Result<Report, EvalError> {
    let tokens = scores.len();
    if tokens == 0 {
        return Err(EvalError::Empty);
    }
    let mean = |sum: f64| sum / tokens as f64;
    let nll = mean(scores.iter().map(|position| position.nll).sum());
    let divergences: Vec<_> = scores.iter().filter_map(|position| position.divergence).collect();
    let compared = !divergences.is_empty();
    let mut kl: Vec<f64> = divergences.iter().map(|d| d.kl).collect();
    let kl_mean = mean(kl.iter().sum());
    kl.sort_by(f64::total_cmp);
    let agreeing = divergences.iter().filter(|d| d.same_top).count();
    let reference_nll = mean(divergences.iter().map(|d| d.reference_nll).sum());
    Ok(Report {
        tokens,
        nll,
        perplexity: exp(nll),
        kl_mean: compared.then_some(kl_mean),
        kl_p99: compared.then(|| quantile(&kl, 0.99)),
        kl_max: kl.last().copied(),
        top1_agreement: compared.then(|| mean(agreeing as f64)),
        reference_perplexity: compared.then(|| exp(reference_nll)),
        seconds,
        tokens_per_second: if seconds > 0.0 { read as f64 / seconds } else { 0.0 },
    })
}
