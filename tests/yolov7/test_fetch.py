import os
import shutil
import ssl
import subprocess
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from tests.yolov7.pictures import greys, picture, png, write_video
from yolov7 import capture, fetch, items
from yolov7.errors import UserError
from yolov7.sources import Source


@pytest.fixture
def server() -> Iterator[Callable[[dict[str, tuple[str, bytes]]], str]]:
    """Starts an HTTP server of path -> (content type, body); gives its address."""
    pages: dict[str, tuple[str, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in pages:
                self.send_error(404)
                return
            kind, body = pages[self.path]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name there
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()

    def start(new: dict[str, tuple[str, bytes]]) -> str:
        pages.update(new)
        return f"http://127.0.0.1:{httpd.server_port}"

    yield start
    httpd.shutdown()
    httpd.server_close()


def test_urls(server: Callable[..., str], tmp_path: Path) -> None:
    image = picture()
    video = write_video(tmp_path / "v.avi", 3).read_bytes()
    url = server(
        {
            "/a.png?size=1": ("image/png", png(image)),
            "/photo": ("image/png", png(image)),
            "/v.avi": ("video/x-msvideo", video),
        }
    )
    for address in (f"{url}/a.png?size=1", f"{url}/photo"):
        np.testing.assert_array_equal(next(iter(Source(address))).image, image)
    assert greys(Source(f"{url}/v.avi")) == [0, 1, 2]


def test_addresses_that_do_not_tell_are_asked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight servers that take half a second, and one that takes none, are half a second."""
    together = threading.Barrier(8, timeout=10)

    def refused(address: str) -> None:
        if not address.endswith("first"):
            together.wait()
        raise ConnectionRefusedError

    monkeypatch.setattr(items, "open_url", refused)
    addresses = ["http://x/first", *(f"http://x/{number}" for number in range(8))]
    errors: list[UserError] = []
    (frame,) = Source([*addresses, np.zeros((4, 4), np.uint8)], on_error=errors.append)
    assert frame.path == "array 0"
    assert [str(error).split(":")[1] for error in errors] == [a[5:] for a in addresses]


def test_urls_that_fail(server: Callable[..., str]) -> None:
    url = server({"/page.png": ("text/html", b"<html>")})
    for address, match in [
        (f"{url}/absent.png", "absent.png: Not Found: check the address"),
        (f"{url}/absent", "absent: Not Found: check the address"),
        (f"{url}/page.png", "such as SVG or a web page"),
        ("http://127.0.0.1:9/a.png", "refused: check the address and the connection"),
        ("http://a b/a.png", "a b/a.png: URL can't contain control characters.*check the address"),
        ("ftp://example.org/a.png", "give one of az, gs, hf, http"),
    ]:
        with pytest.raises(UserError, match=match):
            list(Source(address))


@pytest.mark.parametrize("slow", [False, True])
def test_answers_that_never_end_or_end_too_early(
    monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """A byte at a time, or fewer bytes than the header promised."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(1000 if slow else 1):
                self.wfile.write(b"x")
                time.sleep(0.01)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name there
            pass

    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    match = r"too slow, \d+ bytes in \d s: check" if slow else "it ended 999 bytes too early"
    with pytest.raises(UserError, match=match):
        list(Source(f"http://127.0.0.1:{httpd.server_port}/a.png"))
    httpd.shutdown()
    httpd.server_close()


def test_redirections_lead_to_http_alone() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1:9/a.png")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name there
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    with pytest.raises(UserError, match="it sends us to ftp"):
        list(Source(f"http://127.0.0.1:{httpd.server_port}/a.png"))
    httpd.shutdown()
    httpd.server_close()


def test_http_streams_are_live(server: Callable[..., str]) -> None:
    jpeg = cv2.imencode(".jpg", picture(48, 64))[1].tobytes()
    part = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
    body = (part + jpeg + b"\r\n") * 8 + b"--frame--\r\n"
    url = server({"/cam": ("multipart/x-mixed-replace; boundary=frame", body)})
    errors: list[UserError] = []
    source = Source(f"{url}/cam", on_error=errors.append)
    frames = list(source)
    assert len(errors) == 1
    assert source.live
    assert frames
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
@pytest.mark.parametrize("trusted", [False, True])
def test_certificates_are_checked_for_videos_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "v.avi", 2)
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert"
    names = "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*make.split(), *names.split()], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert", "key")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    known = SimpleNamespace(cafile=str(tmp_path / "cert") if trusted else "/dev/null")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: known)
    source = Source(f"https://localhost:{httpd.server_port}/v.avi")
    if trusted:
        assert greys(source) == [0, 1]
    else:
        with pytest.raises(UserError, match="not a video that can be read"):
            list(source)
    assert capture.FFMPEG_OPTIONS not in os.environ
    httpd.shutdown()
    httpd.server_close()


def test_passwords_are_sent_and_not_shown(
    server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server({"/a%C3%BC.png": ("image/png", png(picture()))})
    sent: list[str | None] = []
    open_url = urllib.request.OpenerDirector.open

    def spy(opener: Any, request: Any, *rest: Any, **named: Any) -> Any:
        sent.append(request.get_header("Authorization"))
        return open_url(opener, request, *rest, **named)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", spy)
    with_login = url.replace("://", "://me:s3cret%21@")
    frame = next(iter(Source(f"{with_login}/aü.png")))
    assert frame.path == f"{url.replace('://', '://***@')}/aü.png"
    assert sent == ["Basic " + b64encode(b"me:s3cret!").decode()]
    for address in (
        f"{with_login}/absent.png",
        "rtsp://me:s3cret@127.0.0.1:9/cam?password=s3cret",
        "gopher://me:s3cret@host/a",
        "http://me:s3cret@[::1/a.jpg",
    ):
        with pytest.raises(UserError) as error:
            list(Source(address))
        assert "s3cret" not in str(error.value)


def test_an_error_without_words_still_has_a_reason() -> None:
    said = str(fetch.unreachable("http://x/a.jpg", ConnectionResetError()))
    assert said.startswith("http://x/a.jpg: ConnectionResetError: check")
