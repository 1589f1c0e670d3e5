//! What a `tokenizer.json` must fulfil before the `tokenizers` crate sees it.
//!
//! That crate trusts its files: some inconsistencies make it panic, loop, or take memory without bound.

use std::collections::HashSet;

use serde_json::Value;

use super::{TokenizerError, charsmap, clean};

/// Components (normalizers and the like) that may lie inside each other.
const MAX_DEPTH: usize = 8;
/// Components in all.
const MAX_COMPONENTS: usize = 256;
/// Factor by which normalizers may lengthen a text.
const MAX_GROWTH: f64 = 64.0;
/// Ids are below this, so that adding tokens cannot overflow.
const MAX_ID: u64 = 1 << 31;

const NORMALIZERS: [&str; 14] = [
    "BertNormalizer",
    "Strip",
    "StripAccents",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Sequence",
    "Lowercase",
    "Nmt",
    "Precompiled",
    "Replace",
    "Prepend",
    "ByteLevel",
];
const PRE_TOKENIZERS: [&str; 12] = [
    "BertPreTokenizer",
    "ByteLevel",
    "Delimiter",
    "Metaspace",
    "Whitespace",
    "Sequence",
    "Split",
    "Punctuation",
    "WhitespaceSplit",
    "Digits",
    "UnicodeScripts",
    "FixedLength",
];
const POST_PROCESSORS: [&str; 5] =
    ["RobertaProcessing", "BertProcessing", "ByteLevel", "TemplateProcessing", "Sequence"];
const DECODERS: [&str; 10] = [
    "BPEDecoder",
    "ByteLevel",
    "WordPiece",
    "Metaspace",
    "CTC",
    "Sequence",
    "Replace",
    "Fuse",
    "Strip",
    "ByteFallback",
];

/// Checks the whole file.
pub(super) fn check(file: &Value) -> Result<(), TokenizerError> {
    let at = |part| move |reason| TokenizerError::Invalid { part, reason };
    if !file.is_object() {
        return Err(at("top level")("expected an object".to_owned()));
    }
    model(&file["model"]).map_err(at("model"))?;
    added_tokens(&file["added_tokens"]).map_err(at("added_tokens"))?;
    let mut growth = 1.0;
    let mut normalizer = |kind: &str, value: &Value| normalizer(kind, value, &mut growth);
    Components { list: "normalizers", known: &NORMALIZERS, visit: &mut normalizer, count: 0 }
        .check(&file["normalizer"], 0)
        .map_err(at("normalizer"))?;
    if growth > MAX_GROWTH {
        return Err(at("normalizer")(format!("the replacements may lengthen a text {growth} times")));
    }
    Components { list: "pretokenizers", known: &PRE_TOKENIZERS, visit: &mut pre_tokenizer, count: 0 }
        .check(&file["pre_tokenizer"], 0)
        .map_err(at("pre_tokenizer"))?;
    Components { list: "processors", known: &POST_PROCESSORS, visit: &mut post_processor, count: 0 }
        .check(&file["post_processor"], 0)
        .map_err(at("post_processor"))?;
    Components { list: "decoders", known: &DECODERS, visit: &mut decoder, count: 0 }
        .check(&file["decoder"], 0)
        .map_err(at("decoder"))
}

/// A walk over a component and those inside it.
struct Components<'a> {
    /// The field of a `Sequence` that holds its parts.
    list: &'a str,
    known: &'a [&'a str],
    visit: &'a mut dyn FnMut(&str, &Value) -> Result<(), String>,
    count: usize,
}

impl Components<'_> {
    fn check(&mut self, value: &Value, depth: usize) -> Result<(), String> {
        if value.is_null() {
            return Ok(());
        }
        self.count += 1;
        if depth > MAX_DEPTH || self.count > MAX_COMPONENTS {
            return Err(format!("more than {MAX_COMPONENTS} parts, or nested deeper than {MAX_DEPTH}"));
        }
        let kind = value["type"].as_str().unwrap_or("");
        if !self.known.contains(&kind) {
            return Err(format!("type {} is not one of {}", show(&value["type"]), self.known.join(", ")));
        }
        if kind != "Sequence" {
            return (self.visit)(kind, value);
        }
        let parts =
            value[self.list].as_array().ok_or_else(|| format!("a Sequence has no list {}", self.list))?;
        parts.iter().try_for_each(|part| self.check(part, depth + 1))
    }
}

fn normalizer(kind: &str, value: &Value, growth: &mut f64) -> Result<(), String> {
    let chars = |value: &Value| value.as_str().map_or(0, |text| text.chars().count()) as f64;
    match kind {
        "Precompiled" => charsmap::check(value["precompiled_charsmap"].as_str().unwrap_or(""))?,
        "Replace" => {
            let content = chars(&value["content"]);
            // A regular expression may match nothing at all, between any two characters.
            *growth *= match &value["pattern"]["String"] {
                Value::String(text) if !text.is_empty() => (content / text.chars().count() as f64).max(1.0),
                _ => content + 1.0,
            };
        }
        "Prepend" => *growth *= (chars(&value["prepend"]) / 16.0).max(1.0),
        _ => {}
    }
    Ok(())
}

fn pre_tokenizer(kind: &str, value: &Value) -> Result<(), String> {
    match value.get("length") {
        Some(length) if kind == "FixedLength" && length.as_u64().is_none_or(|n| n == 0) => {
            Err(format!("FixedLength has length {}, expected a positive number", show(length)))
        }
        _ => Ok(()),
    }
}

fn decoder(kind: &str, value: &Value) -> Result<(), String> {
    // The crate counts past the start of tokens that are shorter than `stop`.
    if kind == "Strip" && value["stop"].as_u64() != Some(0) {
        return Err(format!("Strip with stop {} is not supported, only 0 is", show(&value["stop"])));
    }
    Ok(())
}

fn post_processor(kind: &str, value: &Value) -> Result<(), String> {
    if kind != "TemplateProcessing" {
        return Ok(());
    }
    let special = value["special_tokens"].as_object().ok_or("a template has no special_tokens")?;
    for (name, token) in special {
        let len = |field: &str| token[field].as_array().map(Vec::len);
        if len("ids").is_none() || len("ids") != len("tokens") {
            return Err(format!("special token {} has unequal lists of ids and tokens", quote(name)));
        }
    }
    for (field, sequences) in [("single", &["A"][..]), ("pair", &["A", "B"][..])] {
        let pieces = value[field].as_array().ok_or_else(|| format!("a template has no list {field}"))?;
        for piece in pieces {
            let id = |kind: &str| piece[kind]["id"].as_str();
            match (id("SpecialToken"), id("Sequence")) {
                (Some(name), _) if !special.contains_key(name) => {
                    return Err(format!(
                        "the template names the special token {}, which is not defined",
                        quote(name)
                    ));
                }
                (None, Some(sequence)) if !sequences.contains(&sequence) => {
                    return Err(format!("the template {field} names the sequence {}", quote(sequence)));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn added_tokens(list: &Value) -> Result<(), String> {
    let tokens = match list {
        Value::Null => return Ok(()),
        Value::Array(tokens) => tokens,
        _ => return Err("expected a list".to_owned()),
    };
    match tokens.iter().find(|token| token["id"].as_u64().is_none_or(|id| id >= MAX_ID)) {
        Some(token) => Err(format!("id {} is not a number below {MAX_ID}", show(&token["id"]))),
        None => Ok(()),
    }
}

fn model(model: &Value) -> Result<(), String> {
    if !model.is_object() {
        return Err("expected an object with type and vocab".to_owned());
    }
    match model["type"].as_str() {
        Some("Unigram") => return unigram(model),
        Some("BPE" | "WordPiece" | "WordLevel") => {}
        // Files from before the field existed.
        None if model["type"].is_null() && model["merges"].is_array() => {}
        _ => {
            let found = show(&model["type"]);
            return Err(format!("type {found} is not one of BPE, WordPiece, WordLevel, Unigram"));
        }
    }
    let vocab = model["vocab"].as_object().ok_or("vocab is no object of tokens")?;
    if vocab.is_empty() {
        return Err("vocab is empty".to_owned());
    }
    let mut seen = HashSet::with_capacity(vocab.len());
    for (token, id) in vocab {
        match id.as_u64() {
            Some(n) if n >= MAX_ID => {
                return Err(format!("token {} of vocab has id {n}, expected below {MAX_ID}", quote(token)));
            }
            Some(n) if !seen.insert(n) => {
                return Err(format!("id {n} of vocab is a duplicate, token {} has it too", quote(token)));
            }
            Some(_) => {}
            None => return Err(format!("token {} of vocab has id {}", quote(token), show(id))),
        }
    }
    if model["merges"].is_null() {
        return Ok(());
    }
    let merges = model["merges"].as_array().ok_or("merges is no list")?;
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    for (line, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Value::String(text) if text.starts_with("#version") => continue,
            Value::String(text) => text.split_once(' ').filter(|(_, b)| !b.contains(' ')),
            Value::Array(pair) if pair.len() == 2 => pair[0].as_str().zip(pair[1].as_str()),
            _ => None,
        };
        let (a, b) = pair.ok_or_else(|| format!("merge {line} is not a pair: {}", show(merge)))?;
        if let Some(part) = [a, b].into_iter().find(|part| !vocab.contains_key(*part)) {
            return Err(format!("merge {line} joins {}, which is not in vocab", quote(part)));
        }
        let tail = b.strip_prefix(prefix).ok_or_else(|| {
            format!(
                "merge {line}: {} does not begin with the continuing_subword_prefix {}",
                quote(b),
                quote(prefix)
            )
        })?;
        let whole = format!("{a}{tail}");
        if !vocab.contains_key(&whole) {
            return Err(format!("merge {line} makes {}, which is not in vocab", quote(&whole)));
        }
    }
    Ok(())
}

fn unigram(model: &Value) -> Result<(), String> {
    let vocab = model["vocab"].as_array().filter(|list| !list.is_empty());
    let vocab = vocab.ok_or("the vocab of a Unigram model is no list, or empty")?;
    match model["unk_id"].as_u64() {
        Some(id) if id < vocab.len() as u64 => {}
        _ => return Err(format!("unk_id {} is not an index of the Unigram vocab", show(&model["unk_id"]))),
    }
    let fine = |entry: &Value| entry[0].is_string() && entry[1].is_number();
    match vocab.iter().position(|entry| !fine(entry)) {
        Some(i) => Err(format!("entry {i} of the Unigram vocab is not a token and a score")),
        None => Ok(()),
    }
}

fn show(value: &Value) -> String {
    match value {
        Value::Null => "missing".to_owned(),
        Value::String(text) => quote(text),
        Value::Array(_) | Value::Object(_) => "a list or object".to_owned(),
        other => other.to_string(),
    }
}

fn quote(text: &str) -> String {
    let short: String = text.chars().take(40).collect();
    format!("\"{}\"", clean(&short))
}
