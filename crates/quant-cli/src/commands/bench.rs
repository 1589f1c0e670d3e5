//! `quant bench`.

mod kernels;
mod model;

use clap::{Args, Subcommand};

use crate::failure::Failure;
use crate::output::Output;

/// Measure speed on this machine
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant bench kernels --shape 1x14336x4096 --bits 4 --group-size 128\n  \
    quant bench model --synthetic llama-1.1b --bits 4 --group-size 128 --json")]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

/// What is measured.
#[derive(Subcommand)]
enum What {
    Kernels(kernels::BenchKernels),
    Model(model::BenchModel),
}

impl Bench {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        match &self.what {
            What::Kernels(command) => command.run(output),
            What::Model(command) => command.run(output),
        }
    }
}
