//! Checkpoints of any shape with random weights, in the Hugging Face file layout.
//!
//! Every element is a pure function of the seed, the tensor's name and the element's index, so the same files
//! come out for any number of threads, and memory does not grow with the model. Weights have the variance that
//! keeps activations near one; a few channels of each normalisation and a few outputs of each linear layer are
//! made large, as trained models have them and as quantizers must cope with.
//!
//! ```
//! use quant_testkit::synthetic::{Arch, Checkpoint, Shape};
//!
//! let dir = std::env::temp_dir().join(format!("synthetic-doc-{}", std::process::id()));
//! Checkpoint::new(Shape::tiny(Arch::Qwen3)).write(&dir)?;
//! assert!(dir.join("model.safetensors").exists());
//! # std::fs::remove_dir_all(dir)?;
//! # Ok::<(), std::io::Error>(())
//! ```

mod config;
mod ids;
mod random;
mod tensors;
mod write;

pub use ids::{random_ids, write_npy};

use tensors::TensorPlan;

/// An architecture of the generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// `model_type` llama.
    Llama,
    /// `model_type` mistral, without a sliding window.
    Mistral,
    /// `model_type` qwen2: biases on the attention's inputs.
    Qwen2,
    /// `model_type` qwen3: normalised queries and keys.
    Qwen3,
    /// `model_type` gpt2: learned positions, `Conv1D` weights `[in, out]`.
    Gpt2,
}

impl Arch {
    /// All of them.
    pub const ALL: [Arch; 5] = [Arch::Llama, Arch::Mistral, Arch::Qwen2, Arch::Qwen3, Arch::Gpt2];

    /// The `model_type` of `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Arch::Llama => "llama",
            Arch::Mistral => "mistral",
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
            Arch::Gpt2 => "gpt2",
        }
    }
}

/// The sizes of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Architecture.
    pub arch: Arch,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Width of the feed-forward part.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Features per head.
    pub head_dim: usize,
    /// Tokens.
    pub vocab: usize,
    /// Longest sequence.
    pub positions: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// The output layer shares the embedding.
    pub tied: bool,
}

impl Shape {
    /// TinyLlama.
    pub const LLAMA_1_1B: Shape = Shape {
        arch: Arch::Llama,
        hidden: 2048,
        layers: 22,
        ffn: 5632,
        heads: 32,
        kv_heads: 4,
        head_dim: 64,
        vocab: 32_000,
        positions: 2048,
        rope_theta: 1e4,
        tied: false,
    };
    /// Llama 3 8B.
    pub const LLAMA_8B: Shape = Shape {
        hidden: 4096,
        layers: 32,
        ffn: 14_336,
        kv_heads: 8,
        head_dim: 128,
        vocab: 128_256,
        positions: 8192,
        rope_theta: 5e5,
        ..Self::LLAMA_1_1B
    };
    /// Eight blocks of Llama 3 8B with Llama 2's vocabulary.
    pub const LLAMA_8B_L8: Shape = Shape { layers: 8, vocab: 32_000, ..Self::LLAMA_8B };
    /// Qwen3 0.6B.
    pub const QWEN3_0_6B: Shape = Shape {
        arch: Arch::Qwen3,
        hidden: 1024,
        layers: 28,
        ffn: 3072,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        vocab: 151_936,
        positions: 40_960,
        rope_theta: 1e6,
        tied: true,
    };
    /// GPT-2, 124 million parameters.
    pub const GPT2: Shape = Shape {
        arch: Arch::Gpt2,
        hidden: 768,
        layers: 12,
        ffn: 3072,
        heads: 12,
        kv_heads: 12,
        head_dim: 64,
        vocab: 50_257,
        positions: 1024,
        rope_theta: 0.0,
        tied: true,
    };

    /// The shapes that have a name.
    pub const NAMED: [(&'static str, Shape); 5] = [
        ("llama-1.1b", Self::LLAMA_1_1B),
        ("llama-8b", Self::LLAMA_8B),
        ("llama-8b-l8", Self::LLAMA_8B_L8),
        ("qwen3-0.6b", Self::QWEN3_0_6B),
        ("gpt2", Self::GPT2),
    ];

    /// Small enough for a unit test: two blocks of 64 features, 128 tokens.
    pub fn tiny(arch: Arch) -> Shape {
        let kv_heads = if arch == Arch::Gpt2 { 4 } else { 2 };
        let sizes = Shape { arch, hidden: 64, layers: 2, ffn: 128, heads: 4, kv_heads, ..Self::LLAMA_1_1B };
        Shape { head_dim: 16, vocab: 128, positions: 128, tied: arch == Arch::Gpt2, ..sizes }
    }
}

/// Element type of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// 16 bits with the range of f32.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Single precision.
    F32,
}

/// A checkpoint to be written with [`Checkpoint::write`].
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Sizes.
    pub shape: Shape,
    /// Element type of the weights.
    pub storage: Storage,
    /// Seed of all values.
    pub seed: u64,
    /// A file holds at most this many bytes of tensors (but at least one tensor).
    pub shard_bytes: u64,
}

impl Checkpoint {
    /// Values in bf16, seed 0, files of at most 5 GB.
    pub fn new(shape: Shape) -> Self {
        Self { shape, storage: Storage::Bf16, seed: 0, shard_bytes: 5_000_000_000 }
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().filter(|t| t.is_parameter()).map(TensorPlan::len).sum()
    }

    fn tensors(&self) -> Vec<TensorPlan> {
        tensors::plan(&self.shape)
    }
}

#[cfg(test)]
mod tests;
