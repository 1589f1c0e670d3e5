//! Architectures in GGUF files: `config.json` from the keys and the keys from `config.json`.

use serde_json::{Map, Number, Value, json};

use super::metadata::{MetaArray, MetaValue, Metadata};
use super::names::{self, Names};
use crate::error::FormatError;

/// An architecture that is known by its name in `general.architecture`.
#[derive(Debug)]
pub(super) struct GgufArch {
    /// `general.architecture`.
    pub(super) name: &'static str,
    /// `model_type` of `config.json`.
    model_type: &'static str,
    /// The class in its `architectures`.
    class: &'static str,
    pub(super) names: &'static Names,
    /// Field of `config.json`, key below the architecture, type of the key.
    fields: &'static [(&'static str, &'static str, Kind)],
    /// Fields that GGUF leaves to the architecture, in JSON.
    fixed: &'static [(&'static str, &'static str)],
    /// Positions enter by rotation.
    rotary: bool,
    /// Rows of q and k are in interleaved order.
    pub(super) interleaved: bool,
    /// Float weights of the blocks are the transpose of the checkpoint's.
    pub(super) transposed: bool,
}

/// Type of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Count,
    Float,
}

const LLAMA_FIELDS: &[(&str, &str, Kind)] = &[
    ("max_position_embeddings", "context_length", Kind::Count),
    ("hidden_size", "embedding_length", Kind::Count),
    ("num_hidden_layers", "block_count", Kind::Count),
    ("intermediate_size", "feed_forward_length", Kind::Count),
    ("num_attention_heads", "attention.head_count", Kind::Count),
    ("num_key_value_heads", "attention.head_count_kv", Kind::Count),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", Kind::Float),
    ("head_dim", "attention.key_length", Kind::Count),
    ("head_dim", "attention.value_length", Kind::Count),
    ("vocab_size", "vocab_size", Kind::Count),
];

const fn llama_like(name: &'static str, class: &'static str, interleaved: bool) -> GgufArch {
    GgufArch {
        name,
        model_type: name,
        class,
        names: &names::LLAMA,
        fields: LLAMA_FIELDS,
        fixed: &[("hidden_act", "\"silu\"")],
        rotary: true,
        interleaved,
        transposed: false,
    }
}

static ARCHS: [GgufArch; 5] = [
    llama_like("llama", "LlamaForCausalLM", true),
    llama_like("qwen2", "Qwen2ForCausalLM", false),
    llama_like("qwen3", "Qwen3ForCausalLM", false),
    GgufArch {
        name: "gpt2",
        model_type: "gpt2",
        class: "GPT2LMHeadModel",
        names: &names::GPT2,
        fields: &[
            ("n_positions", "context_length", Kind::Count),
            ("n_embd", "embedding_length", Kind::Count),
            ("n_layer", "block_count", Kind::Count),
            ("n_inner", "feed_forward_length", Kind::Count),
            ("n_head", "attention.head_count", Kind::Count),
            ("layer_norm_epsilon", "attention.layer_norm_epsilon", Kind::Float),
            ("vocab_size", "vocab_size", Kind::Count),
        ],
        fixed: &[("activation_function", "\"gelu_new\"")],
        rotary: false,
        interleaved: false,
        transposed: true,
    },
    GgufArch {
        name: "bert",
        model_type: "bert",
        class: "BertModel",
        names: &names::BERT,
        fields: &[
            ("max_position_embeddings", "context_length", Kind::Count),
            ("hidden_size", "embedding_length", Kind::Count),
            ("num_hidden_layers", "block_count", Kind::Count),
            ("intermediate_size", "feed_forward_length", Kind::Count),
            ("num_attention_heads", "attention.head_count", Kind::Count),
            ("layer_norm_eps", "attention.layer_norm_epsilon", Kind::Float),
            ("vocab_size", "vocab_size", Kind::Count),
        ],
        fixed: &[("hidden_act", "\"gelu\"")],
        rotary: false,
        interleaved: false,
        transposed: false,
    },
];

/// What the tensors of a file add to its keys.
pub(super) struct TensorFacts {
    /// Rows of the embedding.
    pub(super) embedding_rows: Option<usize>,
    /// Rows of the token types of an encoder.
    pub(super) token_types: Option<usize>,
    /// There is an output head.
    pub(super) head: bool,
    /// The factors of `rope_freqs.weight`.
    pub(super) rope_factors: Option<Vec<f32>>,
}

impl GgufArch {
    /// The architecture of a file, if it is known.
    pub(super) fn of(metadata: &Metadata) -> Result<Option<&'static Self>, FormatError> {
        let name = metadata.text("general.architecture")?;
        Ok(ARCHS.iter().find(|arch| Some(arch.name) == name))
    }

    /// The architecture for a `config.json`.
    pub(super) fn for_config(config: &Value) -> Result<&'static Self, FormatError> {
        let found = config["model_type"].as_str().unwrap_or_default();
        let name = if found == "mistral" { "llama" } else { found };
        ARCHS.iter().find(|arch| arch.model_type == name).ok_or_else(|| {
            let known: Vec<_> = ARCHS.iter().map(|arch| arch.model_type).collect();
            FormatError::Config {
                field: "model_type".into(),
                found: found.to_owned(),
                expected: format!("gguf files are written for {}, mistral", known.join(", ")),
            }
        })
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    /// Number of query heads, or of key heads, for the order of rows.
    pub(super) fn heads(&self, metadata: &Metadata, keys: bool) -> Option<usize> {
        let count = |key| metadata.get(&self.key(key)).map(uniform).and_then(|v| v.as_u64());
        let count = if keys {
            count("attention.head_count_kv").or(count("attention.head_count"))
        } else {
            count("attention.head_count")
        };
        count.and_then(|n| usize::try_from(n).ok())
    }

    /// `config.json` of a file.
    pub(super) fn config(&self, metadata: &Metadata, facts: &TensorFacts) -> Value {
        let mut config = Map::new();
        let get = |key: &str| metadata.get(&self.key(key)).map(uniform);
        config.insert("architectures".into(), json!([self.class]));
        config.insert("model_type".into(), self.model_type.into());
        for (field, key, _) in self.fields {
            if let Some(value) = get(key) {
                config.insert((*field).into(), value);
            }
        }
        for (field, value) in self.fixed {
            config.insert((*field).into(), serde_json::from_str(value).unwrap_or_default());
        }
        let tokens = metadata.get("tokenizer.ggml.tokens").and_then(|v| match v {
            MetaValue::Array(list) => Some(list.len()),
            _ => None,
        });
        if let Some(rows) = tokens.or(facts.embedding_rows).filter(|_| !config.contains_key("vocab_size")) {
            config.insert("vocab_size".into(), rows.into());
        }
        if let Some(types) = facts.token_types {
            config.insert("type_vocab_size".into(), types.into());
        }
        self.rope(&mut config, metadata, facts);
        for (field, key) in [("bos_token_id", "bos"), ("pad_token_id", "padding")] {
            if let Some(id) = metadata.get(&format!("tokenizer.ggml.{key}_token_id")) {
                config.insert(field.into(), to_json(id));
            }
        }
        let ends =
            ["eos", "eot"].map(|key| metadata.get(&format!("tokenizer.ggml.{key}_token_id")).map(to_json));
        match ends {
            [Some(eos), Some(eot)] if eos != eot => {
                config.insert("eos_token_id".into(), json!([eos, eot]));
            }
            [Some(eos), _] => {
                config.insert("eos_token_id".into(), eos);
            }
            _ => {}
        }
        if self.name != "bert" {
            config.insert("tie_word_embeddings".into(), (!facts.head).into());
        }
        config.into()
    }

    /// Rotary parameters.
    fn rope(&self, config: &mut Map<String, Value>, metadata: &Metadata, facts: &TensorFacts) {
        let get = |key: &str| metadata.get(&self.key(key)).map(uniform);
        let Some(dim) = get("rope.dimension_count") else { return };
        if let Some(theta) = get("rope.freq_base") {
            config.insert("rope_theta".into(), theta);
        }
        let number = |config: &Map<String, Value>, field: &str| config.get(field).and_then(Value::as_f64);
        let head_dim = number(config, "head_dim")
            .or_else(|| Some(number(config, "hidden_size")? / number(config, "num_attention_heads")?));
        if let (Some(dim), Some(head_dim)) = (dim.as_f64(), head_dim)
            && dim != head_dim
        {
            config.insert("partial_rotary_factor".into(), json!(dim / head_dim));
        }
        let mut scaling = Map::new();
        match get("rope.scaling.type").as_ref().and_then(Value::as_str) {
            None | Some("none") => {}
            Some(kind) => {
                scaling.insert("rope_type".into(), kind.into());
            }
        }
        let fields = [
            ("factor", "factor"),
            ("original_max_position_embeddings", "original_context_length"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ];
        let scaled = !scaling.is_empty();
        for (field, key) in fields.into_iter().filter(|_| scaled) {
            if let Some(value) = get(&format!("rope.scaling.{key}")) {
                scaling.insert(field.into(), value);
            }
        }
        if let Some(factors) = &facts.rope_factors {
            let theta = number(config, "rope_theta").unwrap_or(10_000.0);
            scaling = llama3_parameters(factors, theta).unwrap_or_else(|| {
                // No formula that is known here: refused by the name.
                Map::from_iter([("rope_type".to_owned(), json!("factors of rope_freqs.weight"))])
            });
        }
        if !scaling.is_empty() {
            config.insert("rope_scaling".into(), scaling.into());
        }
    }

    /// The keys of a model, without its tokenizer.
    pub(super) fn metadata(&self, config: &Value) -> Result<Metadata, FormatError> {
        refuse_window(config)?;
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", self.name.into());
        metadata.set("general.type", "model".into());
        for (field, key, kind) in self.fields {
            let value = match (&config[*field], *field) {
                (Value::Null, "num_key_value_heads") => &config["num_attention_heads"],
                (value, _) => value,
            };
            let wrong = || FormatError::Config {
                field: (*field).to_owned(),
                found: value.to_string(),
                expected: format!("it is needed for the key {}", self.key(key)),
            };
            match kind {
                _ if value.is_null() => {}
                Kind::Count => {
                    let n = value.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(wrong)?;
                    metadata.set(self.key(key), n.into());
                }
                Kind::Float => metadata.set(self.key(key), (value.as_f64().ok_or_else(wrong)? as f32).into()),
            }
        }
        match self.name {
            "gpt2" if config["n_inner"].is_null() => {
                let inner = config["n_embd"].as_u64().map(|n| 4 * n).and_then(|n| u32::try_from(n).ok());
                metadata.set(self.key("feed_forward_length"), inner.unwrap_or(0).into());
            }
            "bert" => {
                metadata.set("bert.attention.causal", false.into());
                metadata.set("bert.pooling_type", 1u32.into());
            }
            _ => {}
        }
        if self.rotary {
            self.rope_metadata(config, &mut metadata)?;
        }
        Ok(metadata)
    }

    fn rope_metadata(&self, config: &Value, metadata: &mut Metadata) -> Result<(), FormatError> {
        let rope = Rope::of(config);
        metadata.set(self.key("rope.dimension_count"), rope.dim.into());
        metadata.set(self.key("rope.freq_base"), (rope.theta as f32).into());
        let kind = rope.kind.as_str();
        match kind {
            "default" | "llama3" => {}
            "linear" | "yarn" => {
                metadata.set(self.key("rope.scaling.type"), kind.into());
                metadata.set(
                    self.key("rope.scaling.factor"),
                    (rope.number("factor").unwrap_or(1.0) as f32).into(),
                );
                if let Some(n) = rope.number("original_max_position_embeddings") {
                    metadata.set(self.key("rope.scaling.original_context_length"), (n as u32).into());
                }
                for (field, key) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
                    if let Some(value) = rope.number(field) {
                        metadata.set(self.key(&format!("rope.scaling.{key}")), (value as f32).into());
                    }
                }
            }
            other => {
                return Err(FormatError::Config {
                    field: "rope_scaling".into(),
                    found: other.to_owned(),
                    expected: "gguf files hold default, linear, yarn and llama3".into(),
                });
            }
        }
        Ok(())
    }
}

/// GGUF has no key for attention windows of these architectures.
fn refuse_window(config: &Value) -> Result<(), FormatError> {
    let used = config["model_type"] == "mistral" || config["use_sliding_window"] == true;
    let window = config["sliding_window"].as_u64().filter(|_| used);
    let context = config["max_position_embeddings"].as_u64().unwrap_or(u64::MAX);
    match window.filter(|&window| window < context) {
        None => Ok(()),
        Some(window) => Err(FormatError::Config {
            field: "sliding_window".into(),
            found: window.to_string(),
            expected: "gguf files of this architecture have no window: set it to null if no text is longer"
                .into(),
        }),
    }
}

/// The rotary parameters of a `config.json`, old or new form.
struct Rope<'a> {
    object: &'a Value,
    kind: String,
    theta: f64,
    dim: u32,
}

impl<'a> Rope<'a> {
    fn of(config: &'a Value) -> Self {
        let object =
            [&config["rope_scaling"], &config["rope_parameters"]].into_iter().find(|v| v.is_object());
        let object = object.unwrap_or(&Value::Null);
        let kind = object["rope_type"].as_str().or(object["type"].as_str()).unwrap_or("default").to_owned();
        let theta = object["rope_theta"].as_f64().or(config["rope_theta"].as_f64()).unwrap_or(10_000.0);
        let heads = config["num_attention_heads"].as_u64().unwrap_or(1).max(1);
        let dim = config["head_dim"].as_u64().or(config["hidden_size"].as_u64().map(|n| n / heads));
        let dim = dim.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        Self { object, kind, theta, dim }
    }

    fn number(&self, field: &str) -> Option<f64> {
        self.object[field].as_f64()
    }
}

/// The factors `[head_dim / 2]` that llama.cpp divides frequencies by, for models with the scaling of Llama 3.
pub(super) fn rope_factors(config: &Value) -> Option<Vec<f32>> {
    let rope = Rope::of(config);
    if rope.kind != "llama3" {
        return None;
    }
    let number = |field| rope.number(field);
    let (factor, low, high) = (number("factor")?, number("low_freq_factor")?, number("high_freq_factor")?);
    let outer =
        config["original_max_position_embeddings"].as_f64().or(config["max_position_embeddings"].as_f64());
    let trained = number("original_max_position_embeddings").or(outer)?;
    let factors = (0..rope.dim / 2).map(|i| {
        let inv = rope.theta.powf(-2.0 * f64::from(i) / f64::from(rope.dim));
        let periods = trained * inv / std::f64::consts::TAU;
        let keep = ((periods - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 / ((1.0 - keep) / factor + keep)) as f32
    });
    Some(factors.collect())
}

/// The parameters that give such factors. Low frequencies are divided by the largest, high ones kept; between them
/// the share that is kept is linear in the frequency, `a * frequency + b`, which two of them tell.
fn llama3_parameters(factors: &[f32], theta: f64) -> Option<Map<String, Value>> {
    let dim = 2.0 * factors.len() as f64;
    let frequency = |i: usize| theta.powf(-2.0 * i as f64 / dim);
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let keep = |f: f32| (1.0 / f64::from(f) - 1.0 / factor) / (1.0 - 1.0 / factor);
    let between: Vec<usize> =
        (0..factors.len()).filter(|&i| factors[i] > 1.0 && f64::from(factors[i]) < factor).collect();
    let (&first, &last) = (between.first()?, between.last()?);
    let a = (keep(factors[first]) - keep(factors[last])) / (frequency(first) - frequency(last));
    let b = keep(factors[first]) - a * frequency(first);
    if first == last || !(a > 0.0 && b < 0.0) {
        return None;
    }
    // Only three of the four parameters are free; low is 1 in every model.
    let high = (1024.0 * (1.0 - 1.0 / b)).round() / 1024.0;
    let trained = (std::f64::consts::TAU * a * (high - 1.0)).round();
    let config = json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
        "original_max_position_embeddings": trained as u64,
    });
    let whole = json!({ "rope_scaling": config, "rope_theta": theta, "head_dim": dim as u64 });
    let again = rope_factors(&whole)?;
    let same = factors.iter().zip(again).all(|(a, b)| (a - b).abs() <= 1e-3 * b);
    config.as_object().filter(|_| same).cloned()
}

/// A value in JSON. What JSON does not have (NaN, infinity) is `null`.
pub(super) fn to_json(value: &MetaValue) -> Value {
    match value {
        MetaValue::Str(text) => text.as_str().into(),
        MetaValue::Bool(flag) => (*flag).into(),
        MetaValue::F32(_) | MetaValue::F64(_) => {
            value.as_f64().and_then(Number::from_f64).map_or(Value::Null, Value::Number)
        }
        MetaValue::Array(list) => format!("a list of {}", list.len()).into(),
        number => number.as_i128().and_then(Number::from_i128).map_or(Value::Null, Value::Number),
    }
}

/// A value in JSON, where a list of equal numbers, one for each layer, is that number.
fn uniform(value: &MetaValue) -> Value {
    let same = |list: &[i128]| match list {
        [first, rest @ ..] if rest.iter().all(|n| n == first) => Number::from_i128(*first).map(Value::Number),
        _ => None,
    };
    let list: Option<Vec<i128>> = match value {
        MetaValue::Array(MetaArray::U32(list)) => Some(list.iter().map(|&n| n.into()).collect()),
        MetaValue::Array(MetaArray::I32(list)) => Some(list.iter().map(|&n| n.into()).collect()),
        _ => None,
    };
    list.and_then(|list| same(&list)).unwrap_or_else(|| to_json(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_llama_3_are_recognised() {
        for (factor, dim, theta) in [(8.0, 128, 500_000.0), (32.0, 64, 500_000.0)] {
            let rope = json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            });
            let config = json!({ "rope_scaling": rope, "rope_theta": theta, "head_dim": dim });
            let factors = rope_factors(&config).unwrap();
            assert_eq!(Value::Object(llama3_parameters(&factors, theta).unwrap()), rope);
        }
        assert_eq!(llama3_parameters(&[1.0, 2.0, 3.0, 9.0], 10_000.0), None);
        assert_eq!(llama3_parameters(&[], 10_000.0), None);
    }

    #[test]
    fn a_configuration_survives() {
        let config = json!({
            "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
            "rope_scaling": { "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 },
        });
        let arch = GgufArch::for_config(&config).unwrap();
        let metadata = arch.metadata(&config).unwrap();
        let facts = TensorFacts { embedding_rows: None, token_types: None, head: true, rope_factors: None };
        let back = GgufArch::of(&metadata).unwrap().unwrap().config(&metadata, &facts);
        for (field, value) in config.as_object().unwrap() {
            assert_eq!(&back[field], value, "{field}");
        }
        assert_eq!(back["tie_word_embeddings"], false);
    }
}
