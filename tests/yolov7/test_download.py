"""Published weights by name, from a local server."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar

import pytest
import torch
from filelock import FileLock

from yolov7 import download
from yolov7.checkpoint import load_model
from yolov7.download import PUBLISHED, published_weights
from yolov7.errors import UserError

CONTENT = bytes(range(256)) * 40
OTHER = bytes(reversed(CONTENT))


class _Handler(BaseHTTPRequestHandler):
    """Serves CONTENT under any name; class attributes say how it misbehaves."""

    content: ClassVar[bytes] = CONTENT
    headers_sent: ClassVar[dict[str, str | None]] = {}  # instead of the right ones; None: without
    cut_after: ClassVar[int | None] = None
    ranges: ClassVar[bool] = True
    obeys: ClassVar[bool] = True  # the header If-Range
    requests: ClassVar[list[str]] = []
    go_on: ClassVar[Event | None] = None  # before the second half of an answer
    drip: ClassVar[str] = ""  # "head" or "body": a byte at a time
    raw: ClassVar[bytes | None] = None  # the whole answer

    @property
    def tag(self) -> str:
        return f'"{zlib.crc32(self.content)}"'

    def do_GET(self) -> None:
        """Answer one request."""
        wanted = self.headers.get("Range")
        self.requests.append(wanted or "whole")
        if self.raw is not None:
            self.wfile.write(self.raw)
            return
        if self.path.endswith("yolov7-e6e.pt"):
            self.send_error(404)
            return
        same = not self.obeys or self.headers.get("If-Range") == self.tag
        part = bool(wanted) and self.ranges and same
        start = int((wanted or "").removeprefix("bytes=").rstrip("-")) if part else 0
        if part and start >= len(self.content):
            self.send_error(416)
            return
        self.answer(start, part)

    def answer(self, start: int, part: bool) -> None:
        body, size = self.content[start:], len(self.content)
        headers: dict[str, str | None] = {"Content-Length": str(len(body)), "ETag": self.tag}
        if part:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        if self.drip == "head":
            self.dripped(b"HTTP/1.1 200 OK\r\nServer: " + b"x" * 1000)
            return
        self.send_response(206 if part else 200)
        for name, value in {**headers, **self.headers_sent}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.drip == "body":
            self.dripped(body)
            return
        if self.go_on is not None:
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.go_on.wait(30)
            body = body[half:]
        self.wfile.write(body if self.cut_after is None else body[: self.cut_after])

    def dripped(self, data: bytes) -> None:
        with suppress(OSError):  # the other side has had enough
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


def is_right(path: Path) -> None:
    """What stands for loading the checkpoint."""
    if path.read_bytes() not in (CONTENT, OTHER):
        raise UserError(f"{path}: truncated or not a PyTorch checkpoint")


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path))
    for name, value in vars(_Handler).copy().items():
        if name in _Handler.__annotations__:
            monkeypatch.setattr(_Handler, name, value)
    monkeypatch.setattr(_Handler, "requests", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(release: str) -> "partial[Path]":
    return partial(published_weights, "yolov7.pt", is_right, release=release)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change how the server behaves."""

    def change(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setattr(_Handler, name, value)

    return change


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "weights").iterdir() if path.name != "lock")


def test_downloads_once_and_says_that_it_trusts(
    fetch: "partial[Path]", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch()
    digest = hashlib.sha256(CONTENT).hexdigest()
    said = capsys.readouterr().err
    assert said.startswith(
        "note: yolov7.pt is its authors', under GPL-3.0; it is trusted at this first"
    )
    assert said.endswith(f"SHA-256 {digest}\n")
    assert path.read_bytes() == CONTENT
    assert fetch() == path
    assert capsys.readouterr().err == ""
    assert _Handler.requests == ["whole"]
    assert left(tmp_path) == ["sha256.json", "yolov7.pt"]
    assert json.loads((tmp_path / "weights" / "sha256.json").read_text()) == {"yolov7.pt": digest}


@pytest.mark.parametrize("ranges", [True, False], ids=["resumes", "server-without-ranges"])
def test_a_cut_download_says_so_and_goes_on(
    fetch: "partial[Path]", serve: Callable[..., None], ranges: bool, tmp_path: Path
) -> None:
    serve(cut_after=1000, ranges=ranges)
    with pytest.raises(UserError, match=r"cut off after 1000 of 10240 bytes; run again"):
        fetch()
    serve(cut_after=None)
    assert fetch().read_bytes() == CONTENT
    assert _Handler.requests == ["whole", "bytes=1000-"]
    assert left(tmp_path) == ["sha256.json", "yolov7.pt"]


@pytest.mark.parametrize(
    ("behaviour", "requests"),
    [
        ({}, ["bytes=1000-"]),  # says by itself that it is another
        ({"obeys": False}, ["bytes=1000-", "whole"]),  # and one that does not
        ({"obeys": False, "headers_sent": {"ETag": None}}, ["bytes=1000-", "whole"]),
    ],
    ids=["if-range", "another-tag", "no-tag"],
)
def test_a_file_that_changed_in_between_is_fetched_anew(
    fetch: "partial[Path]",
    serve: Callable[..., None],
    behaviour: dict[str, Any],
    requests: list[str],
) -> None:
    serve(cut_after=1000)
    with pytest.raises(UserError, match="cut off"):
        fetch()
    serve(cut_after=None, content=OTHER, **behaviour)
    assert fetch().read_bytes() == OTHER
    assert _Handler.requests == ["whole", *requests]


@pytest.mark.parametrize("tag", ['W/"1"', None, '"two\twords"', "bare"])
def test_without_a_tag_that_tells_versions_apart_nothing_is_gone_on_with(
    fetch: "partial[Path]", serve: Callable[..., None], tag: str | None
) -> None:
    serve(cut_after=1000, headers_sent={"ETag": tag})
    with pytest.raises(UserError, match="cut off"):
        fetch()
    serve(cut_after=None)
    assert fetch().read_bytes() == CONTENT
    assert _Handler.requests == ["whole", "whole"]


@pytest.mark.parametrize(
    "place",
    ["bytes 999-10239/10240", "bytes 0-10239/10240", "bytes 1000-10239/*", "", None],
)
def test_another_place_than_was_asked_for_is_not_appended(
    fetch: "partial[Path]", serve: Callable[..., None], place: str | None
) -> None:
    serve(cut_after=1000)
    with pytest.raises(UserError, match="cut off"):
        fetch()
    serve(cut_after=None, headers_sent={"Content-Range": place})
    assert fetch().read_bytes() == CONTENT
    assert _Handler.requests == ["whole", "bytes=1000-", "whole"]


def test_a_part_as_long_as_the_file_is_thrown_away(fetch: "partial[Path]", tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "yolov7.pt.part").write_bytes(bytes(20_000))
    (tmp_path / "weights" / "yolov7.pt.etag").write_text(f'"{zlib.crc32(CONTENT)}"')
    assert fetch().read_bytes() == CONTENT
    assert _Handler.requests == ["bytes=20000-", "whole"]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"content": b"<html>Log in</html>"}, "what came is not kept: truncated or not a PyTorch"),
        ({"content": b""}, "what came is not kept"),
        ({"cut_after": 99, "headers_sent": {"Content-Length": None}}, "what came is not kept"),
        ({"content": CONTENT + b"!"}, "what came is not kept"),
    ],
    ids=["portal", "empty", "cut-without-length", "longer"],
)
def test_what_is_no_checkpoint_is_not_kept(
    fetch: "partial[Path]",
    serve: Callable[..., None],
    behaviour: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    serve(**behaviour)
    with pytest.raises(UserError, match=message) as error:
        fetch()
    assert str(tmp_path) not in str(error.value)
    assert left(tmp_path) == []
    serve(content=CONTENT, cut_after=None, headers_sent={})
    assert fetch().read_bytes() == CONTENT


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "cannot be reached .Remote end closed connection"),
        (b"SSH-2.0-OpenSSH_9\r\n", "cannot be reached .SSH-2.0-OpenSSH_9"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "cannot be reached .got more than"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n", "cannot be reached .got more"),
        (b"HTTP/1.1 200 \x1b[31mOK\r\nContent-Length: 5\r\n\r\nab", "cut off after 2 of 5 bytes"),
        (CHUNKED + b"3\r\nabc\r\n5\r\nab", "cut off"),
        (CHUNKED + b"zz\r\nabc", "cut off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1e9\r\n\r\nab", "what came is not kept"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nab", "what came is not kept"),
        (b"HTTP/1.1 206 OK\r\nContent-Range: bytes 5-6/7\r\n\r\nab", "answers 206 OK"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "the server answers 204 No Content"),
        (b"HTTP/1.1 500 \x1b[31mNo\r\n\r\n", "the server answers 500"),
        (b"HTTP/1.1 302 F\r\nLocation: ftp://h/f\r\n\r\n", "it sends us to ftp://h/f"),
        (
            b"HTTP/1.1 302 F\r\nLocation: file:///etc/passwd\r\n\r\n",
            "answers 302 F - Redirection to url",
        ),
        (b"HTTP/1.1 302 F\r\nLocation: /yolov7.pt\r\n\r\n", "the server answers 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9000000000\r\n\r\nab", "over the limit of 4096 MiB"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_every_fault_of_a_server_is_one_line(
    fetch: "partial[Path]", serve: Callable[..., None], raw: bytes, message: str
) -> None:
    serve(raw=raw)
    with pytest.raises(UserError, match=message) as error:
        fetch()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_what_does_not_end_is_cut_at_the_limit(
    fetch: "partial[Path]", serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LARGEST", 5000)
    serve(headers_sent={"Content-Length": None})
    with pytest.raises(UserError, match="over the limit"):
        fetch()


@pytest.mark.parametrize(
    ("drip", "message"), [("head", "no answer within 1 s"), ("body", r"too slow, \d+ bytes in 1 s")]
)
def test_a_server_that_drips_is_left(
    fetch: "partial[Path]",
    serve: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    drip: str,
    message: str,
) -> None:
    monkeypatch.setattr(download, "PATIENCE", 1)
    serve(drip=drip)
    with pytest.raises(UserError, match=message):
        fetch()


@pytest.mark.parametrize("content", ["[]", "7", '{"yolov7.pt": 7}', "[" * 100_000, "{", "\xff"])
def test_a_record_that_is_damaged_is_said(
    fetch: "partial[Path]", tmp_path: Path, content: str
) -> None:
    path = fetch()
    (tmp_path / "weights" / "sha256.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"sha256\.json: damaged: delete it"):
        fetch()
    (tmp_path / "weights" / "sha256.json").unlink()
    assert fetch() == path


def test_a_full_disk_is_said(
    fetch: "partial[Path]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device"):
            fetch()
    assert fetch().read_bytes() == CONTENT


ASK = """
import sys
from yolov7.download import published_weights
print("asking", flush=True)
print(published_weights("yolov7.pt", lambda path: 0, release=sys.argv[1]).read_bytes().hex())
"""


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


def test_file_systems_without_locks(
    fetch: "partial[Path]", monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", none)
    assert fetch().read_bytes() == CONTENT


def test_a_changed_file_is_refused(fetch: "partial[Path]") -> None:
    path = fetch()
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match="SHA-256 is not the one recorded"):
        fetch()
    path.unlink()
    assert fetch().read_bytes() == CONTENT


def test_404_is_said(release: str) -> None:
    with pytest.raises(UserError, match=r"yolov7-e6e\.pt: the server answers 404"):
        published_weights("yolov7-e6e.pt", is_right, release=release)


def test_no_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be reached .*; download it elsewhere"):
        published_weights("yolov7.pt", is_right, release="http://127.0.0.1:9/")


def test_a_published_name_is_loaded_before_it_is_kept(
    release: str, serve: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "yolov7.download.published_weights", partial(published_weights, release=release)
    )
    with pytest.raises(UserError, match=r"yolov7\.pt: what came is not kept: truncated or not"):
        load_model("yolov7.pt")
    state = io.BytesIO()
    torch.save(OrderedDict({"model.0.conv.weight": torch.zeros(8, 3, 3, 3)}), state)
    serve(content=state.getvalue())  # a checkpoint, but not this one
    with pytest.raises(UserError, match="what came is not kept: its last layer is not"):
        load_model("yolov7.pt")
    assert left(tmp_path) == []


def test_no_home_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("YOLOV7_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(UserError, match="let YOLOV7_CACHE name a folder"):
        published_weights("yolov7.pt", is_right)


def test_published_names_are_the_release() -> None:
    assert len(PUBLISHED) == 13
    assert PUBLISHED["yolov7-w6_training.pt"] == "yolov7-w6"
    assert "yolov7-tiny_training.pt" not in PUBLISHED
