"""From the words of a command line to the options of a verb."""

import ast
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from inspect import get_annotations, getsource
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any

from yolov7.text import printable

# What people write who come from elsewhere, and the word here: told, not taken.
VERBS_ELSEWHERE = {"detect": "predict", "test": "val", "benchmark": "bench"}
OPTIONS_ELSEWHERE = {
    "agnostic-nms": "--agnostic",
    "batch-size": "--batch",
    "cfg": "--variant",
    "conf-thres": "--conf",
    "dynamic-batch": "--batch dynamic",
    "end2end": "--nms onnx",
    "grid": "--layout grid",
    "half": "--precision fp16",
    "hyp": "--preset, and --set NAME VALUE",
    "img": "--imgsz",
    "img-size": "--imgsz",
    "include": "--format",
    "iou-thres": "--iou",
    "model": "--weights",
    "task": "--split",
    "view-img": "--show",
}
VALUES_ELSEWHERE = {
    "tensorrt": "TensorRT builds its engine from --format onnx (docs/deploy.md)",
    "torchscript": "torch-export and aoti take its place",
}
VALUES_ELSEWHERE |= dict.fromkeys(("engine", "trt"), VALUES_ELSEWHERE["tensorrt"])


def parse(options: type, verb: str, about: str, words: Sequence[str]) -> Any:
    """The options of a verb.

    Args:
        options: Their dataclass.
        verb: Of the command line.
        about: What it does, in a sentence.
        words: That follow the verb.

    Raises:
        SystemExit: With 2 for wrong usage, which has been said; with 0 for `--help`.
    """
    import tyro  # 0.3 s, in which Ctrl-C should be quiet already

    if os.environ.get("NO_COLOR"):  # which tyro does not know
        tyro._experimental_options["ansi_codes"] = False
    for owner in options.__mro__[:-1]:
        _describe(owner)
    names = {field.name.replace("_", "-") for field in fields(options)}
    for before, word in zip(["", *words], words, strict=False):
        if hint := _elsewhere(word, before, names):
            print(f"error: {printable(word)}: {hint}", file=sys.stderr)
            raise SystemExit(2)
    return tyro.cli(
        options,
        prog=f"yolov7 {verb}",
        description=about,
        args=words,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )


def _elsewhere(word: str, before: str, names: set[str]) -> str | None:
    """What to write here in the place of a word, if it is one of another program."""
    flag, _, value = word.partition("=")
    if before == "--format" or flag == "--format":
        return VALUES_ELSEWHERE.get(value or word)
    if flag.startswith("--"):
        name = flag[2:].replace("_", "-")
        return None if name in names else _in_place_of(name, names)
    pair = re.fullmatch(r"([a-z]\w*)=(.*)", word)
    if pair and not before.startswith("--"):  # else it is that option's value
        name = pair[1].replace("_", "-")
        if name in names:
            return f"write --{name} {printable(pair[2])}"
        return _in_place_of(name, names, printable(pair[2]))
    return None


def _in_place_of(name: str, names: set[str], value: str = "") -> str | None:
    here = OPTIONS_ELSEWHERE.get(name, "")
    known = re.findall(r"--([\w-]+)", here)
    if not known or known[0] not in names:
        return None
    return f"here it is {here} {value}".strip()


@cache
def _describe(owner: type) -> None:
    """Give the fields of a dataclass their docstrings as help, each as one paragraph.

    Defaults are named that say something: not None, nothing or False.
    """
    from tyro import conf

    (body,) = ast.parse(dedent(getsource(owner))).body
    assert isinstance(body, ast.ClassDef)
    kinds = get_annotations(owner)
    for field, text in pairwise(body.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(said))),
            ):
                said = " ".join(said.split())
                kinds[name] = Annotated[kinds[name], conf.arg(help=said, help_behavior_hint=_hint)]
    owner.__annotations__ = kinds


def _hint(default: str) -> str:
    return "" if default in ("", "''", "None", "False", "True") else f"(default: {default})"
