#!/usr/bin/env python3
"""Make fixtures/golden/ct-mixed: one model that mixes the formats of compressed-tensors, module by module.

  python make_golden_ct.py DIR_OF_GOLDEN

Needs torch, transformers 5.x, safetensors, compressed-tensors 0.20.0. DIR_OF_GOLDEN must hold base-llama.
"""
import json
import os
import sys
from importlib.metadata import version

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

FP4 = dict(num_bits=4, type="float", symmetric=True, dynamic=False)
FP8 = dict(num_bits=8, type="float", symmetric=True, dynamic=False)
MX = dict(strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8)


def integers(bits, group=None, symmetric=True):
    strategy = "group" if group else "channel"
    return dict(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group, dynamic=False)


# Module of a layer -> format and arguments of its weight.
LAYERS = [
    {
        "self_attn.q_proj": ("nvfp4-pack-quantized", dict(**FP4, strategy="tensor_group", group_size=16)),
        "self_attn.k_proj": ("mxfp4-pack-quantized", dict(**FP4, **MX)),
        "self_attn.v_proj": ("naive-quantized", dict(**FP8, strategy="channel")),
        "self_attn.o_proj": ("naive-quantized", dict(**FP8, strategy="block", block_structure=[128, 128])),
        "mlp.gate_proj": ("mxfp8-quantized", dict(**FP8, **MX)),
        "mlp.up_proj": ("mxfp6-pack-quantized", dict(num_bits=6, type="float", symmetric=True, dynamic=False, **MX)),
        "mlp.down_proj": ("pack-quantized", integers(3, 32, symmetric=False)),
    },
    {
        "self_attn.q_proj": ("pack-quantized", integers(5)),
        "self_attn.k_proj": ("pack-quantized", integers(6, 64)),
        "self_attn.v_proj": ("pack-quantized", integers(7, 32, symmetric=False)),
        "self_attn.o_proj": ("pack-quantized", integers(2, 16)),
        "mlp.gate_proj": ("naive-quantized", dict(**FP8, strategy="tensor")),
        "mlp.up_proj": ("naive-quantized", integers(8, symmetric=False)),
        "mlp.down_proj": ("nvfp4-pack-quantized", dict(**FP4, strategy="tensor_group", group_size=16)),
    },
]


def extremes(w, args):
    """Least and greatest element of each group, in the shape of its scale."""
    rows, cols = w.shape
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "tensor":
        parts = w.reshape(1, -1)
        return parts.amin(1), parts.amax(1)
    if strategy == "block":
        r, c = args.block_structure
        w = torch.nn.functional.pad(w, (0, -cols % c, 0, -rows % r))
        parts = w.reshape(w.shape[0] // r, r, w.shape[1] // c, c)
        return parts.amin((1, 3)), parts.amax((1, 3))
    parts = w.reshape(rows, -1, args.group_size if "group" in strategy else cols)
    return parts.amin(2), parts.amax(2)


def calibrate(module, args):
    w = module.weight.data
    low, high = extremes(w, args)
    factor = None
    if hasattr(module, "weight_global_scale"):
        factor = generate_gparam(w.amin(), w.amax())
        module.weight_global_scale.data = factor
    scale, zero = calculate_qparams(low, high, args, global_scale=factor)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
    if hasattr(module, "weight_zero_point"):
        zero = zero.reshape(module.weight_zero_point.shape)
        module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)


def main(golden):
    base, out = os.path.join(golden, "base-llama"), os.path.join(golden, "ct-mixed")
    os.makedirs(out, exist_ok=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    groups, formats = {}, {}
    for i, layer in enumerate(LAYERS):
        for name, (kind, args) in layer.items():
            path = f"model.layers.{i}.{name}"
            formats[path] = kind
            scheme = QuantizationScheme(targets=[path], weights=QuantizationArgs(**args), format=kind)
            groups[f"group_{len(groups)}"] = scheme
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="mixed-precision")
    apply_quantization_config(model, config)
    for path in formats:
        module = model.get_submodule(path)
        calibrate(module, module.quantization_scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})

    expected, floats = {}, dict(load_file(os.path.join(base, "model.safetensors")))
    for path, kind in formats.items():
        module = model.get_submodule(path)
        local = {k[len(path) + 1:]: v for k, v in state.items() if k.startswith(path + ".")}
        codec = BaseCompressor.get_value_from_registry(kind)
        weight = codec.decompress(local, module.quantization_scheme)["weight"].float()
        floats[path + ".weight"] = weight
        expected["dequant." + path] = weight.contiguous()
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    fresh.load_state_dict({k: v.float() for k, v in floats.items()}, strict=False)
    fresh.tie_weights()
    ids = load_file(os.path.join(base, "expected.safetensors"))["input_ids"]
    with torch.no_grad():
        expected["logits"] = fresh.eval()(input_ids=ids[None].long(), use_cache=False).logits[0].contiguous()
    expected["input_ids"] = ids
    save_file(expected, os.path.join(out, "expected.safetensors"))

    with open(os.path.join(base, "config.json")) as f:
        model_config = json.load(f)
    model_config["quantization_config"] = json.loads(config.model_dump_json())
    model_config["quantization_config"]["version"] = version("compressed-tensors")
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(model_config, f, indent=2)
    with open(os.path.join(out, "meta.json"), "w") as f:
        json.dump({
            "package": "compressed-tensors",
            "version": version("compressed-tensors"),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "call": "tests/interop/make_golden_ct.py: QuantizationConfig of one group per module, "
                    "ModelCompressor.compress_model; dequant.* by the compressors' decompress",
            "base": "base-llama",
            "formats": formats,
        }, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
