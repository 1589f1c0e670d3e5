//! Real tokenizers: texts, special tokens, streams, and files edited to be harmful.

use std::fs;
use std::sync::LazyLock;

use proptest::prelude::*;
use quant_model::{Tokenizer, TokenizerError};
use quant_testkit::{assets, fixtures_dir};
use serde_json::{Value, json};

fn stories() -> Value {
    let file = fixtures_dir().join("models/ts-llama-3.7M/tokenizer.json");
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

fn load(file: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_bytes(&serde_json::to_vec(file).unwrap())
}

static STORIES: LazyLock<Tokenizer> = LazyLock::new(|| load(&stories()).unwrap());

/// Encoding adds what the post-processor says, and decoding gives the text back.
fn round_trip(tokenizer: &Tokenizer, text: &str) {
    let plain = tokenizer.encode(text, false).unwrap();
    assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
    let special = tokenizer.encode(text, true).unwrap();
    assert!(special.len() >= plain.len() && special.ends_with(&plain));
    assert_eq!(tokenizer.decode(&special, true).unwrap(), text);
    let mut stream = tokenizer.stream(true);
    let mut streamed: String = special.iter().map(|&id| stream.push(id).unwrap()).collect();
    streamed += &stream.finish().unwrap();
    assert_eq!(streamed, text);
}

#[test]
fn texts_come_back() {
    let tokenizer = &*STORIES;
    for text in ["once upon a time, there was a little girl.", "今天天气如何? 🦀 naïve", "\n\n  x\t", ""]
    {
        round_trip(tokenizer, text);
    }
}

#[test]
fn known_ids() {
    let Some(dir) = assets("models/tokenizers") else { return };
    let gpt2 = Tokenizer::from_file(&dir.join("gpt2/tokenizer.json")).unwrap();
    assert_eq!(gpt2.encode("Hello, world!", true).unwrap(), [15496, 11, 995, 0]);
    assert_eq!(gpt2.encode("<|endoftext|>", true).unwrap(), [50256]);
    assert_eq!(gpt2.vocab_size(), 50257);
    round_trip(&gpt2, "今天天气如何? It's   fine.");
    let llama = Tokenizer::from_file(&dir.join("llama2/tokenizer.json")).unwrap();
    assert_eq!(llama.encode("Hello, world!", true).unwrap(), [1, 15043, 29892, 3186, 29991]);
    round_trip(&llama, "byte fallback 🦀 and 今天");
}

/// A character in several tokens appears when its last byte does, never as a replacement character.
#[test]
fn streams_wait_for_whole_characters() {
    let tokenizer = &*STORIES;
    let ids = tokenizer.encode("🦀", false).unwrap();
    assert!(ids.len() > 1, "the character is split");
    let mut stream = tokenizer.stream(true);
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces.last().unwrap(), "🦀");
    assert!(pieces[..pieces.len() - 1].iter().all(String::is_empty));
    // An end in the middle of a character is shown as such.
    let mut stream = tokenizer.stream(true);
    assert_eq!(stream.push(ids[0]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_comes_back(text in "[a-z ]{0,20}\\PC{0,10}") {
        round_trip(&STORIES, &text);
    }

    /// Whatever a model emits, the stream's pieces are the text of all tokens.
    #[test]
    fn streams_of_any_tokens_add_up(ids in prop::collection::vec(0u32..2048, 0..30)) {
        let tokenizer = &*STORIES;
        let mut stream = tokenizer.stream(true);
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text += &stream.finish().unwrap();
        prop_assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
    }
}

#[test]
fn truncation_padding_and_dropout_are_off() {
    let mut file = stories();
    let text = "once upon a time there was a dog";
    let plain = load(&file).unwrap().encode(text, true).unwrap();
    file["truncation"] =
        json!({"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"});
    file["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x"});
    file["model"]["dropout"] = json!(0.9);
    assert_eq!(load(&file).unwrap().encode(text, true).unwrap(), plain);
}

/// Each edit makes the crate behind panic, loop or grow without the checks.
#[test]
fn harmful_files_are_refused() {
    let edits: [(&str, Value, &str); 12] = [
        ("/model/continuing_subword_prefix", json!("é"), "prefix"),
        ("/model/merges", json!(["a b c"]), "pair"),
        ("/model/vocab", json!({}), "empty"),
        ("/model/type", json!("Unigram"), "Unigram"),
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "!"}), "charsmap"),
        ("/normalizer", nested(9), "deeper"),
        ("/normalizer", growing(), "lengthen"),
        ("/pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "FixedLength"),
        ("/decoder", json!({"type": "Strip", "content": " ", "start": 0, "stop": 1}), "Strip"),
        ("/decoder", json!({"type": "Zork"}), "Zork"),
        ("/post_processor", template("A", &[1, 2]), "unequal"),
        ("/post_processor", template("B", &[1]), "sequence"),
    ];
    for (part, value, mention) in edits {
        let mut file = stories();
        *file.pointer_mut(part).unwrap_or_else(|| panic!("the file has {part}")) = value;
        let text = load(&file).err().unwrap_or_else(|| panic!("{part} {mention} was accepted")).to_string();
        assert!(text.contains(mention), "{text}");
    }
}

fn nested(depth: usize) -> Value {
    let leaf = json!({"type": "NFC"});
    (0..depth).fold(leaf, |inner, _| json!({"type": "Sequence", "normalizers": [inner]}))
}

fn growing() -> Value {
    let step = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    json!({"type": "Sequence", "normalizers": vec![step; 40]})
}

fn template(sequence: &str, ids: &[u32]) -> Value {
    json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": sequence, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"]}},
    })
}
