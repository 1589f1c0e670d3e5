//! `quant eval`.

use std::path::{Path, PathBuf};

use clap::Args;
use quant::Model;
use quant_eval::{Report, Windowing, evaluate, windows_of_ids};
use serde::Serialize;

use super::{Compute, model_path};
use crate::failure::Failure;
use crate::output::{Output, Table};
use crate::progress::reporter;
use crate::size::{show, show_seconds};

/// Measure a model on a text: perplexity, and how far it is from its float original
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant eval models/llama-4bit --text wiki.txt --reference models/llama\n  \
    quant eval models/llama-4bit --tokens ids.npy --seq-len 2048 --json")]
pub(crate) struct Eval {
    /// Model directory, float or quantized, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
    /// Text to score
    #[arg(long, value_name = "FILE", required_unless_present = "tokens")]
    text: Option<PathBuf>,
    /// Token ids to score instead, [windows, length] or [length]
    #[arg(long, value_name = "FILE.npy", conflicts_with = "text")]
    tokens: Option<PathBuf>,
    /// Float model to compare with
    #[arg(long, value_name = "MODEL")]
    reference: Option<String>,
    #[command(flatten)]
    windows: WindowOptions,
    /// How products are computed
    #[arg(long, value_enum, default_value = "exact")]
    compute: Compute,
}

/// How a text is cut.
#[derive(Args)]
pub(crate) struct WindowOptions {
    /// Tokens of a window, at most the context of the model; windows do not overlap, and the first token of each is
    /// not scored
    #[arg(long, default_value_t = 512, value_name = "N")]
    seq_len: usize,
    /// Stop after so many tokens
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Let each document, between lines of <|endoftext|>, be a window of its own
    #[arg(long, conflicts_with = "tokens")]
    documents: bool,
}

/// What is scored.
pub(crate) enum Source<'a> {
    /// A text file.
    Text(&'a Path),
    /// A NumPy file of token ids.
    Ids(&'a Path),
}

/// The JSON result.
#[derive(Serialize)]
pub(crate) struct EvalReport {
    #[serde(flatten)]
    report: Report,
    bytes: u64,
    bits_per_weight: f64,
    peak_rss_bytes: u64,
    compute: &'static str,
}

impl Eval {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let source = match (&self.text, &self.tokens) {
            (Some(text), _) => Source::Text(text),
            (None, Some(ids)) => Source::Ids(ids),
            (None, None) => return Err(Failure::Usage("give --text or --tokens".to_owned())),
        };
        let mut model = Model::open(&model_path(&self.model)?)?;
        model.set_compute(self.compute.into());
        let reference =
            self.reference.as_ref().map(|name| Ok::<_, Failure>(Model::open(&model_path(name)?)?));
        let report = measure(&model, reference.transpose()?.as_ref(), &source, &self.windows, output)?;
        output.result(&report, || report.table().to_string())
    }
}

/// Scores `model`, against `reference` if there is one.
pub(crate) fn measure(
    model: &Model,
    reference: Option<&Model>,
    source: &Source<'_>,
    options: &WindowOptions,
    output: Output,
) -> Result<EvalReport, Failure> {
    let windows = options.windows(model, source)?;
    let progress = reporter(output);
    progress.begin("evaluating", windows.iter().map(|w| w.len() as u64).sum());
    let mut before = 0;
    let report = evaluate(model.decoder(), reference.map(Model::decoder), &windows, |done, _| {
        progress.advance("", (done - before) as u64);
        before = done;
    })?;
    progress.end();
    Ok(EvalReport {
        report,
        bytes: model.checkpoint().tensor_bytes(),
        bits_per_weight: quant::bits_per_weight(model.checkpoint())?,
        peak_rss_bytes: quant::peak_rss_bytes(),
        compute: model.decoder().compute().name(),
    })
}

impl WindowOptions {
    /// Windows of a text as `eval` has them when nothing is asked for.
    pub(crate) fn standard() -> Self {
        Self { seq_len: 512, max_tokens: None, documents: false }
    }

    fn windows(&self, model: &Model, source: &Source<'_>) -> Result<Vec<Vec<u32>>, Failure> {
        if self.seq_len < 2 {
            return Err(Failure::Usage(
                "--seq-len must be at least 2: the first token is not scored".to_owned(),
            ));
        }
        let len = self.seq_len.min(model.decoder().spec().max_positions.max(2));
        let mut windows = match source {
            Source::Text(file) => {
                let text = std::fs::read_to_string(file).map_err(|e| quant::Error::io(*file, e))?;
                let windowing =
                    if self.documents { Windowing::stories(len) } else { Windowing::Stream { len } };
                windowing.windows(model.tokenizer()?, &text).map_err(quant::Error::from)?
            }
            Source::Ids(file) => {
                let ids = quant::read_npy_ids(file).map_err(quant::Error::from)?;
                ids.rows().into_iter().flat_map(|row| windows_of_ids(&row.to_vec(), len)).collect()
            }
        };
        if let Some(limit) = self.max_tokens {
            let mut total = 0;
            windows.retain_mut(|window| {
                window.truncate(limit.saturating_sub(total));
                total += window.len();
                window.len() >= 2
            });
        }
        Ok(windows)
    }
}

impl EvalReport {
    /// The closing table.
    pub(crate) fn table(&self) -> Table {
        let r = &self.report;
        let mut table = Table::plain();
        table.pair("perplexity", format!("{:.4} over {} tokens", r.perplexity, r.tokens));
        if let Some(reference) = r.reference_perplexity {
            table.pair("float perplexity", format!("{reference:.4}"));
        }
        if let (Some(mean), Some(p99), Some(max)) = (r.kl_mean, r.kl_p99, r.kl_max) {
            table.pair("KL divergence", format!("{mean:.5} nats mean, {p99:.4} at 99%, {max:.4} at most"));
        }
        if let Some(agreement) = r.top1_agreement {
            table.pair("top-1 agreement", format!("{:.2}%", 100.0 * agreement));
        }
        table.pair("weights", format!("{}, {:.3} bits per weight", show(self.bytes), self.bits_per_weight));
        let speed = format!("{:.0} tokens a second", r.tokens_per_second);
        table.pair(
            "time",
            format!("{}, {speed}, peak memory {}", show_seconds(r.seconds), show(self.peak_rss_bytes)),
        );
        table
    }
}
