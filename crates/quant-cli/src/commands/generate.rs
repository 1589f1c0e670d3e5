//! `quant generate`.

use std::fmt::Display;
use std::ops::ControlFlow;

use clap::Args;
use quant::{Finish, Generated, Model};
use serde::Serialize;

use super::model_path;
use super::sampling::SamplingOptions;
use crate::failure::Failure;
use crate::output::{Output, escape, print};
use crate::size::show;

/// Continue a text
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant generate models/llama-4bit --prompt \"Once upon a time\" --max-new-tokens 200\n  \
    quant generate models/llama-4bit --prompt \"今天天气如何?\" --temperature 0.7 --top-p 0.9 --seed 1 --json")]
pub(crate) struct Generate {
    /// Model directory, float or quantized, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
    /// Text to continue
    #[arg(long, short, value_name = "TEXT")]
    prompt: String,
    #[command(flatten)]
    sampling: SamplingOptions,
}

/// The JSON result.
#[derive(Serialize)]
pub(crate) struct GenerateReport {
    prompt: String,
    text: String,
    finish: &'static str,
    prompt_tokens: usize,
    generated_tokens: usize,
    prompt_tokens_per_second: f64,
    generate_tokens_per_second: f64,
    weight_bytes: usize,
    peak_rss_bytes: u64,
    compute: &'static str,
}

impl Generate {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let options = self.sampling.options();
        let mut model = Model::open(&model_path(&self.model)?)?;
        model.set_compute(self.sampling.compute.into());
        let mut written = Ok(());
        if !output.json {
            written = print(&escape(&self.prompt));
        }
        let generated = model.generate_streaming(&self.prompt, &options, |piece| {
            if !output.json && written.is_ok() {
                written = print(&escape(piece));
            }
            if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        written?;
        let report = GenerateReport::new(&model, &self.prompt, generated)?;
        if output.json {
            return output.result(&report, String::new);
        }
        print("\n")?;
        output.note(report.speed());
        Ok(())
    }
}

impl GenerateReport {
    /// The report of a finished generation.
    pub(crate) fn new(model: &Model, prompt: &str, generated: Generated) -> Result<Self, Failure> {
        let prompt_tokens = model.tokenizer()?.encode(prompt, true).map_err(quant::Error::from)?.len();
        // The first token comes out of the prompt's pass.
        let later = generated.ids.len().saturating_sub(1);
        let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
        Ok(Self {
            prompt: prompt.to_owned(),
            text: generated.text,
            finish: finish_name(generated.finish),
            prompt_tokens,
            generated_tokens: generated.ids.len(),
            prompt_tokens_per_second: rate(prompt_tokens, generated.prompt_seconds),
            generate_tokens_per_second: rate(later, generated.decode_seconds),
            weight_bytes: model.memory_footprint().total(),
            peak_rss_bytes: quant::peak_rss_bytes(),
            compute: model.decoder().compute().name(),
        })
    }

    fn speed(&self) -> String {
        format!(
            "{} tokens at {:.1} a second, prompt of {} at {:.1} a second; weights {}, peak memory {}",
            self.generated_tokens,
            self.generate_tokens_per_second,
            self.prompt_tokens,
            self.prompt_tokens_per_second,
            show(self.weight_bytes as u64),
            show(self.peak_rss_bytes),
        )
    }
}

/// The word for why a generation ended.
pub(crate) fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::Eos => "eos",
        Finish::Stop => "stop",
        Finish::Context => "context",
        Finish::Caller => "caller",
    }
}

impl Display for GenerateReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}\n\n{}", self.prompt, self.text, self.speed())
    }
}
