"""The network through `torch.compile`, its results kept in the user's cache folder."""

import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from yolov7.cache import cache_folder
from yolov7.engine.cpu import can_pack
from yolov7.engine.eager import Network
from yolov7.errors import UserError
from yolov7.model import YOLOv7

T = TypeVar("T")

COMPILED = "TORCHINDUCTOR_CACHE_DIR"
COMPILERS = {"darwin": "clang++", "win32": "cl"}  # that Inductor takes where CXX names none


class CompiledNetwork(Network):
    """A network with frozen weights, compiled once per input shape; on a CPU in fp32 Winograd's.

    Raises:
        UserError: No C++ compiler is here.
    """

    engine = "compile"
    one_shape = True

    def _made_ready(self, model: YOLOv7) -> Callable[[Tensor], Tensor]:
        compiler = os.environ.get("CXX", COMPILERS.get(sys.platform, "g++"))
        if not shutil.which(compiler):
            raise UserError(
                f"engine compile needs the C++ compiler {compiler}: install it, set CXX to "
                "another, or use eager"
            )
        _keep_compiled()
        if self.device.type != "cpu":
            return _frozen(torch.compile(model, dynamic=False))
        if self.dtype == torch.float32 and can_pack():
            from yolov7.engine.winograd import use_winograd  # loads the compiler

            use_winograd(model)
        outputs: Callable[[Tensor], list[Tensor]] = model.lead_outputs
        return self._decoded(model, _frozen(torch.compile(outputs, dynamic=False)))


def _keep_compiled() -> None:
    """Have Inductor write into the user's cache folder, unless the user names another."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing Inductor sets the variable to a folder under /tmp.
    if os.environ.get(COMPILED, default_cache_dir()) == default_cache_dir():
        os.environ[COMPILED] = str(cache_folder("inductor"))


def _frozen(compiled: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    """Compile with the weights as constants, which are packed then.

    As an option of `torch.compile` this reaches Inductor but not Dynamo, which would pass the
    weights as arguments: 41 ms instead of 20 for yolov7-tiny in bf16. The setting is the whole
    process's, so one thread compiles at a time.
    """
    from torch._inductor import config

    lock, ready = threading.Lock(), set[tuple[object, ...]]()

    def forward(x: Tensor) -> T:
        kind = (x.shape, torch.is_inference_mode_enabled())  # of which each is compiled for itself
        if kind in ready:
            return compiled(x)
        with lock, config.patch(freezing=True):
            result = compiled(x)
        ready.add(kind)
        return result

    return forward
