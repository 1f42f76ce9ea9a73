"""No image is trained and evaluated on."""

import json
import os
from pathlib import Path

import pytest

from tests.yolov7.data_sets import (
    BOX,
    linux,
    roboflow,
    unsplit,
    write_image,
    write_label,
    yolo_data,
)
from yolov7.dataset import Dataset, load_splits
from yolov7.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_folder")


def classes(dataset: Dataset) -> list[list[int]]:
    return [sample.labels.classes.tolist() for sample in dataset.samples]


def test_the_same_images_are_never_trained_and_evaluated_on(tmp_path: Path) -> None:
    latest = unsplit(tmp_path / "set")
    for spec in (latest, latest.parent.parent):
        with pytest.raises(UserError, match="2 of 2 images of val are in train, too"):
            load_splits(spec)
        train, val = load_splits(spec, val_fraction=0.5, seed=1)
        assert len(train.samples) == len(val.samples) == 1
        assert train.samples[0].path != val.samples[0].path


@linux
def test_links_to_images_are_the_same_images(tmp_path: Path) -> None:
    path = yolo_data(tmp_path, "names: [a, b]\ntrain: images/val\nval: images/other\n")
    (tmp_path / "images/other").mkdir()
    os.symlink(tmp_path / "images/val/a.jpg", tmp_path / "images/other/a.jpg")
    write_image(tmp_path / "images/other/b.jpg")
    with pytest.raises(UserError, match="1 of 2 images of val are in train"):
        load_splits(path)


def test_images_held_out_follow_from_the_seed(tmp_path: Path) -> None:
    for index in range(20):
        write_image(tmp_path / f"images/{index}.jpg")
    copies = [write_image(tmp_path / f"images/x.rf.{name}.jpg") for name in "abc"]
    write_label(tmp_path / "labels/0.txt", BOX)
    (tmp_path / "data.yaml").write_text("names: [a]\ntrain: images\n")

    def held(seed: int) -> set[str]:
        train, val = load_splits(tmp_path, val_fraction=0.3, seed=seed)
        first, second = ({s.path.name for s in part.samples} for part in (train, val))
        assert not first & second
        assert len(first | second) == 23
        assert len({copy.name for copy in copies} & first) in (0, 3)
        return second

    assert held(0) == held(0) != held(1)
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match="give a number between 0 and 1"):
            load_splits(tmp_path, val_fraction=fraction)


def test_splits_that_count_their_classes_differently_are_matched_by_name(tmp_path: Path) -> None:
    roboflow(tmp_path, train=["a.jpg"], valid=["c.jpg"])
    path = tmp_path / "valid/_annotations.coco.json"
    content = json.loads(path.read_text())
    content["categories"][1]["id"], content["categories"][2]["id"] = 2, 1
    path.write_text(json.dumps(content))
    train, val = load_splits(tmp_path)
    assert train.names == val.names == ["red", "white"]
    assert classes(val) == [[1]]
    assert (train.category_ids, val.category_ids) == ([1, 2], [2, 1])
