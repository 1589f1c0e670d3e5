//! `quant inspect`.

use clap::Args;
use quant::Inspection;
use serde_json::Value;

use super::model_path;
use crate::failure::Failure;
use crate::output::{Output, Table};
use crate::size::show;

/// Tell what a model is: architecture, layout, sizes
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant inspect models/llama-4bit\n  \
    quant inspect model.safetensors --tensors --json")]
pub(crate) struct Inspect {
    /// Model directory, a .safetensors file, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
}

impl Inspect {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let inspection = quant::inspect(&model_path(&self.model)?)?;
        let mut json = serde_json::to_value(&inspection).expect("results are plain data");
        if let (false, Value::Object(fields)) = (self.tensors, &mut json) {
            fields.remove("tensors");
        }
        output.result(&json, || {
            let tensors = if self.tensors { format!("\n{}", tensors(&inspection)) } else { String::new() };
            summary(&inspection).to_string() + &tensors
        })
    }
}

fn summary(found: &Inspection) -> Table {
    let mut table = Table::plain();
    table.pair("model", &found.path);
    if let Some(arch) = &found.architecture {
        let tied = if arch.tied_embeddings { ", tied embedding" } else { "" };
        table.pair("architecture", format!("{}, {} layers{tied}", arch.model_type, arch.layers));
        table.pair("hidden size", format!("{}, mlp {}", arch.hidden_size, arch.intermediate_size));
        let (heads, kv) = (arch.heads, arch.kv_heads);
        table.pair("heads", format!("{heads} of {}, {kv} for keys and values", arch.head_dim));
        table.pair("vocabulary", arch.vocab_size);
        table.pair("context", arch.max_positions);
    }
    match (&found.layout, &found.quantization) {
        (Some(layout), Some(q)) => {
            let group = if q.group_size < 0 {
                "whole rows".to_owned()
            } else {
                format!("groups of {}", q.group_size)
            };
            let symmetric = if q.symmetric { "symmetric" } else { "asymmetric" };
            let order = if q.act_order { ", act-order" } else { "" };
            table.pair("layout", format!("{layout}, {} bits, {group}, {symmetric}{order}", q.bits));
        }
        (Some(layout), None) => table.pair("layout", layout),
        (None, _) => table.pair("layout", "float"),
    }
    if found.quantized_layers > 0 {
        table.pair("quantized layers", found.quantized_layers);
    }
    table.pair("parameters", found.parameters);
    table.pair("bits per weight", format!("{:.3}", found.bits_per_weight));
    table.pair("tensors", format!("{} in {}", show(found.bytes), plural(found.files.len(), "file")));
    for file in &found.files {
        let tensors = plural(file.tensors, "tensor");
        table.pair("file", format!("{}, {}, {tensors}", file.name, show(file.bytes)));
    }
    found.notes.iter().for_each(|note| table.pair("note", note));
    table
}

fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn tensors(found: &Inspection) -> Table {
    let mut table = Table::with_head(&["tensor", "type", "shape", "bytes"]);
    for tensor in &found.tensors {
        let shape: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
        let shape = if shape.is_empty() { "scalar".to_owned() } else { shape.join("x") };
        table.row([tensor.name.clone(), tensor.dtype.to_owned(), shape, tensor.bytes.to_string()]);
    }
    table
}
