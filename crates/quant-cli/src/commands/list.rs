//! `quant list`.

use clap::{Args, ValueEnum};
use quant::{Entry, registry};
use serde_json::{Map, Value, json};

use crate::failure::Failure;
use crate::output::{Output, Table};

/// List what this build can do
#[derive(Args)]
#[command(after_help = "Examples:\n  quant list\n  quant list methods --json")]
pub(crate) struct List {
    /// What to list [default: everything]
    #[arg(value_enum)]
    what: Option<What>,
    /// Print tables for a document
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
}

/// A registry.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum What {
    /// Quantization methods
    Methods,
    /// On-disk layouts of quantized weights
    Layouts,
    /// Instruction sets of the products
    Kernels,
    /// Model architectures
    Architectures,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            What::Methods => "methods",
            What::Layouts => "layouts",
            What::Kernels => "kernels",
            What::Architectures => "architectures",
        }
    }

    fn entries(self) -> Vec<Entry> {
        match self {
            What::Methods => registry::methods(),
            What::Layouts => registry::layouts(),
            What::Kernels => registry::kernels(),
            What::Architectures => registry::architectures(),
        }
    }
}

impl List {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let chosen = What::value_variants().iter().filter(|what| self.what.is_none_or(|w| w == **what));
        let lists: Vec<(&str, Vec<Entry>)> = chosen.map(|what| (what.name(), what.entries())).collect();
        let json: Map<String, Value> =
            lists.iter().map(|(name, entries)| ((*name).to_owned(), json!(entries))).collect();
        output.result(&json, || {
            if self.markdown {
                return markdown(&lists);
            }
            let mut text = Vec::new();
            for (name, entries) in &lists {
                let mut table = Table::plain();
                for entry in entries {
                    let here = if entry.available { "" } else { " (not on this machine)" };
                    table.pair(&format!("  {}", entry.name), format!("{}{here}", entry.description));
                }
                text.push(format!("{name}\n{table}"));
            }
            text.join("\n")
        })
    }
}

/// One table for documents, which does not depend on the machine.
fn markdown(lists: &[(&str, Vec<Entry>)]) -> String {
    let mut text = "| | name | what it is |\n| --- | --- | --- |\n".to_owned();
    for (list, entries) in lists {
        for (i, entry) in entries.iter().enumerate() {
            let list = if i == 0 { *list } else { "" };
            text += &format!("| {list} | `{}` | {} |\n", entry.name, entry.description);
        }
    }
    text
}
