//! `quant completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use serde_json::json;

use crate::Cli;
use crate::failure::Failure;
use crate::output::{Output, print};

/// Print a script that lets a shell complete commands and options
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant completions bash > ~/.local/share/bash-completion/completions/quant\n  \
    quant completions zsh > ~/.zfunc/_quant")]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "quant", &mut script);
        let script = String::from_utf8_lossy(&script);
        match output.json {
            true => output.result(&json!({ "shell": self.shell.to_string(), "script": script }), String::new),
            false => print(&script),
        }
    }
}
