//! One file per command.

mod bench;
mod chat;
mod completions;
mod convert;
mod dequantize;
mod embed;
mod eval;
mod generate;
mod info;
mod inspect;
mod lint;
mod list;
mod logits;
mod man;
mod options;
mod plan;
mod quantize;
mod sampling;
mod verify;

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};

use crate::failure::Failure;
use crate::output::Output;

/// What to do.
#[derive(Subcommand)]
pub(crate) enum Command {
    Quantize(Box<quantize::Quantize>),
    Plan(Box<plan::Plan>),
    Eval(eval::Eval),
    Generate(generate::Generate),
    Chat(chat::Chat),
    Embed(embed::Embed),
    Logits(logits::Logits),
    Dequantize(dequantize::Dequantize),
    Convert(convert::Convert),
    Inspect(inspect::Inspect),
    Verify(verify::Verify),
    Lint(lint::Lint),
    Bench(bench::Bench),
    List(list::List),
    Info(info::Info),
    Completions(completions::Completions),
    Man(man::Man),
}

impl Command {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        match self {
            Command::Quantize(command) => command.run(output),
            Command::Plan(command) => command.run(output),
            Command::Eval(command) => command.run(output),
            Command::Generate(command) => command.run(output),
            Command::Chat(command) => command.run(output),
            Command::Embed(command) => command.run(output),
            Command::Logits(command) => command.run(output),
            Command::Dequantize(command) => command.run(output),
            Command::Convert(command) => command.run(output),
            Command::Inspect(command) => command.run(output),
            Command::Verify(command) => command.run(output),
            Command::Lint(command) => command.run(output),
            Command::Bench(command) => command.run(output),
            Command::List(command) => command.run(output),
            Command::Info(command) => command.run(output),
            Command::Completions(command) => command.run(output),
            Command::Man(command) => command.run(output),
        }
    }
}

/// An existing path, or a model in the local Hugging Face cache.
fn model_path(model: &str) -> Result<PathBuf, Failure> {
    Ok(quant::resolve_model(model).map_err(quant::Error::from)?)
}

/// How products with quantized weights are computed.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Compute {
    /// In f32, with the bits of the dequantized weights
    Exact,
    /// With activations rounded to eight bits, where this build has a product for the weights; else as exact
    Fast,
}

impl From<Compute> for quant::Compute {
    fn from(compute: Compute) -> Self {
        match compute {
            Compute::Exact => quant::Compute::Exact,
            Compute::Fast => quant::Compute::Fast,
        }
    }
}
