"""What a run leaves on the disk besides its results."""

import json
from pathlib import Path

import pytest
import yaml

from yolov7.errors import UserError
from yolov7.runs import check_writable, write_arguments, write_json


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
