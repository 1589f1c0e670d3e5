//! `quant quantize`.

use std::path::{Path, PathBuf};

use clap::Args;
use quant::{GenerateOptions, LayerSummary, Model, Summary};
use serde::Serialize;

use super::eval::{EvalReport, Source, WindowOptions, measure};
use super::generate::GenerateReport;
use super::options::QuantizeOptions;
use super::{model_path, plan};
use crate::failure::Failure;
use crate::output::{Output, Table};
use crate::progress::reporter;
use crate::size::{show, show_seconds};

/// Quantize a whole model with one method
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant quantize models/llama --out models/llama-4bit --bits 4 --group-size 128\n  \
    quant quantize models/llama --out models/llama-3bit --method gptq --bits 3 --group-size 64 --asym \\\n      \
        --calibration texts.jsonl --samples 256")]
pub(crate) struct Quantize {
    /// Model directory, or a name in the local Hugging Face cache; a .safetensors file with methods without calibration
    #[arg(value_name = "MODEL")]
    model: String,
    /// Directory to write
    #[arg(long, short, value_name = "OUT", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    #[command(flatten)]
    options: QuantizeOptions,
    /// Share of the layers that may fall back to a simpler method before the exit code is 3
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    max_fallbacks: f64,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
    /// Then measure the result on this text, against the model it was made from
    #[arg(long, value_name = "FILE", help_heading = "Afterwards")]
    eval: Option<PathBuf>,
    /// Then let the result continue this text
    #[arg(long, value_name = "TEXT", help_heading = "Afterwards")]
    prompt: Option<String>,
    /// Only tell what would happen, as `quant plan` does
    #[arg(long)]
    dry_run: bool,
}

/// The JSON result.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    #[serde(skip_serializing_if = "Option::is_none")]
    eval: Option<EvalReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generated: Option<GenerateReport>,
}

impl Quantize {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let config = self.options.config(self.force)?;
        if !(0.0..=1.0).contains(&self.max_fallbacks) {
            return Err(Failure::Usage("--max-fallbacks is a share between 0 and 1".to_owned()));
        }
        let model = model_path(&self.model)?;
        let Some(out) = self.out.as_ref().filter(|_| !self.dry_run) else {
            return plan::report(&model, &config, output);
        };
        let summary = quant::quantize(&model, out, &config, reporter(output).as_ref())?;
        let (eval, generated) = self.try_out(&model, out, output)?;
        let report = Report { summary: &summary, eval, generated };
        output.result(&report, || report.text(out, output))?;
        if summary.fallback_share() > self.max_fallbacks {
            let first = summary.layers.iter().find_map(|l| l.fallback.as_ref().map(|why| (l, why)));
            let first = first.map_or(String::new(), |(l, why)| format!("; {}: {why}", l.name));
            return Err(Failure::Fallbacks(format!(
                "the model is written, but {} of {} layers fell back to a simpler method, more than --max-fallbacks {} allows{first}",
                summary.fallbacks,
                summary.layers.len(),
                self.max_fallbacks,
            )));
        }
        Ok(())
    }

    /// What the result is worth, if that was asked for.
    fn try_out(
        &self,
        model: &Path,
        out: &Path,
        output: Output,
    ) -> Result<(Option<EvalReport>, Option<GenerateReport>), Failure> {
        if self.eval.is_none() && self.prompt.is_none() {
            return Ok((None, None));
        }
        let quantized = Model::open(out)?;
        let eval = |text: &PathBuf| {
            let (source, windows) = (Source::Text(text), WindowOptions::standard());
            measure(&quantized, Some(&Model::open(model)?), &source, &windows, output)
        };
        let eval = self.eval.as_ref().map(eval).transpose()?;
        let generate = |prompt: &String| {
            let generated = quantized.generate(prompt, &GenerateOptions::default())?;
            GenerateReport::new(&quantized, prompt, generated)
        };
        Ok((eval, self.prompt.as_ref().map(generate).transpose()?))
    }
}

impl Report<'_> {
    fn text(&self, out: &Path, output: Output) -> String {
        let mut text = String::new();
        if output.verbosity > 1 {
            text += &format!("{}\n", layers(&self.summary.layers));
        }
        text += &closing(self.summary, out).to_string();
        if let Some(eval) = &self.eval {
            text += &format!("\n{}", eval.table());
        }
        if let Some(generated) = &self.generated {
            text += &format!("\n{generated}\n");
        }
        text
    }
}

fn layers(layers: &[LayerSummary]) -> Table {
    let mut table = Table::with_head(&["layer", "shape", "bits", "rel. error", "loss", "seconds", "note"]);
    for layer in layers {
        let [rows, cols] = layer.shape;
        table.row([
            layer.name.clone(),
            format!("{rows}x{cols}"),
            layer.bits.to_string(),
            format!("{:.5}", layer.rel_error),
            layer.loss.map_or("-".to_owned(), |loss| format!("{loss:.3e}")),
            format!("{:.2}", layer.seconds),
            layer.fallback.clone().unwrap_or_default(),
        ]);
    }
    table
}

fn closing(summary: &Summary, out: &Path) -> Table {
    let mut table = Table::plain();
    let group = match summary.group_size {
        -1 => "whole rows".to_owned(),
        n => format!("groups of {n}"),
    };
    table.pair("method", format!("{}, {} bits, {group}", summary.method, summary.bits));
    table.pair("layout", &summary.layout);
    table.pair("layers", format!("{} quantized, {} fallbacks", summary.layers.len(), summary.fallbacks));
    if summary.zeroed > 0 {
        table.pair("zeroed", format!("{} weights that were not finite", summary.zeroed));
    }
    let share = 100.0 * summary.bytes_out as f64 / summary.bytes_in.max(1) as f64;
    table.pair("size", format!("{} -> {} ({share:.0}%)", show(summary.bytes_in), show(summary.bytes_out)));
    table.pair("bits per weight", format!("{:.3}", summary.bits_per_weight));
    if let Some(worst) = summary.layers.iter().max_by(|a, b| a.rel_error.total_cmp(&b.rel_error)) {
        table.pair("largest error", format!("{:.4} of the weights' norm, {}", worst.rel_error, worst.name));
    }
    let memory = show(summary.peak_rss_bytes);
    table.pair("time", format!("{}, peak memory {memory}", show_seconds(summary.seconds)));
    table.pair("written", out.display());
    table
}
