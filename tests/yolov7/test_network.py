import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from yolov7.checkpoint import load_model
from yolov7.device import resolve_device
from yolov7.engine.choose import Runtime, open_network, resolve_engine, resolve_precision
from yolov7.engine.compile import COMPILED
from yolov7.engine.cpu import Decoder, PackedConv
from yolov7.engine.eager import Network
from yolov7.engine.graph.calibrate import calibrate
from yolov7.engine.graph.network import PLANS, GraphNetwork
from yolov7.errors import UserError
from yolov7.model import YOLOv7, create_model

Outputs = Callable[[torch.Tensor], list[torch.Tensor]]


@pytest.fixture(scope="module")
def demo() -> YOLOv7:
    return load_model()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_fp32_equals_the_plain_model(demo: YOLOv7, images: torch.Tensor) -> None:
    with torch.no_grad():
        expected = demo(images)
    result = open_network(Runtime(weights=demo, device="cpu"))(images)
    assert result.dtype == torch.float32
    assert relative(result, expected) < 1e-5  # sums in another order


def test_every_activation_and_repconv(images: torch.Tensor) -> None:
    model = create_model("yolov7", 3, width=0.25).eval()
    with torch.no_grad():
        expected = model(images)
    network = open_network(Runtime(weights=model, device="cpu"))
    assert relative(network(images), expected) < 1e-5
    assert isinstance(network, Network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network._model.modules())


def test_packed_convolutions_take_other_shapes(demo: YOLOv7, images: torch.Tensor) -> None:
    network = open_network(Runtime(weights=demo, device="cpu"))
    network(images[:1, :, :64, :64])
    with torch.no_grad():
        expected = demo(images)
    assert relative(network(images), expected) < 1e-5


def test_a_weight_is_packed_once_whoever_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = PackedConv(nn.Conv2d(8, 8, 3, padding=1), None)
    real, started = PackedConv._reordered, threading.Barrier(4)

    def slow(self: PackedConv, shape: list[int]) -> torch.Tensor:
        time.sleep(0.1)  # until the others have come
        return real(self, shape)

    @torch.no_grad()
    def first(_: int) -> torch.Tensor:
        started.wait()
        result: torch.Tensor = conv(torch.ones(1, 8, 8, 8))
        return result

    monkeypatch.setattr(PackedConv, "_reordered", slow)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(first, range(4)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_in_place_is_decoding(demo: YOLOv7, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    decode = Decoder(demo.head)
    for scale in (4, 3, 3):  # of another shape, and again
        sides = [(scale * n, scale * n + n) for n in (4, 2, 1)]
        raw = [torch.randn(2, 3, h, w, 8, generator=random).to(dtype) for h, w in sides]
        before = [y.clone() for y in raw]
        decoded = decode(raw)
        torch.testing.assert_close(decoded, demo.head.decode(raw))
        assert all(torch.equal(a, b) for a, b in zip(raw, before, strict=True))


def test_bf16_decodes_in_fp32(demo: YOLOv7, images: torch.Tensor) -> None:
    with torch.no_grad():
        expected = demo(images)
    network = open_network(Runtime(weights=demo, device="cpu", precision="bf16"))
    result = network(images)
    assert network.dtype == torch.bfloat16
    assert result.dtype == torch.float32
    assert relative(result[..., :4], expected[..., :4]) < 0.02  # 8 bits of mantissa
    # Coordinates are not rounded to bf16's steps of 1 at 128 pixels.
    assert (result[..., :2] % 0.5 != 0).float().mean() > 0.9


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="no oneDNN form of ReLU"):
        PackedConv(nn.Conv2d(3, 3, 1), nn.ReLU())


def test_devices_and_precisions() -> None:
    cpu = torch.device("cpu")
    assert resolve_device("cpu") == cpu
    assert resolve_precision("auto", cpu) == "fp32"
    assert resolve_precision("auto", torch.device("mps")) == "fp32"
    assert resolve_precision("auto", torch.device("cuda")) == "fp16"
    for name in ("cuda:99", "99", "mps", "gpu", "xpu"):
        with pytest.raises(UserError, match=f"device {name}: "):
            resolve_device(name)
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        resolve_precision("fp16", cpu)
    with pytest.raises(UserError, match="precision int4: give auto"):
        resolve_precision("int4", cpu)


def test_engines(demo: YOLOv7, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="engine fast: give"):
        open_network(Runtime(weights=demo, device="cpu", engine="fast"))
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError, match=r"needs the C\+\+ compiler g\+\+: install"):
        open_network(Runtime(weights=demo, device="cpu", engine="compile"))
    monkeypatch.setattr("shutil.which", lambda name: name if name == "clang++" else None)
    monkeypatch.delenv("CXX", raising=False)
    if sys.platform == "linux":  # where Inductor does not look for another
        with pytest.raises(UserError, match=r"set CXX to another, or use eager"):
            open_network(Runtime(weights=demo, device="cpu", engine="compile"))


def test_compile_freezes_and_keeps_its_cache(
    demo: YOLOv7, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOV7_CACHE", "cache")
    monkeypatch.setenv(COMPILED, default_cache_dir())  # as importing Inductor leaves it
    asked: dict[str, Any] = {}
    frozen: list[bool] = []

    def compile_(outputs: Outputs, **options: Any) -> Outputs:
        asked.update(options)

        def forward(x: torch.Tensor) -> list[torch.Tensor]:
            frozen.append(torch._inductor.config.freezing and not torch.is_grad_enabled())
            return outputs(x)

        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("shutil.which", lambda name: name)
    network = open_network(Runtime(weights=demo, device="cpu", engine="compile"))
    assert asked == {"dynamic": False}
    assert os.environ[COMPILED] == str(Path("cache/inductor"))
    assert relative(network(images), demo(images)) < 1e-5  # sums in another order
    assert frozen == [True]
    assert not torch._inductor.config.freezing


def test_graph_plans_for_every_shape_and_keeps_a_few(demo: YOLOv7) -> None:
    """On a CPU the kernels' references run."""
    network = open_network(Runtime(weights=demo, device="cpu", engine="graph"))
    sizes = [(1, 3, 32, 32 * columns) for columns in range(1, PLANS + 3)]
    for size in [*sizes, sizes[-1]]:
        x = torch.rand(size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = demo(x)
        assert relative(network(x), expected) < 1e-4
    assert isinstance(network, GraphNetwork)
    plans = [network.planned(size[0], *size[2:]) for size in sizes[-PLANS:]]
    assert network.planned(1, 32, 32 * (PLANS + 2)) is plans[-1]
    assert len({id(plan) for plan in plans}) == len(network._plans) == PLANS


def test_graph_is_refused_where_triton_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A B200 with the Triton of PyTorch 2.11: eager under auto, said once; else one line."""
    pytest.importorskip("triton")
    blackwell, hopper = torch.device("cuda:0"), torch.device("cuda:1")
    capability = {blackwell: (10, 0), hopper: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.__getitem__)
    monkeypatch.setattr("triton.__version__", "3.6.0")
    with pytest.warns(UserWarning, match=r"Triton 3\.6\.0 .* 10\.0: install") as said:
        assert resolve_engine("auto", blackwell) == "eager"
    assert len(said) == 1
    with pytest.raises(UserError, match=r"engine graph: Triton 3\.6\.0") as error:
        resolve_engine("graph", blackwell)
    assert "\n" not in str(error.value)
    assert resolve_engine("graph", hopper) == resolve_engine("auto", hopper) == "graph"
    monkeypatch.setattr("triton.__version__", "3.7.1")
    assert resolve_engine("auto", blackwell) == "graph"
    monkeypatch.setattr("yolov7.engine.choose.AMD", True)
    assert (resolve_engine("auto", hopper), resolve_engine("graph", hopper)) == ("eager", "graph")


def test_fp8_needs_calibrated_weights_and_the_graph(demo: YOLOv7, images: torch.Tensor) -> None:
    with pytest.raises(UserError, match="yolov7 convert --precision fp8 --calibrate"):
        open_network(Runtime(weights=demo, device="cpu", precision="fp8", engine="graph"))
    model = copy.deepcopy(demo)
    model.ranges = {"fp8": calibrate(copy.deepcopy(demo).fuse(), [images])}
    with pytest.raises(UserError, match="needs engine graph"):
        open_network(Runtime(weights=model, device="cpu", precision="fp8"))
    network = open_network(Runtime(weights=model, device="cpu", precision="fp8", engine="graph"))
    with torch.no_grad():
        expected = demo(images)
    assert network.precision == "fp8"
    assert 1e-4 < relative(network(images), expected) < 0.1


def test_fp16_on_a_cpu_is_for_checking_the_graph(demo: YOLOv7, images: torch.Tensor) -> None:
    network = open_network(Runtime(weights=demo, device="cpu", precision="fp16", engine="graph"))
    with torch.no_grad():
        expected = demo(images)
    assert 1e-6 < relative(network(images), expected) < 5e-3


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_forwards_take_no_page_faults() -> None:
    """In a process of its own: the allocator's settings hold for all of it."""
    code = """
import resource, torch
torch.set_num_threads(1)
from yolov7.checkpoint import load_model
from yolov7.engine.cpu import Decoder, PackedConv
from yolov7.engine.choose import Runtime, open_network
network, x = open_network(Runtime(weights=load_model(), device="cpu")), torch.rand(1, 3, 640, 640)
for _ in range(3): network(x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2): network(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 6000  # 30 000 otherwise
