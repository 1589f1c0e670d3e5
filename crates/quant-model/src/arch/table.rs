//! The one table of architectures.

use serde_json::Value;

use super::{
    Activation, ArchSpec, AttentionScale, Fields, LinearSpec, Names, NormKind, NormPlace, NormSpec,
    PositionSpec, Stage, StageKind, WindowSpec,
};
use crate::error::ConfigError;
use crate::rope::RopeSpec;

/// An entry of the table of architectures.
#[derive(Clone, Copy, Debug)]
pub struct Architecture {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class in `architectures`, for files without `model_type`.
    pub class: &'static str,
    /// Other models that are the same architecture under this name.
    pub covers: &'static str,
    build: fn(Fields<'_>) -> Result<ArchSpec, ConfigError>,
}

/// All architectures, in the order in which they are listed to users.
pub fn architectures() -> &'static [Architecture] {
    &TABLE
}

const TABLE: [Architecture; 6] = [
    Architecture {
        model_type: "llama",
        class: "LlamaForCausalLM",
        covers: "Llama 1 to 3, TinyLlama, SmolLM",
        build: llama,
    },
    Architecture {
        model_type: "mistral",
        class: "MistralForCausalLM",
        covers: "Mistral 7B, Nemo, Small",
        build: mistral,
    },
    Architecture {
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        covers: "Qwen 1.5, 2 and 2.5, dense",
        build: qwen2,
    },
    Architecture { model_type: "qwen3", class: "Qwen3ForCausalLM", covers: "Qwen 3, dense", build: qwen3 },
    Architecture {
        model_type: "gpt2",
        class: "GPT2LMHeadModel",
        covers: "GPT-2 of every size, DistilGPT-2",
        build: gpt2,
    },
    Architecture {
        model_type: "bert",
        class: "BertModel",
        covers: "BERT encoders: MiniLM, BGE, E5, GTE v1",
        build: bert,
    },
];

/// Reads `config.json`.
pub(super) fn build(config: &Value) -> Result<ArchSpec, ConfigError> {
    let fields = Fields::root(config)?;
    let class = fields.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let entry = match fields.text("model_type")? {
        Some(name) => TABLE.iter().find(|entry| entry.model_type == name),
        None => TABLE.iter().find(|entry| Some(entry.class) == class),
    };
    let Some(entry) = entry else {
        let known: Vec<_> = TABLE.iter().map(|entry| entry.model_type).collect();
        let expected = format!("one of the supported architectures: {}", known.join(", "));
        return Err(match fields.get("model_type") {
            Some(found) => fields.bad("model_type", expected, found),
            None => fields.missing("model_type", expected),
        });
    };
    (entry.build)(fields)
}

const LLAMA_NAMES: Names = Names {
    prefix: "model.",
    embedding: "embed_tokens",
    positions: "",
    token_types: "",
    embedding_norm: "",
    layers: "layers",
    attention_norm: "input_layernorm",
    mlp_norm: "post_attention_layernorm",
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    final_norm: "norm",
    head: "lm_head",
};

/// Which linears of a Llama-like block have a bias.
#[derive(Clone, Copy)]
struct Biases {
    qkv: bool,
    attention_out: bool,
    mlp: bool,
}

/// What all descendants of Llama have in common.
fn llama_like(f: Fields<'_>, model_type: &'static str, biases: Biases) -> Result<ArchSpec, ConfigError> {
    let hidden = f.count("hidden_size")?;
    let inner = f.count("intermediate_size")?;
    let heads = f.count("num_attention_heads")?;
    let kv_heads = f.count_or("num_key_value_heads", heads)?;
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of num_attention_heads {heads}");
        return Err(f.bad("num_key_value_heads", expected, &kv_heads.into()));
    }
    let head_dim = head_dim(f, hidden, heads)?;
    let max_positions = f.count_or("max_position_embeddings", 2048)?;
    let vocab_size = f.count("vocab_size")?;
    let linear = |name, out_features, in_features, bias, because| LinearSpec {
        name,
        out_features,
        in_features,
        bias,
        because,
    };
    let q_why = "num_attention_heads, head_dim and hidden_size";
    let kv_why = "num_key_value_heads, head_dim and hidden_size";
    let mlp_why = "intermediate_size and hidden_size";
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let stages = vec![
        Stage {
            kind: StageKind::Qkv,
            linears: vec![
                linear("self_attn.q_proj", q, hidden, biases.qkv, q_why),
                linear("self_attn.k_proj", kv, hidden, biases.qkv, kv_why),
                linear("self_attn.v_proj", kv, hidden, biases.qkv, kv_why),
            ],
        },
        Stage {
            kind: StageKind::AttentionOut,
            linears: vec![linear("self_attn.o_proj", hidden, q, biases.attention_out, q_why)],
        },
        Stage {
            kind: StageKind::MlpIn,
            linears: vec![
                linear("mlp.gate_proj", inner, hidden, biases.mlp, mlp_why),
                linear("mlp.up_proj", inner, hidden, biases.mlp, mlp_why),
            ],
        },
        Stage {
            kind: StageKind::MlpOut,
            linears: vec![linear("mlp.down_proj", hidden, inner, biases.mlp, mlp_why)],
        },
    ];
    Ok(ArchSpec {
        model_type,
        vocab_size,
        hidden_size: hidden,
        layers: f.count("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        intermediate_size: inner,
        max_positions,
        norm: NormSpec {
            kind: NormKind::Rms,
            eps: f.positive_or("rms_norm_eps", 1e-6)? as f32,
            place: NormPlace::Before,
        },
        causal: true,
        token_types: 0,
        qk_norm: false,
        positions: PositionSpec::Rope(RopeSpec::from_config(f, head_dim, max_positions)?),
        activation: activation(f, "hidden_act", "silu")?,
        gated: true,
        attention_scale: AttentionScale { base: inverse_sqrt(head_dim), by_layer: false },
        window: WindowSpec::Full,
        tied_embeddings: f.flag_or("tie_word_embeddings", false)?,
        conv1d: false,
        stages,
        names: LLAMA_NAMES,
        bos: f.token_ids("bos_token_id", vocab_size)?.first().copied(),
        eos: f.token_ids("eos_token_id", vocab_size)?,
    })
}

fn llama(f: Fields<'_>) -> Result<ArchSpec, ConfigError> {
    let attention = f.flag_or("attention_bias", false)?;
    let biases = Biases { qkv: attention, attention_out: attention, mlp: f.flag_or("mlp_bias", false)? };
    llama_like(f, "llama", biases)
}

fn mistral(f: Fields<'_>) -> Result<ArchSpec, ConfigError> {
    let mut spec = llama_like(f, "mistral", Biases { qkv: false, attention_out: false, mlp: false })?;
    if let Some(len) = f.optional_count("sliding_window")? {
        spec.window = WindowSpec::From { first: 0, len };
    }
    Ok(spec)
}

fn qwen2(f: Fields<'_>) -> Result<ArchSpec, ConfigError> {
    let mut spec = llama_like(f, "qwen2", Biases { qkv: true, attention_out: false, mlp: false })?;
    spec.window = qwen_window(f, spec.layers)?;
    Ok(spec)
}

fn qwen3(f: Fields<'_>) -> Result<ArchSpec, ConfigError> {
    let attention = f.flag_or("attention_bias", false)?;
    let mut spec = llama_like(f, "qwen3", Biases { qkv: attention, attention_out: attention, mlp: false })?;
    spec.qk_norm = true;
    spec.window = qwen_window(f, spec.layers)?;
    Ok(spec)
}

/// The window holds only where `use_sliding_window` is set, for the layers of `layer_types` or, in older files,
/// from `max_window_layers` on.
fn qwen_window(f: Fields<'_>, layers: usize) -> Result<WindowSpec, ConfigError> {
    if !f.flag_or("use_sliding_window", false)? {
        return Ok(WindowSpec::Full);
    }
    let len = f.count_or("sliding_window", 4096)?;
    let Some(types) = f.get("layer_types") else {
        let first = match f.get("max_window_layers") {
            Some(value) if value.as_u64() == Some(0) => 0,
            _ => f.count_or("max_window_layers", 28)?,
        };
        return Ok(WindowSpec::From { first, len });
    };
    let bad = || {
        let expected = format!("a list of {layers} times full_attention or sliding_attention");
        f.bad("layer_types", expected, types)
    };
    let list = types.as_array().filter(|list| list.len() == layers).ok_or_else(bad)?;
    let sliding = list.iter().map(|kind| match kind.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(bad()),
    });
    Ok(WindowSpec::Layers { sliding: sliding.collect::<Result<_, _>>()?, len })
}

fn gpt2(f: Fields<'_>) -> Result<ArchSpec, ConfigError> {
    let hidden = f.count("n_embd")?;
    let inner = f.count_or("n_inner", 4 * hidden)?;
    let heads = f.count("n_head")?;
    if !hidden.is_multiple_of(heads) {
        return Err(f.bad("n_head", format!("a divisor of n_embd {hidden}"), &heads.into()));
    }
    if f.flag_or("add_cross_attention", false)? {
        return Err(f.bad("add_cross_attention", "false: only decoders are supported", &true.into()));
    }
    let head_dim = hidden / heads;
    let vocab_size = f.count("vocab_size")?;
    let scaled = f.flag_or("scale_attn_weights", true)?;
    let linear = |name, out_features, in_features, because| LinearSpec {
        name,
        out_features,
        in_features,
        bias: true,
        because,
    };
    let stages = vec![
        Stage { kind: StageKind::Qkv, linears: vec![linear("attn.c_attn", 3 * hidden, hidden, "n_embd")] },
        Stage {
            kind: StageKind::AttentionOut,
            linears: vec![linear("attn.c_proj", hidden, hidden, "n_embd")],
        },
        Stage {
            kind: StageKind::MlpIn,
            linears: vec![linear("mlp.c_fc", inner, hidden, "n_inner and n_embd")],
        },
        Stage {
            kind: StageKind::MlpOut,
            linears: vec![linear("mlp.c_proj", hidden, inner, "n_inner and n_embd")],
        },
    ];
    Ok(ArchSpec {
        model_type: "gpt2",
        vocab_size,
        hidden_size: hidden,
        layers: f.count("n_layer")?,
        heads,
        kv_heads: heads,
        head_dim,
        intermediate_size: inner,
        max_positions: f.count_or("n_positions", 1024)?,
        norm: NormSpec {
            kind: NormKind::Layer,
            eps: f.positive_or("layer_norm_epsilon", 1e-5)? as f32,
            place: NormPlace::Before,
        },
        causal: true,
        token_types: 0,
        qk_norm: false,
        positions: PositionSpec::Learned,
        activation: activation(f, "activation_function", "gelu_new")?,
        gated: false,
        attention_scale: AttentionScale {
            base: if scaled { inverse_sqrt(head_dim) } else { 1.0 },
            by_layer: f.flag_or("scale_attn_by_inverse_layer_idx", false)?,
        },
        window: WindowSpec::Full,
        tied_embeddings: f.flag_or("tie_word_embeddings", true)?,
        conv1d: true,
        stages,
        names: Names {
            prefix: "transformer.",
            embedding: "wte",
            positions: "wpe",
            token_types: "",
            embedding_norm: "",
            layers: "h",
            attention_norm: "ln_1",
            mlp_norm: "ln_2",
            q_norm: "",
            k_norm: "",
            final_norm: "ln_f",
            head: "lm_head",
        },
        bos: f.token_ids("bos_token_id", vocab_size)?.first().copied(),
        eos: f.token_ids("eos_token_id", vocab_size)?,
    })
}

fn bert(f: Fields<'_>) -> Result<ArchSpec, ConfigError> {
    let hidden = f.count("hidden_size")?;
    let inner = f.count("intermediate_size")?;
    let heads = f.count("num_attention_heads")?;
    if !hidden.is_multiple_of(heads) {
        return Err(f.bad(
            "num_attention_heads",
            format!("a divisor of hidden_size {hidden}"),
            &heads.into(),
        ));
    }
    for flag in ["is_decoder", "add_cross_attention"] {
        if f.flag_or(flag, false)? {
            return Err(f.bad(flag, "false: BERT runs as an encoder", &true.into()));
        }
    }
    if let Some(kind) = f.text("position_embedding_type")?.filter(|kind| *kind != "absolute") {
        return Err(f.bad("position_embedding_type", "absolute", &kind.into()));
    }
    let head_dim = hidden / heads;
    let linear = |name, out_features, in_features, because| LinearSpec {
        name,
        out_features,
        in_features,
        bias: true,
        because,
    };
    let mlp_why = "intermediate_size and hidden_size";
    let stages = vec![
        Stage {
            kind: StageKind::Qkv,
            linears: vec![
                linear("attention.self.query", hidden, hidden, "hidden_size"),
                linear("attention.self.key", hidden, hidden, "hidden_size"),
                linear("attention.self.value", hidden, hidden, "hidden_size"),
            ],
        },
        Stage {
            kind: StageKind::AttentionOut,
            linears: vec![linear("attention.output.dense", hidden, hidden, "hidden_size")],
        },
        Stage { kind: StageKind::MlpIn, linears: vec![linear("intermediate.dense", inner, hidden, mlp_why)] },
        Stage { kind: StageKind::MlpOut, linears: vec![linear("output.dense", hidden, inner, mlp_why)] },
    ];
    Ok(ArchSpec {
        model_type: "bert",
        vocab_size: f.count("vocab_size")?,
        hidden_size: hidden,
        layers: f.count("num_hidden_layers")?,
        heads,
        kv_heads: heads,
        head_dim,
        intermediate_size: inner,
        max_positions: f.count_or("max_position_embeddings", 512)?,
        norm: NormSpec {
            kind: NormKind::Layer,
            eps: f.positive_or("layer_norm_eps", 1e-12)? as f32,
            place: NormPlace::After,
        },
        causal: false,
        token_types: f.count_or("type_vocab_size", 2)?,
        qk_norm: false,
        positions: PositionSpec::Learned,
        activation: activation(f, "hidden_act", "gelu")?,
        gated: false,
        attention_scale: AttentionScale { base: inverse_sqrt(head_dim), by_layer: false },
        window: WindowSpec::Full,
        tied_embeddings: false,
        conv1d: false,
        stages,
        names: Names {
            prefix: "bert.",
            embedding: "embeddings.word_embeddings",
            positions: "embeddings.position_embeddings",
            token_types: "embeddings.token_type_embeddings",
            embedding_norm: "embeddings.LayerNorm",
            layers: "encoder.layer",
            attention_norm: "attention.output.LayerNorm",
            mlp_norm: "output.LayerNorm",
            q_norm: "",
            k_norm: "",
            final_norm: "",
            head: "",
        },
        bos: None,
        eos: Vec::new(),
    })
}

fn head_dim(f: Fields<'_>, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
    let dim = match f.optional_count("head_dim")? {
        Some(dim) => dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let expected = format!("a divisor of hidden_size {hidden}, or head_dim beside it");
            return Err(f.bad("num_attention_heads", expected, &heads.into()));
        }
    };
    // The cap bounds the tables of angles, which are made before any tensor has confirmed the size.
    if dim % 2 == 1 || dim > 1 << 16 {
        return Err(f.bad("head_dim", "an even number of at most 65536, for rope turns pairs", &dim.into()));
    }
    Ok(dim)
}

fn inverse_sqrt(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}

fn activation(f: Fields<'_>, name: &str, default: &str) -> Result<Activation, ConfigError> {
    Ok(match f.text(name)?.unwrap_or(default) {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        found => {
            let expected = "an activation of silu, gelu, gelu_new, gelu_pytorch_tanh, relu";
            return Err(f.bad(name, expected, &found.into()));
        }
    })
}
