//! `quant logits`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use ndarray::Array2;
use quant::{EncoderModel, Model};
use quant_core::DenseTensor;
use serde::Serialize;

use super::{Compute, model_path};
use crate::failure::Failure;
use crate::output::{Output, Table};

/// Write a model's logits at every position of a text; of an encoder, its last hidden state
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant logits models/llama-4bit --ids 1,15,27 --out logits.safetensors\n  \
    quant logits models/llama-4bit --prompt \"Once upon a time\" --out logits.safetensors")]
pub(crate) struct Logits {
    /// Model directory, float or quantized, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
    /// Token ids
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',', required_unless_present = "prompt")]
    ids: Vec<u32>,
    /// Text instead of ids
    #[arg(long, short, value_name = "TEXT", conflicts_with = "ids")]
    prompt: Option<String>,
    /// File to write, with the tensor `logits` [tokens, vocabulary] or, of an encoder,
    /// `last_hidden_state` [tokens, hidden]; an existing one is replaced
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// How products are computed
    #[arg(long, value_enum, default_value = "exact")]
    compute: Compute,
}

/// The JSON result.
#[derive(Serialize)]
struct Report {
    ids: Vec<u32>,
    tokens: usize,
    vocab_size: usize,
    /// The most probable next token.
    next: Option<usize>,
    compute: &'static str,
}

/// The JSON result for an encoder.
#[derive(Serialize)]
struct EncoderReport {
    ids: Vec<u32>,
    tokens: usize,
    hidden_size: usize,
    compute: &'static str,
}

impl Logits {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let path = model_path(&self.model)?;
        if quant::is_encoder(&path)? {
            return self.hidden_states(&EncoderModel::open(&path)?, output);
        }
        let mut model = Model::open(&path)?;
        model.set_compute(self.compute.into());
        let ids = match &self.prompt {
            None => self.ids.clone(),
            Some(prompt) => model.tokenizer()?.encode(prompt, true).map_err(quant::Error::from)?,
        };
        let logits = model.logits(&ids)?;
        let (tokens, vocab_size) = logits.dim();
        let next = logits.rows().into_iter().next_back().and_then(|last| {
            let better = |best: usize, i: usize| if last[i] > last[best] { i } else { best };
            (0..vocab_size).reduce(better)
        });
        self.write("logits", &logits)?;
        let report = Report { ids, tokens, vocab_size, next, compute: model.decoder().compute().name() };
        output.result(&report, || {
            let mut table = Table::plain();
            table.pair("tokens", tokens);
            table.pair("vocabulary", vocab_size);
            if let Some(next) = next {
                table.pair("most probable next", next);
            }
            self.show_file(&mut table);
            table.to_string()
        })
    }

    /// An encoder has no logits.
    fn hidden_states(&self, model: &EncoderModel, output: Output) -> Result<(), Failure> {
        let ids = match &self.prompt {
            None => self.ids.clone(),
            Some(prompt) => model.tokenizer()?.encode(prompt, true).map_err(quant::Error::from)?,
        };
        let states = model.hidden_states(&ids)?;
        self.write("last_hidden_state", &states)?;
        let (tokens, hidden_size) = states.dim();
        let report = EncoderReport { ids, tokens, hidden_size, compute: quant::Compute::Exact.name() };
        output.result(&report, || {
            let mut table = Table::plain();
            table.pair("tokens", tokens);
            table.pair("hidden size", hidden_size);
            self.show_file(&mut table);
            table.to_string()
        })
    }

    fn write(&self, name: &str, values: &Array2<f32>) -> Result<(), Failure> {
        let Some(out) = &self.out else { return Ok(()) };
        let (rows, cols) = values.dim();
        let tensor = DenseTensor::from_f32(&[rows, cols], values.as_slice().expect("rows are contiguous"));
        let tensors = [(name.to_owned(), tensor)];
        Ok(quant::write_safetensors(out, &tensors, &BTreeMap::new()).map_err(quant::Error::from)?)
    }

    fn show_file(&self, table: &mut Table) {
        if let Some(out) = &self.out {
            table.pair("written", out.display());
        }
    }
}
