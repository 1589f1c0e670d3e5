//! What this crate refuses.

use quant_core::WeightError;
use quant_kernels::ShapeError;

/// A configuration that describes no model this crate can build.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A field without which nothing can be built.
    #[error("config.json: field {field} is missing; expected {expected}")]
    Missing {
        /// The field.
        field: String,
        /// What it must hold.
        expected: String,
    },
    /// A field with a value that makes no sense.
    #[error("config.json: field {field} is {found}; expected {expected}")]
    Value {
        /// The field.
        field: String,
        /// What it must hold.
        expected: String,
        /// What it holds, cut to a readable length and with control characters escaped.
        found: String,
    },
    /// The top of the file is not an object.
    #[error("config.json: expected an object of fields, found {found}")]
    NotAnObject {
        /// What was found.
        found: String,
    },
}

/// A model that cannot be loaded or run.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A tensor of the checkpoint.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// An operand of a product; a caller's mistake.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A token that the model has no embedding for.
    #[error(
        "token id {id} is out of range: the embedding has {vocab} rows (vocab_size); use the model's own tokenizer"
    )]
    Token {
        /// The token.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// More positions than the model has embeddings for.
    #[error("{positions} positions where the model has {limit} (max_position_embeddings); shorten the text")]
    Context {
        /// Positions asked for.
        positions: usize,
        /// Positions that exist.
        limit: usize,
    },
    /// A block whose linear layer was not set.
    #[error("{module} has no weights yet; set the linear before running its stage")]
    Empty {
        /// Path of the layer.
        module: String,
    },
    /// A layer that is stored in a way that nothing here computes.
    #[error("{module}: {reason}")]
    Unsupported {
        /// Path of the layer.
        module: String,
        /// What is missing, and what to do.
        reason: String,
    },
    /// A logit that is no number.
    #[error(
        "the logit of token {token} is not a number; the weights may hold NaN or infinity, which verify would name"
    )]
    NotANumber {
        /// The first such token.
        token: usize,
    },
    /// An option of generation outside its range.
    #[error("{option} is {found}; it must be {allowed}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        found: String,
        /// What is possible, in words.
        allowed: &'static str,
    },
}
