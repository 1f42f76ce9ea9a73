"""The command line: one typed dataclass per verb, parsed by tyro."""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

import tyro

from yolov7.errors import UserError
from yolov7.text import printable

# Verb -> what it does. Each lives in the module of its name here: a dataclass named like it and
# a function `run(options) -> exit code`. A verb's module is imported when it is asked for.
VERBS = {
    "predict": "Detect objects in images, videos, cameras and streams.",
    "train": "Train a model, from scratch or from weights, or go on with a run.",
    "val": "Measure a model's accuracy on a data set.",
    "export": "Write a model for other runtimes: ONNX, torch.export, AOTInductor.",
    "bench": "Time a model on this machine, from the frame to the boxes.",
    "info": "Show what a model is made of.",
    "convert": "Write weights in this project's safetensors format.",
}

# What a disk, not this code, has done wrong.
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `yolov7 VERB ...`.

    Returns:
        0: done; 1: an error that the user can mend, said in one line. Wrong usage exits with 2.
    """
    _bear_any_text()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    verb, *rest = words
    if verb == "--version":
        from yolov7 import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(
            f"error: no verb {printable(repr(verb))}{hint} (verbs: {', '.join(VERBS)})",
            file=sys.stderr,
        )
        return 2
    module = import_module(f"yolov7.cli.{verb}")
    options = tyro.cli(
        getattr(module, verb.capitalize()),
        prog=f"yolov7 {verb}",
        description=VERBS[verb],
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        code = int(module.run(options))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has had enough: `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
        return 141
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {printable(place)}{error.strerror}", file=sys.stderr)
        return 1


def _bear_any_text() -> None:
    """Let the terminal's encoding never end a run: letters that it lacks are written as codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _usage() -> str:
    rows = "\n".join(f"  {verb:<9}{text}" for verb, text in VERBS.items())
    return f"usage: yolov7 VERB [options]   (yolov7 VERB --help lists them)\n\n{rows}"
