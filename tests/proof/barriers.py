"""`python -m tests.proof.barriers`: the compiled kernels' shared memory is free of races.

sentryward proves of the PTX of a launch that whatever two threads do to the same bytes of shared
memory is ordered by a barrier; that a proof can fail is seen by deleting each barrier in turn (some
order nothing in a launch so small). Asked are those kernels that it can read and that share memory
between threads, compiled for sm_80: the gathering convolution, the pyramid pool. It does not know
warp-group instructions (sm_90), descriptors beside tcgen05 (sm_100), atomic additions (batch norm,
histograms), nor branches on what was read (suppression, letterbox, decoding).
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentryward import verify  # type: ignore[import-not-found]  # not in every environment

from yolov7.kernels import aot, pool
from yolov7.kernels.conv import ConvConfig, ConvLaunch
from yolov7.kernels.conv.cases import Record, layer_of, meta_call
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import CompileSpec, recording

TARGET = "sm_80"
SECONDS = 120
PROVEN, RACE = "race_free", "potential_race"
NUMBERS = {"i32": "u32", "i64": "u64", "fp32": "f32"}
CONFIG = ConvConfig(block_m=64, block_n=64, block_k=32, num_stages=3)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Small launches of each kernel that can be read, on tensors without content."""
    for name, record, options in (
        ("convolution 3x3", Record(64, 64, 3, 1, 9, 11), {}),
        ("convolution 3x3, stride 2", Record(64, 64, 3, 2, 8, 10), {}),
        ("convolution 1x1 behind a pool", Record(64, 64, 1, 1, 8, 10), {"pool": True}),
        ("convolution 1x1, upsampled", Record(64, 64, 1, 1, 8, 10), {"upsample": True}),
    ):
        launch = ConvLaunch([meta_call(layer_of(record, 1, **options), torch.float16)])
        yield name, launch.prepare(CONFIG)
    layout = PitchedLayout.of(1, 7, 9)
    maps = [layout.empty(16, dtype=torch.float16, device="meta") for _ in range(4)]
    yield "pyramid pool", partial(pool._spp_triton, maps[0], maps[1:], layout.sizes, [5, 9, 13])


def question(spec: CompileSpec, kernel: Any) -> dict[str, Any]:
    """The launch as sentryward wants it described."""
    leaves: list[tuple[str, Any]] = []

    def walk(value: Any, kind: Any) -> None:
        if isinstance(kind, tuple):
            for v, k in zip(value, kind, strict=True):
                walk(v, k)
        elif kind != "constexpr":
            leaves.append((kind, value))

    values = {**spec.args, **spec.config}
    for parameter in spec.fn.params:
        walk(values.get(parameter.name, parameter.default), spec.signature[parameter.name])
    name = spec.fn.__name__
    grid = [*spec.grid, 1, 1][:3]
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": name,
        "launch": {
            "grid_dim": grid,
            "block_dim": [32 * kernel.metadata.num_warps, 1, 1],
            "cluster_dim": [1, 1, 1],
            "dynamic_shared_bytes": kernel.metadata.shared,
        },
        "arguments": [
            {"type": NUMBERS[kind], "value": value, "parameter": f"{name}_param_{i}"}
            for i, (kind, value) in enumerate(leaves)
            if kind in NUMBERS
        ],
        "assumptions": {"representative_branches": True, "bounded_computation_loops": True},
    }


def answer(ptx: str, asked: dict[str, Any], folder: Path) -> str:
    """What sentryward finds."""
    (folder / "kernel.ptx").write_text(ptx)
    (folder / "input.json").write_text(json.dumps(asked))
    files = {name: str(folder / name) for name in ("kernel.ptx", "input.json")}
    found = verify(files["kernel.ptx"], input=files["input.json"], timeout_seconds=SECONDS)
    return str(found["result"])


def main() -> int:
    """Print each answer; 1 unless all are proven, and of each a missing barrier is seen."""
    capability, wrong = aot.capability_of(TARGET), []
    with tempfile.TemporaryDirectory() as name:
        for title, case in launches():
            with recording(capability) as specs:
                case()
            (spec,) = specs
            kernel = aot.compiled_kernel(spec, capability)
            asked, ptx = question(spec, kernel), kernel.asm["ptx"]
            found = answer(ptx, asked, Path(name))
            print(f"{title}: {found}", flush=True)
            if found != PROVEN:
                wrong.append(f"{title}: {found}")
            places = [match.start() for match in re.finditer(r"bar\.sync", ptx)]
            changed = (f"{ptx[:place]}//{ptx[place:]}" for place in places)
            without = [answer(text, asked, Path(name)) for text in changed]
            print(f"  without one of its barriers: {', '.join(without)}", flush=True)
            if RACE not in without:
                wrong.append(f"{title}: no barrier is missed")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
