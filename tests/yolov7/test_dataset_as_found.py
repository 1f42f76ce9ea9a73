"""Data sets as people have them: other tools' layouts, other systems' habits, small faults."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.yolov7.data_sets import (
    BOX,
    HEIGHT,
    WIDTH,
    coco_content,
    coco_data,
    linux,
    roboflow,
    unsplit,
    write_image,
    write_label,
    yolo_data,
)
from yolov7.dataset import Dataset, load_data, load_splits, yolo
from yolov7.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_folder")


def read(root: Path, description: str) -> Dataset:
    return load_data(yolo_data(root, description), "val")


def classes(dataset: Dataset) -> list[list[int]]:
    return [sample.labels.classes.tolist() for sample in dataset.samples]


# data.yaml


@pytest.mark.parametrize(
    ("names", "read_as"),
    [
        ("[yes, no]", ["yes", "no"]),
        ("[on, null]", ["on", "null"]),
        ("[1.10, 2001-99-99]", ["1.10", "2001-99-99"]),
        ("{'0': a, '1': b}", ["a", "b"]),
        ("{1: b, 0: a}", ["a", "b"]),
        (r'["\ud800x", "\e[31m"]', [r"\ud800x", r"\x1b[31m"]),
        ("[!!python/object:os.system x, y]", ["x", "y"]),
    ],
)
def test_names_are_the_text_that_stands_there(
    tmp_path: Path, names: str, read_as: list[str]
) -> None:
    assert read(tmp_path, f"names: {names}\nval: images/val\n").names == read_as


@pytest.mark.parametrize(
    "description",
    [
        "names: [a, b]\nnc: '2'\nval: images\\val\n",
        "names: [a, b]\npath: gone\nval: images/val\n",
        "names: [a, b]\nval: /content/set-3/images/val\n",
        "names: [a, b]\nval: C:\\data\\set\\images\\val\ntest:  # optional\n",
        "\ufeffnames: [a, b]\nval: lists/windows.txt\n",
    ],
    ids=["backslashes", "moved", "elsewhere", "windows", "byte order mark"],
)
def test_paths_of_other_systems_and_machines_lead_to_the_images(
    tmp_path: Path, description: str
) -> None:
    (tmp_path / "lists").mkdir()
    listed = [rf"images\val\{name}.jpg" for name in "abc"]
    (tmp_path / "lists/windows.txt").write_text("\ufeff" + "\r\n".join(listed))
    assert classes(read(tmp_path, description)) == [[0, 1], [], []]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("names: [a]\nval: images\ntest:\n", "its split test is empty"),
        ("names: [a]\nval: images\nroboflow: {version: 1}\n", "no split test: it has val"),
        ("names: {0: a, x: b}\ntest: images\n", "names has x, which is no whole number"),
        ("names: [a]\nnc: many\ntest: images\n", "nc has many, which is no whole number"),
        ("names: [a]\ntest: images\nkpt_shape: 17\n", "kpt_shape is 17"),
        ("names: [[a], b]\ntest: images\n", "must give the names"),
    ],
)
def test_what_is_wrong_with_a_description_is_said(
    tmp_path: Path, description: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_data(yolo_data(tmp_path, description), "test")


def laughs() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")]  # noqa: B905
    return "\n".join(lines) + "\nnames: *i\nval: images\n"


HOSTILE_YAML = {
    "aliases": (laughs, "refers to a part of itself"),
    "deep lists": (lambda: "names: " + "[" * 100_000, "nested more than 16 deep"),
    "deep maps": (lambda: "{a: " * 60_000, "nested more than 16 deep|no valid yaml"),
    "large": (lambda: "names: [" + "x, " * 200_000 + "]", "larger than 256 KB"),
    "control characters": (lambda: "names: [\x07]", "no valid yaml"),
    "not text": (lambda: "\udcff\udcfe\udcfd", "no valid yaml"),
}

LIMITED = """
import resource, sys, time
from yolov7.dataset import load_data
from yolov7.errors import UserError
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    load_data(sys.argv[1], "val")
except UserError as error:
    print(error)
print(time.process_time() - start)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


@linux
@pytest.mark.parametrize(("text", "message"), HOSTILE_YAML.values(), ids=HOSTILE_YAML.keys())
def test_a_hostile_yaml_is_one_line_at_once(
    tmp_path: Path, text: Callable[[], str], message: str
) -> None:
    path = tmp_path / "data.yaml"
    path.write_bytes(text().encode(errors="surrogateescape"))
    check_cheap(path, message)


def check_cheap(path: Path, message: str) -> None:
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    line, seconds, megabytes = done.stdout.splitlines()
    with pytest.raises(UserError, match=message):
        raise UserError(line)
    assert float(seconds) < 3
    assert int(megabytes) < 200


@linux
@pytest.mark.parametrize("text", ["[" * 1_000_000, '{"a":' * 1_000_000], ids=["lists", "objects"])
def test_a_deep_json_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "val.json"
    path.write_text(text)
    check_cheap(path, "no valid json")


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    long = "x" * 300
    for description in (f"names: [a]\nval: {long}\n", f"names: [a]\nval: {long}.json\n"):
        with pytest.raises(UserError, match=r"does not exist|cannot be read"):
            read(tmp_path, description)
    with pytest.raises(UserError, match="does not exist"):
        load_data("a\0b", "val")


@linux
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    path = yolo_data(tmp_path)
    write_label(tmp_path / "labels/val/a.txt", *(f"0 0.{n} 0.5 0.1 0.1" for n in range(20, 40)))
    label = tmp_path / "labels/val/b.txt"
    label.unlink()
    os.mkfifo(label)
    dataset = load_data(path, "val")
    assert [problem.text for problem in dataset.problems] == ["is no file"]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="does not exist"):
        load_data(path, "val")


# Folders


@linux
def test_folders_are_searched_through_links_and_links_in_circles_end(tmp_path: Path) -> None:
    path = yolo_data(tmp_path / "set")
    write_image(tmp_path / "elsewhere/d.jpg")
    (tmp_path / "set/images/val/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/images/val/round").symlink_to(tmp_path / "set/images")
    names = [sample.path.name for sample in load_data(path, "val").samples]
    assert sorted(names) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def test_a_folder_that_may_not_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs as root may read everything, so it is asked as if he was not."""
    path = yolo_data(tmp_path, "names: [a, b]\nval: images\n")
    plain = os.scandir

    def scandir(folder: Path) -> object:
        if folder.name == "val":
            raise PermissionError(13, "Permission denied", str(folder))
        return plain(folder)

    monkeypatch.setattr("yolov7.dataset.yolo.os.scandir", scandir)
    with pytest.raises(UserError, match=r"val: cannot be read \(Permission denied\)"):
        load_data(path, "val")


def test_what_macos_keeps_beside_files_is_no_image(tmp_path: Path) -> None:
    path = yolo_data(tmp_path)
    (tmp_path / "images/val/._a.jpg").write_bytes(b"resource fork")
    dataset = load_data(path, "val")
    assert len(dataset.samples) == 3
    assert not dataset.skipped


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/a.jpg", "images/a.txt"),
        ("images/a.jpg", "Labels/a.txt"),
        ("images/a.jpg", "labels/a.TXT"),
        ("images/a.jpg", "labels/a.jpg.txt"),
        ("JPEGImages/a.jpg", "labels/a.txt"),
    ],
)
def test_labels_are_found_in_the_usual_places(tmp_path: Path, image: str, label: str) -> None:
    write_image(tmp_path / image)
    write_label(tmp_path / label, BOX)
    (tmp_path / "data.yaml").write_text(f"names: [a]\nval: {image.split('/')[0]}\n")
    assert classes(load_data(tmp_path, "val")) == [[0]]


# Label files


def with_labels(root: Path, text: str, more: str = "") -> Dataset:
    """Twenty right rows beside those of `text`: a few wrong ones are borne."""
    path = yolo_data(root, f"names: [cell, dot]\nval: images/val\n{more}")
    (root / "labels/val/a.txt").write_text(text, encoding="utf-8")
    rows = [f"0 0.{number} 0.5 0.1 0.1" for number in range(20, 40)]
    if not more:
        write_label(root / "labels/val/b.txt", *rows)
    return load_data(path, "val")


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path: Path) -> None:
    assert classes(with_labels(tmp_path, f"\ufeff{BOX}\n"))[0] == [0]


@pytest.mark.parametrize("entry", ["a\\0b", "va\\ud800l"])
def test_an_entry_that_can_be_no_path_is_one_line(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(f'train: "{entry}"\nval: images/val\nnames: [a]\n')
    with pytest.raises(UserError, match=r"data\.yaml: split train: .* is no path: correct it$"):
        load_data(path, "train")


def test_the_whole_file_system_is_no_folder_of_images(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(json.dumps({"train": tmp_path.anchor, "val": "images/val", "names": ["a"]}))
    with pytest.raises(UserError, match=r" is the whole file system: name a folder of images$"):
        load_data(path, "train")


def test_rows_that_come_twice_are_left_out_and_counted(tmp_path: Path) -> None:
    dataset = with_labels(tmp_path, f"{BOX}\n{BOX.replace(' ', '  ')}\n{BOX}\n")
    assert classes(dataset)[0] == [0]
    assert [problem.kind for problem in dataset.problems] == ["duplicate label"] * 2
    assert dataset.summary() == (
        "3 images (1 without boxes), 21 boxes of 2 classes; left out: 2 duplicate labels"
    )


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("0 0.5 0.5 0.2 0.2 1 0", "7 numbers, two of them flags"),
        ("0 0.5 0.5 0.2 0.2 0.93", "6 numbers; leave the confidence out"),
        ("0 nan 0.5 0.2 0.2", "cx is nan"),
        ("9 0.5 0.5 0.2 0.2", "class 9"),
        ("0 0.5 0.5 0 0.2", "the box has no area"),
        ("\x1b[2J", "not made of numbers"),
    ],
)
def test_a_few_wrong_rows_are_left_out_and_named(tmp_path: Path, row: str, why: str) -> None:
    dataset = with_labels(tmp_path, f"{BOX}\n{row}\n")
    assert classes(dataset)[0] == [0]
    (problem,) = dataset.problems
    assert str(problem).startswith(f"{tmp_path}/labels/val/a.txt:2: ")
    assert why in str(problem)
    assert str(problem).isprintable()


def test_a_file_of_labels_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    path = yolo_data(tmp_path)
    write_label(tmp_path / "labels/val/b.txt", *(f"0 0.{n} 0.5 0.1 0.1" for n in range(20, 40)))
    (tmp_path / "labels/val/a.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as text" in str(load_data(path, "val").problems[0])


@pytest.mark.parametrize(
    ("shape", "numbers"), [("[4, 3]", "0.5 0.5 2 " * 4), ("[17, 2]", "0.5 0.4 " * 17)]
)
def test_of_a_pose_the_box_is_read(tmp_path: Path, shape: str, numbers: str) -> None:
    dataset = with_labels(tmp_path, f"{BOX} {numbers}\n", f"kpt_shape: {shape}\n")
    np.testing.assert_allclose(dataset.samples[0].labels.boxes, [[30, 10, 50, 30]], rtol=1e-6)
    assert dataset.samples[0].labels.polygons == ([],)
    with pytest.raises(UserError, match="by kpt_shape a label has"):
        with_labels(tmp_path, f"{BOX} 0.5 0.5\n", f"kpt_shape: {shape}\n")


def test_images_that_a_list_names_twice_count_once(tmp_path: Path) -> None:
    path = yolo_data(tmp_path, "names: [a, b]\nval: val.txt\n")
    (tmp_path / "val.txt").write_text("images/val/a.jpg\nimages/val/b.jpg\nimages/val/a.jpg\n")
    dataset = load_data(path, "val")
    assert len(dataset.samples) == 2
    assert dataset.problems[0].kind == "duplicate image"


def test_a_folder_that_a_split_names_often_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost is bounded by what a file holds, not by it times what lies in the folder."""
    read_from: list[Path] = []
    plain = yolo.list_images

    def list_images(entry: Path, root: Path) -> list[Path]:
        read_from.append(entry)
        return plain(entry, root)

    monkeypatch.setattr("yolov7.dataset.reader.yolo.list_images", list_images)
    places = ["images/val", "./images/val", "images/../images/val"] * 1000
    dataset = read(tmp_path, f"names: [a, b]\nval: [{', '.join(places)}]\n")
    assert len(dataset.samples) == 3
    assert not dataset.problems
    assert read_from == [tmp_path / "images" / "val"]


def test_a_label_that_is_edited_while_the_set_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yolov7.dataset import yolo

    path = yolo_data(tmp_path)
    label = tmp_path / "labels/val/a.txt"
    read_labels = yolo.read_labels

    def edited_after(file: Path, *rest: Any) -> Any:
        found = read_labels(file, *rest)
        if file == label:
            label.write_text(f"{BOX.replace('0 ', '1 ', 1)}\n")
        return found

    monkeypatch.setattr(yolo, "read_labels", edited_after)
    assert classes(load_data(path, "val"))[0] == [0, 1]
    monkeypatch.undo()
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path / "cache"))
    assert classes(load_data(path, "val"))[0] == [1]


# COCO


@pytest.mark.parametrize("spec", [".", "train/_annotations.coco.json"])
def test_roboflows_layout_is_read(tmp_path: Path, spec: str) -> None:
    roboflow(tmp_path, train=["a.jpg", "b.jpg"], valid=["c.jpg"], test=["d.jpg"])
    train, val = load_splits(tmp_path / spec)
    assert [sample.path.name for sample in train.samples] == ["a.jpg", "b.jpg"]
    assert [sample.path.name for sample in val.samples] == ["c.jpg"]
    assert (train.names, classes(train)) == (["red", "white"], [[0], [0]])


def test_the_json_of_another_split_lies_beside_the_one_that_is_named(tmp_path: Path) -> None:
    path = coco_data(tmp_path)
    other = path.with_name("instances_train2017.json")
    other.write_text(path.read_text())
    (tmp_path / "train2017").mkdir()
    for name in ("7", "3"):
        write_image(tmp_path / f"train2017/{name}.jpg")
    train, val = load_splits(other)
    assert {s.path.parent.name for s in train.samples} == {"train2017"}
    assert {s.path.parent.name for s in val.samples} == {"val2017"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"id": 7, "file_name": n} for n in ("7.jpg", "3.jpg")]}, "1 ids belong to"),
        ({"categories": [{"id": 18, "name": "dog"}, {"id": 18, "name": "cat"}]}, "the same id"),
    ],
)
def test_ids_that_come_twice_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_data(coco_data(tmp_path, coco_content() | change), "val")


def test_annotations_that_come_twice_are_left_out_and_counted(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] += [content["annotations"][0] | {"id": 99}]
    dataset = load_data(coco_data(tmp_path, content), "val")
    assert classes(dataset)[0] == [0, 1]
    assert [problem.kind for problem in dataset.problems] == ["duplicate label"]


@pytest.mark.parametrize(
    "outline", [[1, 2, 3, 4, 5, 6], [[[1, 2], [3, 4], [5, 6]]], [[1, 2, 3, 4, 5, 6, 7]], "x"]
)
def test_an_outline_that_is_none_costs_no_box(tmp_path: Path, outline: object) -> None:
    content = coco_content()
    content["annotations"][0]["segmentation"] = outline
    sample = load_data(coco_data(tmp_path, content), "val").samples[0]
    assert sample.labels.polygons == ([], [])
    assert sample.labels.classes.tolist() == [0, 1]


def test_windows_paths_and_sizes_of_zero_in_a_json(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0] |= {"file_name": "sub\\7.jpg", "height": 0, "width": 0}
    write_image(tmp_path / "val2017/sub/7.jpg")
    dataset = load_data(coco_data(tmp_path, content), "val")
    assert (dataset.samples[0].height, dataset.samples[0].width) == (HEIGHT, WIDTH)


def test_a_name_that_only_contains_a_split_is_none(tmp_path: Path) -> None:
    latest = unsplit(tmp_path / "set")
    for split in ("train", "val"):
        assert len(load_data(latest, split).samples) == 2
