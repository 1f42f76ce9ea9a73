import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from yolov7 import window
from yolov7.drawing import class_colour
from yolov7.errors import UserError
from yolov7.images import read_image
from yolov7.recorder import Outputs, Recorder
from yolov7.results import Boxes, Results
from yolov7.sources import Frame

NAMES = ["person", "bus", "wine glass", "fire/exit"]
SPEED = {"pre": 1.0, "network": 4.0, "nms": 1.1}


def make(rows: list[list[float]], shape: tuple[int, int] = (100, 200), **frame: object) -> Results:
    image = np.full((*shape, 3), 90, np.uint8)
    where = {"path": "street.jpg", "item": 3, "items": 12, **frame}
    boxes = Boxes(torch.tensor(rows, dtype=torch.float32).view(-1, 6), shape)
    return Results(Frame(image, **where), boxes, NAMES, SPEED, (448, 640))  # type: ignore[arg-type]


BOXES = [
    [10.0, 20.0, 50.0, 80.0, 0.9, 0.0],
    [100.0, 10.0, 180.0, 90.0, 0.75, 1.0],
    [0.0, 0.0, 20.0, 10.0, 0.5, 0.0],
]


def test_boxes_in_every_form() -> None:
    boxes = make(BOXES).boxes
    assert len(boxes) == 3
    assert boxes.xyxy[0].tolist() == [10, 20, 50, 80]
    assert boxes.xywh[0].tolist() == [30, 50, 40, 60]
    assert boxes.conf.tolist() == [pytest.approx(0.9), 0.75, 0.5]
    assert boxes.cls.tolist() == [0, 1, 0]
    assert boxes.cls.dtype == torch.int64


def test_boxes_in_parts_of_the_image() -> None:
    boxes = make(BOXES).boxes
    torch.testing.assert_close(boxes.xyxyn[0], torch.tensor([0.05, 0.2, 0.25, 0.8]))
    torch.testing.assert_close(boxes.xywhn[0], torch.tensor([0.15, 0.5, 0.2, 0.6]))
    assert boxes.numpy().shape == (3, 6)
    assert boxes.numpy().dtype == np.float32
    assert boxes.id is None


def test_boxes_one_by_one_and_by_index() -> None:
    boxes = make(BOXES).boxes
    assert [int(box.cls) for box in boxes] == [0, 1, 0]
    assert [len(box) for box in boxes] == [1, 1, 1]
    assert boxes[-1].xyxy[0].tolist() == [0, 0, 20, 10]
    assert boxes[1:].conf.tolist() == [0.75, 0.5]
    assert boxes[boxes.cls == 0].cls.tolist() == [0, 0]
    assert boxes[[2, 0]].xyxyn[1].tolist() == boxes.xyxyn[0].tolist()
    with pytest.raises(IndexError):
        boxes[3]
    assert list(make([]).boxes) == []
    tracked = Boxes(boxes.data, boxes.shape, torch.tensor([7, 8, 9]))
    assert [int(box.id) for box in tracked if box.id is not None] == [7, 8, 9]


def test_the_line_of_an_image() -> None:
    line = "image 3/12 street.jpg: 448x640 2 persons, 1 bus, 6.1 ms"
    assert str(make(BOXES)) == line
    assert str(make([])) == "image 3/12 street.jpg: 448x640 no detections, 6.1 ms"


def test_the_line_of_a_frame() -> None:
    video = make([], path="v.mp4", kind="video", number=7, total=300)
    assert str(video).startswith("video 3/12 frame 7/300 v.mp4: 448x640")
    assert str(make([], items=0)).startswith("image 3 street.jpg: ")
    live = make([], path="camera 0", kind="live", number=7)
    assert str(live).startswith("video 3/12 frame 7 camera 0: 448x640")


def test_short_in_a_notebook() -> None:
    result = make(BOXES)
    assert repr(result) == "Results('street.jpg', 2 persons, 1 bus)"
    assert repr(result.boxes) == "Boxes(3, confidence 0.90 to 0.50)"
    assert repr(make([])) == "Results('street.jpg', no detections)"
    assert repr(make([]).boxes) == "Boxes(0)"


def test_results_can_be_compared_and_kept_in_sets() -> None:
    first, second = make(BOXES), make(BOXES)
    assert first == first
    assert first != second  # an identity, as of the arrays inside
    assert len({first, second, first.boxes, second.boxes}) == 4


def test_plurals() -> None:
    glasses = [[0.0, 0.0, 1.0, 1.0, 0.5, 2.0]] * 2 + [[0.0, 0.0, 1.0, 1.0, 0.5, 1.0]] * 2
    assert make(glasses).summary() == "2 buses, 2 wine glasses"


def test_plot_draws_on_a_copy_in_the_class_colour() -> None:
    result = make(BOXES, (400, 600))
    picture = result.plot()
    assert (result.image == 90).all()
    assert tuple(picture[50, 10].tolist()) == class_colour(0)
    assert tuple(picture[50, 100].tolist()) == class_colour(1)
    assert tuple(picture[50, 30].tolist()) == (90, 90, 90)


@pytest.mark.parametrize("shape", [(1, 1), (8, 500), (3000, 40)])
def test_plot_of_small_and_narrow_images(shape: tuple[int, int]) -> None:
    h, w = shape
    picture = make([[0.0, 0.0, w, h, 0.9, 0.0]], shape).plot()
    assert picture.shape == (*shape, 3)
    assert (picture != 90).any()


def test_labels_stay_in_the_picture() -> None:
    def tag(x: float, y: float) -> np.ndarray:
        picture = make([[x, y, x + 30, y + 30, 0.9, 0.0]], (300, 400)).plot()
        return (picture == class_colour(0)).all(2)

    free = tag(150, 150).sum()
    for corner in ((0, 0), (390, 0), (390, 290), (0, 290)):
        assert tag(*corner).sum() > 0.6 * free


def test_save(tmp_path: Path) -> None:
    path = make(BOXES).save(tmp_path / "new" / "out.png")
    np.testing.assert_array_equal(read_image(path), make(BOXES).plot())
    with pytest.raises(UserError, match="cannot be written"):
        make(BOXES).save(tmp_path / "out.unknown")


def test_save_txt(tmp_path: Path) -> None:
    path = make(BOXES[:2]).save_txt(tmp_path / "labels" / "a.txt")
    assert path.read_text() == (
        "0 0.150000 0.500000 0.200000 0.600000\n1 0.700000 0.500000 0.400000 0.800000\n"
    )
    make(BOXES[:1]).save_txt(path, conf=True)
    assert path.read_text() == "0 0.150000 0.500000 0.200000 0.600000 0.900000\n"
    assert make([]).save_txt(path).read_text() == ""


def test_save_crops(tmp_path: Path) -> None:
    rows = [[10.4, 20.0, 49.6, 80.0, 0.9, 0.0], [200.0, 50.0, 200.0, 50.0, 0.5, 3.0]]
    paths = make(rows).save_crops(tmp_path, "street")
    assert [str(p.relative_to(tmp_path)) for p in paths] == [
        "person/street-1.jpg",
        "fire-exit/street-2.jpg",
    ]
    assert read_image(paths[0]).shape == (60, 40, 3)
    assert read_image(paths[1]).shape == (1, 1, 3)


def test_crops_are_cut_out_of_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame on a GPU is copied whenever its pixels are asked for."""
    copies: list[Results] = []
    real = vars(Results)["image"].fget

    def image(self: Results) -> Any:
        copies.append(self)
        return real(self)

    monkeypatch.setattr(Results, "image", property(image))
    assert len(make(BOXES).save_crops(tmp_path, "street")) == 3
    assert len(copies) == 1


def test_to_dict_is_json() -> None:
    row = make(BOXES[1:2]).to_dict()
    assert json.loads(json.dumps(row)) == {
        "path": "street.jpg",
        "height": 100,
        "width": 200,
        "boxes": [
            {"name": "bus", "class": 1, "confidence": 0.75, "xyxy": [100.0, 10.0, 180.0, 90.0]}
        ],
        "speed": SPEED,
    }
    frame = make([], kind="video", number=7, time=0.24).to_dict()
    assert (frame["frame"], frame["time"]) == (7, 0.24)
    assert json.loads(make(BOXES).to_json()) == make(BOXES).to_dict()


def test_to_df(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        make(BOXES).to_df()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    columns = make(BOXES).to_df()
    assert list(columns) == ["name", "class", "confidence", "x1", "y1", "x2", "y2"]
    assert columns["name"] == ["person", "bus", "person"]
    assert columns["x2"].tolist() == [50, 180, 20]


def test_to_df_of_pandas() -> None:
    pytest.importorskip("pandas")
    frame = make(BOXES).to_df()
    assert frame.shape == (3, 7)
    assert frame[frame["name"] == "bus"]["y2"].tolist() == [90]
    assert make([]).to_df().shape == (0, 7)


def test_a_notebook_shows_a_picture() -> None:
    shown = cv2.imdecode(np.frombuffer(make(BOXES)._repr_png_(), np.uint8), cv2.IMREAD_COLOR)
    assert shown is not None
    np.testing.assert_array_equal(shown, make(BOXES).plot())
    large = cv2.imdecode(np.frombuffer(make([], (300, 2560))._repr_png_(), np.uint8), 1)
    assert large is not None
    assert large.shape == (150, 1280, 3)


@pytest.mark.parametrize("ending", ["k", "closed"])
def test_show(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[np.ndarray] = []
    answers = iter([None, None, ending])
    monkeypatch.setattr(window, "_opens", lambda: True)
    monkeypatch.setattr(cv2, "imshow", lambda _, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda _: ord("k") if next(answers) == "k" else -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 0.0 if len(shown) == 3 else 1.0)
    make(BOXES).show()
    assert len(shown) == 3
    np.testing.assert_array_equal(shown[0], make(BOXES).plot())


def test_show_without_a_display_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qt would end the process, which is why another one tries."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", ":97")
    for name in ("WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="show needs a display"):
        make(BOXES).show()


def test_to_coco() -> None:
    row = {"image_id": 5, "category_id": 1, "bbox": [100.0, 10.0, 80.0, 80.0], "score": 0.75}
    assert make(BOXES[1:2]).to_coco(5) == [row]
    assert make(BOXES[1:2]).to_coco(5, [1, 90])[0]["category_id"] == 90


def test_to_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        make(BOXES).to_supervision()
    stand_in = SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    fields = make(BOXES).to_supervision()
    assert fields["xyxy"].shape == (3, 4)
    assert fields["class_id"].tolist() == [0, 1, 0]
    assert fields["data"]["class_name"].tolist() == ["person", "bus", "person"]
    assert fields["tracker_id"] is None
    assert make([]).to_supervision()["xyxy"].shape == (0, 4)


def test_supervision_reads_results() -> None:
    supervision = pytest.importorskip("supervision")
    for result in (make(BOXES), make([])):
        read, made = supervision.Detections.from_ultralytics(result), result.to_supervision()
        assert len(read) == len(result)
        np.testing.assert_array_equal(read.xyxy, made.xyxy)
        np.testing.assert_array_equal(read.confidence, made.confidence)
        np.testing.assert_array_equal(read.class_id, made.class_id)
        assert read.data["class_name"].tolist() == made.data["class_name"].tolist()
        assert read.tracker_id is None


def test_results_have_what_supervision_asks_for() -> None:
    """`Detections.from_ultralytics` reads these, and takes `obb` for oriented boxes."""
    result = make(BOXES)
    assert result.masks is None
    assert not hasattr(result, "obb")
    assert result.boxes.id is None
    assert [result.names[index] for index in result.boxes.cls.cpu().numpy().astype(int)]
    assert result.boxes.xyxy.cpu().numpy().shape == (3, 4)


def test_one_video_file_is_written_at_a_time_and_streams_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[cv2.VideoWriter] = []

    class Writers:  # a subclass of OpenCV's would crash
        fourcc, make = cv2.VideoWriter.fourcc, cv2.VideoWriter

        def __call__(self, *arguments: Any) -> cv2.VideoWriter:
            opened.append(self.make(*arguments))
            return opened[-1]

    def writing() -> list[bool]:
        return [writer.isOpened() for writer in opened]

    monkeypatch.setattr(cv2, "VideoWriter", Writers())
    with Recorder(Outputs(tmp_path)) as recorder:
        for item, number in [(1, 1), (1, 2), (2, 1)]:
            recorder.write(make([], path=f"{item}.avi", item=item, kind="video", number=number))
        assert writing() == [False, True]
        for item in (3, 4, 3, 4):
            recorder.write(make([], path=f"camera {item}", item=item, kind="live"))
        assert writing()[2:] == [True, True]
    assert not any(writing())
    assert len(list(tmp_path.glob("*.mp4"))) == 4
