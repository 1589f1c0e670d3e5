//! An architecture as a value.

mod fields;
mod table;

use quant_core::{NormId, Producer, WeightSource};
use serde_json::Value;

use crate::error::ConfigError;
use crate::rope::RopeSpec;

pub(crate) use fields::Fields;
pub use table::{Architecture, architectures};

/// Everything that tells one model from another. The forward passes of [`crate::Decoder`] and [`crate::Encoder`] are
/// functions of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ArchSpec {
    /// `model_type` of the configuration, an entry of [`architectures`].
    pub model_type: &'static str,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Blocks. Not yet verified against the checkpoint; allocate nothing by it.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Features inside the MLP.
    pub intermediate_size: usize,
    /// Positions that the model was trained for.
    pub max_positions: usize,
    /// The norms of attention and MLP, and the last one.
    pub norm: NormSpec,
    /// A token sees only those before it: a decoder. Otherwise it sees all: an encoder, which has no head.
    pub causal: bool,
    /// Rows of the embedding of token types (segments), of which a text alone has the first. 0: there is none.
    pub token_types: usize,
    /// RMS normalisation of each query and key head before rope.
    pub qk_norm: bool,
    /// How positions enter.
    pub positions: PositionSpec,
    /// Nonlinearity of the MLP.
    pub activation: Activation,
    /// The MLP multiplies the activated gate with a second projection.
    pub gated: bool,
    /// Factor of the attention scores.
    pub attention_scale: AttentionScale,
    /// Which layers see only the last positions.
    pub window: WindowSpec,
    /// The output head is the embedding.
    pub tied_embeddings: bool,
    /// Dense linears are stored `[in, out]`.
    pub conv1d: bool,
    /// The linears of a block in the order in which they run; those of one stage share their input.
    pub stages: Vec<Stage>,
    /// Where tensors lie.
    pub names: Names,
    /// Beginning-of-text token, if any.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// The kind of all norms of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// The formula.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f32,
    /// Where it acts.
    pub place: NormPlace,
}

/// Where a block normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlace {
    /// The inputs of attention and MLP, and what leaves the last block (pre-LN).
    Before,
    /// The residual stream behind attention and behind the MLP; the embedding, too (post-LN, BERT).
    After,
}

/// The formula of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) * weight`.
    Rms,
    /// `(x - mean) / std * weight + bias`.
    Layer,
}

/// How positions enter a model.
#[derive(Clone, Debug, PartialEq)]
pub enum PositionSpec {
    /// Rotation of queries and keys.
    Rope(RopeSpec),
    /// A learned vector per position, added to the embedding.
    Learned,
}

/// Nonlinearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)` with the error function.
    Gelu,
    /// The tanh approximation of [`Activation::Gelu`].
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// Factor of the attention scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionScale {
    /// The factor of the first layer.
    pub base: f32,
    /// Divide by the layer's number, counted from 1.
    pub by_layer: bool,
}

impl AttentionScale {
    /// The factor of a layer.
    pub fn of_layer(self, layer: usize) -> f32 {
        if self.by_layer { self.base / (layer + 1) as f32 } else { self.base }
    }
}

/// Which layers see only the last positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WindowSpec {
    /// None.
    Full,
    /// Those from `first` on see `len` positions, their own included.
    From {
        /// First layer with a window.
        first: usize,
        /// Positions seen.
        len: usize,
    },
    /// Those with a `true` see `len` positions, their own included.
    Layers {
        /// One entry per layer.
        sliding: Vec<bool>,
        /// Positions seen.
        len: usize,
    },
}

impl WindowSpec {
    /// Positions that a token of this layer sees, its own included. `None` is all of them.
    pub fn of_layer(&self, layer: usize) -> Option<usize> {
        match self {
            WindowSpec::From { first, len } if layer >= *first => Some(*len),
            WindowSpec::Layers { sliding, len } if sliding.get(layer) == Some(&true) => Some(*len),
            _ => None,
        }
    }
}

/// Linears of a block that share an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// What happens to their outputs.
    pub kind: StageKind,
    /// The linears, in the order of their outputs.
    pub linears: Vec<LinearSpec>,
}

/// What a stage is for. Every block has these four in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageKind {
    /// Query, key and value projections (one linear or three), then attention.
    Qkv,
    /// Projection of the attended values, added to the residual stream.
    AttentionOut,
    /// Gate and up projection, or one projection, then the activation.
    MlpIn,
    /// Projection back, added to the residual stream.
    MlpOut,
}

/// A linear layer of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Path below the block, such as `mlp.up_proj`.
    pub name: &'static str,
    /// Output features.
    pub out_features: usize,
    /// Input features.
    pub in_features: usize,
    /// The checkpoint must hold a bias. One that it holds anyway is used too.
    pub bias: bool,
    /// Fields of the configuration that the shape follows from.
    pub because: &'static str,
}

/// Names of the tensors of an architecture, below a common prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// Prefix of files of a whole model, such as `model.`; files of a bare decoder come without.
    pub prefix: &'static str,
    /// The embedding.
    pub embedding: &'static str,
    /// The learned positions, if there are any.
    pub positions: &'static str,
    /// The token types, if there are any.
    pub token_types: &'static str,
    /// Norm of the embedding with [`NormPlace::After`].
    pub embedding_norm: &'static str,
    /// The list of blocks.
    pub layers: &'static str,
    /// Norm before or after attention, below a block.
    pub attention_norm: &'static str,
    /// Norm before or after the MLP, below a block.
    pub mlp_norm: &'static str,
    /// Norm of queries, below a block.
    pub q_norm: &'static str,
    /// Norm of keys, below a block.
    pub k_norm: &'static str,
    /// Norm after the last block with [`NormPlace::Before`].
    pub final_norm: &'static str,
    /// The output head of a decoder; without the prefix.
    pub head: &'static str,
}

impl ArchSpec {
    /// Reads `config.json`.
    pub fn from_config(config: &Value) -> Result<Self, ConfigError> {
        table::build(config)
    }

    /// Features of all query heads together.
    pub fn q_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Features of all key (or value) heads together.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The linears of a block in order, all stages joined. Their positions are the slots of [`crate::Block`].
    pub fn linears(&self) -> impl Iterator<Item = &LinearSpec> {
        self.stages.iter().flat_map(|stage| &stage.linears)
    }

    /// The slots of a stage.
    pub fn slots(&self, stage: usize) -> std::ops::Range<usize> {
        let start = self.stages[..stage].iter().map(|s| s.linears.len()).sum();
        start..start + self.stages[stage].linears.len()
    }

    /// What makes the input of a stage.
    pub fn producer(&self, stage: usize) -> Producer {
        let last = |kind| {
            let at = self.stages.iter().position(|s| s.kind == kind).expect("a block has every kind");
            (self.slots(at).end - 1, self.stages[at].linears.last().map_or(0, |linear| linear.out_features))
        };
        match (self.stages[stage].kind, self.norm.place) {
            (StageKind::Qkv, NormPlace::Before) => Producer::Norm(NormId::Attention),
            (StageKind::MlpIn, NormPlace::Before) => Producer::Norm(NormId::Mlp),
            (StageKind::Qkv | StageKind::MlpIn, NormPlace::After) => {
                Producer::Fixed { because: "the norm before it also feeds the residual stream" }
            }
            // Attention is linear in the values, which are the last outputs of the stage.
            (StageKind::AttentionOut, _) => {
                let (slot, outputs) = last(StageKind::Qkv);
                let (first, dim, shared) =
                    (outputs - self.kv_size(), self.head_dim, self.heads / self.kv_heads);
                let row = |k: usize| first + k / dim / shared * dim + k % dim;
                Producer::Outputs { slot, rows: (0..self.q_size()).map(row).collect() }
            }
            // The activated gate is multiplied with the last outputs of the stage; max(x, 0) keeps positive factors.
            (StageKind::MlpOut, _) if self.gated || self.activation == Activation::Relu => {
                let (slot, outputs) = last(StageKind::MlpIn);
                let first = outputs - self.intermediate_size;
                Producer::Outputs { slot, rows: (first..outputs).collect() }
            }
            (StageKind::MlpOut, _) => {
                Producer::Fixed { because: "it is the output of an activation function" }
            }
        }
    }

    /// Path of a norm below its block.
    pub fn norm_name(&self, norm: NormId) -> &'static str {
        match norm {
            NormId::Attention => self.names.attention_norm,
            NormId::Mlp => self.names.mlp_norm,
        }
    }

    /// Path of a block, such as `model.layers.3`, as this checkpoint spells it.
    pub fn block_path(&self, layer: usize, src: &dyn WeightSource) -> String {
        let path = format!("{}.{layer}", self.names.layers);
        let norm = format!("{path}.{}", self.names.attention_norm);
        format!("{}{path}", self.prefix_of(&norm, src))
    }

    /// Full name of a module outside the blocks, as this checkpoint spells it.
    pub(crate) fn module_path(&self, module: &str, src: &dyn WeightSource) -> String {
        format!("{}{module}", self.prefix_of(module, src))
    }

    /// The prefix, unless the checkpoint has the module without it.
    fn prefix_of(&self, module: &str, src: &dyn WeightSource) -> &'static str {
        let prefix = self.names.prefix;
        // Norms of old BERT files call their weight gamma.
        let holds =
            |path: &str| ["weight", "gamma"].iter().any(|part| src.contains(&format!("{path}.{part}")));
        let bare = !holds(&format!("{prefix}{module}")) && holds(module);
        if bare { "" } else { prefix }
    }
}
