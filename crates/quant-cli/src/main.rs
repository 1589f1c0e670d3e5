//! The program `quant`: quantizes language models and runs them, on a CPU.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 error, 2 wrong usage,
//! 3 done with too many fallbacks, 130 and 143 interrupted.
#![forbid(unsafe_code)]

mod commands;
mod failure;
mod interrupt;
mod output;
mod progress;
mod size;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use clap::Parser;

use commands::Command;
use failure::Failure;
use output::{Output, escape, say};

/// Quantize language models and run them, on a CPU
#[derive(Parser)]
#[command(
    name = "quant",
    version,
    after_help = "Examples:\n  \
        quant quantize models/llama --out models/llama-4bit --bits 4 --group-size 128\n  \
        quant generate models/llama-4bit --prompt \"Once upon a time\""
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Threads to use [default: all the process may use]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Print one JSON object on standard output and nothing else
    #[arg(long, global = true)]
    json: bool,
    /// Tell more; may be given again
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Tell nothing but results and errors
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

impl Cli {
    fn run(&self) -> Result<(), Failure> {
        quant::check_environment()?;
        let mut pool = rayon::ThreadPoolBuilder::new();
        if let Some(threads) = self.threads {
            pool = pool.num_threads(usize::from(threads));
        }
        pool.build_global().map_err(|e| Failure::Found(format!("threads cannot be started: {e}")))?;
        interrupt::watch().map_err(|e| Failure::Found(format!("signals cannot be watched: {e}")))?;
        let verbosity = if self.quiet { 0 } else { 1 + self.verbose };
        self.command.run(Output { json: self.json, verbosity })
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come here too, with exit code 0.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { failure::USAGE } else { 0 });
        }
    };
    let failure = match catch_panics(|| cli.run()) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    if !matches!(failure, Failure::Closed) {
        say(&escape(&format!("error: {failure}")));
    }
    ExitCode::from(failure.exit_code())
}

/// Runs `f`. A panic is a defect; it ends like an error, with one text that says where it was.
fn catch_panics(f: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    static LAST: Mutex<String> = Mutex::new(String::new());
    let last = || LAST.lock().unwrap_or_else(PoisonError::into_inner);
    // Libraries catch panics too, of code that reads foreign files; those are not shown.
    std::panic::set_hook(Box::new(move |panic| *last() = panic.to_string()));
    catch_unwind(AssertUnwindSafe(f))
        .unwrap_or_else(|_| Err(Failure::Found(format!("internal error, please report it: {}", last()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_like_an_error() {
        let before = std::panic::take_hook();
        let failure = catch_panics(|| panic!("the sky fell")).unwrap_err();
        std::panic::set_hook(before);
        assert_eq!(failure.exit_code(), failure::ERROR);
        let text = failure.to_string();
        assert!(text.contains("internal error") && text.contains("the sky fell") && text.contains("main.rs"));
    }
}
