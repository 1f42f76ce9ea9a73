"""Compile the portable kernels for one of AMD's GPUs, as a PyTorch that is for them would.

`python -m tests.kernels.amd gfx942` prints a line of JSON for each kernel. It is a process of its
own since kernels are told at import what they are compiled for.
"""

import json
import re
import sys

import torch

torch.version.hip = "stands for one of PyTorch's builds for ROCm"

from triton.backends.compiler import GPUTarget  # noqa: E402  # behind the above, as the next ones
from triton.compiler import ASTSource, make_backend  # noqa: E402

from yolov7.kernels import aot  # noqa: E402
from yolov7.kernels.runtime import recording, triton  # noqa: E402

WARP = {"gfx942": 64, "gfx1100": 32}


def main(target: str) -> None:
    """Compile a sample of every kernel in fp16, NMS in the fp32 that it is always."""
    for shape, case in aot.kernel_cases({"batch": 1, "precision": "fp16"}):
        with recording((0, 0)) as specs:
            case()
        for spec in specs:
            source = ASTSource(spec.fn, spec.signature, spec.constexprs, spec.attrs)
            gpu = GPUTarget("hip", target, WARP[target])
            known = vars(make_backend(gpu).parse_options({}))
            if unknown := spec.options.keys() - known.keys():
                raise ValueError(f"{spec.fn.__name__}: no options {unknown}")  # as a launch would
            made = triton.compile(source, target=gpu, options=spec.options)
            text = made.asm["amdgcn"]
            row = {
                "kernel": spec.fn.__name__,
                "shape": shape,
                "matrix": len(re.findall(r"v_(?:mfma|wmma)_", text)),
                "shared": made.metadata.shared,
                "spilled": max(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))),
            }
            print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1])
