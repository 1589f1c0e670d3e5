//! `quant chat`.

use std::io::{self, BufRead, IsTerminal};
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Args;
use quant::{ChatTemplate, Generated, Message, Model};
use serde::Serialize;

use super::generate::finish_name;
use super::model_path;
use super::sampling::SamplingOptions;
use crate::failure::Failure;
use crate::output::{Output, escape, print, say};

/// Longest line that is read as a message.
const MAX_LINE: usize = 1 << 20;

/// Talk with a model through its own chat template
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant chat models/qwen3-4bit --system \"You are brief.\"\n  \
    quant chat models/qwen3-4bit --once \"Why is the sky blue?\" --max-new-tokens 200\n\n\
In a conversation, /reset forgets what was said and /quit ends.")]
pub(crate) struct Chat {
    /// Model directory, float or quantized, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
    /// Answer this message and end
    #[arg(long, value_name = "TEXT")]
    once: Option<String>,
    /// Instructions before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Chat template (Jinja) instead of the model's own
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingOptions,
}

/// The JSON result of `--once`.
#[derive(Serialize)]
struct Report {
    message: String,
    /// What the template made of it.
    prompt: String,
    text: String,
    finish: &'static str,
    prompt_tokens: usize,
    generated_tokens: usize,
}

impl Chat {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        if output.json && self.once.is_none() {
            return Err(Failure::Usage("--json needs --once: a conversation is no single result".to_owned()));
        }
        let mut model = Model::open(&model_path(&self.model)?)?;
        model.set_compute(self.sampling.compute.into());
        let template = match &self.template {
            None => model.chat_template()?,
            Some(file) => {
                let source = std::fs::read_to_string(file).map_err(|e| quant::Error::io(file, e))?;
                let config =
                    model.checkpoint().json_file("tokenizer_config.json").map_err(quant::Error::from)?;
                ChatTemplate::new(&source, &config.unwrap_or_default()).map_err(quant::Error::from)?
            }
        };
        let mut history: Vec<Message> =
            self.system.iter().map(|text| Message::new("system", text.as_str())).collect();
        match &self.once {
            Some(text) => {
                history.push(Message::new("user", text.as_str()));
                self.once(&model, &template, &history, text, output)
            }
            None => self.converse(&model, &template, history),
        }
    }

    fn once(
        &self,
        model: &Model,
        template: &ChatTemplate,
        history: &[Message],
        text: &str,
        output: Output,
    ) -> Result<(), Failure> {
        let (prompt, ids, answer) = self.answer(model, template, history, !output.json)?;
        let report = Report {
            message: text.to_owned(),
            prompt,
            finish: finish_name(answer.finish),
            prompt_tokens: ids,
            generated_tokens: answer.ids.len(),
            text: answer.text,
        };
        if output.json { output.result(&report, String::new) } else { print("\n") }
    }

    /// Reads messages from standard input until it ends.
    fn converse(
        &self,
        model: &Model,
        template: &ChatTemplate,
        mut history: Vec<Message>,
    ) -> Result<(), Failure> {
        let start = history.len();
        let asks = io::stdin().is_terminal();
        loop {
            if asks {
                print("> ")?;
            }
            let Some(line) = read_line()? else { return Ok(()) };
            match line.trim() {
                "" => continue,
                "/quit" | "/exit" => return Ok(()),
                "/reset" => {
                    history.truncate(start);
                    continue;
                }
                text => history.push(Message::new("user", text)),
            }
            match self.answer(model, template, &history, true) {
                Ok((_, _, answer)) => history.push(Message::new("assistant", answer.text)),
                Err(Failure::Quant(error)) => {
                    // The conversation can go on without this message.
                    history.pop();
                    say(&escape(&format!("error: {error}")));
                }
                Err(failure) => return Err(failure),
            }
            print("\n")?;
        }
    }

    /// The model's answer to a conversation, with the prompt and its number of tokens.
    fn answer(
        &self,
        model: &Model,
        template: &ChatTemplate,
        history: &[Message],
        show: bool,
    ) -> Result<(String, usize, Generated), Failure> {
        let prompt = template.render(history, true).map_err(quant::Error::from)?;
        // The template writes special tokens itself.
        let ids = model.tokenizer()?.encode(&prompt, false).map_err(quant::Error::from)?;
        let mut written = Ok(());
        let answer = model.continue_ids(&ids, &self.sampling.options(), |piece| {
            if show {
                written = print(&escape(piece));
            }
            if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        written?;
        Ok((prompt, ids.len(), answer))
    }
}

/// A line of standard input, `None` at its end.
fn read_line() -> Result<Option<String>, Failure> {
    let mut bytes = Vec::new();
    let mut input = io::Read::take(io::stdin().lock(), MAX_LINE as u64 + 1);
    let read = input.read_until(b'\n', &mut bytes);
    read.map_err(|e| Failure::Found(format!("standard input: {e}")))?;
    if bytes.len() > MAX_LINE {
        return Err(Failure::Found(format!("standard input: a line of more than {MAX_LINE} bytes")));
    }
    Ok((!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned()))
}
