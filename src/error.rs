//! What can go wrong.

use std::path::PathBuf;
use std::sync::Arc;

use quant_core::{SpecError, WeightError};
use quant_formats::FormatError;
use quant_methods::{QuantizeError, Stopped, UnknownMethod};
use quant_model::{ConfigError, GenerateError, ModelError, TemplateError, TokenizerError};
use serde::Serialize;

/// Any failure of this library. The text names what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory can't be read or written as a checkpoint.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The configuration describes no model that can be run.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A model can't be loaded or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tokenizer can't be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A chat template can't be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A checkpoint lacks what is needed.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// No method has this name.
    #[error(transparent)]
    UnknownMethod(#[from] UnknownMethod),
    /// The method can't do what was asked for.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A layer can't be quantized.
    #[error("{module}: {source}")]
    Quantize {
        /// The layer.
        module: String,
        /// Why.
        source: QuantizeError,
    },
    /// A transform gave up without a reason.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// Problems that were found before any work began.
    #[error("nothing was done: {}", list(.0))]
    Problems(Vec<Problem>),
    /// A calibrated method, but no model to run.
    #[error(
        "{method} needs calibration, and so a model directory with config.json; this is a bare file of tensors: use a calibration-free method such as rtn"
    )]
    NoModel {
        /// The method.
        method: String,
    },
    /// The weights are quantized already.
    #[error("{module} is quantized already; quantize the float model it was made from")]
    AlreadyQuantized {
        /// The first such layer.
        module: String,
    },
    /// Token ids that the model does not have.
    #[error("calibration sample {sample}: token id {id} is not below the vocabulary size {vocab_size}")]
    TokenId {
        /// Index of the sample.
        sample: usize,
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// Calibration samples of different length, or none.
    #[error(
        "calibration samples must exist and have equal length; sample {sample} has {found} tokens, the first has {expected}"
    )]
    SampleLength {
        /// Index of the sample.
        sample: usize,
        /// Length of the first.
        expected: usize,
        /// Its length.
        found: usize,
    },
    /// A line of a `.jsonl` file that holds no text.
    #[error("{}: line {line} is no JSON object with a string `text` or a list `messages` of objects with `content`", .file.display())]
    Jsonl {
        /// The file.
        file: PathBuf,
        /// Line, counted from 1.
        line: usize,
    },
    /// A layer that the target of a conversion cannot hold.
    #[error(
        "{module}: {layout} cannot hold it with the same codes ({because}); --allow-requantize rounds such layers anew"
    )]
    Convert {
        /// The layer.
        module: String,
        /// The target.
        layout: &'static str,
        /// What stands in the way.
        because: String,
    },
    /// A float checkpoint where a quantized one is needed.
    #[error("{model} has no quantized layers; use quantize to make some")]
    NotQuantized {
        /// The checkpoint.
        model: String,
    },
    /// No layout that is known here holds all layers of a checkpoint exactly.
    #[error("no layout holds every layer exactly; name one with --to to see the verdict of each layer")]
    NoExactLayout,
    /// A module of a sentence-embedding model that is not known here.
    #[error(
        "modules.json: {found} is not supported (a Transformer, a Pooling and a Normalize are); --pooling gives vectors without it"
    )]
    Module {
        /// Its type.
        found: String,
    },
    /// A kernel can't be measured, or is wrong.
    #[error("{kernel}: {reason}")]
    Bench {
        /// Its name.
        kernel: String,
        /// Why.
        reason: String,
    },
    /// A file can't be read or written.
    #[error("{}: {source}", .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        source: Arc<std::io::Error>,
    },
}

impl From<GenerateError> for Error {
    fn from(error: GenerateError) -> Self {
        match error {
            GenerateError::Model(error) => error.into(),
            GenerateError::Tokenizer(error) => error.into(),
            _ => unreachable!("the enum is this workspace's own"),
        }
    }
}

impl Error {
    /// An operating system error on a file.
    pub fn io(file: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { file: file.into(), source: Arc::new(source) }
    }
}

/// Something that stands in the way of a plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Problem {
    /// The tensor or module, if it is about one.
    pub tensor: Option<String>,
    /// What was expected and found.
    pub message: String,
}

/// Problems in one text, one a line.
fn list(problems: &[Problem]) -> String {
    let lines = problems.iter().map(|p| match &p.tensor {
        Some(tensor) => format!("\n  {tensor}: {}", p.message),
        None => format!("\n  {}", p.message),
    });
    lines.collect()
}
