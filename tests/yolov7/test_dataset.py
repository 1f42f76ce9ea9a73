from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.yolov7.data_sets import (
    BOX,
    HEIGHT,
    WIDTH,
    assert_same,
    coco_content,
    coco_data,
    write_image,
    write_label,
    yolo_data,
)
from yolov7.dataset import load_data, reader
from yolov7.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_folder")


# YOLO form


def test_boxes_polygons_and_backgrounds_of_a_yolo_split(tmp_path: Path) -> None:
    dataset = load_data(yolo_data(tmp_path), "val")
    assert [sample.path.name for sample in dataset.samples] == ["a.jpg", "b.jpg", "c.jpg"]
    assert (dataset.names, dataset.category_ids, dataset.skipped) == (["cell", "dot"], [0, 1], [])
    first = dataset.samples[0]
    assert (first.height, first.width) == (HEIGHT, WIDTH)
    assert first.labels.classes.tolist() == [0, 1]
    np.testing.assert_allclose(first.labels.boxes, [[30, 10, 50, 30], [8, 4, 40, 36]], rtol=1e-6)
    np.testing.assert_allclose(first.labels.areas, [20 * 20, 32 * 32], rtol=1e-6)
    assert first.labels.polygons[0] == []
    np.testing.assert_allclose(
        first.labels.polygons[1][0], [[8, 4], [40, 4], [40, 36], [8, 36]], rtol=1e-6
    )
    for background in dataset.samples[1:]:
        assert background.labels.boxes.shape == (0, 4)
        assert background.labels.polygons == ()


def test_a_polygons_area_is_its_own_not_its_boxs(tmp_path: Path) -> None:
    path = yolo_data(tmp_path)
    write_label(tmp_path / "labels/val/a.txt", "1 0 0 1 0 0 1")
    assert load_data(path, "val").samples[0].labels.areas.tolist() == [WIDTH * HEIGHT / 2]


@pytest.mark.parametrize(
    "description",
    [
        "names: {0: cell, 1: dot}\nval: images/val\nnc: 2\n",
        "path: .\nnames: [cell, dot]\nval: [images/val/a.jpg, images/val/b.jpg, images/val/c.jpg]",
        "names: [cell, dot]\nval: images\n",
        "names: [cell, dot]\nval: lists/val.txt\n",
        "path: ROOT\nnames: [cell, dot]\nval: images/val\n",
        "names: [cell, dot]\nval: ../images/val\n",
        "names: [cell, dot]\nval: SET/images/val\n",
    ],
    ids=[
        "dict-of-names",
        "list-of-entries",
        "nested-folder",
        "text-list",
        "absolute-path",
        "one-folder-too-high",
        "from-working-directory",
    ],
)
def test_forms_of_a_data_yaml_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, description: str
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    plain = load_data(yolo_data(tmp_path), "val")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "val.txt").write_text(
        f"images/val/a.jpg\n{tmp_path / 'images/val/b.jpg'}\n\n../images/val/c.jpg\n"
    )
    description = description.replace("ROOT", str(tmp_path)).replace("SET", tmp_path.name)
    path = yolo_data(tmp_path, description)
    other = load_data(path, "val")
    assert [s.path.resolve() for s in other.samples] == [s.path for s in plain.samples]
    assert [s.labels.classes.tolist() for s in other.samples] == [[0, 1], [], []]


def test_a_folder_stands_for_the_data_yaml_in_it(tmp_path: Path) -> None:
    path = yolo_data(tmp_path)
    assert_same(load_data(tmp_path, "val"), load_data(path, "val"))


def test_labels_lie_beside_images_where_no_folder_is_called_images(tmp_path: Path) -> None:
    write_image(tmp_path / "all/x.png")
    write_label(tmp_path / "all/x.txt", BOX)
    (tmp_path / "data.yaml").write_text("names: [cell]\ntrain: all\n")
    assert load_data(tmp_path, "train").samples[0].labels.classes.tolist() == [0]


def test_only_the_last_folder_called_images_is_exchanged(tmp_path: Path) -> None:
    root = tmp_path / "images" / "set"
    write_image(root / "images/x.png")
    write_label(root / "labels/x.txt", BOX)
    (root / "data.yaml").write_text("names: [cell]\ntrain: images\n")
    assert load_data(root, "train").samples[0].labels.classes.tolist() == [0]


def test_image_ids_are_the_numbers_that_files_are_named_by(tmp_path: Path) -> None:
    for name in ("000042", "000007"):
        write_image(tmp_path / f"images/{name}.jpg")
    (tmp_path / "data.yaml").write_text("names: [cell]\nval: images\n")
    assert [s.image_id for s in load_data(tmp_path, "val").samples] == [7, 42]
    write_image(tmp_path / "images/extra.jpg")
    assert [s.image_id for s in load_data(tmp_path, "val").samples] == [0, 1, 2]


def test_the_80_names_of_coco_get_its_91_ids(tmp_path: Path) -> None:
    path = yolo_data(tmp_path, reader.COCO_YAML.read_text().replace("val: ", "val: images/val #"))
    ids = load_data(path, "val").category_ids
    assert len(ids) == 80
    assert (ids[0], ids[11], ids[16], ids[79]) == (1, 13, 18, 90)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"a\.txt:2: class 2, but the data set names 2 classes \(0 to 1\)"),
        ("-1 0.5 0.5 0.1 0.1", r"a\.txt:2: class -1"),
        ("1.5 0.5 0.5 0.1 0.1", r"a\.txt:2: .*whole number"),
        ("0 0.5 0.5 0.1", r"a\.txt:2: 4 numbers; a label is"),
        ("0 0.5 0.5 0.1 0.1 0.9", r"a\.txt:2: 6 numbers; leave the confidence out: a label is"),
        ("0 30 10 50 30", r"a\.txt:2: coordinates must be fractions"),
        ("0 0.5 0.5 nan 0.1", r"a\.txt:2: the width is nan"),
        ("cell 0.5 0.5 0.1 0.1", r"a\.txt:2: .* is not made of numbers"),
    ],
)
def test_a_wrong_label_is_named_with_its_file_and_line(
    tmp_path: Path, line: str, message: str
) -> None:
    path = yolo_data(tmp_path)
    write_label(tmp_path / "labels/val/a.txt", BOX, line)
    with pytest.raises(UserError, match=message):
        load_data(path, "val")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("names: [cell, dot]\nval: images/val\nnc: 3\n", "nc is 3, but it has 2 names"),
        ("names: {1: cell, 2: dot}\nval: images/val\n", "keys of names must be 0 to 1"),
        ("val: images/val\n", "must give the names"),
        ("names: [cell]\ntrain: images/val\n", "has no split val: it has train"),
        ("names: [cell]\nval: images/elsewhere\n", "elsewhere does not exist"),
        ("names: [cell\nval", "no valid yaml"),
        ("- 1\n", "is no data.yaml"),
        ("names: [cell]\nval: labels\n", "holds no images"),
    ],
)
def test_a_wrong_data_yaml_is_explained(tmp_path: Path, description: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data(yolo_data(tmp_path, description), "val")


@pytest.mark.parametrize("spec", ["nothing.yaml", "nothing.json", "."])
def test_a_data_set_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist|holds neither"):
        load_data(spec, "val")


def test_corrupt_images_are_skipped_and_listed(tmp_path: Path) -> None:
    path = yolo_data(tmp_path)
    (tmp_path / "images/val/b.jpg").write_bytes(b"no image")
    dataset = load_data(path, "val")
    assert [sample.path.name for sample in dataset.samples] == ["a.jpg", "c.jpg"]
    assert len(dataset.skipped) == 1
    assert dataset.skipped[0].place == str(tmp_path / "images/val/b.jpg")
    for name in ("a", "c"):
        (tmp_path / f"images/val/{name}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of 3 images can be read"):
        load_data(path, "val")


# COCO form


@pytest.mark.parametrize("spec", ["annotations/instances_val2017.json", ".", "annotations"])
def test_polygons_crowds_and_categories_of_a_coco_json(tmp_path: Path, spec: str) -> None:
    coco_data(tmp_path)
    dataset = load_data(tmp_path / spec, "val")
    assert (dataset.names, dataset.category_ids) == (["dog", "toothbrush"], [18, 90])
    first, second = dataset.samples
    assert (first.image_id, first.path.name, second.image_id) == (7, "7.jpg", 3)
    assert first.labels.classes.tolist() == [0, 1]
    assert first.labels.boxes.tolist() == [[10, 10, 70, 20], [0, 0, 80, 40]]
    assert first.labels.crowd.tolist() == [False, True]
    assert first.labels.areas.tolist() == [250, 900]
    assert [len(parts) for parts in first.labels.polygons] == [2, 0]
    assert first.labels.polygons[0][1][0].tolist() == [50, 50]
    assert len(second.labels.classes) == 0


def test_a_data_yaml_may_name_coco_jsons_and_the_order_of_classes(tmp_path: Path) -> None:
    coco_data(tmp_path)
    path = tmp_path / "data.yaml"
    path.write_text("names: [toothbrush, dog]\nval: annotations/instances_val2017.json\n")
    dataset = load_data(path, "val")
    assert (dataset.names, dataset.category_ids) == (["toothbrush", "dog"], [90, 18])
    assert dataset.samples[0].labels.classes.tolist() == [1, 0]
    path.write_text("names: [cat, dog]\nval: annotations/instances_val2017.json\n")
    with pytest.raises(UserError, match="differ in cat, toothbrush"):
        load_data(path, "val")


def test_a_json_of_another_split_is_not_taken_silently(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the val split, not train: say --split val"):
        load_data(coco_data(tmp_path), "train")


def test_images_of_a_coco_json_that_are_missing_or_of_another_size_are_listed(
    tmp_path: Path,
) -> None:
    content = coco_content()
    content["images"] += [
        {"id": 8, "file_name": "8.jpg", "height": HEIGHT, "width": WIDTH},
        {"id": 9, "file_name": "9.jpg", "height": WIDTH, "width": HEIGHT},
    ]
    write_image(tmp_path / "val2017/9.jpg")
    dataset = load_data(coco_data(tmp_path, content), "val")
    assert [sample.image_id for sample in dataset.samples] == [7, 3]
    missing, turned = map(str, dataset.skipped)
    assert "8.jpg: no such file" in missing
    assert "9.jpg: is 80x40, but its annotations are made for 40x80" in turned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no COCO json"),
        ({"categories": [{"id": 18, "name": "dog"}]}, "annotation 2 has category 90"),
        ({"annotations": [{"image_id": 7}]}, "annotation number 1 has no category_id"),
        ({"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]}, "the same name"),
        ({"categories": [{"id": "x", "name": "dog"}]}, "category x .* id 'x': give a whole number"),
        ({"images": [{"id": "abc", "file_name": "7.jpg"}]}, "image abc .* id 'abc': give a whole"),
        ({"images": [{"id": 1.5, "file_name": "7.jpg"}]}, "id 1.5: give a whole number"),
        ({"images": [{"id": 2**63, "file_name": "7.jpg"}]}, "give a whole number"),
        ({"images": [{"id": 7}]}, "image 7 has no file_name"),
        ({"images": ["7.jpg"]}, "image number 1 is no object with fields"),
        ({"images": {"7.jpg": 7}}, "no COCO json: it has no images"),
    ],
)
def test_a_wrong_coco_json_is_explained(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_data(coco_data(tmp_path, coco_content() | change), "val")
    assert "instances_val2017.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "abc"}, "annotation 1 has the image_id 'abc': give a whole number"),
        ({"image_id": None}, "annotation 1 has the image_id None: give a whole number"),
        ({"bbox": [1, 2, 3]}, r"annotation 1 has the bbox \[1, 2, 3\]: give x, y, width, height"),
        ({"bbox": [1, 2, 3, float("nan")]}, "annotation 1 has the bbox .*: give x, y, width"),
        ({"bbox": ["x", 2, 3, 4]}, "annotation 1 .*could not convert string to float: 'x'"),
        ({"bbox": None}, "annotation 1 is not as it should be"),
        ({"area": "large"}, "annotation 1 .*could not convert string to float: 'large'"),
    ],
)
def test_a_wrong_coco_annotation_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = coco_content()
    content["annotations"][0] |= change
    with pytest.raises(UserError, match=message) as caught:
        load_data(coco_data(tmp_path, content), "val")
    assert "instances_val2017.json: annotation 1" in str(caught.value)
    assert "(1 of 2 labels are wrong; yolov7 check lists them all)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_whose_only_boxes_are_wrong_has_none(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][1]["bbox"] = [0, 0, -5, 5]
    content["annotations"][1]["image_id"] = 3
    dataset = reader.read_split(coco_data(tmp_path, content), "val")
    assert [len(sample.labels.boxes) for sample in dataset.samples] == [1, 0]
    assert [problem.kind for problem in dataset.problems] == ["wrong label"]


@pytest.mark.parametrize("letter", ["\ud800", "\udcff"])  # noqa: PT014  # two halves
def test_halves_of_letters_in_names_of_files_are_borne(tmp_path: Path, letter: str) -> None:
    content = coco_content()
    content["images"][1]["file_name"] = f"3{letter}.jpg"
    for _ in range(2):  # read, and from the cache
        dataset = load_data(coco_data(tmp_path, content), "val")
        assert len(dataset.samples) == len(dataset.skipped) == 1
        assert str(dataset.skipped[0]).isprintable()


def test_nulls_of_a_coco_annotation_count_as_absent(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0] |= {"area": None, "iscrowd": None, "segmentation": None}
    sample = load_data(coco_data(tmp_path, content), "val").samples[0]
    assert sample.labels.areas.tolist() == [600, 900]
    assert sample.labels.crowd.tolist() == [False, True]
    assert sample.labels.polygons[0] == []


def test_numbers_of_a_coco_json_may_be_written_as_text(tmp_path: Path) -> None:
    """Tools that keep ids as text write `"1"`: such a json says the same."""
    plain = load_data(coco_data(tmp_path), "val")
    content = coco_content()
    for entries in content.values():
        for entry in entries:
            for key in ("id", "image_id", "category_id", "iscrowd", "height", "width"):
                if key in entry:
                    entry[key] = str(entry[key])
    text = load_data(coco_data(tmp_path, content), "val")
    assert [len(sample.labels.classes) for sample in text.samples] == [2, 0]
    assert_same(text, plain)


def test_a_json_that_is_not_cocos(tmp_path: Path) -> None:
    path = coco_data(tmp_path)
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="no COCO json: it has no annotations, categories, images"):
        load_data(path, "val")
    path.write_text("{")
    with pytest.raises(UserError, match="no valid json"):
        load_data(path, "val")


def test_images_of_a_coco_json_that_are_nowhere(tmp_path: Path) -> None:
    path = coco_data(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"7\.jpg.*put them there"):
        load_data(path, "val")


def test_coco_by_name_says_where_it_belongs_and_is_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"COCO is not in .*datasets/coco: put https://images"):
        load_data("coco", "val")
    named = yaml.safe_load(reader.COCO_YAML.read_text())
    pairs = zip(named["category_ids"], named["names"], strict=True)
    categories = [{"id": number, "name": name} for number, name in pairs]
    coco_data(tmp_path / "here/coco", coco_content() | {"categories": categories})
    monkeypatch.setenv("YOLOV7_DATASETS", str(tmp_path / "here"))
    (first, *_) = load_data("coco", "val").samples
    assert first.labels.classes.tolist() == [16, 79]  # dog, toothbrush
    with pytest.raises(UserError, match="has no split test: it has train, val"):
        load_data("coco", "test")


# real data


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_both_forms_of_real_data_say_the_same(data_dir: Path, split: str) -> None:
    folder = data_dir / "blood-cells"
    yolo = load_data(folder, split)
    coco = load_data(folder / "annotations", split)
    assert yolo.names == coco.names
    assert len(yolo.samples) == {"train": 205, "val": 87, "test": 72}[split]
    for a, b in zip(yolo.samples, coco.samples, strict=True):
        assert (a.path, a.height, a.width) == (b.path, b.height, b.width)
        assert a.labels.classes.tolist() == b.labels.classes.tolist()
        # labels are written with six decimals of 640
        np.testing.assert_allclose(a.labels.boxes, b.labels.boxes, atol=1e-3)


@pytest.mark.parametrize(("split", "boxes", "crowds"), [("train", 705, 6), ("val", 815, 11)])
def test_real_coco_annotations(data_dir: Path, split: str, boxes: int, crowds: int) -> None:
    dataset = load_data(data_dir / "coco-tiny", split)
    assert len(dataset.samples) == 80
    assert dataset.category_ids == load_category_ids()
    assert sum(len(sample.labels.classes) for sample in dataset.samples) == boxes
    assert sum(int(sample.labels.crowd.sum()) for sample in dataset.samples) == crowds
    for sample in dataset.samples:
        labels = sample.labels
        for box, parts, crowd in zip(labels.boxes, labels.polygons, labels.crowd, strict=True):
            assert crowd == (not parts)
            if parts:  # the outline reaches to the sides of its box
                points = np.concatenate(parts)
                np.testing.assert_allclose(points.min(0), box[:2], atol=1.5)
                np.testing.assert_allclose(points.max(0), box[2:], atol=1.5)


def load_category_ids() -> list[int]:
    missing = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    return [number for number in range(1, 91) if number not in missing]
