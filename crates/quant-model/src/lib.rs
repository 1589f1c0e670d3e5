//! Decoders as data, and one way to run them.
//!
//! An architecture is a value, [`ArchSpec`], read from `config.json` by one table ([`architectures`]). [`Decoder`]
//! runs every such value; its linears hide behind [`Linear`], so that float and quantized models look alike.
//! A [`Block`] can be run stage by stage, which is how a quantizer sees the inputs of each layer.
#![forbid(unsafe_code)]

mod arch;
mod attention;
mod block;
mod decoder;
mod error;
mod generate;
mod kv;
mod linear;
mod ops;
mod rope;
mod sample;
mod tokenizer;

pub use arch::{
    Activation, ArchSpec, Architecture, AttentionScale, LinearSpec, Names, NormKind, NormSpec, PositionSpec,
    Stage, StageKind, WindowSpec, architectures,
};
pub use block::{Block, Sequences};
pub use decoder::{Decoder, Embedding, Head, MemoryFootprint};
pub use error::{ConfigError, ModelError};
pub use generate::{Finish, GenerateError, GenerateOptions, Generated, eos_tokens, generate, generate_ids};
pub use kv::{KvCache, LayerCache};
pub use linear::{DenseLinear, DenseMatrix, Linear, PackedLinear, linear, weight_f32};
pub use rope::{RopeKind, RopeSpec, RopeTable};
pub use sample::{Sampler, Sampling};
pub use tokenizer::{TextStream, Tokenizer, TokenizerError};
