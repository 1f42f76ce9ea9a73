"""Fused convolution over pitched maps: ``act(conv(x) * scale + bias) [+ residual]``.

PyTorch runs a convolution, a bias and a SiLU as one library call and one or two passes over the
result; here the result is written once, finished, into any channel slice of any map, so that what
concatenation, max-pool before a 1x1, nearest upsample and residual sums would copy is never moved.

Convolutions are no operation of PyTorch's: a plan prepares each once, over buffers that it owns,
and runs it many times (`ConvLaunch.prepare`).

- `layer`: what is computed, and the plain PyTorch reference.
- `tma`: the Hopper kernel. `gather`: the portable one (sm_80 and up). `parts`: what they share.
- `stem`: the first layer, from an image of 3 channels.
- `launcher`: starts kernels; takes a config and preallocated buffers.
- `config`: what a config says, tuned ones on disk. `search`: those worth trying. `model`: what each
  is expected to take, by which the default is chosen.
- `launch`: all of it behind one face. `cases`: layers to compile ahead of time.
"""

from yolov7.kernels.conv.cases import compile_cases
from yolov7.kernels.conv.config import ConvConfig
from yolov7.kernels.conv.launch import ConvLaunch, Launch, StemLaunch, Workspace
from yolov7.kernels.conv.layer import LARGEST, ConvCall, ConvLayer, pack_weight, quantise_weight
from yolov7.kernels.conv.stem import Stem, StemCall, space_to_depth_weight

__all__ = [
    "LARGEST",
    "ConvCall",
    "ConvConfig",
    "ConvLaunch",
    "ConvLayer",
    "Launch",
    "Stem",
    "StemCall",
    "StemLaunch",
    "Workspace",
    "compile_cases",
    "pack_weight",
    "quantise_weight",
    "space_to_depth_weight",
]
