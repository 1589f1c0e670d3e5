//! `quant plan`.

use std::path::Path;

use clap::Args;
use quant::QuantizeConfig;

use super::model_path;
use super::options::QuantizeOptions;
use crate::failure::Failure;
use crate::output::{Output, Table};
use crate::size::{show, show_seconds};

/// Tell what quantizing a model would do, and every problem, before any work
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant plan models/llama --bits 4 --group-size 128\n  \
    quant plan models/llama --bits 3 --group-size 64 --max-memory 4GiB --json")]
pub(crate) struct Plan {
    /// Model directory, or a name in the local Hugging Face cache; a .safetensors file with methods without calibration
    #[arg(value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    options: QuantizeOptions,
}

impl Plan {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let config = self.options.config(false)?;
        report(&model_path(&self.model)?, &config, output)
    }
}

/// Makes and prints a plan. Problems are an error, after the plan.
pub(crate) fn report(model: &Path, config: &QuantizeConfig, output: Output) -> Result<(), Failure> {
    let plan = quant::plan(model, config)?;
    output.result(&plan, || text(&plan))?;
    if plan.problems.is_empty() { Ok(()) } else { Err(quant::Error::Problems(plan.problems).into()) }
}

fn text(plan: &quant::Plan) -> String {
    let mut tensors = Table::with_head(&["tensor", "shape", "method", "bits", "bytes"]);
    for tensor in &plan.tensors {
        let shape: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
        tensors.row([
            tensor.name.clone(),
            shape.join("x"),
            tensor.method.clone(),
            tensor.bits.to_string(),
            tensor.bytes.to_string(),
        ]);
    }
    let mut sums = Table::plain();
    sums.pair("method", format!("{}, layout {}", plan.method, plan.layout));
    sums.pair("size", format!("{} -> {}", show(plan.bytes_in), show(plan.bytes_out)));
    sums.pair("bits per weight", format!("{:.3}", plan.bits_per_weight));
    if plan.calibration_tokens > 0 {
        sums.pair("calibration", format!("at most {} tokens", plan.calibration_tokens));
    }
    sums.pair("peak memory", show(plan.peak_rss_bytes));
    sums.pair("time", format!("about {}", show_seconds(plan.seconds)));
    sums.pair("problems", plan.problems.len());
    format!("{tensors}\n{sums}")
}
