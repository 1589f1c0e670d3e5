//! `quant list`.

use clap::{Args, ValueEnum};
use quant::Entry;
use quant::registry::{self, KINDS, LayoutSupport};
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
        let mut json: Map<String, Value> =
            lists.iter().map(|(name, entries)| ((*name).to_owned(), json!(entries))).collect();
        let support = match lists.iter().any(|(name, _)| *name == "layouts") {
            true => registry::layout_support(),
            false => Vec::new(),
        };
        if !support.is_empty() {
            json.insert("support".to_owned(), json!(support));
        }
        output.result(&json, || {
            if self.markdown {
                return markdown(&lists) + &support_markdown(&support);
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
            if !support.is_empty() {
                text.push(support_table(&support));
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

/// Bits in ranges, such as `2-4, 8`.
fn ranges(bits: &[u8]) -> String {
    let mut text: Vec<String> = Vec::new();
    for run in bits.chunk_by(|a, b| a + 1 == *b) {
        text.push(match run {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => continue,
        });
    }
    if text.is_empty() { "read only".to_owned() } else { text.join(", ") }
}

/// What layouts hold, for people: the bits that they write, and what is converted to them exactly.
fn support_table(support: &[LayoutSupport]) -> String {
    let mut table = Table::plain();
    for layout in support {
        let exact = layout.exact.join(", ");
        let exact = if exact.is_empty() { String::new() } else { format!("; exactly from {exact}") };
        table.pair(&format!("  {}", layout.name), format!("writes {} bits{exact}", ranges(&layout.bits)));
    }
    format!("support\n{table}")
}

/// The same for a document. Every layout of the table is read.
fn support_markdown(support: &[LayoutSupport]) -> String {
    if support.is_empty() {
        return String::new();
    }
    let mut text = format!("\n| layout | writes bits | {} |\n", KINDS.join(" | "));
    text += &format!("| --- | --- |{}\n", " :-: |".repeat(KINDS.len()));
    for layout in support {
        let marks = KINDS.map(|kind| if layout.exact.contains(&kind) { "✓" } else { "" });
        text += &format!("| `{}` | {} | {} |\n", layout.name, ranges(&layout.bits), marks.join(" | "));
    }
    text
}
