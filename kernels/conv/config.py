"""Configs of the convolutions: what they say, and where tuned ones are found.

The tuner (`yolov7 tune`) writes the fastest config of each launch that it was given into
``configs/DEVICE/conv.json`` under the user's cache folder; configs that come with the package lie
beside this code in the same form. A launch of another size takes that of the nearest one. What a
file holds is valid for the Triton that it was tuned with, since another compiles other machine
code; what can't be used is said once, and the launch takes its default.
"""

import functools
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch

from yolov7.kernels import runtime
from yolov7.kernels.runtime import triton

PACKAGED = Path(__file__).parents[1] / "configs"
COMMAND = "yolov7 tune"

Key = tuple[str, tuple[int, ...]]
"""What a launch is looked up by: its kind, which must match, and sizes, which may differ."""


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """How a launch of convolutions is computed."""

    tma: bool = False
    """By the Hopper kernel, or by the portable one."""
    block_m: int
    """Rows of a tile."""
    block_n: int
    """Output channels of a tile."""
    block_k: int
    """Terms of the sum that are multiplied at a step."""
    split_k: int = 1
    """Parts of the sum that programs share; what they leave is added by a second launch."""
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int = 0
    """Registers of a thread at most; 0 leaves them to the compiler."""
    flatten: bool = False
    """Overlap one tile's store with the next one's loads (Hopper)."""
    occupancy: int = 1
    """Programs of a processor (Hopper)."""
    launch_pdl: bool = False
    """Be launched before the kernel before has ended (from sm_90 on)."""

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """The config that a file holds, every field by its name.

        Raises:
            ValueError: a field is missing, unknown, or not of its type.
        """
        types = {field.name: field.type for field in fields(cls)}
        if not isinstance(values, dict):
            raise ValueError(f"a config is {values!r}")
        if missing := sorted(types.keys() - values.keys()):
            raise ValueError(f"a config lacks {', '.join(missing)}")
        if unknown := sorted(values.keys() - types.keys()):
            raise ValueError(f"a config has an unknown {', '.join(unknown)}")
        for name, value in values.items():
            if type(value) is not types[name] or value < 0:
                raise ValueError(f"the {name} of a config is {value!r}")
        return cls(**values)

    def options(self, *constexprs: str) -> runtime.Config:
        """Constexprs by the names that a kernel gives them, ``BLOCK_M``, and compile options.

        GPUs before sm_90 do not know ``launch_pdl``, so it is there only where it is wanted.
        """
        options = {name: getattr(self, name.lower()) for name in constexprs}
        options |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg:
            options["maxnreg"] = self.maxnreg
        if self.tma:
            options["FLATTEN"] = int(self.flatten)
        if self.launch_pdl:
            options["launch_pdl"] = 1
        return options


@dataclass(frozen=True)
class Entry:
    """The best config of one launch, as a file holds it."""

    kind: str
    """``3x3s1-fp16`` for instance."""
    size: tuple[int, ...]
    config: ConvConfig
    microseconds: float
    tried: int
    """Configs that were tried; fewer than the search space when time ran out."""

    @property
    def key(self) -> Key:
        """What a launch is looked up by."""
        return self.kind, self.size

    @classmethod
    def from_json(cls, row: Any) -> Self:
        """The entry of a file.

        Raises:
            ValueError: it is not one.
        """
        try:
            kind, size = str(row["kind"]), tuple(map(int, row["size"]))
            config = ConvConfig.from_json(row["config"])
            return cls(kind, size, config, float(row["microseconds"]), int(row["tried"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"an entry is incomplete ({error})") from None


def user_configs() -> Path:
    """Where the tuner writes: the folder that `yolov7.cache` names, under YOLOV7_CACHE if set.

    Nothing above is imported here. Of a user without a home it is a folder that is not there.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return Path(os.environ.get("YOLOV7_CACHE") or user / "yolov7-triton") / "configs"


def write_entries(
    path: Path, entries: Mapping[Key, Entry], capability: tuple[int, int], device: str
) -> None:
    """Write a config file."""
    rows = [asdict(entry) for _, entry in sorted(entries.items())]
    head = {"device": device, "capability": list(capability), "triton": triton.__version__}
    write_json(path, {**head, "entries": rows})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def read_entries(path: Path) -> dict[Key, Entry]:
    """The entries of a config file that are of use; those that are not are one warning."""
    if not path.exists():
        return {}
    entries, faults = {}, []
    try:
        content = json.loads(path.read_text())
        version, rows = str(content["triton"]), list(content["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        faults.append(f"no config file ({type(error).__name__}: {error})")
        version, rows = triton.__version__, []
    if version.split(".")[:2] != triton.__version__.split(".")[:2]:
        faults.append(f"tuned with Triton {version}, this is {triton.__version__}")
        rows = []
    for row in rows:
        try:
            entry = Entry.from_json(row)
        except ValueError as error:
            faults.append(str(error))
        else:
            entries[entry.key] = entry
    if faults:
        text = f"{path}: {faults[0]}; default configs are used instead; tune with: {COMMAND}"
        warnings.warn(text, stacklevel=2)
    return entries


@functools.cache
def tuned_entries(folder: str) -> dict[Key, Entry]:
    """What was tuned for a device, by the user or for the package, the user's first."""
    packaged, user = (base / folder / "conv.json" for base in (PACKAGED, user_configs()))
    return read_entries(packaged) | read_entries(user)


@functools.cache
def warn_untuned(name: str) -> None:
    """Say once that a device runs default configs."""
    warnings.warn(f"no kernel config was tuned for {name}; to tune: {COMMAND}", stacklevel=2)


def find_config(key: Key, device: torch.device) -> ConvConfig | None:
    """The tuned config of the nearest launch of a kind within a factor of two, if there is one.

    Args:
        key: kind, and positive numbers, each compared by its ratio.
        device: where it will run.
    """
    folder = runtime.device_folder(device)
    if folder is None:
        return None
    entries = tuned_entries(folder)
    if not entries and not runtime.is_recording():
        warn_untuned(folder)
    kind, size = key

    def ratios(entry: Entry) -> list[float]:
        pairs = zip(entry.size, size, strict=True)
        return [abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs]

    # What decides a config is the number of tiles for each processor, and the default counts them:
    # one tuned for 32 images leaves most processors idle at one image.
    alike = (e for e in entries.values() if e.kind == kind and len(e.size) == len(size))
    near = [entry for entry in alike if max(ratios(entry)) <= 1]
    if not near:
        return None
    return min(near, key=lambda entry: sum(r * r for r in ratios(entry))).config
