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
import torch

from yolov7 import capture, fetch, sources
from yolov7.errors import UserError
from yolov7.letterbox import Image
from yolov7.sources import Source


def picture(height: int = 12, width: int = 20) -> Image:
    """Blue rises to the right, green downwards; red is 200."""
    image = np.full((height, width, 3), 200, np.uint8)
    image[:, :, 0] = np.linspace(0, 255, width, dtype=np.uint8)
    image[:, :, 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    return image


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def write_video(path: Path, frames: int, fourcc: str = "MJPG") -> Path:
    """Frame i is uniformly grey, 20 i."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 10.0, (64, 48))
    for index in range(frames):
        writer.write(np.full((48, 64, 3), 20 * index % 256, np.uint8))
    writer.release()
    return path


def greys(source: Source) -> list[int]:
    return [round(float(frame.image.mean()) / 20) for frame in source]


# Sources of images


def test_folders_globs_and_lists(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(picture()))
    (tmp_path / "notes.txt").write_text("no image")

    def names(source: object) -> list[str]:
        return [str(Path(frame.path).relative_to(tmp_path)) for frame in Source(source)]

    assert names(tmp_path) == ["a.PNG", "b.png"]
    assert names(str(tmp_path / "**" / "*")) == ["a.PNG", "b.png", "sub/c.png"]
    assert names([tmp_path / "b.png", str(tmp_path / "sub")]) == ["b.png", "sub/c.png"]
    frames = list(Source(tmp_path))
    assert [(f.item, f.items, f.number, f.kind) for f in frames] == [
        (1, 2, 1, "image"),
        (2, 2, 1, "image"),
    ]


def test_many_images_stay_in_order(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index:02}.png").write_bytes(png(np.full((4, 4), index * 10, np.uint8)))
    assert [int(frame.image[0, 0, 0]) for frame in Source(tmp_path)] == list(range(0, 200, 10))


def test_images_are_read_a_few_ahead_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def read(path: Path) -> Image:
        reads.append(str(path))
        return picture()

    monkeypatch.setattr(sources, "read_image", read)
    frames = iter(Source([f"{index}.jpg" for index in range(100)]))
    next(frames)
    assert len(reads) < 10


def test_the_others_are_done_when_some_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png(picture()))
    (tmp_path / "bad.png").write_bytes(b"bad")
    (tmp_path / "empty").mkdir()
    errors: list[UserError] = []
    source = [tmp_path / "absent.png", tmp_path, tmp_path / "empty", str(tmp_path / "*.jpg")]
    frames = list(Source(source, on_error=errors.append))
    assert [Path(frame.path).name for frame in frames] == ["good.png"]
    messages = "\n".join(map(str, errors))
    assert len(errors) == 4
    for part in ("absent.png: no such file", "bad.png: trunc", "without images", "matches no"):
        assert part in messages


def test_the_others_are_done_when_a_place_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)  # root may read every folder
    (tmp_path / "good.png").write_bytes(png(picture()))
    errors: list[UserError] = []
    names = ["x" * 300, "x" * 300 + ".mp4", tmp_path, "http://[::1/a.jpg", tmp_path / "good.png"]
    assert len(list(Source(names, on_error=errors.append))) == 1
    long, video, folder, url = map(str, errors)
    assert long == f"{names[0]}: cannot be read: File name too long"
    assert video == f"{names[1]}: cannot be read: File name too long"
    assert folder == f"{tmp_path}: cannot be read: Permission denied"
    assert url.startswith("http://[::1/a.jpg: Invalid IPv6 URL: check the address")


def test_without_a_handler_the_error_is_raised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder without images or videos"):
        list(Source(tmp_path))


def test_arrays() -> None:
    image = picture()
    frame = next(iter(Source(image)))
    np.testing.assert_array_equal(frame.image, image)
    assert frame.path == "array 0"
    assert len(list(Source(np.stack([image, image])))) == 2
    assert next(iter(Source(np.full((5, 6), 65535, np.uint16)))).image.min() == 255


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((4, 4, 2), np.uint8), "4x4x2 is not an image"),
        (np.zeros((0, 4, 3), np.uint8), "0x4x3 is not an image"),
        (np.zeros((4, 4, 3), np.float32), "pixels are float32"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, match: str) -> None:
    with pytest.raises(UserError, match=match):
        list(Source(array))


def test_tensors_are_rgb() -> None:
    image = picture()
    whole = torch.from_numpy(image).flip(2).permute(2, 0, 1)
    for tensor in (whole, whole.float() / 255, (whole.double() / 255)[None]):
        np.testing.assert_array_equal(next(iter(Source(tensor))).image, image)
    broken = torch.full((3, 2, 2), float("nan"))
    assert next(iter(Source(broken))).image.max() == 0


def test_a_tensor_of_0_to_255_is_refused_unless_it_is_uint8() -> None:
    with pytest.raises(UserError, match="tensor 0: values up to 255: give 0 to 1, or uint8"):
        list(Source(torch.full((3, 4, 4), 255.0)))
    assert next(iter(Source(torch.full((3, 4, 4), 1.005)))).image.max() == 255


def test_a_folder_that_is_called_like_a_camera(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2024").mkdir()
    Path("2024/a.png").write_bytes(png(picture()))
    assert [frame.path for frame in Source("2024")] == ["2024/a.png"]
    with pytest.raises(UserError, match="the source is empty"):
        Source("")


def test_a_video_that_cannot_be_decoded_names_its_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "v.avi", 2)
    monkeypatch.setattr(sources, "next_frame", lambda *_: None)
    with pytest.raises(UserError, match=r"no frame that can be read: .* \(MJPG\) to H.264"):
        list(Source(path))


@pytest.mark.parametrize("source", [None, True, 1.5, {"a": 1}])
def test_other_kinds_are_refused(source: object) -> None:
    with pytest.raises(UserError, match="a source cannot be a"):
        Source(source)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(UserError, match="list of sources is empty"):
        Source([])


# Videos


def test_video_frames_with_their_numbers(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", 6)
    frames = list(Source(path))
    assert [frame.number for frame in frames] == [1, 2, 3, 4, 5, 6]
    assert {(f.kind, f.total, f.fps, f.image.shape) for f in frames} == {
        ("video", 6, 10.0, (48, 64, 3))
    }
    assert greys(Source(path)) == [0, 1, 2, 3, 4, 5]


def test_video_stride(tmp_path: Path) -> None:
    source = Source(write_video(tmp_path / "v.avi", 7), vid_stride=3)
    assert greys(source) == [0, 3, 6]
    assert [frame.number for frame in source] == [1, 4, 7]
    with pytest.raises(UserError, match="vid_stride is 0"):
        Source(0, vid_stride=0)


def test_a_header_that_promises_too_much_ends_cleanly(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", 40)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    frames = list(Source(path))
    assert 0 < len(frames) < 40
    assert frames[0].total > len(frames)


def test_broken_videos_are_reported_and_the_next_source_follows(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    write_video(tmp_path / "b.avi", 2)
    errors: list[UserError] = []
    assert greys(Source(tmp_path, on_error=errors.append)) == [0, 1]
    assert "a.mp4: not a video that can be read" in str(errors[0])


def test_leaving_a_video_early_closes_it(tmp_path: Path) -> None:
    before = threading.active_count()
    frames = iter(Source(write_video(tmp_path / "v.avi", 50)))
    next(frames)
    frames.close()  # type: ignore[attr-defined]  # a generator
    assert threading.active_count() == before


# Network, cameras


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


def test_urls_that_fail(server: Callable[..., str]) -> None:
    url = server({"/page.png": ("text/html", b"<html>")})
    for address, match in [
        (f"{url}/absent.png", "absent.png: Not Found: check the address"),
        (f"{url}/absent", "absent: Not Found: check the address"),
        (f"{url}/page.png", "such as SVG or a web page"),
        ("http://127.0.0.1:9/a.png", "refused: check the address and the connection"),
        ("http://a b/a.png", "a b/a.png: URL can't contain control characters.*check the address"),
        ("ftp://example.org/a.png", "give one of http"),
    ]:
        with pytest.raises(UserError, match=match):
            list(Source(address))


class Camera:
    """Gives grey frames 0, 1, 2, ... as fast as they are asked for, every 10 ms."""

    def __init__(self, *_: object) -> None:
        self.count = 0
        self.released = False

    def isOpened(self) -> bool:  # noqa: N802  # OpenCV's name
        return True

    def get(self, _: int) -> float:
        return float("nan")

    def grab(self) -> bool:
        self.count += 1
        return True

    def read(self) -> tuple[bool, Image | None]:
        time.sleep(0.01)
        if self.count >= 40:
            return False, None
        self.count += 1
        return True, np.full((2, 2, 3), self.count, np.uint8)

    def release(self) -> None:
        self.released = True


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
    match = "bytes in 1 seconds: check" if slow else "it ended 999 bytes too early"
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
    with pytest.raises(UserError, match="it leads to ftp"):
        list(Source(f"http://127.0.0.1:{httpd.server_port}/a.png"))
    httpd.shutdown()
    httpd.server_close()


def test_a_pipe_that_is_called_like_a_video_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="it is a pipe"):
        list(Source(tmp_path))


def test_the_newest_frame_wins_and_drops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    errors: list[UserError] = []
    source = Source(0, on_error=errors.append)
    numbers = []
    for frame in source:
        assert (frame.path, frame.kind, frame.fps) == ("camera 0", "live", 0.0)
        assert frame.image[0, 0, 0] == frame.number
        numbers.append(frame.number)
        time.sleep(0.05)
    assert source.live
    assert numbers == sorted(set(numbers))
    assert 3 < len(numbers) < 20
    assert source.dropped == 40 - len(numbers)
    assert [str(error) for error in errors] == [
        "camera 0: no frame comes any more: check the source"
    ]


def test_several_cameras_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    seen = [frame.path for frame in Source(["0", 1], on_error=lambda _: None)]
    first = seen[: len(seen) // 2]
    assert {"camera 0", "camera 1"} == set(first)


def test_leaving_a_camera_early_releases_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cameras: list[Camera] = []

    def opened(target: object) -> Camera:
        cameras.append(Camera(target))
        return cameras[-1]

    monkeypatch.setattr(cv2, "VideoCapture", opened)
    frames = iter(Source(0))
    next(frames)
    frames.close()  # type: ignore[attr-defined]  # a generator
    assert cameras[0].released


@pytest.mark.parametrize("number", [63, 20240101123456])
def test_a_camera_that_is_not_there(number: int) -> None:
    with pytest.raises(UserError, match=f"camera {number}: cannot be opened"):
        list(Source(number))


def test_a_camera_is_released_when_the_next_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    camera = Camera(0)

    def opened(target: int, name: str, hint: str) -> Camera:
        if target == 1:
            raise UserError(f"{name}: {hint}")
        return camera

    monkeypatch.setattr(sources, "open_capture", opened)
    with pytest.raises(UserError, match="camera 1: cannot be opened"):
        list(Source([0, 1]))
    assert camera.released


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


def test_a_stream_that_drops_is_opened_again_until_it_stays_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capture, "FIRST_PAUSE_S", 0.01)
    opened: list[Camera] = []

    def connect(target: object) -> Camera:
        if len(opened) == 2:
            raise cv2.error("gone")
        opened.append(Camera(target))
        return opened[-1]

    monkeypatch.setattr(cv2, "VideoCapture", connect)
    errors: list[UserError] = []
    notes: list[str] = []
    source = Source(0, retry=0.3, on_error=errors.append, on_note=notes.append)
    numbers = [frame.number for frame in source]
    assert numbers == sorted(set(numbers))
    assert 40 < numbers[-1] <= 80  # they go on
    assert all(camera.released for camera in opened)
    assert notes[0] == (
        "camera 0: no frame comes any more: check the source; trying again in 0.0 s"
    )
    assert "camera 0: cannot be opened" in notes[-1]
    assert [str(error) for error in errors] == [
        "camera 0: cannot be opened: check that it is there"
    ]
    with pytest.raises(UserError, match="retry is nan seconds"):
        Source(0, retry=float("nan"))


@pytest.mark.parametrize(
    ("error", "seen"), [(cv2.error("container"), UserError), (MemoryError(), MemoryError)]
)
def test_an_error_of_the_reading_thread_reaches_the_main_loop(
    monkeypatch: pytest.MonkeyPatch, error: Exception, seen: type[Exception]
) -> None:
    def read(_: Camera) -> tuple[bool, Image]:
        raise error

    monkeypatch.setattr(Camera, "read", read)
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    with pytest.raises(seen):
        list(Source(0))


def test_a_video_that_opencv_trips_over_is_reported_and_the_next_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.avi", "b.avi"):
        write_video(tmp_path / name, 2)
    whole, count = capture.next_frame, iter(range(9))

    def tripping(reader: cv2.VideoCapture, stride: int) -> Image | None:
        if next(count) == 1:
            raise UserError("damaged (container)")
        return whole(reader, stride)

    monkeypatch.setattr(sources, "next_frame", tripping)
    errors: list[UserError] = []
    paths = [Path(frame.path).name for frame in Source(tmp_path, on_error=errors.append)]
    assert paths == ["a.avi", "b.avi", "b.avi"]
    assert str(errors[0]) == f"{tmp_path / 'a.avi'}: damaged (container) from frame 2 on"


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


# Names


def test_a_video_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.avi")
    write_video(tmp_path / "v.avi", 2).rename(name)
    with pytest.raises(UserError, match=r"caf\\xe9.avi: OpenCV opens only names in UTF-8: rename"):
        list(Source(tmp_path))


def test_an_image_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(png(picture()))
    assert len(list(Source(tmp_path))) == 1


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
