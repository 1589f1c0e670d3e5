//! Loading and running a model, float or quantized.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::OnceLock;

use ndarray::Array2;
use quant_formats::{Checkpoint, resolve_model};
use quant_model::{
    ChatTemplate, Compute, Decoder, GenerateOptions, Generated, MemoryFootprint, Tokenizer, eos_tokens,
    generate,
};
use serde_json::Value;

use crate::error::Error;

/// A model ready to run. The tokenizer is read when it is first needed.
///
/// ```
/// # fn main() -> Result<(), quant::Error> {
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/models/ts-llama-3.7M");
/// let model = quant::Model::load(path)?;
/// let options = quant::GenerateOptions { max_new_tokens: 8, ..Default::default() };
/// let story = model.generate("once upon a time", &options)?;
/// assert_eq!(story.text, ", there was a little girl named lily");
/// # Ok(())
/// # }
/// ```
pub struct Model {
    decoder: Decoder,
    checkpoint: Checkpoint,
    tokenizer: OnceLock<Tokenizer>,
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
        Ok(Self { decoder, checkpoint, tokenizer: OnceLock::new() })
    }

    /// Chooses how products with quantized weights are computed; exactly at first.
    pub fn set_compute(&mut self, compute: Compute) {
        self.decoder.set_compute(compute);
    }

    /// The network.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The files it came from.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        match self.tokenizer.get() {
            Some(tokenizer) => Ok(tokenizer),
            None => {
                let tokenizer = read_tokenizer(&self.checkpoint)?;
                Ok(self.tokenizer.get_or_init(|| tokenizer))
            }
        }
    }

    /// Bytes of the weights in memory.
    pub fn memory_footprint(&self) -> MemoryFootprint {
        self.decoder.memory_footprint()
    }

    /// Logits `[ids, vocab]` at every position of a text.
    pub fn logits(&self, ids: &[u32]) -> Result<Array2<f32>, Error> {
        Ok(self.decoder.logits(ids)?)
    }

    /// Continues `prompt`.
    pub fn generate(&self, prompt: &str, options: &GenerateOptions) -> Result<Generated, Error> {
        self.generate_streaming(prompt, options, |_| ControlFlow::Continue(()))
    }

    /// Continues `prompt`; `on_text` sees the text as it grows and may end it. The model's own end-of-text tokens are
    /// added to those of the options.
    pub fn generate_streaming(
        &self,
        prompt: &str,
        options: &GenerateOptions,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, Error> {
        self.continue_ids(&self.tokenizer()?.encode(prompt, true)?, options, on_text)
    }

    /// The same from token ids.
    pub fn continue_ids(
        &self,
        ids: &[u32],
        options: &GenerateOptions,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, Error> {
        let mut options = options.clone();
        let generation_config = self.checkpoint.json_file("generation_config.json")?;
        options.eos.extend(eos_tokens(self.decoder.spec(), generation_config.as_ref())?);
        Ok(generate(&self.decoder, self.tokenizer()?, ids, &options, on_text)?)
    }

    /// The template that makes a conversation into a prompt.
    pub fn chat_template(&self) -> Result<ChatTemplate, Error> {
        let file = self.checkpoint.text_file("chat_template.jinja")?;
        let config = self.checkpoint.json_file("tokenizer_config.json")?.unwrap_or_default();
        if file.is_none() && config.get("chat_template").is_none_or(Value::is_null) {
            // Processors keep it in a file of its own.
            let mut other = self.checkpoint.json_file("chat_template.json")?.unwrap_or_default();
            if let Some(Value::String(source)) = other.get_mut("chat_template").map(Value::take) {
                return Ok(ChatTemplate::of_checkpoint(Some(&source), &config)?);
            }
        }
        Ok(ChatTemplate::of_checkpoint(file.as_deref(), &config)?)
    }
}

/// The tokenizer of a checkpoint.
pub(crate) fn read_tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer, Error> {
    let json = match checkpoint.gguf_metadata() {
        None => return Ok(Tokenizer::from_file(&checkpoint.path().join("tokenizer.json"))?),
        Some(_) => checkpoint.tokenizer()?,
    };
    // A file without vocabulary gives `null`, which the tokenizer refuses.
    let text = json.unwrap_or_default().to_string();
    Ok(Tokenizer::from_bytes(text.as_bytes())?)
}
