//! How byte-level BPE tokenizers cut a text before they merge: in GGUF a name, elsewhere a pipeline.

use serde_json::{Value, json};

/// A way to cut texts.
#[derive(Debug)]
pub(super) struct Cut {
    /// Names in `tokenizer.ggml.pre`; the first is written.
    names: &'static [&'static str],
    /// What is found is a word.
    words: &'static [&'static str],
    /// Every digit is a word of its own.
    digits: bool,
    /// The rule of GPT-2 is applied to what is left.
    gpt2: bool,
    /// NFC comes first.
    nfc: bool,
    /// Words that are tokens are not merged.
    ignore_merges: bool,
    /// A beginning token is put before texts unless a key says otherwise.
    bos: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: Cut =
    Cut { names: &[], words: &[], digits: false, gpt2: false, nfc: false, ignore_merges: false, bos: false };

/// The known ways. What llama.cpp calls `default` is its guess for files without the key; it warns, and GPT-2's rule
/// is the nearest that such files were made with.
static CUTS: [Cut; 5] = [
    Cut { names: &["gpt-2", "phi-2", "roberta-bpe", "mpt", "olmo", "jais", "default"], gpt2: true, ..PLAIN },
    Cut {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3"],
        words: &[LLAMA3],
        ignore_merges: true,
        bos: true,
        ..PLAIN
    },
    Cut { names: &["qwen2", "deepseek-r1-qwen", "megrez"], words: &[QWEN2], nfc: true, ..PLAIN },
    Cut {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        digits: true,
        gpt2: true,
        ..PLAIN
    },
    Cut { names: &["tekken"], words: &[TEKKEN], ignore_merges: true, bos: true, ..PLAIN },
];

/// The way of this name.
pub(super) fn by_name(name: &str) -> Option<&'static Cut> {
    CUTS.iter().find(|cut| cut.names.contains(&name))
}

/// All names.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    CUTS.iter().flat_map(|cut| cut.names.iter().copied())
}

/// The name of the pre-tokenizer of a `tokenizer.json`.
pub(super) fn name_of(pre_tokenizer: &Value, ignore_merges: &Value) -> Option<&'static str> {
    let steps = match pre_tokenizer["type"].as_str()? {
        "Sequence" => pre_tokenizer["pretokenizers"].as_array()?.iter().collect(),
        _ => vec![pre_tokenizer],
    };
    let of_type = |kind: &'static str| steps.iter().filter(move |s| s["type"] == kind);
    let words: Vec<&str> = of_type("Split").filter_map(|s| s["pattern"]["Regex"].as_str()).collect();
    let digits = of_type("Digits").any(|s| s["individual_digits"] == true);
    let gpt2 = of_type("ByteLevel").any(|s| s["use_regex"] != false);
    let others = steps.iter().any(|s| !matches!(s["type"].as_str(), Some("Split" | "Digits" | "ByteLevel")));
    let fits = |cut: &&Cut| {
        cut.words == words
            && (cut.digits, cut.gpt2) == (digits, gpt2)
            && cut.ignore_merges == (ignore_merges == true)
    };
    CUTS.iter().find(fits).filter(|_| !others).map(|cut| cut.names[0])
}

impl Cut {
    /// The pre-tokenizer of a `tokenizer.json`.
    pub(super) fn json(&self) -> Value {
        let words = self.words.iter().map(|regex| {
            json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false })
        });
        let digits = self.digits.then(|| json!({ "type": "Digits", "individual_digits": true }));
        let bytes = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": self.gpt2,
        });
        let mut steps: Vec<Value> = words.chain(digits).chain([bytes]).collect();
        match steps.len() {
            1 => steps.remove(0),
            _ => json!({ "type": "Sequence", "pretokenizers": steps }),
        }
    }

    /// The normalizer of a `tokenizer.json`.
    pub(super) fn normalizer(&self) -> Value {
        if self.nfc { json!({ "type": "NFC" }) } else { Value::Null }
    }

    /// Words that are tokens are not merged.
    pub(super) fn ignores_merges(&self) -> bool {
        self.ignore_merges
    }

    /// A beginning token is put before texts unless a key says otherwise.
    pub(super) fn adds_bos(&self) -> bool {
        self.bos
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_recognised() {
        for cut in &CUTS {
            assert_eq!(name_of(&cut.json(), &cut.ignore_merges.into()), Some(cut.names[0]));
            assert!(cut.names.iter().all(|name| by_name(name).is_some_and(|c| std::ptr::eq(c, cut))));
        }
        let other = json!({ "type": "Split", "pattern": { "Regex": "x" }, "behavior": "Isolated" });
        assert_eq!(name_of(&other, &Value::Null), None);
        assert_eq!(name_of(&json!({ "type": "Whitespace" }), &Value::Null), None);
    }
}
