"""Exported files: what writing one takes, and ONNX Runtime on our graph beside the legacy one's."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.baselines.plain import image, model, sampled
from bench.comparison import Comparison, close
from yolov7.benchmark.clock import Run, Work
from yolov7.export import Settings, export
from yolov7.layers import conv_layers

VARIANTS = ("yolov7-tiny", "yolov7")


def onnx_runtime(path: Path, x: Tensor) -> Run:
    """A file in ONNX Runtime, with as many threads as PyTorch takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others have turns
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.ascontiguousarray(x.numpy())}

    def run() -> Tensor:
        (decoded,) = session.run(None, feed)
        return sampled(torch.from_numpy(decoded))

    return run


@pytest.mark.parametrize("variant", VARIANTS)
def bench_onnx_runtime(
    variant: str, compete: Comparison, device: torch.device, smoke: bool
) -> None:
    """Decoded boxes of a 640-pixel image in ONNX Runtime on a CPU, from two exporters' graphs."""
    if device.type != "cpu":
        pytest.skip("of a machine without a GPU")
    size = 64 if smoke else 640
    x = image(size)
    with tempfile.TemporaryDirectory() as folder:
        ours, legacy = Path(folder) / "ours.onnx", Path(folder) / "legacy.onnx"
        export(model(variant), ours, Settings(imgsz=(size, size)))
        torch.onnx.export(model(variant).fuse(), (x,), legacy, dynamo=False)
        contenders = {"ours": onnx_runtime(ours, x), "legacy exporter": onnx_runtime(legacy, x)}

    flops = sum(layer.flops for layer in conv_layers(model(variant).fuse(), size, size))
    compete(contenders, agree=close(1e-4), work=Work(flops=flops, items=1))


@pytest.mark.parametrize("variant", VARIANTS[:1])
def bench_export(variant: str, compete: Comparison, smoke: bool) -> None:
    """Write an ONNX file of 640 pixels and check it."""
    network, size = model(variant), 64 if smoke else 640

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            export(network, Path(folder) / "model.onnx", Settings(imgsz=(size, size)))

    compete({"ours": run}, agree=None)
