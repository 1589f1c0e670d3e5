"""Writes variants.safetensors and variants.json: tiny random models with every option of a configuration that changes
the forward pass, and their logits. Run with transformers 5.23.0 and torch 2.15.0 on a CPU:

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python make_variants.py
"""
import json
import os

import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

torch.set_num_threads(1)
LEN = 24
base = dict(vocab_size=32, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2)
short = {**base, "max_position_embeddings": 16}
gpt2 = dict(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2, bos_token_id=1,
            eos_token_id=2)
qwen = dict(head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=1)


def rope(kind, **rest):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **rest))


VARIANTS = {
    "llama-biases": LlamaConfig(**base, attention_bias=True, mlp_bias=True),
    "llama-gelu-wide-heads-tied": LlamaConfig(**base, head_dim=6, hidden_act="gelu", tie_word_embeddings=True),
    "llama-relu-multihead": LlamaConfig(**{**base, "num_key_value_heads": 4}, hidden_act="relu"),
    "llama-linear": LlamaConfig(**base, **rope("linear", factor=3.0)),
    "llama-dynamic": LlamaConfig(**short, **rope("dynamic", factor=2.0)),
    "llama-llama3": LlamaConfig(**base, **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                               original_max_position_embeddings=16)),
    "llama-yarn": LlamaConfig(**base, **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral-wide-heads": MistralConfig(**base, head_dim=8, sliding_window=None),
    "mistral-window": MistralConfig(**base, sliding_window=5),
    "qwen2-window": Qwen2Config(**base, **{k: v for k, v in qwen.items() if k != "head_dim"}),
    "qwen3-window-biases": Qwen3Config(**base, **qwen, attention_bias=True),
    "qwen3-tanh": Qwen3Config(**base, head_dim=8, hidden_act="gelu_pytorch_tanh"),
    "gpt2-scale-by-layer": GPT2Config(**gpt2, scale_attn_by_inverse_layer_idx=True),
    "gpt2-unscaled-untied": GPT2Config(**gpt2, scale_attn_weights=False, tie_word_embeddings=False, n_inner=24,
                                       activation_function="relu"),
    "gpt2-gelu": GPT2Config(**gpt2, activation_function="gelu"),
}

here = os.path.dirname(os.path.abspath(__file__))
tensors, configs = {}, {}
for seed, (name, config) in enumerate(VARIANTS.items()):
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    ids = torch.randint(0, 32, (1, LEN))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
        logits = model(input_ids=ids, use_cache=False).logits[0]
    tied = config.tie_word_embeddings
    state = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    tensors |= {f"{name}/{k}": v.contiguous() for k, v in state.items()}
    tensors |= {f"{name}/input_ids": ids[0].int(), f"{name}/logits": logits.contiguous()}
    configs[name] = config.to_dict()
    print(name, float(logits.std()))
save_file(tensors, os.path.join(here, "variants.safetensors"))
versions = {m.__name__: m.__version__ for m in (transformers, torch, safetensors)}
call = "AutoModelForCausalLM.from_config(config).float(), eager attention, float32, seed = index of the variant"
with open(os.path.join(here, "variants.json"), "w") as f:
    json.dump({"versions": versions, "call": call, "configs": configs}, f, indent=1)
    f.write("\n")
