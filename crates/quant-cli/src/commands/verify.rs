//! `quant verify`.

use clap::Args;
use quant::{Finding, Severity, Verification};

use super::model_path;
use crate::failure::Failure;
use crate::output::{Output, escape, say};

/// Check that a model is complete and sound: structure, shapes, values, hashes
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant verify models/llama-4bit\n  \
    quant verify model.safetensors --json")]
pub(crate) struct Verify {
    /// Model directory, a .safetensors file, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
}

impl Verify {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        report(&self.model, &quant::verify(&model_path(&self.model)?)?, output)
    }
}

/// Tells what was found in a model; an error if any of it is one.
pub(crate) fn report(model: &str, verification: &Verification, output: Output) -> Result<(), Failure> {
    let errors = verification.findings.iter().filter(|f| f.severity == Severity::Error).count();
    for finding in &verification.findings {
        say(&escape(&line(finding)));
    }
    output.result(verification, || match verification.ok {
        true => "ok\n".to_owned(),
        false => format!("{errors} errors\n"),
    })?;
    if verification.ok { Ok(()) } else { Err(Failure::Found(format!("{model}: {errors} errors"))) }
}

fn line(finding: &Finding) -> String {
    let severity = match finding.severity {
        Severity::Error => "error",
        _ => "warning",
    };
    let at = if finding.tensor.is_empty() { String::new() } else { format!("{}: ", finding.tensor) };
    format!("{severity} [{}]: {at}{}; {}", finding.code, finding.message, finding.remedy)
}
