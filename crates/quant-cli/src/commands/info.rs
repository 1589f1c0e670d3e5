//! `quant info`.

use clap::Args;
use quant::{Info as Facts, Machine};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Output, Table};

/// Tell what this build and this machine can do
#[derive(Args)]
#[command(after_help = "Examples:\n  quant info\n  quant info --roof --json")]
pub(crate) struct Info {
    /// Measure what the machine can do at most; takes about a second
    #[arg(long)]
    roof: bool,
}

/// What is told.
#[derive(Serialize)]
struct Told {
    #[serde(flatten)]
    facts: Facts,
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<Machine>,
}

impl Info {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let told = Told { facts: quant::info(), machine: self.roof.then(Machine::measure) };
        output.result(&told, || {
            let Told { facts, machine } = &told;
            let mut table = Table::plain();
            table.pair("version", facts.version);
            table.pair("platform", format!("{}-{}", facts.arch, facts.os));
            table.pair("instructions", format!("{} (of {})", facts.isa, facts.isas.join(", ")));
            if let Some(cap) = facts.cap {
                table.pair("cap", format!("{cap} (the processor has {})", facts.detected));
            }
            table.pair("threads", facts.threads);
            if let Some(machine) = machine {
                table.pair("memory read", format!("{:.1} GB/s", machine.read_gb_s));
                table.pair("int8 products", format!("{:.3} TOPS", machine.int8_tops));
                table.pair("bf16 products", format!("{:.3} TFLOPS", machine.bf16_tflops));
                table.pair("f32 products", format!("{:.3} TFLOPS", machine.f32_tflops));
            }
            table.to_string()
        })
    }
}
