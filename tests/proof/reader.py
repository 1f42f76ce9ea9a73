"""A child process that reads hostile inputs, and what comes of each. Needs Linux's /proc."""

import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from yolov7.errors import UserError

LONGEST = 10  # seconds of work
WAITING = 60  # seconds without work
MEMORY = 1 << 30  # bytes
LONGEST_MESSAGE = 1000  # characters
ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / name}{os.sep}" for name in ("yolov7", "train"))
# Events of the interpreter by which a file would execute something.
EXECUTING = re.compile(
    r"os\.(system|exec|fork|forkpty|posix_spawn|spawn)|subprocess\.Popen|pty\.spawn|"
    r"pickle\.find_class"
)

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Door:
    """A way in.

    Attributes:
        seeds: Sound inputs, from which the hostile ones are made.
        opened: What reads an input, given a folder for its files.
    """

    seeds: Callable[[], list[bytes]]
    opened: Callable[[Path], Read]


@dataclass(frozen=True)
class Outcome:
    """What came of an input.

    Attributes:
        kind: "read", "refused", or what is a finding: "traceback", "executed", "written", "died",
            "hang", "memory".
        place: Where it ended, and with which exceptions: alike for inputs that fare alike.
        text: The message of an error.
        lines: Of ours that were reached for the first time.
        seconds: Of work.
        memory: Bytes beyond what the process had before.
    """

    kind: str
    place: str = ""
    text: str = ""
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0

    @property
    def found(self) -> bool:
        """Whether it is a fault."""
        return self.kind not in ("read", "refused")


class Reader:
    """A child process that reads inputs, one at a time.

    Args:
        door: What reads them.
    """

    def __init__(self, door: Door) -> None:
        self.door = door
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.child = context.Process(target=serve, args=(self.door, other), daemon=True)
        self.child.start()
        other.close()
        self.pipe.recv_bytes()  # it is ready

    def read(self, data: bytes) -> Outcome:
        """What the child makes of an input."""
        before, memory = self._work(), self._memory("VmRSS")
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")  # the peak begins here
        start = time.monotonic()
        self.pipe.send_bytes(data)
        while not self.pipe.poll(0.05):
            seconds = self._work() - before
            if self._memory("VmHWM") - memory > 2 * MEMORY:
                return self._killed(Outcome("memory", seconds=seconds, memory=2 * MEMORY))
            if seconds > LONGEST or time.monotonic() - start > WAITING:
                return self._killed(Outcome("hang", seconds=seconds))
        try:
            answer = json.loads(self.pipe.recv_bytes())
        except EOFError:
            self.child.join()
            code = self.child.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._start()
            return Outcome("died", name)
        peak, seconds = self._memory("VmHWM") - memory, self._work() - before
        outcome = Outcome(**answer, seconds=seconds, memory=peak)
        if peak > MEMORY:
            return replace(outcome, kind="memory")
        return replace(outcome, kind="hang") if seconds > LONGEST else outcome

    def close(self) -> None:
        """End the child."""
        self.child.kill()
        self.child.join()

    def _killed(self, outcome: Outcome) -> Outcome:
        self.close()
        self._start()
        return outcome

    def _work(self) -> float:
        """Seconds that the child has computed."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0

    def _memory(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", self._proc("status"))
        return int(found[1]) << 10 if found else 0

    def _proc(self, name: str) -> str:
        try:
            return Path(f"/proc/{self.child.pid}/{name}").read_text()
        except ProcessLookupError:
            return ""


def serve(door: Door, pipe: Connection) -> None:
    """What the child does: read inputs until it is killed."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    with tempfile.TemporaryDirectory(prefix="proof-") as name:
        folder = Path(name)
        os.environ |= {"YOLOV7_CACHE": f"{folder / 'cache'}", "TMPDIR": name}
        read = door.opened(folder)
        for seed in door.seeds():  # imports what is imported late
            attempt(read, seed)
        watch = _Watch(folder)
        sys.addaudithook(watch)
        pipe.send_bytes(b"")
        while True:
            data = pipe.recv_bytes()
            lines: set[str] = set()
            with watch.armed(), _reached(watch.known, lines):
                kind, place, text = attempt(read, data)
            if watch.events:
                (kind, place), text = watch.events[0], ""
            answer = {"kind": kind, "place": place, "text": text, "lines": sorted(lines)}
            pipe.send_bytes(json.dumps(answer).encode())


def attempt(read: Read, data: bytes) -> tuple[str, str, str]:
    """Kind, place and text of the outcome of an input."""
    try:
        read(data)
    except UserError as error:
        text = str(error)
        if text.isprintable() and len(text) < LONGEST_MESSAGE:
            return "refused", _place(error), text
        return "traceback", f"{_place(error)} is no line", ascii(text)[:300]
    except BaseException as error:
        return "traceback", _place(error), ascii(error)[:300]
    return "read", "", ""


def _place(error: BaseException | None) -> str:
    """The line of ours that raised an exception, and of those that it was raised for."""
    places = []
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((f for f in reversed(frames) if f.filename.startswith(OURS)), frames[-1])
        places.append(f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}")
        error = error.__context__
    return ", ".join(places)


class _Watch:
    """An audit hook: what an input makes the interpreter do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events, self.on = str(folder), list[tuple[str, str]](), False
        self.known: set[str] = set()

    @contextmanager
    def armed(self) -> Iterator[None]:
        self.events, self.on = [], True
        try:
            yield
        finally:
            self.on = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if EXECUTING.fullmatch(event):
            self.events.append(("executed", f"{event} {ascii(args)[:80]}"))
        elif event == "open" and isinstance(args[0], str | bytes) and isinstance(args[2], int):
            path = os.fsdecode(args[0])
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not os.path.abspath(path).startswith((self.folder, "/dev/")):
                self.events.append(("written", ascii(path)[:200]))


@contextmanager
def _reached(known: set[str], new: set[str]) -> Iterator[None]:
    """Note the lines of ours, and of the unpickler, that are run."""

    def on_line(frame: FrameType, event: str, arg: object) -> Any:
        key = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if key not in known:
            known.add(key)
            new.add(key)
        return on_line

    def on_call(frame: FrameType, event: str, arg: object) -> Any:
        name = frame.f_code.co_filename
        return on_line if name.startswith(OURS) or name.endswith("/pickle.py") else None

    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(None)
