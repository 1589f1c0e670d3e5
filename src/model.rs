//! Loading and running a model, float or quantized.

use std::path::Path;

use ndarray::Array2;
use quant_formats::{Checkpoint, resolve_model};
use quant_model::{Decoder, MemoryFootprint};

use crate::error::Error;

/// A model ready to run, with its tokenizer if it has one.
pub struct Model {
    decoder: Decoder,
    checkpoint: Checkpoint,
}

impl Model {
    /// Loads a Hugging Face directory, float or quantized in any known layout, or a model by its name in the local
    /// Hugging Face cache.
    pub fn load(model: &str) -> Result<Self, Error> {
        Self::open(&resolve_model(model)?)
    }

    /// Loads the model directory at `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let checkpoint = Checkpoint::open(path)?;
        let decoder = Decoder::load(checkpoint.config(), &checkpoint)?;
        Ok(Self { decoder, checkpoint })
    }

    /// The network.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The files it came from.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Bytes of the weights in memory.
    pub fn memory_footprint(&self) -> MemoryFootprint {
        self.decoder.memory_footprint()
    }

    /// Logits `[ids, vocab]` of every position of a text.
    pub fn logits(&self, ids: &[u32]) -> Result<Array2<f32>, Error> {
        Ok(self.decoder.logits(ids)?)
    }
}
