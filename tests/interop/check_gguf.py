"""Holds a GGUF file that `quant` wrote against gguf-py and, if it is installed, llama.cpp.

    python check_gguf.py MODEL.gguf WEIGHTS.safetensors [LOGITS.safetensors --ids 1,2,3]

WEIGHTS is the output of `quant dequantize MODEL.gguf --like-peer`, LOGITS that of `quant logits MODEL.gguf`. Every weight
must be equal to the bit. llama.cpp rounds activations to 8 bits before each product with quantized weights (and keys
and values to f16), so logits are compared by how far they point in the same direction: for a file of floats the
relative distance must be below 2 %, for quantized ones below 10 %; a wrong order of rows gives about 100 %.
"""
import argparse
import sys

import gguf
import numpy as np
from safetensors.numpy import load_file

BLOCK = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}
OUTER = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
}


def in_file(name):
    """The name in the file of a tensor of the checkpoint."""
    module, part = name.rsplit(".", 1)
    for prefix in ("model.layers.", "transformer.h."):
        if module.startswith(prefix):
            number, rest = module[len(prefix):].split(".", 1)
            return f"blk.{number}.{BLOCK[rest]}.{part}"
    return f"{OUTER[module]}.{part}"


def field(reader, key, default=None):
    found = reader.fields.get(key)
    return default if found is None else found.contents()


def check_weights(reader, ours):
    arch = field(reader, "general.architecture")
    heads = field(reader, f"{arch}.attention.head_count")
    kv_heads = field(reader, f"{arch}.attention.head_count_kv", heads)
    theirs = {t.name: t for t in reader.tensors}
    print(f"{arch}, {len(theirs)} tensors: {sorted({t.tensor_type.name for t in theirs.values()})}")
    failures = 0
    for name, weight in ours.items():
        tensor = theirs.pop(in_file(name))
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        n = heads if "q_proj" in name else kv_heads if "k_proj" in name else None
        if arch == "llama" and n:
            dim = value.shape[0] // n
            value = value.reshape(n, dim // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if value.shape != weight.shape:
            value = value.T
        if not np.array_equal(value.view(np.uint32), np.ascontiguousarray(weight).view(np.uint32)):
            print(f"  {name}: differs by at most {np.abs(value - weight).max()}")
            failures += 1
    theirs.pop("rope_freqs.weight", None)
    if theirs:
        print("  not in our output:", sorted(theirs))
    print(f"weights: {len(ours) - failures} of {len(ours)} equal to the bit")
    return not failures and not theirs


def check_logits(path, ours, ids, quantized):
    try:
        import llama_cpp
    except ImportError:
        print("llama-cpp-python is not installed: logits not compared")
        return True
    llama = llama_cpp.Llama(path, n_ctx=max(64, len(ids)), logits_all=True, verbose=False)
    llama.eval(ids)
    theirs = np.array(llama.scores[:len(ids)])
    distance = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
    limit = 0.10 if quantized else 0.02
    same = (theirs.argmax(1) == ours.argmax(1)).sum()
    print(f"llama.cpp {llama_cpp.__version__}: logits {100 * distance:.3f} % apart, {100 * limit:.0f} % allowed; "
          f"{same} of {len(ids)} greatest tokens agree")
    return distance < limit


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("weights")
    parser.add_argument("logits", nargs="?")
    parser.add_argument("--ids", default="")
    args = parser.parse_args()
    reader = gguf.GGUFReader(args.model)
    ok = check_weights(reader, load_file(args.weights))
    if args.logits:
        quantized = any(t.tensor_type.name not in ("F32", "F16", "BF16") for t in reader.tensors)
        ids = [int(n) for n in args.ids.split(",")]
        ok &= check_logits(args.model, load_file(args.logits)["logits"], ids, quantized)
    sys.exit(not ok)


if __name__ == "__main__":
    main()
