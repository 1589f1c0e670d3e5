//! Continuing a text.

use std::ops::ControlFlow;
use std::time::Instant;

use serde_json::Value;

use crate::arch::{ArchSpec, Fields, PositionSpec};
use crate::decoder::Decoder;
use crate::error::{ConfigError, ModelError};
use crate::sample::{Sampler, Sampling};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// How a text is continued.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// New tokens at most.
    pub max_new_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// Tokens that end the text; see [`eos_tokens`].
    pub eos: Vec<u32>,
    /// Texts that end it; they are not part of the result.
    pub stop: Vec<String>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 50, sampling: Sampling::default(), eos: Vec::new(), stop: Vec::new() }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The number of tokens asked for is reached.
    Length,
    /// The model ended the text.
    Eos,
    /// A stop text appeared.
    Stop,
    /// The model has no more positions.
    Context,
    /// The caller had enough.
    Caller,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// New tokens, without the one that ended the text.
    pub ids: Vec<u32>,
    /// Their text, without a stop text.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Time for the prompt and the first token.
    pub prompt_seconds: f64,
    /// Time for all other tokens.
    pub decode_seconds: f64,
}

/// A generation that failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Tokens that end a text: those of `generation_config.json` if it names some, else those of `config.json`.
pub fn eos_tokens(spec: &ArchSpec, generation_config: Option<&Value>) -> Result<Vec<u32>, ConfigError> {
    let listed = match generation_config {
        Some(config) => Fields::root(config)?.token_ids("eos_token_id", spec.vocab_size)?,
        None => Vec::new(),
    };
    Ok(if listed.is_empty() { spec.eos.clone() } else { listed })
}

/// Continues `prompt`. `on_text` sees the text as it grows, in pieces of whole characters, and may end it.
pub fn generate(
    model: &Decoder,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_text: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, GenerateError> {
    let mut stream = Some(tokenizer.stream(true));
    let mut output = Output { text: String::new(), shown: 0, stop: &options.stop };
    let mut failure = None;
    let mut stopped = None;
    let mut result = generate_ids(model, prompt, options, |id| {
        let piece = match stream.as_mut().expect("taken at the end").push(id) {
            Ok(piece) => piece,
            Err(error) => {
                failure = Some(error);
                return ControlFlow::Break(());
            }
        };
        let (show, found) = output.add(&piece);
        let caller = if show.is_empty() { ControlFlow::Continue(()) } else { on_text(show) };
        stopped = found.then_some(Finish::Stop);
        if found { ControlFlow::Break(()) } else { caller }
    })?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    match stopped {
        Some(finish) => result.finish = finish,
        None => {
            let rest = stream.take().map_or(Ok(String::new()), |stream| stream.finish())?;
            let rest = output.finish(&rest);
            if !rest.is_empty() && on_text(rest).is_break() {
                result.finish = Finish::Caller;
            }
        }
    }
    result.text = output.text;
    Ok(result)
}

/// Continues `prompt` without a tokenizer; stop texts have no effect and the result has no text. `on_token` sees each
/// new token and may end the text.
pub fn generate_ids(
    model: &Decoder,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, ModelError> {
    let mut sampler = Sampler::new(options.sampling)?;
    if prompt.is_empty() {
        let (found, allowed) = ("0 tokens".to_owned(), "at least one token, such as the beginning of text");
        return Err(ModelError::Option { option: "prompt", found, allowed });
    }
    let spec = model.spec();
    let limit = if spec.positions == PositionSpec::Learned { spec.max_positions } else { usize::MAX };
    let mut cache = model.new_cache();
    let mut text = prompt.to_vec();
    let mut finish = Finish::Length;
    let start = Instant::now();
    let mut prompt_seconds = None;
    while text.len() - prompt.len() < options.max_new_tokens {
        if text.len() > limit && text.len() > prompt.len() {
            finish = Finish::Context;
            break;
        }
        let mut logits = model.next_logits(&text[cache.len()..], &mut cache)?;
        let id = sampler.sample(logits.as_slice_mut().expect("one row"), &text)?;
        prompt_seconds.get_or_insert_with(|| start.elapsed().as_secs_f64());
        if options.eos.contains(&id) {
            finish = Finish::Eos;
            break;
        }
        text.push(id);
        if on_token(id).is_break() {
            finish = Finish::Caller;
            break;
        }
    }
    let total = start.elapsed().as_secs_f64();
    let prompt_seconds = prompt_seconds.unwrap_or(total);
    let ids = text.split_off(prompt.len());
    let decode_seconds = total - prompt_seconds;
    Ok(Generated { ids, text: String::new(), finish, prompt_seconds, decode_seconds })
}

/// The text so far, of which the end is held back while it may become a stop text.
struct Output<'a> {
    text: String,
    shown: usize,
    stop: &'a [String],
}

impl Output<'_> {
    /// Adds a piece. Returns what can be shown, and whether a stop text has appeared; the text then ends before it.
    fn add(&mut self, piece: &str) -> (&str, bool) {
        self.text.push_str(piece);
        let open = &self.text[self.shown..];
        let stops = || self.stop.iter().filter(|stop| !stop.is_empty());
        let found = stops().filter_map(|stop| open.find(stop.as_str())).min();
        let end = match found {
            Some(at) => {
                self.text.truncate(self.shown + at);
                self.text.len()
            }
            None => {
                let held = |stop: &String| {
                    let starts = open.char_indices().map(|(at, _)| at);
                    starts.filter(|&at| stop.starts_with(&open[at..])).map(|at| open.len() - at).max()
                };
                self.text.len() - stops().filter_map(held).max().unwrap_or(0)
            }
        };
        let start = std::mem::replace(&mut self.shown, end);
        (&self.text[start..end], found.is_some())
    }

    /// Adds the last piece and returns all that was not shown yet, up to a stop text.
    fn finish(&mut self, piece: &str) -> &str {
        let start = self.shown;
        self.add(piece);
        self.shown = self.text.len();
        &self.text[start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_texts_are_never_shown() {
        let stop = ["END".to_owned(), "\n\n".to_owned()];
        let mut output = Output { text: String::new(), shown: 0, stop: &stop };
        assert_eq!(output.add("one E"), ("one ", false));
        assert_eq!(output.add("N"), ("", false));
        assert_eq!(output.add("é\n"), ("ENé", false));
        assert_eq!(output.add("two EN"), ("\ntwo ", false));
        assert_eq!(output.add("D three"), ("", true));
        assert_eq!(output.text, "one ENé\ntwo ");

        let mut output = Output { text: String::new(), shown: 0, stop: &stop };
        assert_eq!(output.add("a EN"), ("a ", false));
        assert_eq!(output.finish("d"), "ENd");
        assert_eq!(output.text, "a ENd");
    }
}
