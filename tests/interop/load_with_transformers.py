#!/usr/bin/env python3
"""Load a GPTQ directory with the libraries that users have, and compare their logits with ours.

  quant logits DIR --ids 1,2,3 --out ours.safetensors
  python load_with_transformers.py DIR ours.safetensors --ids 1,2,3 [--only gptqmodel|transformers] [--weights FILE]

The file holds `logits` f32 [tokens, vocab], and `input_ids` unless --ids is given. --weights takes the output of
`quant dequantize --like-peer` and demands that every quantized weight has the same bits as the library's.

What is compared, for each library:
  A  float32 forward of the architecture with the weights as the library dequantizes them, products (code - zero) * scale
     rounded to float16, and all other tensors as they stand in the file.
  B  the same with the products not rounded. Codes come from A's weights: round(weight / scale) is an exact integer,
     because a float16 rounding moves it by at most 255 / 2048.
A right reader computes A or B, so ours is held against the nearer one. The tolerance is
     16 * max |A - A64|,
where A64 is A with float64 matrix products: the distance of the two results shows what rounding in another order of
summation can do, and 16 leaves room for a different blocking and for other exp and sin functions. |A - B| is printed too:
it is the largest difference that the library's float16 products alone explain, and the tolerance to apply to a reader that
mixes both; errors of a few tenths of a percent in one scale would hide in it.
The library's own forward is printed as well. It is not judged: in float16 it differs from A by its own rounding.

Exit code 0: everything loaded and agrees. 1: not. 2: wrong usage.
"""
import argparse
import glob
import json
import os
import sys
import traceback
from importlib.metadata import version

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is read from DIR
import torch
import transformers
from safetensors.torch import load_file

NOISE_FACTOR = 16


def load_gptqmodel(folder):
    """GPTQModel with its plain torch kernel; it runs in float16 only."""
    from gptqmodel import BACKEND, GPTQModel
    return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model


def load_transformers(folder):
    """transformers through optimum and GPTQModel's torch kernel, in float32."""
    with open(os.path.join(folder, "config.json")) as f:
        bits = json.load(f)["quantization_config"]["bits"]
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="eager",
        quantization_config=transformers.GPTQConfig(bits=bits, backend="torch"))


LIBRARIES = {"gptqmodel": load_gptqmodel, "transformers": load_transformers}


def logits_of(model, ids):
    """Logits [tokens, vocab] of one forward, without a cache."""
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0].double()


def take_weights(model):
    """Per quantized layer: the library's weight [out, in] in float16, the exact product in float32, and the bias."""
    layers = {}
    for name, module in model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        rounded = module.dequantize_weight().detach()[: module.in_features, : module.out_features].t().contiguous()
        scale = module.scales.float()[module.g_idx.long()][: module.in_features, : module.out_features].t()
        steps = torch.where(scale == 0, 0.0, rounded.float() / scale).round()
        bias = None if module.bias is None else module.bias.detach().float()
        layers[name] = (rounded, steps * scale, bias)
    return layers


def float_model(folder, layers, exact):
    """The architecture in float32 with dequantized weights (float16-rounded, or exact products) and the file's other tensors."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
            if os.path.basename(path).startswith("expected"):
                continue
            for name, value in load_file(path).items():
                parameter = find_parameter(model, name)
                if parameter is not None:
                    parameter.copy_(value)
        for name, (rounded, product, bias) in layers.items():
            module = model.get_submodule(name)
            weight = product if exact else rounded.float()
            # GPT-2's Conv1D keeps its weight as [in, out].
            module.weight.copy_(weight if isinstance(module, torch.nn.Linear) else weight.t())
            if bias is not None:
                module.bias.copy_(bias)
    return model


def find_parameter(model, name):
    """The model's parameter of this name; files of base models lack the prefix."""
    parameters = dict(model.named_parameters())
    return parameters.get(name, parameters.get(f"{model.base_model_prefix}.{name}"))


def check_weights(path, layers):
    """Number of layers whose weight in `path` has not the library's bits."""
    ours, wrong = load_file(path), 0
    for name, (rounded, _, _) in layers.items():
        found = ours.get(f"{name}.weight")
        if found is not None and found.shape != rounded.shape:
            found = found.t()
        if found is None or not torch.equal(found.float(), rounded.float()):
            wrong += 1
            print(f"  weight of {name}: {'missing' if found is None else 'differs'}")
    print(f"  weights with the same bits: {len(layers) - wrong} of {len(layers)}")
    return wrong


def compare(library, folder, ids, ours, weights):
    """Whether `library` loads `folder` and agrees with `ours`."""
    native = LIBRARIES[library](folder)
    kernels = sorted({type(m).__name__ for m in native.modules() if hasattr(m, "qweight")})
    layers = take_weights(native)
    if not layers:
        print("  FAIL: the library found no quantized layer")
        return False
    own = logits_of(native, ids)
    del native
    a_model = float_model(folder, layers, exact=False)
    a = logits_of(a_model, ids)
    a64 = logits_of(a_model.double(), ids)
    b = logits_of(float_model(folder, layers, exact=True), ids)
    if ours.shape != a.shape:
        print(f"  FAIL: our logits are {list(ours.shape)}, the library's {list(a.shape)}")
        return False

    allowed = NOISE_FACTOR * largest(a - a64)
    to_a, to_b = largest(ours - a), largest(ours - b)
    same_top = (ours.argmax(-1) == a.argmax(-1)).float().mean().item()
    print(f"  {len(layers)} quantized layers, kernels {', '.join(kernels)}; logits up to {largest(a):.3f}")
    print(f"  |ours - A| {to_a:.3e}, |ours - B| {to_b:.3e}, allowed for the nearer {allowed:.3e}; |A - B| {largest(a - b):.3e}")
    print(f"  same first choice {same_top:.1%}; the library's own forward: |ours - own| {largest(ours - own):.3e}, "
          f"|A - own| {largest(a - own):.3e}")
    good = to_a <= allowed or to_b <= allowed  # false for NaN
    if weights:
        good &= check_weights(weights, layers) == 0
    print("  OK" if good else "  FAIL")
    return good


def largest(difference):
    """Greatest absolute value, NaN if there is one."""
    return difference.abs().max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("logits", metavar="OURS.safetensors")
    parser.add_argument("--ids", help="comma-separated token ids (default: input_ids of the logits file)")
    parser.add_argument("--only", choices=LIBRARIES)
    parser.add_argument("--weights", metavar="FILE.safetensors", help="output of `quant dequantize --like-peer`")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    file = load_file(args.logits)
    if "logits" not in file or (args.ids is None and "input_ids" not in file):
        parser.error(f"{args.logits} holds {sorted(file)}; logits are needed, and input_ids unless --ids is given")
    ids = file["input_ids"].reshape(-1).long() if args.ids is None else torch.tensor([int(i) for i in args.ids.split(",")])
    ours = file["logits"].double()

    results = {}
    for library in [args.only] if args.only else LIBRARIES:
        print(f"{library} {version(library)} (torch {torch.__version__}, optimum {version('optimum')})", flush=True)
        try:
            results[library] = compare(library, args.folder, ids, ours, args.weights)
        except Exception as error:  # any failure of the library to load is a result of this check
            traceback.print_exc()
            print(f"  FAIL: {type(error).__name__}: {error}")
            results[library] = False
    print(" ".join(f"{name}={'OK' if good else 'FAIL'}" for name, good in results.items()))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
