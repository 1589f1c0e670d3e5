//! `quant convert`.

use std::path::PathBuf;

use clap::Args;
use quant::{Conversion, ConvertConfig, Verdict};

use super::model_path;
use crate::failure::Failure;
use crate::output::{Output, Table};
use crate::progress::reporter;
use crate::size::{self, show};

/// Put a quantized model in another layout, codes to codes where it can hold the same numbers
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant convert models/llama-awq --to gptq_v2 --out models/llama-gptq\n  \
    quant convert models/llama-gptq --to auto --out models/llama-small --json\n\n\
The verdict on a layer is `identical` (every weight is the same real number, which is proven), `bounded` (the same\n\
codes, rounded scales, with the largest error of a weight) or `requantized` (only with --allow-requantize).")]
pub(crate) struct Convert {
    /// Quantized model directory, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
    /// Layout to write (see `quant list layouts`), or `auto` for the smallest that is exact: a directory, or GGUF for
    /// an OUT that ends in .gguf
    #[arg(long, value_name = "LAYOUT")]
    to: String,
    /// Directory to write
    #[arg(long, short, value_name = "OUT")]
    out: PathBuf,
    /// Round layers anew that the layout cannot hold
    #[arg(long)]
    allow_requantize: bool,
    /// Count numbers as identical that are equal in f16
    #[arg(long)]
    as_f16: bool,
    /// Largest size of an output file
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "5GB")]
    shard_size: u64,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

impl Convert {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let config = ConvertConfig {
            to: self.to.clone(),
            as_f16: self.as_f16,
            allow_requantize: self.allow_requantize,
            shard_size: self.shard_size,
            overwrite: self.force,
        };
        let model = model_path(&self.model)?;
        let done = quant::convert(&model, &self.out, &config, reporter(output).as_ref())?;
        if let Some(old) = &done.leftover {
            output.note(format!("the old output could not be removed: {}", old.display()));
        }
        output.result(&done, || text(&done, &self.out.display().to_string()))
    }
}

fn text(done: &Conversion, out: &str) -> String {
    let mut layers = Table::with_head(&["layer", "verdict", "largest error", "note"]);
    for layer in &done.tensors {
        let verdict = match layer.verdict {
            Verdict::Identical => "identical",
            Verdict::Bounded => "bounded",
            Verdict::Requantized => "requantized",
        };
        let error =
            if layer.max_abs_error == 0.0 { "0".to_owned() } else { format!("{:.3e}", layer.max_abs_error) };
        layers.row([layer.name.clone(), verdict.to_owned(), error, layer.note.clone()]);
    }
    let mut table = Table::plain();
    table.pair("layout", format!("{} to {}", done.layout_in, done.layout_out));
    table.pair("identical", done.identical);
    table.pair("bounded", done.bounded);
    table.pair("requantized", done.requantized);
    table.pair("tensors", format!("{} to {}", show(done.bytes_in), show(done.bytes_out)));
    table.pair("written", out);
    format!("{layers}\n{table}")
}
