//! Tokenizers: `tokenizer.json` from the keys of a GGUF file, and the keys from a `tokenizer.json`.
//!
//! GGUF holds three kinds that can be said in both: `gpt2` (BPE over bytes, cut by regular expressions that have a
//! name), `llama` (SentencePiece BPE, whose merges follow from scores) and `bert` (WordPiece, with the beginnings of
//! words marked instead of their continuations).

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use super::metadata::{MetaArray, MetaValue, Metadata};
use super::pretokenizers;
use crate::error::FormatError;

/// The mark of a space in SentencePiece, and of the beginning of a word in WordPiece keys.
const SPACE: &str = "\u{2581}";
/// Longest token that merges are looked for in.
const MAX_TOKEN: usize = 512;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

fn wrong(key: &str, found: impl ToString, expected: impl Into<String>) -> FormatError {
    FormatError::Key { key: key.to_owned(), found: found.to_string(), expected: expected.into() }
}

/// The vocabulary of a file, its lists checked against each other.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Option<&'a [i32]>,
    scores: Option<&'a [f32]>,
}

impl<'a> Vocabulary<'a> {
    fn of(metadata: &'a Metadata) -> Result<Option<Self>, FormatError> {
        let Some(tokens) = metadata.texts(TOKENS)? else { return Ok(None) };
        let (types, scores) = (metadata.integers(TYPES)?, metadata.floats(SCORES)?);
        for (key, len) in [(TYPES, types.map(<[i32]>::len)), (SCORES, scores.map(<[f32]>::len))] {
            if let Some(len) = len.filter(|&len| len != tokens.len()) {
                let found = format!("a list of {len}");
                return Err(wrong(key, found, format!("one entry for each of {} tokens", tokens.len())));
            }
        }
        for name in ["bos", "eos", "eot", "cls", "unknown", "seperator", "padding", "mask"] {
            let key = format!("tokenizer.ggml.{name}_token_id");
            if let Some(id) = metadata.number(&key)?.filter(|&id| id >= tokens.len() as u64) {
                return Err(wrong(&key, id, format!("a token id below {}", tokens.len())));
            }
        }
        Ok(Some(Self { tokens, types, scores }))
    }

    fn ty(&self, id: usize) -> i32 {
        self.types.map_or(NORMAL, |types| types[id])
    }

    /// Ids by token. Of equal tokens the first counts, as in llama.cpp the last would; the `tokenizers` crate
    /// needs one.
    fn by_token(&self) -> HashMap<&'a str, usize> {
        let mut map = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            map.entry(token.as_str()).or_insert(id);
        }
        map
    }

    /// The vocabulary as `tokenizer.json` has it.
    fn json(&self, shown: impl Fn(usize, &str) -> String) -> Value {
        let mut vocab = Map::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            vocab.entry(shown(id, token)).or_insert_with(|| id.into());
        }
        vocab.into()
    }

    /// Tokens that are found in a text before it is cut.
    fn added(&self, ids: impl Fn(i32) -> bool, shown: impl Fn(usize, &str) -> String) -> Value {
        let added = self.tokens.iter().enumerate().filter(|&(id, _)| ids(self.ty(id))).map(|(id, token)| {
            json!({
                "id": id, "content": shown(id, token), "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": self.ty(id) != USER_DEFINED,
            })
        });
        Value::Array(added.collect())
    }
}

/// `tokenizer.json` of a file. `None` if it has no vocabulary.
pub(crate) fn to_json(metadata: &Metadata) -> Result<Option<Value>, FormatError> {
    let Some(vocab) = Vocabulary::of(metadata)? else { return Ok(None) };
    let model = metadata.text("tokenizer.ggml.model")?.unwrap_or_default();
    match model {
        "gpt2" => byte_bpe(metadata, &vocab),
        "llama" => sentencepiece(metadata, &vocab),
        "bert" => wordpiece(metadata, &vocab),
        "" | "none" | "no_vocab" => return Ok(None),
        other => Err(wrong("tokenizer.ggml.model", other, "gpt2, llama or bert")),
    }
    .map(Some)
}

/// `tokenizer_config.json` of a file: the template of conversations and the tokens it names.
pub(crate) fn to_config(metadata: &Metadata) -> Result<Option<Value>, FormatError> {
    let Some(vocab) = Vocabulary::of(metadata)? else { return Ok(None) };
    let mut config = Map::new();
    if let Some(template) = metadata.text("tokenizer.chat_template")? {
        config.insert("chat_template".into(), template.into());
    }
    for (field, key) in [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")] {
        if let Some(id) = metadata.number(&format!("tokenizer.ggml.{key}_token_id"))? {
            config.insert(field.into(), vocab.tokens[id as usize].as_str().into());
        }
    }
    Ok(Some(config.into()))
}

fn byte_bpe(metadata: &Metadata, vocab: &Vocabulary<'_>) -> Result<Value, FormatError> {
    let pre = metadata.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let Some(cut) = pretokenizers::by_name(pre) else {
        let known = pretokenizers::names().collect::<Vec<_>>().join(", ");
        return Err(wrong("tokenizer.ggml.pre", crate::display_name(pre), format!("one of {known}")));
    };
    let merges = metadata.texts(MERGES)?.ok_or_else(|| wrong(MERGES, "absent", "a list of merges"))?;
    let plain = |_: usize, token: &str| token.to_owned();
    let pairs: Vec<Value> = merges.iter().map(|merge| merge.as_str().into()).collect();
    Ok(json!({
        "version": "1.0",
        "added_tokens": vocab.added(|ty| ty == CONTROL || ty == USER_DEFINED, plain),
        "normalizer": cut.normalizer(),
        "pre_tokenizer": cut.json(),
        "post_processor": template(metadata, vocab, cut.adds_bos())?,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": cut.ignores_merges(), "vocab": vocab.json(plain), "merges": pairs,
        },
    }))
}

/// SentencePiece joins the neighbours whose union has the best score: a merge for each way to cut a token in two.
fn sentencepiece(metadata: &Metadata, vocab: &Vocabulary<'_>) -> Result<Value, FormatError> {
    let scores = vocab.scores.ok_or_else(|| wrong(SCORES, "absent", "a score for each token"))?;
    let ids = vocab.by_token();
    let mut merges: Vec<(usize, &str, &str)> = Vec::new();
    for (id, token) in vocab.tokens.iter().enumerate() {
        let whole = matches!(vocab.ty(id), NORMAL | USER_DEFINED) && token.len() <= MAX_TOKEN;
        for (cut, _) in token.char_indices().skip(1).filter(|_| whole) {
            let (a, b) = token.split_at(cut);
            if ids.contains_key(a) && ids.contains_key(b) {
                merges.push((id, a, b));
            }
        }
    }
    merges.sort_by(|x, y| {
        let (a, b) = (scores[x.0], scores[y.0]);
        b.total_cmp(&a).then_with(|| (x.0, ids[x.1], ids[x.2]).cmp(&(y.0, ids[y.1], ids[y.2])))
    });
    let merges: Vec<Value> = merges.into_iter().map(|(_, a, b)| json!([a, b])).collect();
    let plain = |_: usize, token: &str| token.to_owned();
    let unknown = (0..vocab.tokens.len()).find(|&id| vocab.ty(id) == UNKNOWN).map(|id| &vocab.tokens[id]);
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    let normalizer = match prefix {
        true => {
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
            json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": SPACE }, replace] })
        }
        false => replace,
    };
    let all_bytes = (0..256).all(|b| ids.contains_key(format!("<0x{b:02X}>").as_str()));
    Ok(json!({
        "version": "1.0",
        "added_tokens": vocab.added(|ty| matches!(ty, UNKNOWN | CONTROL | USER_DEFINED), plain),
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "post_processor": template(metadata, vocab, true)?,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": all_bytes, "ignore_merges": false,
            "vocab": vocab.json(plain), "merges": merges,
        },
    }))
}

fn wordpiece(metadata: &Metadata, vocab: &Vocabulary<'_>) -> Result<Value, FormatError> {
    let shown = |id: usize, token: &str| match (vocab.ty(id), token.strip_prefix(SPACE)) {
        (NORMAL, Some(word)) => word.to_owned(),
        (NORMAL, None) => format!("##{token}"),
        _ => token.to_owned(),
    };
    let number = |name: &str| metadata.number(&format!("tokenizer.ggml.{name}_token_id"));
    let unknown = number("unknown")?.map_or("[UNK]", |id| &vocab.tokens[id as usize]);
    Ok(json!({
        "version": "1.0",
        "added_tokens": vocab.added(|ty| matches!(ty, UNKNOWN | CONTROL | USER_DEFINED), shown),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": true,
        },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": template(metadata, vocab, true)?,
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": {
            "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab.json(shown),
        },
    }))
}

/// The tokens before and behind a text.
fn template(metadata: &Metadata, vocab: &Vocabulary<'_>, adds_bos: bool) -> Result<Value, FormatError> {
    let bert = metadata.text("tokenizer.ggml.model")? == Some("bert");
    let id = |name: &str| metadata.number(&format!("tokenizer.ggml.{name}_token_id"));
    let flag = |name: &str, default| {
        Ok::<_, FormatError>(metadata.flag(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(default))
    };
    let first = if bert { id("cls")?.or(id("bos")?) } else { id("bos")? };
    let last = if bert { id("seperator")? } else { id("eos")? };
    let first = if flag("bos", adds_bos)? { first } else { None };
    let last = if flag("eos", bert)? { last } else { None };
    if first.is_none() && last.is_none() {
        return Ok(Value::Null);
    }
    let name = |id: u64| vocab.tokens.get(id as usize).cloned().unwrap_or_default();
    let piece = |id: Option<u64>| id.map(|id| json!({ "SpecialToken": { "id": name(id), "type_id": 0 } }));
    let sequence = |which: &str| Some(json!({ "Sequence": { "id": which, "type_id": 0 } }));
    let single: Vec<Value> = [piece(first), sequence("A"), piece(last)].into_iter().flatten().collect();
    let second = [piece(first).filter(|_| !bert), sequence("B"), piece(last)];
    let pair: Vec<Value> = single.iter().cloned().chain(second.into_iter().flatten()).collect();
    let special = [first, last].into_iter().flatten();
    let special: Map<String, Value> =
        special.map(|id| (name(id), json!({ "id": name(id), "ids": [id], "tokens": [name(id)] }))).collect();
    Ok(json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special }))
}

/// The keys of a tokenizer, for a model with `rows` rows of embedding. One that GGUF has no kind for is left out: the
/// file then works with token ids.
pub(crate) fn to_keys(
    tokenizer: Option<&Value>,
    rows: usize,
    metadata: &mut Metadata,
) -> Result<(), FormatError> {
    let kind = tokenizer.and_then(|file| Some((file, kind(file)?)));
    let Some((file, (model, pre))) = kind else {
        metadata.set("tokenizer.ggml.model", "none".into());
        return Ok(());
    };
    let vocab = read_vocab(file, rows)?;
    metadata.set("tokenizer.ggml.model", model.into());
    metadata.set("tokenizer.ggml.pre", pre.into());
    let unknown = file["model"]["unk_token"].as_str();
    let mut types = Vec::with_capacity(rows);
    let mut tokens = Vec::with_capacity(rows);
    for (id, token) in vocab.iter().enumerate() {
        let Some((token, added)) = token else {
            tokens.push(format!("[PAD{id}]"));
            types.push(UNUSED);
            continue;
        };
        let ty = match added {
            _ if model != "gpt2" && Some(token.as_str()) == unknown => UNKNOWN,
            Some(true) => CONTROL,
            Some(false) => USER_DEFINED,
            None if model == "llama" && is_byte(token) => BYTE,
            None => NORMAL,
        };
        types.push(ty);
        tokens.push(match (model, ty) {
            ("bert", NORMAL) => match token.strip_prefix("##") {
                Some(rest) => rest.to_owned(),
                None => format!("{SPACE}{token}"),
            },
            _ => token.clone(),
        });
    }
    if model == "llama" {
        metadata.set(SCORES, MetaValue::Array(MetaArray::F32(scores(file, &tokens))));
    }
    metadata.set(TOKENS, MetaValue::Array(MetaArray::Str(tokens)));
    metadata.set(TYPES, MetaValue::Array(MetaArray::I32(types)));
    if model == "gpt2" {
        let merges = merges(file).map(|(a, b)| format!("{a} {b}")).collect();
        metadata.set(MERGES, MetaValue::Array(MetaArray::Str(merges)));
    }
    if model == "llama" {
        let prefix = file["normalizer"].to_string().contains("Prepend");
        metadata.set("tokenizer.ggml.add_space_prefix", prefix.into());
    }
    let (first, last) = around(file);
    metadata.set("tokenizer.ggml.add_bos_token", first.is_some().into());
    metadata.set("tokenizer.ggml.add_eos_token", last.is_some().into());
    if model == "bert" {
        let by_name = |name: &str| vocab.iter().position(|t| t.as_ref().is_some_and(|(t, _)| t == name));
        let ids = [
            ("bos", first.or(by_name("[CLS]"))),
            ("seperator", last.or(by_name("[SEP]"))),
            ("unknown", unknown.and_then(by_name)),
            ("padding", by_name("[PAD]")),
            ("mask", by_name("[MASK]")),
        ];
        for (name, id) in ids {
            if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
                metadata.set(format!("tokenizer.ggml.{name}_token_id"), id.into());
            }
        }
    } else if let Some(id) = first.and_then(|id| u32::try_from(id).ok()) {
        metadata.set("tokenizer.ggml.bos_token_id", id.into());
    }
    Ok(())
}

/// The kind of a tokenizer and how it cuts texts, in the names of GGUF.
fn kind(file: &Value) -> Option<(&'static str, &'static str)> {
    let model = &file["model"];
    match model["type"].as_str() {
        Some("BPE") if model["byte_fallback"] == true => Some(("llama", "default")),
        Some("BPE") => {
            Some(("gpt2", pretokenizers::name_of(&file["pre_tokenizer"], &model["ignore_merges"])?))
        }
        Some("WordPiece") => Some(("bert", "default")),
        _ => None,
    }
}

fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// A token, and whether it is special if it is an added one.
type Token = Option<(String, Option<bool>)>;

/// Tokens by id.
fn read_vocab(file: &Value, rows: usize) -> Result<Vec<Token>, FormatError> {
    let mut vocab: Vec<Token> = vec![None; rows];
    let model = file["model"]["vocab"].as_object().into_iter().flatten();
    let added = file["added_tokens"].as_array().into_iter().flatten();
    let all = model.map(|(token, id)| (token.as_str(), id.as_u64(), None)).chain(
        added.map(|t| (t["content"].as_str().unwrap_or_default(), t["id"].as_u64(), t["special"].as_bool())),
    );
    for (token, id, special) in all {
        let slot = id.and_then(|id| vocab.get_mut(usize::try_from(id).ok()?));
        match slot {
            Some(slot) => *slot = Some((token.to_owned(), special)),
            None => {
                let found = format!("{} with id {id:?}", crate::display_name(token));
                return Err(wrong(TOKENS, found, format!("ids below vocab_size {rows}")));
            }
        }
    }
    Ok(vocab)
}

/// The merges of a tokenizer, old or new form.
fn merges(file: &Value) -> impl Iterator<Item = (&str, &str)> {
    file["model"]["merges"].as_array().into_iter().flatten().filter_map(|merge| match merge {
        Value::String(text) => text.split_once(' '),
        pair => pair[0].as_str().zip(pair[1].as_str()),
    })
}

/// Scores that give the order of merges: earlier ones are better.
fn scores(file: &Value, tokens: &[String]) -> Vec<f32> {
    let mut rank = HashMap::new();
    for (i, (a, b)) in merges(file).enumerate() {
        rank.entry(format!("{a}{b}")).or_insert(i);
    }
    let worst = rank.len();
    tokens.iter().map(|token| -(rank.get(token).copied().unwrap_or(worst) as f32)).collect()
}

/// Ids of the tokens that are put before and behind a single text.
fn around(file: &Value) -> (Option<usize>, Option<usize>) {
    let steps = match file["post_processor"]["type"].as_str() {
        Some("Sequence") => file["post_processor"]["processors"].as_array().cloned().unwrap_or_default(),
        _ => vec![file["post_processor"].clone()],
    };
    let mut seen = HashSet::new();
    let (mut first, mut last) = (None, None);
    for step in steps {
        let id = |piece: &Value| {
            let name = piece["SpecialToken"]["id"].as_str()?;
            step["special_tokens"][name]["ids"][0].as_u64().and_then(|id| usize::try_from(id).ok())
        };
        let pair = |field: &str| step[field][1].as_u64().and_then(|id| usize::try_from(id).ok());
        match step["type"].as_str() {
            Some("TemplateProcessing") => {
                let single = step["single"].as_array().cloned().unwrap_or_default();
                first = first.or(single.first().and_then(id));
                last = last.or(single.last().filter(|_| single.len() > 1).and_then(id));
            }
            Some(kind @ ("BertProcessing" | "RobertaProcessing")) if seen.insert(kind.to_owned()) => {
                (first, last) = (pair("cls"), pair("sep"));
            }
            _ => {}
        }
    }
    (first, last)
}
