//! `quant man`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use serde_json::json;

use crate::Cli;
use crate::failure::Failure;
use crate::output::Output;

/// Write the manual pages
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant man --out ~/.local/share/man/man1\n  \
    quant man --out man && man man/quant-quantize.1")]
pub(crate) struct Man {
    /// Directory to write; its pages of the same names are replaced
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
}

impl Man {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let unwritten = |e: std::io::Error| Failure::Found(format!("cannot write the manual pages: {e}"));
        std::fs::create_dir_all(&self.out).map_err(unwritten)?;
        let mut whole = Cli::command();
        // Names the pages of commands.
        whole.build();
        let commands = whole.get_subcommands().filter(|command| command.get_name() != "help").cloned();
        let mut names = Vec::new();
        for command in std::iter::once(whole.clone()).chain(commands) {
            let page = clap_mangen::Man::new(command);
            let mut text = Vec::new();
            page.render(&mut text).map_err(unwritten)?;
            let name = page.get_filename();
            quant::write_file(&self.out.join(&name), &text).map_err(quant::Error::from)?;
            names.push(name);
        }
        output.result(&json!({ "written": self.out, "pages": names }), || {
            format!("{} pages written to {}\n", names.len(), self.out.display())
        })
    }
}
