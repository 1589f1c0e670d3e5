//! `config.json` of a generated model.

use serde_json::{Value, json};

use super::{Arch, Checkpoint, Storage};

impl Checkpoint {
    /// The content of `config.json`.
    pub fn config(&self) -> Value {
        let shape = &self.shape;
        let dtype = match self.storage {
            Storage::Bf16 => "bfloat16",
            Storage::F16 => "float16",
            Storage::F32 => "float32",
        };
        let mut config = if shape.arch == Arch::Gpt2 { self.gpt2_config() } else { self.llama_config() };
        config["model_type"] = json!(shape.arch.model_type());
        config["vocab_size"] = json!(shape.vocab);
        config["tie_word_embeddings"] = json!(shape.tied);
        config["torch_dtype"] = json!(dtype);
        config
    }

    fn gpt2_config(&self) -> Value {
        let shape = &self.shape;
        let last = shape.vocab.saturating_sub(1);
        json!({
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "bos_token_id": last,
            "eos_token_id": last,
            "layer_norm_epsilon": 1e-5,
            "n_ctx": shape.positions,
            "n_embd": shape.hidden,
            "n_head": shape.heads,
            "n_inner": if shape.ffn == 4 * shape.hidden { Value::Null } else { json!(shape.ffn) },
            "n_layer": shape.layers,
            "n_positions": shape.positions,
        })
    }

    fn llama_config(&self) -> Value {
        let shape = &self.shape;
        let class = match shape.arch {
            Arch::Mistral => "MistralForCausalLM",
            Arch::Qwen2 => "Qwen2ForCausalLM",
            Arch::Qwen3 => "Qwen3ForCausalLM",
            Arch::Llama | Arch::Gpt2 => "LlamaForCausalLM",
        };
        let mut config = json!({
            "architectures": [class],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "max_position_embeddings": shape.positions,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": shape.rope_theta,
        });
        match shape.arch {
            Arch::Mistral => config["sliding_window"] = Value::Null,
            Arch::Qwen2 | Arch::Qwen3 => config["use_sliding_window"] = json!(false),
            Arch::Llama | Arch::Gpt2 => {}
        }
        config
    }
}
