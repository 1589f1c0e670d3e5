#!/usr/bin/env python3
"""Write every layout with `quant` and read it with the library that defines it, on a CPU.

  python load_with_peers.py --quant target/release/quant --work DIR MODEL [MODEL ...] [--only WORD ...]
  python load_with_peers.py --quant target/release/quant --work DIR MODEL [MODEL ...] --library gptqmodel

MODEL is a float checkpoint of the Llama architecture. Layouts of integers are made from it with `quant quantize` (round
to nearest). Values that `quant` does not round to itself are rounded by bitsandbytes and compressed-tensors, and their
directories go through `quant convert`. Every case is a line of JSON: the layout, the library with its version, and

  equal    weights that have the bits of the library's own, of `layers`; ours are those of `quant dequantize --like-peer`
  apart    largest difference of the logits of `quant logits` from those of the library's weights in a float32 forward
           pass of transformers: the smaller one of two, with the weights as the library rounds them (A), and with exact
           ones (B), which may differ from A's by what the library's type of computation rounds
  allowed  16 * |A - A64|, A64 being A with float64 products: how far apart two orders of summation are, with room for
           other exp and sin functions
  native   largest difference from the library's own forward pass, where it runs on a CPU. It is not judged: it rounds
           in places where ours does not

With --library each MODEL is a quantized directory, such as those of fixtures/golden, that is read as it is.

`ok` asks for all weights and for `apart <= allowed`; layouts whose inputs are rounded at run time are judged by their
weights alone. Where the library has no code for a CPU, its packer gets the
codes and the bytes are compared instead (`equal` counts tensors, then). Exit code 0 if all is ok.
"""
import argparse
import glob
import json
import os
import shutil
import subprocess
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import make_golden_ct as ct
import make_golden_packers as packers

NOISE_FACTOR = 16
ROUNDS_INPUTS = ["bnb_int8", "fp8", "fp8_inverse", "fbgemm_fp8", "modelopt_nvfp4", "modelopt_fp8"]
IDS = [1, 7, 30, 60, 100, 150, 200, 250, 300, 350, 400, 450, 500, 5, 9, 11]


# --- float models and what is in a directory ---------------------------------------------------------------------


def weight_files(folder):
    return sorted(f for f in glob.glob(f"{folder}/*.safetensors") if not os.path.basename(f).startswith("expected"))


def tensors(folder):
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def config_of(folder):
    with open(f"{folder}/config.json") as f:
        return json.load(f)


def float_config(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def empty_model(folder):
    return transformers.AutoModelForCausalLM.from_config(
        float_config(folder), attn_implementation="eager", dtype=torch.float32).eval()


def float_model(folder, base, weights):
    """The architecture in float32 with these weights [out, in] and the other tensors as they stand in the directory."""
    model = empty_model(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors(folder if os.path.isdir(folder) else base).items():
            if name in parameters and value.is_floating_point() and value.shape == parameters[name].shape:
                parameters[name].copy_(value)
        for name, weight in weights.items():
            module = model.get_submodule(name)  # GPT-2's Conv1D keeps its weight as [in, out]
            module.weight.copy_(weight if isinstance(module, torch.nn.Linear) else weight.t())
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0].double()


# --- libraries: a directory to weights [out, in] in the type of their computation, and a model that runs or None ----


def gptqmodel(folder, base):
    from gptqmodel import BACKEND, GPTQModel
    kind = config_of(folder)["quantization_config"]
    awq = kind.get("quant_method") == "awq"
    backend, dtype = (BACKEND.AWQ_TORCH if awq else BACKEND.TORCH), torch.float16
    if kind.get("quant_method") == "fp8":  # in 16 bits its scales are rounded, too
        backend, dtype = BACKEND.FP8_TORCH, torch.float32
    model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=dtype).model
    return modules_of(model), model


def transformers_gptq(folder, base):
    bits = config_of(folder)["quantization_config"]["bits"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager",
        quantization_config=transformers.GPTQConfig(bits=bits, backend="torch"))
    return modules_of(model), model


def transformers_auto(folder, base):
    """Any method that transformers reads by the configuration alone, through its packed modules or dequantized."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager").eval()
    return modules_of(model), model


def modules_of(model):
    """Weights of the packed modules of GPTQModel, AutoRound and bitsandbytes."""
    weights = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            import bitsandbytes.functional as F
            state = module.weight.quant_state
            shape = state.shape
            # On a CPU version 0.50.2 decodes matrices of some widths wrongly, vectors never.
            state.shape = torch.Size([shape.numel()])
            weights[name] = F.dequantize_4bit(module.weight.data, state).reshape(shape)
            state.shape = shape
        elif type(module).__name__ == "Linear8bitLt":
            scale = module.weight.SCB if getattr(module.weight, "SCB", None) is not None else module.state.SCB
            weights[name] = module.weight.data.float() * scale.float()[:, None] / 127
        elif hasattr(module, "qweight") or hasattr(module, "dequantize_weight"):
            cols = getattr(module, "in_features", None) or module.infeatures
            rows = getattr(module, "out_features", None) or module.outfeatures
            if hasattr(module, "dequantize_weight"):
                weight = module.dequantize_weight().detach()
                weights[name] = weight[:cols, :rows].t().contiguous()
            else:  # products with single ones are exact
                with torch.no_grad():
                    weight = module(torch.eye(cols, dtype=torch.float16))
                weights[name] = (weight if module.bias is None else weight - module.bias).t().contiguous()
    return weights


def compressed_tensors(folder, base):
    from transformers import CompressedTensorsConfig
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager",
        quantization_config=CompressedTensorsConfig(run_compressed=False)).eval()
    quantized = {name.removesuffix(".weight_scale") for name in tensors(folder) if name.endswith(".weight_scale")}
    return {name: model.get_submodule(name).weight.detach().float() for name in quantized}, model


def finegrained_fp8(folder, base):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager",
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True)).eval()
    names = {name.rsplit(".", 1)[0] for name in tensors(folder) if name.endswith(".weight_scale_inv")}
    return {name: model.get_submodule(name).weight.detach().float() for name in names}, None


def autoawq(folder, base):
    from awq.utils.packing_utils import dequantize_gemm
    stored, kind = tensors(folder), config_of(folder)["quantization_config"]
    weights = {}
    for name in [n[:-8] for n in stored if n.endswith(".qweight")]:
        parts = [stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        weights[name] = dequantize_gemm(*parts, kind["bits"], kind["group_size"]).t()
    return weights, None


def hqq(folder, base):
    from hqq.core.quantize import HQQLinear
    stored, weights = tensors(folder), {}
    for name in [n[:-4] for n in stored if n.endswith(".W_q")]:
        layer = HQQLinear(None, None, compute_dtype=stored[f"{name}.scale"].dtype, device="cpu", initialize=False)
        layer.load_state_dict({n[len(name) + 1:]: t for n, t in stored.items() if n.startswith(f"{name}.")})
        weights[name] = layer.dequantize()
    return weights, None


def quanto(folder, base):
    from optimum.quanto import requantize
    model = empty_model(folder)
    stored = tensors(folder)
    if config_of(folder).get("tie_word_embeddings"):
        stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    with open(f"{folder}/quanto_qmap.json") as f:
        requantize(model, stored, json.load(f), device=torch.device("cpu"))
    found = {n: m.weight.dequantize() for n, m in model.named_modules() if type(m).__name__ == "QLinear"}
    return found, model


def auto_round(folder, base):
    """transformers with AutoRound's own kernels, which run in 16 bits only."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map={"": "cpu"}, attn_implementation="eager").eval()
    return modules_of(model), model


def sinq(folder, base):
    from sinq.patch_model import AutoSINQHFModel, BaseSINQHFModel
    stored = BaseSINQHFModel.load_weights_safetensors

    def with_rotary_buffers(*args, **kwargs):
        weights = stored(*args, **kwargs)
        buffers = {n: b for n, b in empty_model(folder).named_buffers() if n.startswith("model.rotary_emb.")}
        weights.setdefault("model.rotary_emb", {n.rsplit(".", 1)[1]: b for n, b in buffers.items()})
        return weights

    # It demands tables that follow from config.json.
    BaseSINQHFModel.load_weights_safetensors = staticmethod(with_rotary_buffers)
    try:
        with open(f"{folder}/model.safetensors.index.json.meta.json") as f:
            kind = next(iter(json.load(f).values()))["meta"]["compute_dtype"].removeprefix("torch.")
        kind = getattr(torch, kind)
        model = AutoSINQHFModel.from_quantized_safetensors(folder, compute_dtype=kind, device="cpu")
    finally:
        del BaseSINQHFModel.load_weights_safetensors
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "SINQLinear"}
    for layer in layers.values():  # of 8 bits it removes what it asks for
        layer.meta.setdefault("packing", None)
    return {n: layer.dequantize() for n, layer in layers.items()}, model


def torchao(folder, base):
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    weights = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as f:
            found = unflatten_tensor_state_dict(load_file(file), f.metadata())
        for name, tensor in (found[0] if isinstance(found, tuple) else found).items():
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "dequantize"):
                weights[name.removesuffix(".weight")] = tensor.dequantize()
    return weights, None


def gguf(path, base):
    import gguf as library
    from check_gguf import in_file
    reader = library.GGUFReader(path)
    found = {t.name: library.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    config = config_of(base)
    weights = {}
    for name, module in empty_model(base).named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = torch.tensor(found[in_file(f"{name}.weight")])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.rsplit(".", 1)[1])
        if heads:  # rows of a head lie in pairs there
            rows, cols = weight.shape
            weight = weight.reshape(config[heads], -1, 2, cols).swapaxes(1, 2).reshape(rows, cols)
        weights[name] = weight
    return weights, LlamaCpp(path)


class LlamaCpp:
    """llama.cpp, called as a model of transformers is."""

    def __init__(self, path):
        self.path = path

    def __call__(self, input_ids, use_cache):
        import llama_cpp
        model = llama_cpp.Llama(self.path, n_ctx=64, logits_all=True, verbose=False)
        model.eval(input_ids[0].tolist())
        self.logits = [torch.tensor(model.scores[: input_ids.shape[1]])]
        return self


def mxfp4(folder, base):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    stored, weights = tensors(folder), {}
    for name in [n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")]:
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        weight = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].t()
        weights[name.removesuffix(".weight")] = weight
    return weights, None


def modelopt(folder, base):
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
    stored, weights = tensors(folder), {}
    for name in [n.removesuffix(".weight_scale") for n in stored if n.endswith(".weight_scale")]:
        weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        if weight.dtype == torch.uint8:
            shape = (weight.shape[0], weight.shape[1] * 2)
            tensor = NVFP4QTensor(shape, torch.float32, weight)
            double = stored[f"{name}.weight_scale_2"]
            weights[name] = tensor.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16})
        else:
            tensor = FP8QTensor(weight.shape, torch.float32, weight)
            weights[name] = tensor.dequantize(scale=scale, block_sizes=None)
    return weights, None


# --- packers, for layouts that no library reads on a CPU -----------------------------------------------------------


def awq_packer(which):
    """AutoAWQ's from_linear makes the tensors of each layer from codes, scales and zero points read by another path."""
    def check(folder, base, exact):
        import awq.modules.linear as linear
        layer = {"gemv": linear.gemv.WQLinear_GEMV, "fast": linear.gemv_fast.WQLinear_GEMVFast}[which]
        stored, group = tensors(folder), config_of(folder)["quantization_config"]["group_size"]
        equal, count = 0, 0
        for name in [n[:-8] for n in stored if n.endswith(".qweight")]:
            weight = exact[name]
            rows, cols = weight.shape
            scales = stored[f"{name}.scales"]
            scales = (scales.t() if which == "fast" else scales)[:, : cols // group].contiguous()
            # A grid holds a zero, and its codes begin at 0 or end at 15 after the zero point is taken off.
            steps = (weight.reshape(rows, -1, group) / scales.float()[..., None]).round()
            zeros = unpacked_zeros(which, stored[f"{name}.qzeros"], scales)
            module = torch.nn.Linear(cols, rows, bias=False)
            module.weight.data = (steps * scales.float()[..., None]).reshape(rows, cols)
            packed = layer.from_linear(module, 4, group, scales=scales.half(), zeros=zeros)
            for part in ("qweight", "qzeros", "scales"):
                count += 1
                equal += bool(torch.equal(getattr(packed, part), stored[f"{name}.{part}"]))
        return equal, count
    return check


def unpacked_zeros(which, qzeros, scales):
    if which == "fast":  # -scale * zero, as floats
        return (-(qzeros.t()[:, : scales.shape[1]].float()) / scales.float()).round()
    shifts = torch.arange(0, 32, 4)
    return ((qzeros[..., None] >> shifts) & 15).reshape(qzeros.shape[0], -1)[:, : scales.shape[1]].float()


# --- float directories that other libraries round --------------------------------------------------------------------


def make_bnb(model, out, **options):
    config = transformers.BitsAndBytesConfig(**options)
    made = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config)
    made.save_pretrained(out)


def make_ct(model, out, kind, args, inputs=None):
    """One kind of weights for all linears of the blocks, with the least and greatest of each group."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config)
    made = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = inputs and QuantizationArgs(**inputs)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**args), input_activations=inputs, format=kind)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=kind)
    apply_quantization_config(made, config)
    for module in made.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            ct.calibrate(module, module.quantization_scheme.weights)
    ModelCompressor.from_pretrained_model(made).compress_model(made)
    os.makedirs(out, exist_ok=True)
    tied = ["lm_head.weight"] if made.config.tie_word_embeddings else []
    state = {k: v.contiguous() for k, v in made.state_dict().items() if k not in tied}
    save_file(state, f"{out}/model.safetensors", metadata={"format": "pt"})
    whole = config_of(model)
    whole["quantization_config"] = json.loads(config.model_dump_json())
    with open(f"{out}/config.json", "w") as f:
        json.dump(whole, f)


MX = {**ct.MX}
FLOATS = {
    "nf4": lambda m, o: make_bnb(m, o, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-nested": lambda m, o: make_bnb(
        m, o, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": lambda m, o: make_bnb(m, o, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": lambda m, o: make_bnb(m, o, load_in_8bit=True),
    "fp8-row": lambda m, o: make_ct(m, o, "float-quantized", dict(**ct.FP8, strategy="channel")),
    "fp8-tensor": lambda m, o: make_ct(m, o, "float-quantized", dict(**ct.FP8, strategy="tensor")),
    "fp8-block": lambda m, o: make_ct(
        m, o, "float-quantized", dict(**ct.FP8, strategy="block", block_structure=[128, 128])),
    "nvfp4": lambda m, o: make_ct(
        m, o, "nvfp4-pack-quantized", dict(**ct.FP4, strategy="tensor_group", group_size=16)),
    "mxfp4": lambda m, o: make_ct(m, o, "mxfp4-pack-quantized", dict(**ct.FP4, **MX)),
    "mxfp6": lambda m, o: make_ct(
        m, o, "mxfp6-pack-quantized", dict(num_bits=6, type="float", symmetric=True, dynamic=False, **MX)),
    "mxfp8": lambda m, o: make_ct(m, o, "mxfp8-quantized", dict(**ct.FP8, **MX)),
}


# --- cases ---------------------------------------------------------------------------------------------------------

LIBRARIES = {
    gptqmodel: "gptqmodel", transformers_gptq: "optimum", transformers_auto: "transformers",
    compressed_tensors: "compressed-tensors", finegrained_fp8: "transformers", autoawq: "autoawq", hqq: "hqq",
    quanto: "optimum-quanto", auto_round: "auto-round", sinq: "sinq", torchao: "torchao", gguf: "gguf", mxfp4: "transformers",
    modelopt: "nvidia-modelopt",
}


def rtn(layout, bits, group, *more):
    return ["--method", "rtn", "--format", layout, "--bits", str(bits), "--group-size", str(group), *more]


def cases():
    """Name, layout, what makes it (arguments of `quant quantize`, or a float source and a layout), library."""
    for bits in (2, 3, 4, 8):
        yield f"gptq-b{bits}", "gptq", rtn("gptq", bits, 64), gptqmodel
        yield f"gptq_v2-b{bits}-asym", "gptq_v2", rtn("gptq_v2", bits, 64, "--asym"), gptqmodel
    yield "gptq-b4-row", "gptq", rtn("gptq", 4, -1), gptqmodel
    yield "gptq-b4-transformers", "gptq", rtn("gptq", 4, 64), transformers_gptq
    calibrated = ["--method", "gptq", "--format", "gptq", "--bits", "4", "--group-size", "64", "--samples", "8"]
    yield "gptq-b4-act-order", "gptq", [*calibrated, "--desc-act"], gptqmodel
    for bits in (2, 3, 4, 5, 6, 7, 8):
        yield f"gptq_p-b{bits}-asym", "gptq_p", rtn("gptq_p", bits, 64, "--asym"), gptqmodel
    for bits in (2, 3, 4, 5, 6, 7, 8):
        yield f"auto_round-b{bits}", "auto_round", rtn("auto_round", bits, 64), auto_round
    yield "auto_round-b4-asym", "auto_round", rtn("auto_round", 4, 64, "--asym"), auto_round
    for library in (gptqmodel, autoawq):
        yield f"awq-{LIBRARIES[library]}", "awq", rtn("awq", 4, 64, "--asym"), library
    yield "awq-sym", "awq", rtn("awq", 4, 64, "--sym"), gptqmodel
    yield "awq_gemv", "awq_gemv", rtn("awq_gemv", 4, 64, "--asym"), awq_packer("gemv")
    yield "awq_gemv_fast", "awq_gemv_fast", rtn("awq_gemv_fast", 4, 64, "--asym"), awq_packer("fast")
    for bits in (2, 3, 4, 5, 6, 7, 8):
        yield f"ct_pack-b{bits}", "ct_pack", rtn("ct_pack", bits, 64), compressed_tensors
    yield "ct_pack-b4-asym", "ct_pack", rtn("ct_pack", 4, 32, "--asym"), compressed_tensors
    yield "ct_pack-b4-row", "ct_pack", rtn("ct_pack", 4, -1), compressed_tensors
    yield "ct_int-b8", "ct_int", rtn("ct_int", 8, -1), compressed_tensors
    yield "ct_int-b8-asym", "ct_int", rtn("ct_int", 8, -1, "--asym"), compressed_tensors
    for source in ("fp8-row", "fp8-tensor", "fp8-block"):
        yield f"ct_float-{source}", "ct_float", (source, "ct_float"), compressed_tensors
    for layout in ("nvfp4", "mxfp4", "mxfp6", "mxfp8"):
        yield f"ct_{layout}", f"ct_{layout}", (layout, f"ct_{layout}"), compressed_tensors
    yield "fp8-block", "fp8", ("fp8-block", "fp8"), finegrained_fp8
    yield "fp8-tensor", "fp8", ("fp8-tensor", "fp8"), finegrained_fp8
    yield "fp8_inverse", "fp8_inverse", ("fp8-tensor", "fp8_inverse"), gptqmodel
    yield "fbgemm_fp8", "fbgemm_fp8", ("fp8-row", "fbgemm_fp8"), transformers_auto
    yield "modelopt_nvfp4", "modelopt_nvfp4", ("nvfp4", "modelopt_nvfp4"), modelopt
    yield "modelopt_fp8", "modelopt_fp8", ("fp8-tensor", "modelopt_fp8"), modelopt
    yield "mxfp4", "mxfp4", ("mxfp4", "mxfp4"), mxfp4
    for bits, group in ((8, -1), (4, 32), (4, 64)):
        yield f"torchao-b{bits}-g{group}", "torchao", rtn("torchao", bits, group), torchao
    for source in ("nf4", "nf4-nested", "fp4"):
        yield f"bnb-{source}", f"bnb_{source[:3]}", (source, f"bnb_{source[:3]}"), transformers_auto
    yield "bnb-int8", "bnb_int8", ("int8", "bnb_int8"), transformers_auto
    for bits in (2, 3, 4, 5, 6, 8):
        yield f"sinq-b{bits}-asym", "sinq", rtn("sinq", bits, 64, "--asym"), sinq
    yield "sinq-nf4", "sinq", ("nf4", "sinq"), sinq
    for bits in (2, 3, 4, 8):
        yield f"hqq-b{bits}-asym", "hqq", rtn("hqq", bits, 64, "--asym"), hqq
    for bits, group in ((2, 128), (4, 128), (8, -1)):
        yield f"quanto-b{bits}", "quanto", rtn("quanto", bits, group), quanto
    yield "quanto-b4-asym", "quanto", (rtn("gptq_v2", 4, 128, "--asym"), "quanto"), quanto
    yield "quanto-fp8", "quanto", ("fp8-row", "quanto"), quanto
    for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        yield f"gguf-{kind}", "gguf", ["--format", "gguf", "--type", kind], gguf
    yield "gguf-mxfp4", "gguf", ("mxfp4", "gguf"), gguf


class Refused(Exception):
    """`quant` says that it cannot make this."""


def quant(program, *args):
    done = subprocess.run([program, *map(str, args), "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr.strip()[-300:])


def check(program, model, case, work):
    """Makes a case and compares it."""
    name, layout, how, library = case
    out = f"{work}/{name}" + (".gguf" if layout == "gguf" else "")
    if isinstance(how, tuple):
        source = f"{work}/source-{how[0] if isinstance(how[0], str) else name}"
        if isinstance(how[0], list):
            quant(program, "quantize", model, "--out", source, *how[0], "--force")
        elif not os.path.exists(f"{source}/config.json"):
            FLOATS[how[0]](model, source)
        quant(program, "convert", source, "--to", how[1], "--out", out, "--force")
    else:
        quant(program, "quantize", model, "--out", out, *how, "--force")
    if os.path.isdir(out):
        for file in glob.glob(f"{model}/tokenizer*"):
            shutil.copy(file, out)
    return compare(program, out, model, layout, library, work)


def compare(program, out, base, layout, library, work):
    """What the library and `quant` make of a directory; `base` has its architecture."""
    line = {}
    files = [f"{work}/{part}.safetensors" for part in ("peer", "exact", "logits")]
    quant(program, "dequantize", out, "--like-peer", "--out", files[0])
    quant(program, "dequantize", out, "--out", files[1])
    quant(program, "logits", out, "--ids", ",".join(map(str, IDS)), "--out", files[2])
    peer, exact = load_file(files[0]), load_file(files[1])
    ours, ids = load_file(files[2])["logits"].double(), torch.tensor(IDS)
    if library not in LIBRARIES:
        line.update(library="autoawq", version="0.2.9 (packer)")
        bare = {n.removesuffix(".weight"): w for n, w in exact.items()}
        line["equal"], line["layers"] = library(out, base, bare)
        line["ok"] = line["equal"] == line["layers"] > 0
        return line
    line.update(library=LIBRARIES[library], version=version(LIBRARIES[library]))
    weights, native = library(out, base)
    own = None if native is None else native_logits(native, ids)
    del native
    equal = {n for n, w in weights.items() if same_bits(w, peer.get(f"{n}.weight"), layout)}
    line.update(layers=len(weights), equal=len(equal))
    if len(equal) < len(weights):
        first = sorted(set(weights) - equal)[0]
        found = peer.get(f"{first}.weight")
        alike = found is not None and found.shape == weights[first].shape
        line["differs"] = f"{first} by {largest(weights[first].float() - found):.1e}" if alike else first
    # --like-peer has the shape of the library's modules; of GPT-2 the other file does not.
    bare = {n: exact[f"{n}.weight"] for n in equal}
    bare = {n: w if w.shape == weights[n].shape else w.t() for n, w in bare.items()}
    half = torch.finfo(computed_in(weights.values())).eps / 2
    rounded = all(largest(w - weights[n].float()) <= 6 * half * largest(weights[n].float()) for n, w in bare.items())
    a_model = float_model(out, base, {n: w.float() for n, w in weights.items()})
    a = logits_of(a_model, ids)
    allowed = NOISE_FACTOR * largest(a - logits_of(a_model.double(), ids))
    b = logits_of(float_model(out, base, bare), ids) if rounded and len(bare) == len(weights) else a
    apart = min(largest(ours - a), largest(ours - b))
    line.update(apart=apart, allowed=allowed, A_B=largest(a - b), scale=largest(a))
    if own is not None:
        line["native"] = own if isinstance(own, str) else largest(own - ours)
    line["ok"] = 0 < len(weights) == len(equal) and (layout in ROUNDS_INPUTS or apart <= allowed)
    return line


def computed_in(weights):
    """The narrowest type that holds all weights: libraries round in it, and some give float32 in the end."""
    weights = list(weights)
    fits = [t for t in (torch.bfloat16, torch.float16) if all(torch.equal(w.float(), w.to(t).float()) for w in weights)]
    return [*fits, torch.float32][0]


def native_logits(model, ids):
    try:
        return logits_of(model, ids)
    except Exception as error:  # kernels for other devices
        return f"{type(error).__name__}: {error}"[:80]


def same_bits(theirs, ours, layout):
    """Equal in every bit; compressed-tensors' files hold no signs of zeros."""
    if ours is None or ours.shape != theirs.shape:
        return False
    theirs = theirs.float().contiguous()
    if layout.startswith("ct_"):
        return torch.equal(theirs, ours)
    return torch.equal(theirs.view(torch.int32), ours.contiguous().view(torch.int32))


def largest(difference):
    return difference.abs().max().item()


def attempt(line, work):
    """Prints the line of a case, whatever happens in it. True if it is as it should be, or a package is missing."""
    try:
        line.update(work())
    except Refused as error:
        line.update(ok=False, refused=str(error))
    except (PackageNotFoundError, ImportError) as error:
        line.update(ok=None, missing=str(error)[:200])
    except Exception as error:  # whatever goes wrong in a library is a result
        if os.environ.get("TRACE"):
            traceback.print_exc()
        line.update(ok=False, error=f"{type(error).__name__}: {error}"[:300])
    print(json.dumps(line), flush=True)
    return line["ok"] is not False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--quant", default="target/release/quant", help="the program")
    parser.add_argument("--work", default="peers", help="folder for what is made")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names hold one of these words")
    parser.add_argument("--library", choices=[library.__name__ for library in LIBRARIES],
                        help="read each MODEL, which is quantized already, with this library")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    results = []
    for model in args.models:
        name = os.path.basename(model.rstrip("/"))
        work = f"{args.work}/{name}"
        os.makedirs(work, exist_ok=True)
        if args.library:
            library = next(found for found in LIBRARIES if found.__name__ == args.library)
            line = {"model": name, "case": "read"}
            results.append(attempt(line, lambda: compare(args.quant, model, model, name, library, work)))
            continue
        for case in cases():
            if not args.only or any(word in case[0] for word in args.only):
                line = {"model": name, "case": case[0], "layout": case[1]}
                results.append(attempt(line, lambda: check(args.quant, model, case, work)))
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
