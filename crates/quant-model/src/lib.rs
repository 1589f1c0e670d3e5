//! Language and embedding models as data, and one way to run each.
//!
//! An architecture is a value, [`ArchSpec`], read from `config.json` by one table ([`architectures`]). [`Decoder`]
//! and [`Encoder`] run every such value; their linears hide behind [`Linear`], so that float and quantized models look alike.
//! A [`Block`] can be run stage by stage, which is how a quantizer sees the inputs of each layer.
//!
//! ```
//! use quant_model::{ArchSpec, StageKind};
//!
//! let config = serde_json::json!({
//!     "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
//!     "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
//! });
//! let spec = ArchSpec::from_config(&config)?;
//! assert_eq!((spec.head_dim, spec.kv_size()), (8, 32));
//! // The linears that share an input, in the order in which they run.
//! let stages: Vec<Vec<&str>> = spec.stages.iter().map(|s| s.linears.iter().map(|l| l.name).collect()).collect();
//! assert_eq!(stages[0], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]);
//! assert_eq!((spec.stages[3].kind, &stages[3][..]), (StageKind::MlpOut, &["mlp.down_proj"][..]));
//! # Ok::<(), quant_model::ConfigError>(())
//! ```
//!
//! Results have the same bits for any number of threads, and a row of activations has the same bits whatever runs
//! beside it: a token decoded from a cache is the token of a whole pass, a sequence in a batch that of the sequence
//! alone. (Layouts that round activations by something that all rows share, as LLM.int8 does, give that up.) Configurations and tokenizers come from files that nobody vouches for; what makes no sense is an error
//! that names field or tensor, the value expected and the value found.
#![forbid(unsafe_code)]

mod act;
mod arch;
mod block;
mod decoder;
mod embedding;
mod encoder;
mod error;
mod generate;
mod kv;
mod linear;
mod norm;
mod pool;
mod rope;
mod rows;
mod sample;
mod template;
mod tokenizer;

pub use arch::{
    Activation, ArchSpec, Architecture, AttentionScale, LinearSpec, Names, NormKind, NormPlace, NormSpec,
    PositionSpec, Stage, StageKind, WindowSpec, architectures,
};
pub use block::{Block, Sequences};
pub use decoder::{Decoder, Head, MemoryFootprint};
pub use embedding::Embedding;
pub use encoder::Encoder;
pub use error::{ConfigError, ModelError};
pub use generate::{Finish, GenerateError, GenerateOptions, Generated, eos_tokens, generate, generate_ids};
pub use kv::KvCache;
pub use linear::{Compute, DenseLinear, DenseMatrix, Linear, Packed, PackedLinear, linear, weight_f32};
pub use pool::{Pooling, normalize};
pub use rope::{RopeKind, RopeSpec, RopeTable};
pub use sample::{Sampler, Sampling};
pub use template::{ChatTemplate, Message, TemplateError};
pub use tokenizer::{TextStream, Tokenizer, TokenizerError};
