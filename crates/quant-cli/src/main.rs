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
struct Cli {
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
    // A panic is a defect. Its text goes where all errors go, once, and it ends like an error.
    std::panic::set_hook(Box::new(|_| {}));
    let result = catch_unwind(AssertUnwindSafe(|| cli.run()));
    let failure = match result {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::Found(format!("internal error, please report it: {}", panic_text(&panic))),
    };
    if !matches!(failure, Failure::Closed) {
        say(&escape(&format!("error: {failure}")));
    }
    ExitCode::from(failure.exit_code())
}

/// What a panic said.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}
