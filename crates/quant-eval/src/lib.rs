//! How good a model is: perplexity, and how far it is from its float original.
//!
//! A text becomes windows of tokens ([`Windowing`]); [`evaluate`] runs a model, and if wanted its reference, over
//! them. The first token of a window is not scored. Results do not depend on the number of threads.
#![forbid(unsafe_code)]

mod evaluate;
mod metrics;
mod windows;

pub use evaluate::{EvalError, Report, evaluate};
pub use metrics::{Divergence, Position, score};
pub use windows::{Windowing, windows_of_ids};
