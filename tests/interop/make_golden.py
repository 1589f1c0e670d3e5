#!/usr/bin/env python3
"""Make the reference data in fixtures/golden that comes from transformers alone.

  python make_golden.py base   DIR_OF_GOLDEN   # base-mistral and base-qwen2: tiny random float models with their logits
  python make_golden.py rope   DIR_OF_GOLDEN   # rope: cos/sin tables of every rotary variant

Needs torch, transformers 5.x, safetensors. DIR_OF_GOLDEN must hold base-llama, whose tokenizer files are copied.
The same seed and versions give the same files; meta.json of every folder names the versions that were used.
"""
import json
import os
import shutil
import sys

import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

VERSIONS = {
    "transformers": transformers.__version__,
    "torch": torch.__version__.split("+")[0],
    "safetensors": safetensors.__version__,
}

# The size of base-llama: large enough for groups of 128, small enough to commit.
SIZE = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)
MODELS = {
    # The window is shorter than the 24 reference tokens, so a reader that ignores it is found out.
    "base-mistral": (15, MistralConfig(
        **SIZE, sliding_window=8, tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    "base-qwen2": (16, Qwen2Config(
        **{k: v for k, v in SIZE.items() if k != "head_dim"}, tie_word_embeddings=False, rms_norm_eps=1e-6,
        use_sliding_window=False, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})),
}


def exact(t):
    """Round to numbers that float16 and bfloat16 both hold, so that no later cast changes them."""
    return t.to(torch.bfloat16).to(torch.float16).float()


def randomize(model, seed):
    """Fill every parameter with random numbers and plant outliers in a few rows and norm channels."""
    gen = torch.Generator().manual_seed(seed)
    normal = lambda shape: torch.randn(shape, generator=gen)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "norm" in name:
                value = 1 + 0.1 * normal(p.shape)
                value[torch.randperm(len(value), generator=gen)[:3]] *= 3 + 5 * torch.rand(3, generator=gen)
            elif name.endswith(".bias"):
                value = 0.5 * normal(p.shape)
            elif name.endswith("embed_tokens.weight"):
                value = 0.12 * normal(p.shape)
            else:
                value = 0.088 * normal(p.shape)
                rows = torch.randperm(p.shape[0], generator=gen)[:2]
                value[rows] *= 2 + 2 * torch.rand(2, 1, generator=gen)
            p.copy_(exact(value))
    return gen


def forward(config, weights, ids, **changes):
    """Logits [tokens, vocab] of the float32 forward with masks applied by plain (eager) attention."""
    config = type(config)(**{**config.to_dict(), **changes})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(input_ids=ids[None].long(), use_cache=False).logits[0].contiguous()


def make_base(out):
    """Write base-mistral and base-qwen2 below `out`."""
    torch.set_num_threads(1)
    for name, (seed, config) in MODELS.items():
        folder = os.path.join(out, name)
        os.makedirs(folder, exist_ok=True)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        gen = randomize(model, seed)
        ids = torch.randint(3, config.vocab_size, (24,), generator=gen)
        calib = torch.randint(3, config.vocab_size, (64, 64), generator=gen)
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        logits = forward(config, weights, ids)
        checks = {"logits_std": round(logits.std().item(), 4)}
        if getattr(config, "sliding_window", None):
            window = config.sliding_window
            for other in (None, window - 1, window + 1):
                changed = (forward(config, weights, ids, sliding_window=other) - logits).abs().amax(-1)
                checks[f"max_abs_diff_if_window_{other}"] = round(changed.max().item(), 4)
                same_until = int((changed > 0).nonzero()[0])
                checks[f"first_position_that_differs_if_window_{other}"] = same_until
                assert same_until == min(window, other or window), "the window was not applied as documented"
        else:
            no_bias = {k: torch.zeros_like(v) if k.endswith(".bias") else v for k, v in weights.items()}
            checks["max_abs_diff_without_biases"] = round((forward(config, no_bias, ids) - logits).abs().max().item(), 4)

        model.half().save_pretrained(folder)
        path = os.path.join(folder, "config.json")
        saved = json.load(open(path))
        saved["torch_dtype"] = saved["dtype"] = "float16"
        write_json(path, saved)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(os.path.join(out, "base-llama", file), os.path.join(folder, file))
        save_file({"input_ids": ids.long(), "logits": logits, "calib_input_ids": calib.int()},
                  os.path.join(folder, "expected.safetensors"))
        write_json(os.path.join(folder, "meta.json"), {
            "versions": VERSIONS,
            "made_by": "tests/interop/make_golden.py base",
            "seed": seed,
            "call": f"{type(config).__name__.replace('Config', 'ForCausalLM')}, weights exact in float16 and bfloat16, float32 forward, "
                    "attn_implementation='eager', use_cache=False",
            "checks": checks,
        })
        print(name, checks)


LENGTH, HEAD_DIM = 64, 64
# name -> (max_position_embeddings, rope_theta, scaling fields)
ROPE = {
    "default": (2048, 10000.0, {"rope_type": "default"}),
    "default_theta1e6": (2048, 1000000.0, {"rope_type": "default"}),
    "linear": (2048, 10000.0, {"rope_type": "linear", "factor": 4.0}),
    "dynamic_within": (128, 10000.0, {"rope_type": "dynamic", "factor": 2.0}),
    "dynamic_beyond": (32, 10000.0, {"rope_type": "dynamic", "factor": 2.0}),
    "llama3": (131072, 500000.0, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 8192}),
    "yarn": (16384, 10000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}),
    "yarn_mscale": (16384, 10000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096,
                                     "mscale": 1.0, "mscale_all_dim": 0.5}),
    "yarn_attention_factor": (16384, 10000.0, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25,
                                               "original_max_position_embeddings": 4096}),
    "yarn_betas_no_truncate": (16384, 10000.0, {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0,
                                                "truncate": False, "original_max_position_embeddings": 4096}),
}


def rope_tables(config, length=LENGTH):
    """cos and sin [length, D/2], inv_freq [D/2] and the factor on cos and sin, as the Llama model computes them."""
    rope = LlamaRotaryEmbedding(config)
    cos, sin = rope(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    half = HEAD_DIM // 2
    assert torch.equal(cos[..., :half], cos[..., half:]), "the two halves of a head share their angles"
    return {
        "cos": cos[0, :, :half].contiguous(), "sin": sin[0, :, :half].contiguous(),
        "inv_freq": rope.inv_freq.float().clone(), "attention_factor": torch.tensor([float(rope.attention_scaling)]),
    }


def make_rope(out):
    """Write rope/ below `out`."""
    folder = os.path.join(out, "rope")
    os.makedirs(folder, exist_ok=True)
    tensors, cases = {}, {}
    for name, (limit, theta, scaling) in ROPE.items():
        common = dict(hidden_size=HEAD_DIM * 4, num_attention_heads=4, head_dim=HEAD_DIM, max_position_embeddings=limit)
        new = {**common, "rope_parameters": {"rope_theta": theta, **scaling}}
        old = {**common, "rope_theta": theta,
               "rope_scaling": None if scaling["rope_type"] == "default" else scaling}
        table = rope_tables(LlamaConfig(**new))
        for key, value in rope_tables(LlamaConfig(**old)).items():
            assert torch.equal(table[key], value), f"{name}: old and new spelling of the config disagree on {key}"
        for key, value in table.items():
            tensors[f"{name}.{key}"] = value
        cases[name] = {"config": new, "config_before_5": old, "length": LENGTH}
    # Dynamic scaling depends on the length in use: the same config at a second length beyond its limit.
    limit, theta, scaling = ROPE["dynamic_beyond"]
    config = dict(hidden_size=HEAD_DIM * 4, num_attention_heads=4, head_dim=HEAD_DIM, max_position_embeddings=limit,
                  rope_parameters={"rope_theta": theta, **scaling})
    for key, value in rope_tables(LlamaConfig(**config), 48).items():
        tensors[f"dynamic_beyond_48.{key}"] = value
    cases["dynamic_beyond_48"] = {"config": config, "length": 48}

    save_file(tensors, os.path.join(folder, "expected.safetensors"))
    write_json(os.path.join(folder, "meta.json"), {
        "versions": VERSIONS,
        "made_by": "tests/interop/make_golden.py rope",
        "call": "LlamaRotaryEmbedding(LlamaConfig(**config))(x, arange(length)), float32; columns 0..D/2 (the second half is equal)",
        "tensors": "CASE.cos and CASE.sin [length, D/2] (already times the attention factor), CASE.inv_freq [D/2], CASE.attention_factor [1]",
        "accuracy": "angles are float32 products: an exact table differs by up to position * inv_freq * 2^-23, at most 1e-5 here",
        "cases": cases,
    })
    print("rope", len(tensors), "tensors")


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("base", "rope"):
        sys.exit(__doc__)
    {"base": make_base, "rope": make_rope}[sys.argv[1]](sys.argv[2])
