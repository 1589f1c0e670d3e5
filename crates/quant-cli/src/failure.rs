//! Why a command did not succeed, and the exit code that says so.

use std::io;

/// Exit code of an error.
pub(crate) const ERROR: u8 = 1;
/// Exit code of wrong usage.
pub(crate) const USAGE: u8 = 2;
/// Exit code of a finished run in which too many layers fell back to a simpler method.
pub(crate) const FALLBACKS: u8 = 3;

/// A command did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The library could not do it.
    #[error(transparent)]
    Quant(#[from] quant::Error),
    /// An evaluation has no result.
    #[error(transparent)]
    Eval(#[from] quant_eval::EvalError),
    /// The environment asks for something that does not exist.
    #[error(transparent)]
    Environment(#[from] quant::IsaError),
    /// Options that cannot be followed.
    #[error("{0}")]
    Usage(String),
    /// Something was found that is reported as an error.
    #[error("{0}")]
    Found(String),
    /// The work is done, but too many layers fell back.
    #[error("{0}")]
    Fallbacks(String),
    /// Nobody reads standard output any more.
    #[error("standard output was closed")]
    Closed,
    /// Standard output cannot be written.
    #[error("standard output: {0}")]
    Stdout(io::Error),
}

impl Failure {
    /// A failed write to standard output.
    pub(crate) fn stdout(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Failure::Closed } else { Failure::Stdout(error) }
    }

    /// The exit code of the process.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_)
            | Failure::Environment(_)
            | Failure::Quant(quant::Error::UnknownMethod(_) | quant::Error::Spec(_)) => USAGE,
            Failure::Fallbacks(_) => FALLBACKS,
            // A reader that has seen enough, as in `quant list | head`, is no error.
            Failure::Closed => 0,
            _ => ERROR,
        }
    }
}
