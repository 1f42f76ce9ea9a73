"""Two processes over gloo, as torchrun starts them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from yolov7.train.loop import train
from yolov7.train.options import Train
from yolov7.train.report import read_rows
from yolov7.train.state import load_state

PLAIN = {
    "hsv_h": 0, "hsv_s": 0, "hsv_v": 0, "translate": 0, "scale": 0, "fliplr": 0, "mosaic": 0,
    "mixup": 0, "paste_in": 0, "warmup_epochs": 0, "lr0": 1e-5,
}  # fmt: skip

GRADIENTS = """
import copy, torch
from itertools import product
import torch.distributed as dist
from yolov7.model import create_model
from yolov7.train.distributed import Ranks, over_ranks
from yolov7.train.loss import head_loss

# In fp32 a rounding may flip a LeakyReLU or a maximum, and with it a thousandth of a gradient.
torch.manual_seed(0)
start = create_model("yolov7-tiny", 2, width=0.125).double().train()
images = torch.rand(4, 3, 64, 64).double()
boxes = torch.cat([torch.rand(4, 3, 2), 0.2 + 0.3 * torch.rand(4, 3, 2)], 2)
labels = torch.cat([torch.randint(2, (4, 3, 1)).float(), boxes], 2)
labels[3, :, 0] = -1
single = torch.tensor([[0, 0.5, 0.5, 0.1, 0.1]] + [[-1, 0, 0, 0, 0]] * 3).view(4, 1, 5)
loss = head_loss(start, plain=False)

def backward(network, labels, part):
    terms = loss(network(images[part]), labels[part])
    (sum(terms[k] for k in ("box", "objectness", "classes")) * 4).backward()
    return terms["matches"]

whole = {"many": copy.deepcopy(start), "one": copy.deepcopy(start)}
labels = {"many": labels, "one": single}
matches = {name: backward(whole[name], labels[name], slice(None)) for name in whole}
assert matches["many"] > 20 and matches["one"] == 1, matches
dist.init_process_group("gloo")
ranks = Ranks(dist.get_rank(), 2)
for case, fused in product(whole, (False, True)):
    share = copy.deepcopy(start)
    parallel = over_ranks(share, torch.device("cpu"), ranks, sync_bn=True, fused=fused)
    backward(parallel, labels[case], slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))
    for (name, a), b in zip(whole[case].named_parameters(), share.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-5 * a.grad.abs().max(), (case, name)
    for (name, a), b in zip(whole[case].named_buffers(), share.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5), (case, name)
dist.destroy_process_group()
"""

NORM = """
import copy, torch
import torch.distributed as dist
from yolov7.train.norm import join_norms

torch.manual_seed(0)
whole = torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=0.03))
share = copy.deepcopy(whole)
x = (3 + 2 * torch.randn(4, 3, 8, 8)).bfloat16().requires_grad_()
weights = torch.randn(4, 3, 8, 8)
dist.init_process_group("gloo")
join_norms(share, synced=True)
mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
y = x.detach()[mine].requires_grad_()
with torch.autocast("cpu", torch.bfloat16):
    a, b = whole(x), share(y)
(a * weights).sum().backward()
(b * weights[mine]).sum().backward()
assert a.dtype == b.dtype == torch.bfloat16
# The two round to bf16, whose unit is 2^-8, at different places.
for ours, torchs in ((b, a[mine]), (y.grad, x.grad[mine])):
    torch.testing.assert_close(ours, torchs, rtol=2**-6, atol=2**-6)
for ours, torchs in zip(share.buffers(), whole.buffers(), strict=True):
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
dist.destroy_process_group()
"""

SCRIPT = """
import os, torch
torch.set_num_threads(1)
from yolov7.train import loop
from yolov7.train.options import Train
loop.can_plot = lambda: False
{extra}
loop.train(Train(**{options}))
"""

STUCK = """
import time
from pathlib import Path
original = loop.Step.__call__
def step(self, batch, progress):
    Path({folder!r}, f"rank{{self.ranks.rank}}").write_text(str(os.getpid()))
    time.sleep(0.2)
    return original(self, batch, progress)
loop.Step.__call__ = step
"""


def torchrun(script: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "2", str(script)),
    ]


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_have_the_gradients_of_one(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    subprocess.run(torchrun(script), check=True, timeout=120, env=environment)


def test_batch_norm_over_processes_takes_bf16(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "norm.py"
    script.write_text(NORM)
    subprocess.run(torchrun(script), check=True, timeout=120, env=environment)


def test_two_processes_learn_as_one(
    options: Train, tmp_path: Path, environment: dict[str, str]
) -> None:
    """The loss curve, the gradients and the evaluation of one process with the doubled batch."""
    # A step for every batch, small ones, and SiLU: in fp32 a rounding may flip a LeakyReLU, and
    # larger steps make that grow.
    options = replace(options, variant="yolov7-tiny-silu", batch=64, epochs=3)
    options = replace(options, sync_bn=True, plain_loss=True, set=PLAIN)
    script = tmp_path / "two.py"
    two = replace(options, name="two")
    script.write_text(SCRIPT.format(options=asdict(two), extra=""))
    subprocess.run(torchrun(script), check=True, timeout=120, env=environment)

    folders = [train(replace(options, name="one")).folder, Path(options.project) / "two"]
    states = [load_state(folder) for folder in folders]
    assert [state["updates"] for state in states] == [3, 3]
    for one, other in zip(*(read_rows(f / "results.csv") for f in folders), strict=True):
        for name in ("lr", "skipped", "matches"):
            assert one[name] == other[name]
        for name in ("box", "objectness", "classes"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
        for name in ("AP", "AP50"):
            assert one[name] == pytest.approx(other[name], abs=1e-3)
    momenta = [state["optimizer"]["state"].values() for state in states]
    for one, other in zip(*momenta, strict=True):
        a, b = one["momentum_buffer"], other["momentum_buffer"]
        assert (a - b).norm() < 0.05 * a.norm()  # 0.005 measured; a sum for an average: 1


def test_a_killed_rank_ends_the_run(
    options: Train, tmp_path: Path, environment: dict[str, str]
) -> None:
    script = tmp_path / "stuck.py"
    extra = STUCK.format(folder=str(tmp_path))
    script.write_text(SCRIPT.format(options=asdict(replace(options, epochs=1000)), extra=extra))
    run = subprocess.Popen(
        torchrun(script),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    pids = [tmp_path / f"rank{rank}" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in pids):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.1)
    os.kill(int(pids[1].read_text()), signal.SIGKILL)
    output, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "SIGKILL" in output
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids[0].read_text()), 0)
