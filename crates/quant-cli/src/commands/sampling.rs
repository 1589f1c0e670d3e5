//! How text is generated: options that several commands share.

use clap::Args;
use quant::{GenerateOptions, Sampling};

use super::Compute;

/// Options of generation.
#[derive(Args)]
pub(crate) struct SamplingOptions {
    /// New tokens at most
    #[arg(long, short = 'n', default_value_t = 50, value_name = "N")]
    max_new_tokens: usize,
    /// Randomness; 0 always takes the most probable token
    #[arg(long, short, default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Choose among this many of the most probable tokens; 0 is off
    #[arg(long, default_value_t = 0, value_name = "N")]
    top_k: usize,
    /// Choose among the fewest tokens that together have this probability
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f32,
    /// Choose among tokens of at least this share of the largest probability
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    min_p: f32,
    /// Makes tokens that are in the text already less probable, above 1
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    repetition_penalty: f32,
    /// Start of the random numbers
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// End before this text; may be given again
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// How products are computed
    #[arg(long, value_enum, default_value = "fast")]
    pub(crate) compute: Compute,
}

impl SamplingOptions {
    /// The library's form.
    pub(crate) fn options(&self) -> GenerateOptions {
        GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            sampling: Sampling {
                repetition_penalty: self.repetition_penalty,
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                seed: self.seed,
            },
            stop: self.stop.clone(),
            ..GenerateOptions::default()
        }
    }
}
