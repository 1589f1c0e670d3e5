//! Chat templates: a conversation to the text that a model was trained on.
//!
//! Templates are programs in the Jinja language that come with a checkpoint, and nobody vouches for them. They run
//! without access to files, and on a budget ([`FUEL`]) that bounds their time and their memory.

use std::collections::BTreeMap;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value as Jinja};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Largest template; the largest known ones have some 30 kB.
const MAX_TEMPLATE: usize = 1 << 20;

/// Largest text that a template may make.
const MAX_OUTPUT: usize = 16 << 20;

/// Budget of a rendering: about one unit per instruction and per 64 bytes made, so 64 MB and about a second at most.
const FUEL: u64 = 1_000_000;

/// Who said what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A template that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The checkpoint has none.
    #[error(
        "this checkpoint has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); give one with --template, or use generate"
    )]
    Missing,
    /// It is larger than any template.
    #[error("chat template of {found} bytes; {MAX_TEMPLATE} are possible")]
    TooLarge {
        /// Its size.
        found: usize,
    },
    /// A field that should hold a template or a token.
    #[error("{field} is neither a text nor what it may be instead: {expected}")]
    Field {
        /// The field of `tokenizer_config.json`.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
    },
    /// It is no Jinja, uses what does not exist here, or raises an error of its own.
    #[error("chat template: {reason}")]
    Failed {
        /// What the engine, or the template itself, says.
        reason: String,
    },
    /// It ran for too long or made too much text.
    #[error("chat template: it does not end within its budget of time and memory")]
    Budget,
}

/// A compiled template with the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: BTreeMap<&'static str, String>,
}

impl ChatTemplate {
    /// Compiles a template. `tokenizer_config`, if it is an object, gives the special tokens.
    ///
    /// ```
    /// use quant_model::{ChatTemplate, Message};
    ///
    /// let source = "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}\n{% endfor %}";
    /// let template = ChatTemplate::new(source, &serde_json::json!({}))?;
    /// assert_eq!(template.render(&[Message::new("user", " hello ")], true)?, "<user>hello\n");
    /// # Ok::<(), quant_model::TemplateError>(())
    /// ```
    pub fn new(source: &str, tokenizer_config: &Value) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE {
            return Err(TemplateError::TooLarge { found: source.len() });
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        // The text is for a model: nothing is escaped.
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned("chat", source.to_owned()).map_err(failed)?;
        let mut tokens = BTreeMap::new();
        for field in ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"] {
            if let Some(token) = token(tokenizer_config, field)? {
                tokens.insert(field, token.to_owned());
            }
        }
        Ok(Self { environment, tokens })
    }

    /// The template of a checkpoint: the text of its `chat_template.jinja`, else the field of
    /// `tokenizer_config.json`, which is a text or a list of named ones, of which the first called `default` counts.
    pub fn of_checkpoint(file: Option<&str>, tokenizer_config: &Value) -> Result<Self, TemplateError> {
        if let Some(source) = file {
            return Self::new(source, tokenizer_config);
        }
        let field = "chat_template";
        let wrong = TemplateError::Field { field, expected: "a list of objects with name and template" };
        let source = match tokenizer_config.get(field) {
            None | Some(Value::Null) => return Err(TemplateError::Missing),
            Some(Value::String(source)) => source,
            Some(Value::Array(named)) => {
                let default = named.iter().find(|entry| entry["name"] == "default").or(named.first());
                default.and_then(|entry| entry["template"].as_str()).ok_or(wrong)?
            }
            Some(_) => return Err(wrong),
        };
        Self::new(source, tokenizer_config)
    }

    /// The text of a conversation; with `add_generation_prompt` it ends where the model is to answer.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let mut context: BTreeMap<&str, Jinja> =
            self.tokens.iter().map(|(name, token)| (*name, Jinja::from(token.as_str()))).collect();
        let each = messages.iter().map(|m| {
            Jinja::from_pairs([("role", Jinja::from(&m.role)), ("content", Jinja::from(&m.content))])
        });
        context.insert("messages", Jinja::from(&each.collect::<Vec<_>>()[..]));
        context.insert("add_generation_prompt", add_generation_prompt.into());
        let mut output = Capped(Vec::new());
        let template = self.environment.get_template("chat").map_err(failed)?;
        template.render_captured_to(context, &mut output).map_err(failed)?;
        String::from_utf8(output.0).map_err(|_| TemplateError::Failed { reason: "no UTF-8".to_owned() })
    }
}

/// A special token of `tokenizer_config.json`: a text, or an object with `content`.
fn token<'a>(config: &'a Value, field: &'static str) -> Result<Option<&'a str>, TemplateError> {
    match config.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(token)) => Ok(Some(token)),
        Some(other) => match other.get("content").and_then(Value::as_str) {
            Some(token) => Ok(Some(token)),
            None => Err(TemplateError::Field { field, expected: "an object with content" }),
        },
    }
}

fn raise_exception(message: String) -> Result<String, JinjaError> {
    Err(JinjaError::new(ErrorKind::InvalidOperation, message))
}

/// JSON as Python writes it, which models have seen: a space after commas and colons, nothing escaped for HTML.
fn to_json(value: Jinja, options: minijinja::value::Kwargs) -> Result<String, JinjaError> {
    let fail = |e: serde_json::Error| JinjaError::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    let mut text = Capped(Vec::new());
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let pretty = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut text, pretty)).map_err(fail)?;
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut text, Spaced)).map_err(fail)?,
    }
    Ok(String::from_utf8_lossy(&text.0).into_owned())
}

/// Python's separators.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// Text up to [`MAX_OUTPUT`] bytes.
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn failed(error: JinjaError) -> TemplateError {
    const MAX: usize = 300;
    match error.kind() {
        ErrorKind::OutOfFuel | ErrorKind::WriteFailure => TemplateError::Budget,
        _ => {
            let text: String = error.to_string().chars().take(MAX).collect();
            let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
            TemplateError::Failed { reason: clean.collect() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The form of ChatML, with Python's methods and operators.
    const CHATML: &str = "{%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'].strip() + '<|im_end|>\\n' }}
    {%- endif %}
    {%- for m in messages if m.role != 'system' %}
        {{- '<|im_start|>' ~ m.role.upper() ~ '\\n' ~ m.content ~ eos_token ~ '\\n' }}
    {%- endfor %}
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

    #[test]
    fn conversations_become_text() {
        let config = json!({ "chat_template": CHATML, "eos_token": { "content": "<|im_end|>" } });
        let template = ChatTemplate::of_checkpoint(None, &config).unwrap();
        let talk = [Message::new("system", " be brief "), Message::new("user", "a <b> \"c\"")];
        let expected = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>USER\na <b> \"c\"<|im_end|>\n";
        assert_eq!(template.render(&talk, false).unwrap(), expected);
        assert_eq!(template.render(&talk, true).unwrap(), format!("{expected}<|im_start|>assistant\n"));

        let named = json!({ "chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}] });
        assert_eq!(ChatTemplate::of_checkpoint(None, &named).unwrap().render(&[], true).unwrap(), "yes");
        let file = ChatTemplate::of_checkpoint(Some("file"), &named).unwrap();
        assert_eq!(file.render(&[], true).unwrap(), "file");
    }

    #[test]
    fn json_is_pythons() {
        let template = |source: &str| ChatTemplate::new(source, &Value::Null).unwrap();
        let value = "{{ {'a': [1, 'x<é>'], 'b': none} | tojson }}";
        assert_eq!(template(value).render(&[], false).unwrap(), r#"{"a": [1, "x<é>"], "b": null}"#);
        let value = "{{ [1] | tojson(indent=2) }}";
        assert_eq!(template(value).render(&[], false).unwrap(), "[\n  1\n]");
    }

    #[test]
    fn hostile_templates_end() {
        let result = |source: &str| {
            let template = ChatTemplate::new(source, &Value::Null)?;
            template.render(&[Message::new("user", "hi")], true)
        };
        for source in [
            "{% for i in range(1000000000) %}x{% endfor %}",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
            "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ ('x' * 9999999).replace('x', 'y' * 9999999) }}",
            "{{ '%999999999d' | format(1) }}",
        ] {
            assert!(result(source).is_err(), "{source}");
        }
        let long = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert_eq!(result(long), Err(TemplateError::Budget));
        for (source, word) in [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% include '/etc/passwd' %}", "include"),
            ("{% for m in messages %}", "template"),
            (&format!("{{{{ {}1{} }}}}", "(".repeat(20000), ")".repeat(20000)), "template"),
        ] {
            let error = result(source).unwrap_err().to_string();
            assert!(error.contains(word) && error.len() < 400, "{error}");
        }
        assert_eq!(ChatTemplate::of_checkpoint(None, &json!({})).err(), Some(TemplateError::Missing));
        let large = "x".repeat(MAX_TEMPLATE + 1);
        assert!(matches!(result(&large), Err(TemplateError::TooLarge { .. })));
        assert!(ChatTemplate::of_checkpoint(None, &json!({ "chat_template": 1 })).is_err());
        assert!(ChatTemplate::new("", &json!({ "bos_token": 1 })).is_err());
    }
}
