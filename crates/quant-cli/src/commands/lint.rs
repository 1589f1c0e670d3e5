//! `quant lint`.

use clap::Args;

use super::model_path;
use super::verify::report;
use crate::failure::Failure;
use crate::output::Output;

/// Look for likely mistakes of converters, which the weights themselves betray
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant lint models/llama-4bit\n  \
    quant lint models/llama-4bit --json\n\n\
Looks for zero points off by one (versions 1 and 2 of GPTQ), codes in another order than their zero points or groups,\n\
a wrong act-order flag, scales that cannot be, broken ties, and the wrong rotary order of queries and keys.")]
pub(crate) struct Lint {
    /// Model directory, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
}

impl Lint {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        report(&self.model, &quant::lint(&model_path(&self.model)?)?, output)
    }
}
