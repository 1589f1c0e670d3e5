//! A whole decoder: embedding, blocks, final norm and head.

use std::sync::Arc;

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, Slice, concatenate};
use quant_core::{WeightError, WeightSource};
use quant_kernels::KvType;
use serde_json::Value;

use crate::arch::ArchSpec;
use crate::block::{Block, Sequences, load_norm};
use crate::embedding::Embedding;
use crate::error::{ConfigError, ModelError};
use crate::kv::KvCache;
use crate::linear::{Compute, Linear, forward_all, linear};
use crate::norm::Norm;
use crate::rows::Workspace;

/// Positions of a text that run through the blocks together. Longer texts go through the cache in pieces, which
/// bounds memory and changes no bit.
const CHUNK: usize = 512;

/// Final norm and projection to the vocabulary.
pub struct Head {
    norm: Norm,
    linear: Box<dyn Linear>,
    /// The weights are those of the embedding.
    tied: bool,
}

impl Head {
    /// Reads norm and head; a tied head shares the embedding's memory.
    pub fn load(spec: &ArchSpec, embedding: &Embedding, src: &dyn WeightSource) -> Result<Self, ModelError> {
        let path = spec.module_path(spec.names.final_norm, src);
        let norm = load_norm(spec, &path, spec.hidden_size, spec.norm.kind, src)?;
        let tied = spec.tied_embeddings;
        let linear: Box<dyn Linear> = if tied {
            embedding.tokens().linear()
        } else {
            let (module, expected) = (spec.names.head, (spec.vocab_size, spec.hidden_size));
            let found = src.linear_shape(module)?;
            if found != expected {
                return Err(ModelError::Weight(WeightError::Shape {
                    name: format!("{module}.weight"),
                    expected: vec![expected.0, expected.1],
                    found: vec![found.0, found.1],
                    because: "vocab_size and hidden_size".to_owned(),
                }));
            }
            linear(module, src.linear(module)?, false)?
        };
        Ok(Self { norm, linear, tied })
    }

    /// Logits of rows that left the last block. `x`: `[t, hidden]`, `out`: `[t, vocab]`.
    pub fn logits(
        &self,
        x: ArrayView2<'_, f32>,
        compute: Compute,
        out: ArrayViewMut2<'_, f32>,
    ) -> Result<(), ModelError> {
        let mut normed = Array2::zeros(x.dim());
        self.norm.forward(x, &mut normed);
        forward_all(&[&*self.linear], normed.view(), compute, vec![out], &mut Workspace::default())
    }
}

/// A decoder ready to run.
pub struct Decoder {
    spec: Arc<ArchSpec>,
    embedding: Embedding,
    blocks: Vec<Block>,
    head: Head,
    compute: Compute,
}

/// Bytes of a model's weights in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryFootprint {
    /// Token and position embedding.
    pub embedding: usize,
    /// All blocks.
    pub blocks: usize,
    /// Final norm and head; the norm alone where the head is the embedding.
    pub head: usize,
}

impl MemoryFootprint {
    /// All of it.
    pub fn total(&self) -> usize {
        self.embedding + self.blocks + self.head
    }
}

impl Decoder {
    /// A model from its `config.json` and its weights.
    pub fn load(config: &Value, src: &dyn WeightSource) -> Result<Self, ModelError> {
        let spec = Arc::new(ArchSpec::from_config(config)?);
        if !spec.causal {
            let reason =
                "an encoder has no next token; it gives vectors (embed) and hidden states".to_owned();
            return Err(ModelError::Unsupported { module: spec.model_type.to_owned(), reason });
        }
        check_layers(&spec, src)?;
        let embedding = Embedding::load(&spec, src)?;
        let head = Head::load(&spec, &embedding, src)?;
        let blocks =
            (0..spec.layers).map(|layer| Block::load(&spec, layer, src)).collect::<Result<_, _>>()?;
        Ok(Self { spec, embedding, blocks, head, compute: Compute::Exact })
    }

    /// How products are computed: exactly, unless told otherwise, and where no layer has a fast product.
    pub fn compute(&self) -> Compute {
        let mut linears = self.blocks.iter().flat_map(Block::linears).chain([&*self.head.linear]);
        if linears.any(Linear::has_fast) { self.compute } else { Compute::Exact }
    }

    /// Chooses how products with quantized weights are computed. Caches made before keep their type.
    pub fn set_compute(&mut self, compute: Compute) {
        self.compute = compute;
    }

    /// The architecture.
    pub fn spec(&self) -> &Arc<ArchSpec> {
        &self.spec
    }

    /// The blocks, first to last.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The blocks, to replace their linears.
    pub fn blocks_mut(&mut self) -> &mut [Block] {
        &mut self.blocks
    }

    /// Bytes of the weights.
    pub fn memory_footprint(&self) -> MemoryFootprint {
        let head = if self.head.tied { 0 } else { self.head.linear.bytes() };
        MemoryFootprint {
            embedding: self.embedding.bytes(),
            blocks: self.blocks.iter().map(Block::bytes).sum(),
            head: self.head.norm.bytes() + head,
        }
    }

    /// An empty cache for one text: exact in f32, fast in 16 bits.
    pub fn new_cache(&self) -> KvCache {
        let kind = match self.compute() {
            Compute::Exact => KvType::F32,
            Compute::Fast => KvType::F16,
        };
        KvCache::new(&self.spec, self.blocks.len(), kind)
    }

    /// Runs `ids` after what the cache holds. Returns what leaves the last block, `[ids, hidden]`.
    pub fn forward(&self, ids: &[u32], cache: &mut KvCache) -> Result<Array2<f32>, ModelError> {
        let mut pieces = Vec::new();
        let mut work = Workspace::default();
        let text_len = cache.len() + ids.len();
        for ids in ids.chunks(CHUNK) {
            let start = cache.len();
            let mut x = self.embedding.embed(ids, start)?;
            let sequences = Sequences::within(&self.spec, start, ids.len(), text_len)?.computed(self.compute);
            for (layer, block) in self.blocks.iter().enumerate() {
                block.forward_in(&mut x, &sequences, Some(cache.layer_mut(layer)), &mut work)?;
            }
            cache.advance(ids.len());
            pieces.push(x);
        }
        if pieces.len() == 1 {
            return Ok(pieces.remove(0));
        }
        let views: Vec<_> = pieces.iter().map(|x| x.view()).collect();
        match views[..] {
            [] => Ok(Array2::zeros((0, self.spec.hidden_size))),
            _ => Ok(concatenate(Axis(0), &views).expect("pieces have one width")),
        }
    }

    /// Runs sequences of equal length side by side, without a cache. `ids`: `[n, len]`; returns `[n * len, hidden]`.
    pub fn forward_batch(&self, ids: ArrayView2<'_, u32>) -> Result<Array2<f32>, ModelError> {
        let (count, len) = ids.dim();
        let mut x = Array2::zeros((count * len, self.spec.hidden_size));
        for (ids, mut rows) in ids.rows().into_iter().zip(x.axis_chunks_iter_mut(Axis(0), len.max(1))) {
            rows.assign(&self.embedding.embed(&ids.to_vec(), 0)?);
        }
        let sequences = Sequences::new(&self.spec, 0, len)?.computed(self.compute);
        let mut work = Workspace::default();
        for block in &self.blocks {
            block.forward_in(&mut x, &sequences, None, &mut work)?;
        }
        Ok(x)
    }

    /// Logits of rows that left the last block. `x`: `[t, hidden]`, `out`: `[t, vocab]`.
    ///
    /// A caller who needs few of them at a time passes few rows at a time.
    pub fn project(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ModelError> {
        self.head.logits(x, self.compute, out)
    }

    /// What the head sees of a whole text: what leaves the last block, normalised. `[ids, hidden]`.
    pub fn hidden_states(&self, ids: &[u32]) -> Result<Array2<f32>, ModelError> {
        let x = self.forward(ids, &mut self.new_cache())?;
        let mut normed = Array2::zeros(x.dim());
        self.head.norm.forward(x.view(), &mut normed);
        Ok(normed)
    }

    /// Logits of a whole text, `[ids, vocab]`.
    pub fn logits(&self, ids: &[u32]) -> Result<Array2<f32>, ModelError> {
        let x = self.forward(ids, &mut self.new_cache())?;
        let mut logits = Array2::zeros((ids.len(), self.spec.vocab_size));
        self.project(x.view(), logits.view_mut())?;
        Ok(logits)
    }

    /// Runs `ids` after what the cache holds, and returns the logits of the last one, `[vocab]`.
    pub fn next_logits(&self, ids: &[u32], cache: &mut KvCache) -> Result<Array1<f32>, ModelError> {
        let x = self.forward(ids, cache)?;
        let mut logits = Array2::zeros((x.nrows().min(1), self.spec.vocab_size));
        let last = x.nrows().saturating_sub(1);
        self.project(x.slice_axis(Axis(0), Slice::from(last..)), logits.view_mut())?;
        Ok(logits.into_flat())
    }
}

/// The number of layers is the one size that is not checked against a tensor's shape, so the last layer is looked
/// for before the first is read.
pub(crate) fn check_layers(spec: &ArchSpec, src: &dyn WeightSource) -> Result<(), ModelError> {
    let norm = format!("{}.{}", spec.block_path(spec.layers - 1, src), spec.names.attention_norm);
    let [last, old] = ["weight", "gamma"].map(|part| format!("{norm}.{part}"));
    if spec.layers > 1 && !src.contains(&last) && !src.contains(&old) {
        return Err(ConfigError::Value {
            field: "number of layers (num_hidden_layers, n_layer)".to_owned(),
            expected: format!("layers that the checkpoint holds; it has no tensor {last}"),
            found: spec.layers.to_string(),
        }
        .into());
    }
    Ok(())
}
