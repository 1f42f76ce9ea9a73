"""The command line: one typed dataclass per verb; `parse` reads its words."""

import errno
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import current_thread, main_thread
from types import ModuleType
from typing import Any, TextIO

from yolov7.cli.parse import VERBS_ELSEWHERE, parse
from yolov7.errors import UserError
from yolov7.text import printable

# Verb -> what it does. Each lives in the module of its name here (`-` is `_`): a dataclass named
# like it and a function `run(options) -> exit code`, imported when the verb is asked for.
VERBS = {
    "predict": "Detect objects in images, videos, cameras and streams.",
    "track": "Follow objects through videos, cameras and streams.",
    "train": "Train a model, from scratch or from weights, or go on with a run.",
    "tune-hyperparameters": "Search the hyper-parameters that train best on a data set.",
    "val": "Measure a model's accuracy on a data set.",
    "check": "Find everything that is wrong with a data set.",
    "export": "Write a model for other runtimes: ONNX, OpenVINO, torch.export, AOTInductor.",
    "bench": "Time a model on this machine, from the frame to the boxes.",
    "info": "Show what a model is made of.",
    "convert": "Write weights in this project's safetensors format.",
    "tune": "Find the fastest kernel configs on this GPU.",
    "aot": "Compile the kernels for a GPU that need not be here.",
}


# A disk that is full, over its quota, read-only or broken, or a file over its limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `yolov7 VERB ...`.

    Args:
        arguments: The words after `yolov7`; None: those that the process was started with.

    Returns:
        0: done; 1: an error that the user can mend, said in one line; 130, 141 or 143: ended by
        Ctrl-C, a closed pipe or SIGTERM. Wrong usage exits with 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours = arguments is None and current_thread() is main_thread()
    try:
        code = _main(words, ours)
        sys.stdout.flush()
    except KeyboardInterrupt:  # while it ends
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `yolov7 ... | head`: nobody reads on, and nobody would read of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    if ours and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what Python still does is nobody's concern
    return code


def _main(words: list[str], ours: bool) -> int:
    _bear_any_text()
    _wait_in_sleep()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(message)}\n"
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    verb, *rest = words
    if verb == "--version":
        from yolov7 import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        print(f"error: {_no_verb(verb)}", file=sys.stderr)
        return 2
    with _ended_by_sigint() if ours else nullcontext():
        module = import_module(f"yolov7.cli.{verb.replace('-', '_')}")
        options = parse(getattr(module, verb.title().replace("-", "")), verb, VERBS[verb], rest)
    with _ended_by_sigterm(), _streams(options):
        return _run(module, options)


def _no_verb(verb: str) -> str:
    """What to say to a first word that is no verb."""
    named = printable(repr(verb))
    if verb in VERBS_ELSEWHERE:
        return f"no verb {named}: here it is yolov7 {VERBS_ELSEWHERE[verb]}"
    if verb.startswith("-") or "=" in verb:
        return f"no verb {named}: the verb comes first, then --name value (yolov7 --help)"
    near = get_close_matches(verb, VERBS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no verb {named}{hint} (verbs: {', '.join(VERBS)})"


@contextmanager
def _streams(options: Any) -> Iterator[None]:
    """With `--json -` the result goes to standard output, and all lines to standard error.

    With `--quiet` they go nowhere.
    """
    with ExitStack() as stack:
        quiet = getattr(options, "quiet", False)
        if str(getattr(options, "json", None)) == "-":
            folder = Path(stack.enter_context(TemporaryDirectory()))
            options.json = type(options.json)(folder / "result.json")
            stack.callback(_copy, folder / "result.json", sys.stdout)
            if not quiet:
                stack.enter_context(redirect_stdout(sys.stderr))
        if quiet:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def _copy(path: Path, stream: TextIO) -> None:
    """Write a file, if it is there, to a stream."""
    if path.exists():
        with suppress(BrokenPipeError), path.open(encoding="utf-8") as file:
            shutil.copyfileobj(file, stream)
            stream.flush()


class Terminated(KeyboardInterrupt):
    """SIGTERM, such as `docker stop` sends: what was written is put in its place, as at Ctrl-C."""


def _run(module: ModuleType, options: object) -> int:
    try:
        return int(module.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = f"{printable(error.filename)}: " if error.filename else ""
        print(f"error: {where}cannot be written ({error.strerror})", file=sys.stderr)
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1


@contextmanager
def _ended_by_sigint() -> Iterator[None]:
    """Let Ctrl-C end the process at once, while it loads code: an import may swallow an exception.

    Where the process was started to ignore it, as in the background of a script, it goes on so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """End the work in order at SIGTERM, where nobody else has plans for it."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the second ends it at once
        raise Terminated

    ours = current_thread() is main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _bear_any_text() -> None:
    """Let the terminal's encoding never end a run: letters that it lacks are written as codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _wait_in_sleep() -> None:
    """Let threads that wait for others sleep after 40 us, not after 10 ms of turning in circles.

    With a busy process beside ours, on two cores, the thread that is not running waits for the one
    that turns: a forward of yolov7-tiny at 320 pixels took 2.8 s instead of 0.13. GNU's OpenMP does
    so by itself where it knows of more threads than cores. It reads this when PyTorch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _usage() -> str:
    width = 2 + max(map(len, VERBS))
    rows = "\n".join(f"  {verb:<{width}}{text}" for verb, text in VERBS.items())
    return f"usage: yolov7 VERB [options]   (yolov7 VERB --help lists them)\n\n{rows}"
