#!/usr/bin/env python3
"""Make golden checkpoints of layouts that no library writes on a CPU, with the libraries' own packers.

  python make_golden_packers.py awq   DIR_OF_GOLDEN SOURCES_OF_AUTOAWQ_0.2.9     # awq-gemv-fast-b4-g64
  python make_golden_packers.py gptq  DIR_OF_GOLDEN SOURCES_OF_GPTQMODEL_7.7.0   # gptq-p-b5-g64-asym

Needs torch, transformers 5.x, safetensors, and the unpacked source packages, of which one file each runs:
awq/modules/linear/gemv_fast.py and gptqmodel/utils/planar_packing.py. Codes are round to nearest. dequant.* is
computed here: of AWQ scale * code, rounded to float16, plus qzeros, rounded again; of GPTQ (code - zero) * scale in
float16.
"""
import json
import os
import sys
import types

import torch
import transformers
from safetensors.torch import load_file, save_file

GROUP = 64


def load(sources, file):
    """One file of a package, without the package around it."""
    module = types.ModuleType(os.path.basename(file))
    with open(os.path.join(sources, file)) as f:
        exec(compile(f.read(), file, "exec"), module.__dict__)
    return module


def quantize(w, bits):
    """Codes, scales [out, groups] in float16, zero points."""
    top = 2**bits - 1
    groups = w.reshape(w.shape[0], -1, GROUP)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low).clamp(min=1e-5) / top).half()
    zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, top).reshape(w.shape), scales, zeros


def spread(t):
    return t.repeat_interleave(GROUP, 1)


class Awq:
    name, bits = f"awq-gemv-fast-b4-g{GROUP}", 4
    meta = {"package": "autoawq", "version": "0.2.9", "packer": "WQLinear_GEMVFast.from_linear"}
    config = {
        "bits": 4, "group_size": GROUP, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemv_fast",
        "zero_point": True,
    }

    def __init__(self, sources):
        for name in ("awq", "awq.utils", "awq.utils.module"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["awq.utils.module"].try_import = lambda name: (None, "")
        self.layer = load(sources, "awq/modules/linear/gemv_fast.py").WQLinear_GEMVFast

    def pack(self, linear, codes, scales, zeros):
        linear.weight.data = (codes - spread(zeros)) * spread(scales.float())
        packed = self.layer.from_linear(linear, 4, GROUP, scales=scales, zeros=zeros)
        shifts = packed.qzeros.T[:, : scales.shape[1]]
        weight = (spread(scales) * codes.half()) + spread(shifts)
        return {part: getattr(packed, part) for part in ("qweight", "qzeros", "scales")}, weight


class Gptq:
    name, bits = f"gptq-p-b5-g{GROUP}-asym", 5
    meta = {"package": "gptqmodel", "version": "7.7.0", "packer": "planar_pack_rows, planar_pack_cols"}
    config = {
        "bits": 5, "group_size": GROUP, "desc_act": False, "lm_head": False, "method": "gptq", "quant_method": "gptq",
        "format": "gptq_p", "checkpoint_format": "gptq_p", "pack_dtype": "int32", "sym": False,
    }

    def __init__(self, sources):
        self.packing = load(sources, "gptqmodel/utils/planar_packing.py")

    def pack(self, linear, codes, scales, zeros):
        rows = self.packing.planar_pack_rows(codes.T.int().contiguous(), self.bits)
        cols = self.packing.planar_pack_cols(zeros.T.int().contiguous(), self.bits)
        weight = (codes - spread(zeros)).half() * spread(scales)
        g_idx = torch.arange(codes.shape[1], dtype=torch.int32) // GROUP
        return {"qweight": rows, "qzeros": cols, "scales": scales.T.contiguous(), "g_idx": g_idx}, weight


def main(layout, golden):
    base, out = os.path.join(golden, "base-llama"), os.path.join(golden, layout.name)
    os.makedirs(out, exist_ok=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    expected = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        parts, weight = layout.pack(linear, *quantize(linear.weight.data, layout.bits))
        del state[name + ".weight"]
        state.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        expected["dequant." + name] = weight.contiguous()
        linear.weight.data = weight.float()
    ids = load_file(os.path.join(base, "expected.safetensors"))["input_ids"]
    with torch.no_grad():
        expected["logits"] = model(input_ids=ids[None].long(), use_cache=False).logits[0].contiguous()
    expected["input_ids"] = ids
    save_file(state, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    save_file(expected, os.path.join(out, "expected.safetensors"))
    with open(os.path.join(base, "config.json")) as f:
        config = json.load(f)
    config["quantization_config"] = layout.config
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
    meta = {**layout.meta, "torch": torch.__version__.split("+")[0], "base": "base-llama",
            "call": "tests/interop/make_golden_packers.py: round to nearest, then the packer; dequant.* by definition"}
    with open(os.path.join(out, "meta.json"), "w") as f:
        json.dump(meta, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    kinds = {"awq": Awq, "gptq": Gptq}
    if len(sys.argv) != 4 or sys.argv[1] not in kinds:
        sys.exit(__doc__)
    main(kinds[sys.argv[1]](sys.argv[3]), sys.argv[2])
