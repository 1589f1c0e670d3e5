//! `quant info`.

use clap::Args;

use crate::failure::Failure;
use crate::output::{Output, Table};

/// Tell what this build and this machine can do
#[derive(Args)]
#[command(after_help = "Examples:\n  quant info\n  quant info --json")]
pub(crate) struct Info {}

impl Info {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let info = quant::info();
        output.result(&info, || {
            let mut table = Table::plain();
            table.pair("version", info.version);
            table.pair("platform", format!("{}-{}", info.arch, info.os));
            table.pair("instructions", format!("{} (of {})", info.isa, info.isas.join(", ")));
            table.pair("threads", info.threads);
            table.to_string()
        })
    }
}
