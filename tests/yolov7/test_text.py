import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.yolov7.data_sets import linux
from yolov7.drawing import draw_boxes
from yolov7.errors import UserError
from yolov7.progress import progress, working
from yolov7.text import file_name, plot_text, printable, split_login

HOSTILE = ["\x1b[2Jx", "a\rb\x07", "nul\0", "half\ud800", "byte\udce9", "\u202eevil", "a\nb"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_shown_is_one_printable_line(text: str) -> None:
    for shown in (printable(text), str(UserError(text))):
        assert shown.isprintable()
        shown.encode()


def test_a_long_message_keeps_what_it_says_to_do() -> None:
    message = str(UserError(f"{'9' * 100_000}: is no number: give one"))
    assert len(message) < 1000
    assert message.endswith("99: is no number: give one")


@pytest.mark.parametrize("title", ["[/red]", "\x1b[2J", "\ud800"])
def test_titles_of_bars_are_no_markup(
    title: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with working(title):
        assert list(progress([1], title, 1)) == [1]
    assert printable(title) in capsys.readouterr().err


@pytest.mark.parametrize("text", ["bus.jpg", "日本語 ü", "👩\u200d🚒", "नी\u200dल"])
def test_what_can_be_shown_stays(text: str) -> None:
    assert printable(text) == text


def test_bytes_of_a_file_name_are_named() -> None:
    assert printable("caf\udce9.png") == r"caf\xe9.png"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://me:pw@host:554/a@b: gone", "rtsp://***@host:554/a@b: gone"),
        ("https://h/?user=me&password=pw&x=1", "https://h/?user=me&password=***&x=1"),
        ("http://h/a?token=pw: Not Found", "http://h/a?token=*** Not Found"),
        ("me:pw@nowhere", "me:pw@nowhere"),
    ],
)
def test_passwords_of_addresses_are_left_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_login_is_cut_out_of_its_address() -> None:
    assert split_login("http://a:b@h:80/x@y") == ("http://h:80/x@y", "a:b")
    assert split_login("http://h:80/x@y") == ("http://h:80/x@y", "")


@pytest.mark.parametrize(
    ("text", "name"),
    [("..", "-"), ("a/b\\c", "a-b-c"), ("nul\0", "nul-"), ("", "-"), ("half\ud800", "half-")],
)
def test_names_of_files_stay_in_their_folder(text: str, name: str) -> None:
    assert file_name(text) == name


def test_long_names_fit(tmp_path: Path) -> None:
    for letter in ("x", "語"):
        (tmp_path / f"{file_name(letter * 300)}-000001.jpg").touch()


def test_dollars_are_no_mathematics() -> None:
    assert plot_text(r"$\frac{$") == r"\$\frac{\$"


@pytest.mark.parametrize("text", HOSTILE)
def test_any_label_is_drawn(text: str) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    boxes = np.array([[5, 20, 50, 35]], np.float32)
    assert draw_boxes(image, boxes, [text], [0]).any()


@linux
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "cp1252"])
def test_no_terminal_ends_a_run(tmp_path: Path, encoding: str) -> None:
    """Every character reaches a terminal that lacks it as its code."""
    code = "import sys; from yolov7.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "日本語\udce9\x1b"],
        capture_output=True,
        env={"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONPATH": str(Path.cwd())},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: no verb")
    assert b"\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@linux
def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    code = """
import sys
from yolov7 import cli
from types import SimpleNamespace
from dataclasses import dataclass
@dataclass
class Info: pass
cli.import_module = lambda _: SimpleNamespace(
    Info=Info, run=lambda _: [print("x" * 1000) for _ in range(1000)] and 0
)
cli.tyro = SimpleNamespace(cli=lambda *a, **k: None, conf=SimpleNamespace(FlagCreatePairsOff=None))
sys.exit(cli.main(["info"]))
"""
    script = tmp_path / "x.py"
    script.write_text(code)
    command = f"{sys.executable} {script} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        check=False,
    )
    assert done.returncode == 141
    assert done.stderr == ""
