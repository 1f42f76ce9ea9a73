"""Published weights by name, from a local server."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import ClassVar

import pytest

from yolov7.checkpoint import load_model
from yolov7.download import PUBLISHED, published_weights
from yolov7.errors import UserError

CONTENT = bytes(range(256)) * 40


class _Handler(BaseHTTPRequestHandler):
    """Serves CONTENT under any name; a class attribute says how it misbehaves."""

    cut_after: ClassVar[int | None] = None
    ranges: ClassVar[bool] = True
    requests: ClassVar[list[str]] = []
    go_on: ClassVar[Event | None] = None  # before the second half of an answer

    def do_GET(self) -> None:
        """Answer one request."""
        wanted = self.headers.get("Range")
        self.requests.append(wanted or "whole")
        if self.path.endswith("yolov7-e6e.pt"):
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start > len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if wanted and self.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.go_on is not None:
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.go_on.wait(30)
            body = body[half:]
        self.wfile.write(body if self.cut_after is None else body[: self.cut_after])

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path))
    for name, value in (("cut_after", None), ("ranges", True), ("requests", []), ("go_on", None)):
        monkeypatch.setattr(_Handler, name, value)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(release: str) -> "partial[Path]":
    return partial(published_weights, "yolov7.pt", release=release)


def test_downloads_once(fetch: "partial[Path]") -> None:
    path = fetch()
    assert path.read_bytes() == CONTENT
    assert fetch() == path
    assert _Handler.requests == ["whole"]
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".part"] == []


@pytest.mark.parametrize("ranges", [True, False], ids=["resumes", "server-without-ranges"])
def test_a_cut_download_says_so_and_goes_on(
    fetch: "partial[Path]", monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    monkeypatch.setattr(_Handler, "cut_after", 1000)
    monkeypatch.setattr(_Handler, "ranges", ranges)
    with pytest.raises(UserError, match=r"cut off after 1000 of 10240 bytes; run again"):
        fetch()
    monkeypatch.setattr(_Handler, "cut_after", None)
    assert fetch().read_bytes() == CONTENT
    assert _Handler.requests == ["whole", "bytes=1000-"]


def test_a_part_longer_than_the_file_is_thrown_away(fetch: "partial[Path]", tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "yolov7.pt.part").write_bytes(bytes(20_000))
    assert fetch().read_bytes() == CONTENT


ASK = """
import sys
from yolov7.download import published_weights
print("asking", flush=True)
print(published_weights("yolov7.pt", release=sys.argv[1]).read_bytes().hex())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl to lock with")
def test_two_processes_that_ask_at_once_download_once(
    fetch: "partial[Path]", release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Handler, "go_on", Event())
    asking = []
    for _ in range(2):
        command = [sys.executable, "-c", ASK, release]
        asking.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert asking[-1].stdout is not None
        assert asking[-1].stdout.readline() == "asking\n"
        time.sleep(0.3)  # the first is half way through when the second looks
    assert _Handler.go_on is not None
    _Handler.go_on.set()
    for process in asking:
        printed, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert bytes.fromhex(printed) == CONTENT
    assert fetch().read_bytes() == CONTENT
    assert _Handler.requests == ["whole"]


def test_a_changed_file_is_refused(fetch: "partial[Path]") -> None:
    path = fetch()
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match="SHA-256 is not the one recorded"):
        fetch()
    path.unlink()
    assert fetch().read_bytes() == CONTENT


def test_404_is_said(release: str) -> None:
    with pytest.raises(UserError, match=r"yolov7-e6e\.pt: the server answers 404"):
        published_weights("yolov7-e6e.pt", release=release)


def test_no_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be reached .*; download it elsewhere"):
        published_weights("yolov7.pt", release="http://127.0.0.1:9/")


def test_a_published_name_loads_from_the_cache_and_is_checked(
    fetch: "partial[Path]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch()  # not a checkpoint at all
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="truncated or not a PyTorch checkpoint"):
        load_model("yolov7.pt")
    digests = json.loads((tmp_path / "weights" / "sha256.json").read_text())
    assert list(digests) == ["yolov7.pt"]


def test_published_names_are_the_release() -> None:
    assert len(PUBLISHED) == 13
    assert PUBLISHED["yolov7-w6_training.pt"] == "yolov7-w6"
    assert "yolov7-tiny_training.pt" not in PUBLISHED
