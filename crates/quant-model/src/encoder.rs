//! A whole encoder: embedding and blocks in which every token sees every other.

use std::sync::Arc;

use ndarray::Array2;
use quant_core::WeightSource;
use serde_json::Value;

use crate::arch::ArchSpec;
use crate::block::{Block, Sequences};
use crate::decoder::{MemoryFootprint, check_layers};
use crate::embedding::Embedding;
use crate::error::ModelError;

/// An encoder ready to run.
pub struct Encoder {
    spec: Arc<ArchSpec>,
    embedding: Embedding,
    blocks: Vec<Block>,
}

impl Encoder {
    /// A model from its `config.json` and its weights.
    pub fn load(config: &Value, src: &dyn WeightSource) -> Result<Self, ModelError> {
        let spec = Arc::new(ArchSpec::from_config(config)?);
        if spec.causal {
            let reason = "it is a decoder; load it as one".to_owned();
            return Err(ModelError::Unsupported { module: spec.model_type.to_owned(), reason });
        }
        check_layers(&spec, src)?;
        let embedding = Embedding::load(&spec, src)?;
        let blocks =
            (0..spec.layers).map(|layer| Block::load(&spec, layer, src)).collect::<Result<_, _>>()?;
        Ok(Self { spec, embedding, blocks })
    }

    /// The architecture.
    pub fn spec(&self) -> &Arc<ArchSpec> {
        &self.spec
    }

    /// Bytes of the weights.
    pub fn memory_footprint(&self) -> MemoryFootprint {
        MemoryFootprint {
            embedding: self.embedding.bytes(),
            blocks: self.blocks.iter().map(Block::bytes).sum(),
            head: 0,
        }
    }

    /// The last hidden state of one text without padding, `[ids, hidden]`.
    pub fn hidden_states(&self, ids: &[u32]) -> Result<Array2<f32>, ModelError> {
        let mut x = self.embedding.embed(ids, 0)?;
        let sequences = Sequences::new(&self.spec, 0, ids.len())?;
        for block in &self.blocks {
            block.forward(&mut x, &sequences, None)?;
        }
        Ok(x)
    }
}
