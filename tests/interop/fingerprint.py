#!/usr/bin/env python3
"""Replace the decoded weights of golden files by their fingerprints.

  python fingerprint.py fixtures/golden/NAME ...

Moves every tensor `dequant.MODULE` (or `KEY.dequant`) of NAME/expected.safetensors to NAME/dequant.json, as its type,
its shape and the SHA-256 of its elements, row by row, as little-endian float32, which holds narrower types exactly.
Files of compressed-tensors do not hold the signs of zeros, so these count as positive there. Run it after the scripts
that make golden files; what has no such tensors is left alone.
"""
import hashlib
import json
import os
import sys

import torch
from safetensors.torch import load_file, save_file

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def main(folder):
    path = os.path.join(folder, "expected.safetensors")
    tensors = load_file(path)
    unsigned = os.path.basename(os.path.normpath(folder)).startswith("ct-")
    entries = {}
    for name in sorted(tensors):
        if name.startswith("dequant."):
            key = name.removeprefix("dequant.")
        elif name.endswith(".dequant"):
            key = name.removesuffix(".dequant")
        else:
            continue
        weight = tensors.pop(name)
        exact = weight.float() + 0.0 if unsigned else weight.float()
        digest = hashlib.sha256(exact.contiguous().numpy().astype("<f4").tobytes()).hexdigest()
        entries[key] = {"dtype": NAMES[weight.dtype], "shape": list(weight.shape), "sha256": digest}
    if entries:
        save_file(tensors, path)
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
        with open(os.path.join(folder, "dequant.json"), "w") as file:
            file.write("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for folder in sys.argv[1:]:
        main(folder)
