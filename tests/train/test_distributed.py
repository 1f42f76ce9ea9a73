"""Two processes over gloo, as torchrun starts them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from yolov7.train import loop
from yolov7.train.loop import train
from yolov7.train.options import Train
from yolov7.train.report import read_rows

PLAIN = {
    "hsv_h": 0, "hsv_s": 0, "hsv_v": 0, "translate": 0, "scale": 0, "fliplr": 0, "mosaic": 0,
    "mixup": 0, "paste_in": 0, "warmup_epochs": 0, "lr0": 0.001,
}  # fmt: skip

GRADIENTS = """
import copy, torch
import torch.distributed as dist
from yolov7.model import create_model
from yolov7.train import prepare
from yolov7.train.config import PRESETS
from yolov7.train.distributed import synchronise_batch_norms
from yolov7.train.norm import join_norms

# In fp32 a rounding may flip a LeakyReLU or a maximum, and with it a thousandth of a gradient.
torch.manual_seed(0)
whole = create_model("yolov7-tiny", 2, width=0.125).double().train()
shares = [copy.deepcopy(whole) for _ in range(2)]
images = torch.rand(4, 3, 64, 64).double()
boxes = torch.cat([torch.rand(4, 3, 2), 0.2 + 0.3 * torch.rand(4, 3, 2)], 2)
labels = torch.cat([torch.randint(2, (4, 3, 1)).float(), boxes], 2)
labels[3, :, 0] = -1
loss = prepare.head_loss(whole, PRESETS["tiny"], plain=False)

def backward(network, part):
    terms = loss(network(images[part]), labels[part])
    (sum(terms[k] for k in ("box", "objectness", "classes")) * 4).backward()

backward(whole, slice(None))
dist.init_process_group("gloo")
join_norms(shares[1], dist.group.WORLD)
for share in shares:
    synchronise_batch_norms(share, torch.device("cpu"))
    parallel = torch.nn.parallel.DistributedDataParallel(share)
    backward(parallel, slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))
    for (name, a), b in zip(whole.named_parameters(), share.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-5 * a.grad.abs().max(), name
    for (name, a), b in zip(whole.named_buffers(), share.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5), name
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
original = loop.Run._train_batch
def train_batch(self, batch):
    Path({folder!r}, f"rank{{self.ranks.rank}}").write_text(str(os.getpid()))
    time.sleep(0.2)
    return original(self, batch)
loop.Run._train_batch = train_batch
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


def test_two_processes_learn_as_one(
    options: Train, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss curve and evaluation of one process with the doubled batch."""
    monkeypatch.setattr(loop, "can_plot", lambda: False)
    options = replace(options, batch=4, epochs=3, sync_bn=True, plain_loss=True, set=PLAIN)
    script = tmp_path / "two.py"
    two = replace(options, name="two")
    script.write_text(SCRIPT.format(options=asdict(two), extra=""))
    subprocess.run(torchrun(script), check=True, timeout=120, env=environment)

    folders = [train(replace(options, name="one")).folder, Path(options.project) / "two"]
    for one, other in zip(*(read_rows(f / "results.csv") for f in folders), strict=True):
        for name in ("lr", "skipped", "matches"):
            assert one[name] == other[name]
        for name in ("box", "objectness", "classes", "AP", "AP50"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-3)


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
