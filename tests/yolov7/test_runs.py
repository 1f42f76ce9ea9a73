"""What a run leaves on the disk besides its results."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from yolov7.errors import UserError
from yolov7.runs import check_writable, new_run, write_arguments, write_json


def test_json_is_written_where_no_folder_is_yet(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "result.json"
    for value in ({"rows": [1, 2], "totals": {}}, None):
        write_json(path, value)
        assert json.loads(path.read_text()) == value


def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(UserError, match=rf"^{path}: cannot be written \(.*\)$"):
            write_json(path, {})
        with pytest.raises(UserError, match=rf"^{path}: cannot be written \(.*\)$"):
            check_writable(path)


def test_a_check_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    check_writable(None)
    check_writable(path)
    assert not path.exists()
    write_json(path, [1])
    check_writable(path)
    assert json.loads(path.read_text()) == [1]


def test_arguments_are_plain_yaml(tmp_path: Path) -> None:
    arguments = {"weights": None, "source": ("a", "b"), "classes": (), "project": Path("runs/x")}
    write_arguments(tmp_path, arguments)
    written = yaml.safe_load((tmp_path / "arguments.yaml").read_text())
    assert written == {"weights": None, "source": ["a", "b"], "classes": [], "project": "runs/x"}
    assert list(written) == list(arguments)


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_json(path, [1])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"result\.json: cannot be written \(No space left"):
        write_json(path, [2])
    assert json.loads(path.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_runs_are_numbered_and_names_that_are_taken_too(tmp_path: Path) -> None:
    project = tmp_path / "runs" / "val"
    assert [new_run(project, None).name for _ in range(2)] == ["1", "2"]
    (project / "7").touch()  # whatever it is
    (project / "gone").symlink_to(tmp_path / "nowhere")
    assert new_run(project, None).name == "8"
    assert [new_run(project, "a b").name for _ in range(3)] == ["a b", "a b-2", "a b-3"]
    assert new_run(project, "gone").name == "gone-2"
    assert new_run(project, "..a").name == "..a"


def test_names_that_differ_in_case_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS and Windows these are one folder, listed under its first name."""
    mkdir = Path.mkdir

    def insensitive(self: Path, *args: Any, **kwargs: Any) -> None:
        there = {p.name.lower() for p in self.parent.iterdir()} if self.parent.exists() else set()
        if self.name.lower() in there and not kwargs:
            raise FileExistsError
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", insensitive)
    assert [new_run(tmp_path, name).name for name in ("Night", "night")] == ["Night", "night-2"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", "a/", "../a", "a\0b"])
def test_what_is_not_the_name_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs" / "a" / "b").mkdir(parents=True)
    with pytest.raises(UserError, match="give the plain name of a folder, or leave it out"):
        new_run(tmp_path / "runs", name)


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot be written .*: name another with --project"):
        new_run(tmp_path / "file", None)
    with pytest.raises(UserError, match="cannot be written"):
        new_run(tmp_path, "n" * 300)
