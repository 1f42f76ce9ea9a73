"""The data.yaml: where the splits of a data set lie, and what its classes are called."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from yolov7.errors import UserError
from yolov7.text import printable

LARGEST = 2**18  # bytes: thousands of names, read in 2 s
DEEPEST = 16
# What a data.yaml states beside its splits, ours or others'.
OTHER_KEYS = frozenset({"path", "names", "nc", "category_ids", "download", "kpt_shape", "flip_idx"})
NOTHING = ("", "~", "null")


class _Loader(yaml.BaseLoader):
    """Every scalar as the text that stands there.

    `yes` and `1.10` are names, `'0'` is a number wherever one is asked for, and no tag makes an
    object. References are refused: a few of them unfold to any size.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One node, and what lies in it."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to a part of itself with *: write that out")
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a yaml file, all its scalars as text.

    Raises:
        UserError: It cannot be read, or is no such file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is no file")
        if status.st_size > LARGEST:
            raise UserError(f"{path} is no data.yaml: it is larger than {LARGEST >> 10} KB")
        content = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no data.yaml: it must name its splits and classes")
    return content


@dataclass(frozen=True)
class Description:
    """What a data.yaml says.

    Attributes:
        path: Of the file.
        root: The folder from which its splits start.
        splits: What it states for each split, files and folders as they are written.
        names: Class names; None where it has none, which is right beside COCO jsons.
        keypoints: Numbers that a row of labels has after the box, for poses; 0: none.
    """

    path: Path
    root: Path
    splits: dict[str, list[str]]
    names: list[str] | None
    keypoints: int

    def places(self, split: str) -> list[Path]:
        """Where the entries of a split lead, each place once.

        Raises:
            UserError: It has no such split.
        """
        if split not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise UserError(f"{self.path} has no split {split}: it has {known}")
        if not self.splits[split]:
            raise UserError(f"{self.path}: its split {split} is empty: say where the images lie")
        places: dict[str, Path] = {}
        for entry in self.splits[split]:
            place = _find(self.root, entry)
            try:
                real = os.path.realpath(place)
            except ValueError:  # NUL, or half of a letter
                raise UserError(
                    f"{self.path}: split {split}: {entry} is no path: correct it"
                ) from None
            places.setdefault(real, place)
        return list(places.values())

    def class_names(self) -> list[str]:
        """Class names, which YOLO form needs."""
        if self.names is None:
            raise UserError(f"{self.path} must give the names of the classes: names: [person, car]")
        return self.names


def read_description(path: Path, root: Path | None = None) -> Description:
    """Read a data.yaml.

    Args:
        path: Of the file.
        root: Overrides the folder that it names.

    Raises:
        UserError: It cannot be read, or states something wrong.
    """
    content = read_yaml(path)
    splits: dict[str, list[str]] = {}
    for key, value in content.items():
        entries = value if isinstance(value, list) else [value]
        if key not in OTHER_KEYS and all(isinstance(entry, str) for entry in entries):
            splits[printable(key)] = [entry for entry in entries if entry not in NOTHING]
    return Description(
        path,
        root or _root(path, content),
        splits,
        read_names(path, content) if "names" in content else None,
        _keypoints(path, content),
    )


def read_names(path: Path, content: dict[str, Any]) -> list[str]:
    """The class names of a data.yaml.

    Raises:
        UserError: It has none, or they do not fit together.
    """
    names = content.get("names")
    if isinstance(names, dict):
        by_number = {_number(path, "names", key): name for key, name in names.items()}
        if sorted(by_number) != list(range(len(names))):
            raise UserError(f"{path}: the keys of names must be 0 to {len(names) - 1}")
        names = [by_number[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(f"{path} must give the names of the classes: names: [person, car]")
    stated = content.get("nc", "")
    if stated not in NOTHING and _number(path, "nc", stated) != len(names):
        raise UserError(f"{path}: nc is {stated}, but it has {len(names)} names")
    return [printable(name) for name in names]


def _keypoints(path: Path, content: dict[str, Any]) -> int:
    shape = content.get("kpt_shape", [])
    if shape in ([], *NOTHING):
        return 0
    if not isinstance(shape, list) or len(shape) != 2:
        raise UserError(f"{path}: kpt_shape is {shape}: give [points, 2 or 3]")
    points, numbers = (_number(path, "kpt_shape", value) for value in shape)
    return points * numbers


def _number(path: Path, key: str, text: object) -> int:
    try:
        return int(str(text))
    except ValueError:
        raise UserError(f"{path}: {key} has {text}, which is no whole number") from None


def _root(path: Path, content: dict[str, Any]) -> Path:
    """The folder from which the splits of a data.yaml start."""
    stated = content.get("path", ".")
    if not isinstance(stated, str) or stated in NOTHING:
        return path.parent
    folder = native(stated)
    beside = path.parent / folder
    if os.path.isdir(beside):
        return beside
    return folder if os.path.isdir(folder) else path.parent


def _find(root: Path, entry: str) -> Path:
    """Where an entry of a data.yaml leads.

    Some tools write `../train/images` for a folder beside the data.yaml, others paths from the
    working directory or of the machine that made them (`/content/set/train/images`): where the
    plain reading leads nowhere, these are tried, the last by two folders of their end at least.
    """
    path = native(entry)
    plain = root / path
    tails = [root / Path(*path.parts[i:]) for i in range(1, len(path.parts) - 1)]
    places = (plain, root / native(entry.removeprefix("../")), path, *tails)
    return next((place for place in places if os.path.exists(place)), plain)


def native(text: str) -> Path:
    """A path as this system writes it: data sets made on Windows have backslashes."""
    path = Path(text)
    if os.sep == "/" and "\\" in text and not os.path.exists(path):
        return Path(PureWindowsPath(text).as_posix())
    return path
