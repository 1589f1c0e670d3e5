//! `quant dequantize`.

use std::path::PathBuf;

use clap::Args;
use quant::DequantizeConfig;

use super::model_path;
use crate::failure::Failure;
use crate::output::{Output, Table};
use crate::progress::reporter;
use crate::size::show;

/// Write a model's weights as f32 under their float names
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant dequantize models/llama-4bit --out llama.safetensors\n  \
    quant dequantize models/llama-4bit --out q.safetensors --tensor model.layers.0.self_attn.q_proj --like-peer")]
pub(crate) struct Dequantize {
    /// Model directory, a .safetensors file, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
    /// File to write; an existing one is replaced
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// Only this tensor, or the weight of this module; may be given again
    #[arg(long, value_name = "NAME")]
    tensor: Vec<String>,
    /// Round as the layout's own library does; quantized weights are [out, in] for every architecture
    #[arg(long)]
    like_peer: bool,
}

impl Dequantize {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let model = model_path(&self.model)?;
        let config = DequantizeConfig { tensors: self.tensor.clone(), like_peer: self.like_peer };
        let done = quant::dequantize(&model, &self.out, &config, reporter(output).as_ref())?;
        output.result(&done, || {
            let mut table = Table::plain();
            table.pair("tensors", format!("{}, of which {} were quantized", done.tensors, done.dequantized));
            table.pair("size", show(done.bytes));
            table.pair("written", self.out.display());
            table.to_string()
        })
    }
}
