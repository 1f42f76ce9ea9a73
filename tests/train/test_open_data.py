import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from yolov7.checkpoint import load_model
from yolov7.errors import UserError
from yolov7.model import create_model
from yolov7.train.data import match_classes, open_data
from yolov7.train.loop import train
from yolov7.train.options import Train


def test_weights_that_count_the_classes_otherwise_keep_their_head(
    options: Train, tmp_path: Path
) -> None:
    model = create_model("yolov7-tiny", 2, width=0.125, names=["blue", "red"])
    result = train(replace(options, epochs=1), model=model)
    assert load_model(result.folder / "weights" / "last.safetensors").names == ["blue", "red"]
    trainer_data = open_data(options, None)
    first, second = match_classes(*trainer_data, ["blue", "red"])
    for before, after in zip(trainer_data, (first, second), strict=True):
        for a, b in zip(before.samples, after.samples, strict=True):
            assert (a.labels.classes + b.labels.classes == 1).all()


def test_images_are_held_out_of_one_split(options: Train) -> None:
    train_set, val_set = open_data(replace(options, val_fraction=0.25), None)
    assert (len(train_set.samples), len(val_set.samples)) == (6, 2)
    assert not {s.path for s in train_set.samples} & {s.path for s in val_set.samples}
    with pytest.raises(UserError, match="val-fraction 2: give a number between 0 and 1"):
        train(replace(options, val_fraction=2.0))


def test_what_is_wrong_in_the_data_is_said_or_ends_the_run(
    shapes: Path, options: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shapes.parent, tmp_path / "set")
    label = tmp_path / "set/labels/train/000.txt"
    label.write_text(f"{label.read_text()}\n{label.read_text()}\n")
    other = tmp_path / "set/labels/train/001.txt"
    other.write_text("0 0.95 0.5 0.3 0.5\n")
    (tmp_path / "set/labels/train/002.txt").unlink()
    changed = replace(options, data=str(tmp_path / "set/data.yaml"), epochs=1)
    train(changed)
    lines = capsys.readouterr().out.splitlines()
    for line in (
        f"left out: 1 duplicate label, such as {label}:",
        "fault: 1 box outside, such as ",
        "note: 1 image without labels, such as ",
        "yolov7 check names all",
    ):
        assert sum(said.startswith(line) for said in lines) == 1, line
    with pytest.raises(UserError, match=r"--strict: .*1 duplicate label.*1 box outside") as error:
        train(replace(changed, strict=True))
    assert "without labels" not in str(error.value)
    assert str(error.value).endswith("yolov7 check names all, and decodes the images")
