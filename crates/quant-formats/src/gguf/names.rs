//! Names of tensors in GGUF files and in Hugging Face checkpoints.

/// Names of one family of architectures. A module `m` has the tensors `m.weight` and `m.bias` in both.
#[derive(Debug)]
pub(super) struct Names {
    /// Prefix of all modules but those of `bare`; some checkpoints come without.
    prefix: &'static str,
    /// Modules outside the blocks: Hugging Face, GGUF.
    outer: &'static [(&'static str, &'static str)],
    /// The same without prefix.
    bare: &'static [(&'static str, &'static str)],
    /// The list of blocks.
    layers: &'static str,
    /// Modules of a block.
    block: &'static [(&'static str, &'static str)],
}

/// The list of blocks in GGUF.
const BLOCKS: &str = "blk";

pub(super) const LLAMA: Names = Names {
    prefix: "model.",
    outer: &[("embed_tokens", "token_embd"), ("norm", "output_norm")],
    bare: &[("lm_head", "output")],
    layers: "layers",
    block: &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ],
};

pub(super) const GPT2: Names = Names {
    prefix: "transformer.",
    outer: &[("wte", "token_embd"), ("wpe", "position_embd"), ("ln_f", "output_norm")],
    bare: &[("lm_head", "output")],
    layers: "h",
    block: &[
        ("ln_1", "attn_norm"),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("ln_2", "ffn_norm"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
    ],
};

pub(super) const BERT: Names = Names {
    prefix: "bert.",
    outer: &[
        ("embeddings.word_embeddings", "token_embd"),
        ("embeddings.position_embeddings", "position_embd"),
        ("embeddings.token_type_embeddings", "token_types"),
        ("embeddings.LayerNorm", "token_embd_norm"),
    ],
    bare: &[],
    layers: "encoder.layer",
    block: &[
        ("attention.self.query", "attn_q"),
        ("attention.self.key", "attn_k"),
        ("attention.self.value", "attn_v"),
        ("attention.output.dense", "attn_output"),
        ("attention.output.LayerNorm", "attn_output_norm"),
        ("intermediate.dense", "ffn_up"),
        ("output.dense", "ffn_down"),
        ("output.LayerNorm", "layer_output_norm"),
    ],
};

/// The number of a block and what is below it, of `LAYERS.NUMBER.MODULE`.
fn split_block<'a>(module: &'a str, layers: &str) -> Option<(&'a str, &'a str)> {
    let (number, rest) = module.strip_prefix(layers)?.strip_prefix('.')?.split_once('.')?;
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    plain.then_some((number, rest))
}

impl Names {
    /// The module in a GGUF file, of one in a checkpoint with or without prefix.
    pub(super) fn to_gguf(&self, module: &str) -> Option<String> {
        let find =
            |list: &[(&str, &'static str)], m: &str| list.iter().find(|(hf, _)| *hf == m).map(|(_, g)| *g);
        if let Some(name) = find(self.bare, module) {
            return Some(name.to_owned());
        }
        let module = module.strip_prefix(self.prefix).unwrap_or(module);
        if let Some((number, rest)) = split_block(module, self.layers) {
            return find(self.block, rest).map(|name| format!("{BLOCKS}.{number}.{name}"));
        }
        find(self.outer, module).map(str::to_owned)
    }

    /// The module in a checkpoint, of one in a GGUF file, with `prefix` where the family has one.
    pub(super) fn to_hf(&self, module: &str) -> Option<String> {
        let find =
            |list: &[(&'static str, &str)], m: &str| list.iter().find(|(_, g)| *g == m).map(|(hf, _)| *hf);
        if let Some(name) = find(self.bare, module) {
            return Some(name.to_owned());
        }
        if let Some((number, rest)) = split_block(module, BLOCKS) {
            return find(self.block, rest)
                .map(|name| format!("{}{}.{number}.{name}", self.prefix(), self.layers));
        }
        find(self.outer, module).map(|name| format!("{}{name}", self.prefix()))
    }

    /// Encoders come without their prefix from the library's own `save_pretrained`.
    fn prefix(&self) -> &'static str {
        if self.prefix == "bert." { "" } else { self.prefix }
    }

    /// The part below its block of a module of a checkpoint.
    pub(super) fn below_block<'a>(&self, module: &'a str) -> Option<&'a str> {
        split_block(module.strip_prefix(self.prefix).unwrap_or(module), self.layers).map(|(_, rest)| rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        for names in [LLAMA, GPT2, BERT] {
            for (hf, gguf) in names.block {
                let module = format!("{}{}.12.{hf}", names.prefix(), names.layers);
                let name = names.to_gguf(&module).unwrap();
                assert_eq!(name, format!("blk.12.{gguf}"));
                assert_eq!(names.to_hf(&name), Some(module));
            }
            for (_, gguf) in names.outer.iter().chain(names.bare) {
                assert_eq!(names.to_gguf(&names.to_hf(gguf).unwrap()).as_deref(), Some(*gguf));
            }
        }
        assert_eq!(LLAMA.to_gguf("layers.0.mlp.up_proj").as_deref(), Some("blk.0.ffn_up"));
        assert_eq!(BERT.to_gguf("bert.embeddings.LayerNorm").as_deref(), Some("token_embd_norm"));
        for unknown in
            ["model.layers.x.mlp.up_proj", "model.layers.0", "model.layers..norm", "norm.weight", ""]
        {
            assert_eq!(LLAMA.to_gguf(unknown), None, "{unknown}");
        }
        assert_eq!(LLAMA.below_block("model.layers.3.self_attn.q_proj"), Some("self_attn.q_proj"));
    }
}
