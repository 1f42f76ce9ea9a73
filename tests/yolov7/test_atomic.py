"""Files that are whole or absent, whatever happens to the writer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from yolov7.atomic import atomic
from yolov7.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_comes_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic(path, durable=durable) as temporary:
        assert (temporary.parent, temporary.suffix) == (path.parent, path.suffix)
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_content_and_name_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        kind = "folder" if os.stat(handle).st_mode & 0o40000 else os.fstat(handle).st_size
        flushed.append((kind, (tmp_path / "a").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    with atomic(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert flushed == [(5, False), ("folder", True)]


def test_a_folder_in_the_way_is_said_before_the_work(tmp_path: Path) -> None:
    message = f"^{tmp_path}: cannot be written .Is a directory"
    with pytest.raises(UserError, match=message), atomic(tmp_path):
        pytest.fail("the work was done")


def test_names_as_long_as_a_file_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".txt")
    with atomic(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes are Unix's")
def test_links_stay_and_pipes_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target" / "a.txt")
    with atomic(tmp_path / "link") as temporary:
        assert temporary.parent == tmp_path / "target"
        temporary.write_text("whole")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "a.txt").read_text() == "whole"

    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    with atomic(tmp_path / "pipe") as temporary:
        temporary.write_text("whole")
    assert reader.communicate(timeout=30)[0] == b"whole"
    assert names(tmp_path) == ["link", "pipe", "target"]

    code = "import yolov7.atomic as a\nwith a.atomic('/dev/stdout') as t: t.write_text('whole')"
    for path in (tmp_path / "out", None):
        out = path.open("wb") if path else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
        assert (path.read_bytes() if path else done.stdout) == b"whole"


WRITE = """
import os, signal, sys
from pathlib import Path
from yolov7.atomic import atomic
with atomic(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()
    temporary.write_text("whole")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be asked for there")
def test_what_killed_processes_leave_is_swept(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(tmp_path / "a.txt"), fate],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for fate in ("killed", "alive")
    ]
    (killed, left), (alive, busy) = [
        (writer, writer.stdout.readline().strip()) for writer in writers if writer.stdout
    ]
    assert killed.wait(30) == -signal.SIGKILL
    # Another host's, one that bore this process's number before it, and what only looks alike.
    other = ".yolov7-00000000-1-0.txt"
    namesake = left.replace(f"-{killed.pid}-", f"-{os.getpid()}-9")
    long_ago = ".yolov7-00000000-1-1.txt"
    for name in (other, long_ago, namesake, ".yolov7-notes.txt"):
        (tmp_path / name).touch()
    os.utime(tmp_path / long_ago, (0, 0))
    assert {left, busy} <= set(names(tmp_path))

    with atomic(tmp_path / "b.txt") as temporary:
        temporary.touch()
    assert names(tmp_path) == sorted([busy, other, ".yolov7-notes.txt", "b.txt"])
    alive.communicate("go on\n", timeout=30)
    assert (tmp_path / "a.txt").read_text() == "whole"
