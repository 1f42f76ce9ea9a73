import copy
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.yolov7.networks import StandIn
from tests.yolov7.pictures import SAMPLES
from yolov7 import Detector, create_model, load_model, save_model
from yolov7.augmented import Augmented
from yolov7.boxes import box_iou, frame_table, in_frames
from yolov7.engine.eager import Network
from yolov7.engine.frames import HostFrames
from yolov7.errors import UserError
from yolov7.kernels.nms import Detections, batched_nms
from yolov7.letterbox import Image, letterbox, letterbox_geometry
from yolov7.results import Results
from yolov7.sources import Source
from yolov7.speed import Speed
from yolov7.suppression import Suppression


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(device="cpu")


def same(a: Results, b: Results) -> None:
    """Equal detections up to fp32 sums in another order."""
    torch.testing.assert_close(a.boxes.data, b.boxes.data, rtol=1e-4, atol=1e-2)


def test_the_samples_hold_blood_cells(detector: Detector) -> None:
    results = detector(SAMPLES)
    assert [result.path for result in results] == [str(path) for path in SAMPLES]
    for result in results:
        counts = torch.bincount(result.boxes.cls, minlength=3)
        assert counts[0] >= 8  # red cells
        assert counts[1] >= 1  # white ones
        assert result.names == ["RBC", "WBC", "Platelets"]
        assert result.input_shape == (256, 320)
        assert set(result.speed) == {"pre", "network", "nms"}
        height, width = result.image.shape[:2]
        assert bool((result.boxes.xyxy >= 0).all())
        assert bool((result.boxes.xyxy <= torch.tensor([width, height] * 2)).all())
        assert bool((result.boxes.conf.diff() <= 0).all())


def test_equals_the_steps_by_hand(detector: Detector, images: list[Image]) -> None:
    model = load_model()
    for image in images[:2]:
        where = letterbox_geometry(image.shape[:2], 320, auto=True)
        boxed = letterbox(image, where)
        x = torch.from_numpy(boxed[:, :, ::-1].copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            decoded = model(x)
        assert isinstance(decoded, torch.Tensor)
        found = batched_nms(decoded)
        boxes = found.boxes[0, : found.counts[0]]
        boxes[:, :4] = in_frames(boxes[None, :, :4], frame_table([where]))[0]
        torch.testing.assert_close(detector(image)[0].boxes.data, boxes, rtol=1e-4, atol=1e-2)


def test_what_was_read_before_an_error_comes_before_it(images: list[Image]) -> None:
    for batch in (1, 2):
        detector = Detector(device="cpu", imgsz=64, engine="graph", batch=batch)
        results = detector.stream([images[0], images[0], "absent.jpg", images[1]])
        assert [next(results).frame.item for _ in range(2)] == [1, 2]
        with pytest.raises(UserError, match="no such file"):
            next(results)


def test_no_class_is_looked_for(images: list[Image]) -> None:
    for engine in ("eager", "graph"):
        detector = Detector(device="cpu", imgsz=64, engine=engine, classes=[], conf=0.01)
        assert len(detector(images[0])[0]) == 0


def test_agnostic_suppression_crosses_classes(images: list[Image]) -> None:
    options: dict[str, Any] = {"device": "cpu", "conf": 0.004, "iou": 0.2}
    by_class = Detector(**options)(images[0])[0].boxes
    across = Detector(agnostic=True, **options)(images[0])[0].boxes
    overlap = box_iou(by_class.xyxy, by_class.xyxy).triu(1)
    assert bool((overlap[by_class.cls[:, None] != by_class.cls] > 0.3).any())
    assert float(box_iou(across.xyxy, across.xyxy).triu(1).max()) <= 0.2 + 1e-3


def test_the_graphs_time_is_that_of_the_whole(images: list[Image]) -> None:
    detector = Detector(device="cpu", imgsz=64, engine="graph")
    (result,) = detector(images[0])
    assert set(result.speed) == {"whole"}
    assert result.speed["whole"] > 1
    assert str(detector.speed).startswith("speed per image (p50/p99 ms): whole ")


def test_preparing_counts_as_pre(images: list[Image], monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector(device="cpu", imgsz=64)
    real = detector._frames.prepare

    def slow(pixels: Any, geometry: Any) -> Any:
        time.sleep(0.05)
        return real(pixels, geometry)

    monkeypatch.setattr(detector._frames, "prepare", slow)
    assert detector(images[0])[0].speed["pre"] > 45


def test_a_live_source_has_nothing_under_way(images: list[Image]) -> None:
    detector = Detector(device="cpu", imgsz=64, engine="graph")
    read: list[int] = []

    class Camera(Source):
        @property
        def live(self) -> bool:
            return True

        def __iter__(self) -> Iterator[Any]:
            for frame in super().__iter__():
                read.append(frame.item)
                yield frame

    results = detector.stream(Camera([images[0][:64, :64]] * 9))
    for taken in (1, 2, 3):
        next(results)
        assert len(read) == taken
    results.close()


def test_batches_of_equal_shapes_keep_the_order(detector: Detector, images: list[Image]) -> None:
    turned = np.ascontiguousarray(np.rot90(images[1]))
    mixed = [images[0], turned, images[1], turned, images[2], images[3]]
    batched = Detector(device="cpu", batch=3)
    sizes: list[tuple[int, ...]] = []
    network = batched.network

    def spy(x: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(x.shape))
        return network(x)

    batched._frames = HostFrames(StandIn(spy), Suppression(), 3)
    for single, together in zip(detector(mixed), batched(mixed), strict=True):
        assert together.path == single.path
        same(together, single)
    assert sizes == [(3, 3, 256, 320), (1, 3, 256, 320), (2, 3, 320, 256)]


def test_a_stream_reads_only_what_it_needs(detector: Detector, images: list[Image]) -> None:
    read: list[int] = []

    class Counting(Source):
        def __iter__(self) -> Iterator[Any]:
            for frame in super().__iter__():
                read.append(frame.item)
                yield frame

    results = detector.stream(Counting([images[0][:64, :64]] * 50))
    for _ in range(3):
        next(results)
    assert len(read) == 3
    results.close()


def test_errors_are_raised_or_reported(detector: Detector, images: list[Image]) -> None:
    source = ["absent.jpg", images[0]]
    with pytest.raises(UserError, match=r"absent\.jpg: no such file"):
        detector(source)
    errors: list[UserError] = []
    assert len(detector(source, on_error=errors.append)) == 1
    assert len(errors) == 1


def test_classes_by_name_and_number(images: list[Image]) -> None:
    everything = Detector(device="cpu")(images[0])[0]
    wanted: list[list[int | str]] = [["WBC", "Platelets"], [2, "1"], ["2", "WBC", 1]]
    for classes in wanted:
        result = Detector(device="cpu", classes=classes)(images[0])[0]
        same(result, Results(**{**vars(result), "boxes": _only(everything, {1, 2})}))
    with pytest.raises(UserError, match=r"no class 'RBB' in this model: did you mean RBC\?"):
        Detector(device="cpu", classes=["RBB"])
    with pytest.raises(UserError, match="no class 3 in this model: they are RBC, WBC, Platelets"):
        Detector(device="cpu", classes=[3])


def _only(result: Results, classes: set[int]) -> Any:
    return result.boxes[torch.tensor([c in classes for c in result.boxes.cls.tolist()])]


def test_thresholds(images: list[Image]) -> None:
    strict = Detector(device="cpu", conf=0.8, max_det=3)(images[0])[0]
    assert 0 < len(strict) <= 3
    assert strict.boxes.conf.min() > 0.8
    loose = Detector(device="cpu", iou=0.9)(images[0])[0]
    assert len(loose) > len(Detector(device="cpu", iou=0.1, agnostic=True)(images[0])[0])


def test_imgsz_is_rounded_up_to_the_stride(images: list[Image]) -> None:
    assert Detector(device="cpu", imgsz=300).imgsz == (320, 320)
    detector = Detector(device="cpu", imgsz=(130, 200))
    assert detector.imgsz == (160, 224)
    assert detector(images[0])[0].input_shape == (160, 224)
    assert detector(images[0][:1, :1])[0].input_shape == (160, 160)


def test_tiles_find_small_cells(detector: Detector, images: list[Image]) -> None:
    rows = [np.hstack(images[:2]), np.hstack(images[2:])]
    large = np.vstack(rows)  # 960 x 1280: cells are a quarter as large
    whole = detector(large)[0]
    tiled = Detector(device="cpu", tile=640, overlap=0.25, batch=2)(large)[0]
    parts = [detector(image)[0] for image in images]
    assert len(tiled) > 1.3 * len(whole)
    assert tiled.input_shape == whole.input_shape == (256, 320)  # tiles: 320 x 320
    # Every surely seen cell of the four images is found at its place.
    found = 0
    wanted = 0
    for part, (x, y) in zip(parts, ((0, 0), (640, 0), (0, 480), (640, 480)), strict=True):
        sure = part.boxes.data[part.boxes.conf > 0.7]
        placed = sure[:, :4] + torch.tensor([x, y, x, y])
        overlap = box_iou(placed, tiled.boxes.xyxy)
        overlap[sure[:, 5:6] != tiled.boxes.data[:, 5]] = 0
        found += int((overlap.max(1).values > 0.5).sum())
        wanted += len(sure)
    assert found > 0.9 * wanted
    # No two boxes for one thing: suppression went across tiles.
    overlap = box_iou(tiled.boxes.xyxy, tiled.boxes.xyxy)
    overlap[tiled.boxes.cls[:, None] != tiled.boxes.cls] = 0
    assert overlap.triu(1).max() <= 0.45 + 1e-3


def test_a_tile_larger_than_the_image_changes_nothing(
    detector: Detector, images: list[Image]
) -> None:
    tiled = Detector(device="cpu", tile=1000)(images[0])[0]
    single = detector(images[0])[0]
    assert torch.equal(tiled.boxes.cls, single.boxes.cls)
    # Boxes are cut at the image's border before suppression, not after.
    same(tiled, single)


def test_tiles_without_boxes() -> None:
    black = np.zeros((400, 700, 3), np.uint8)
    assert len(Detector(device="cpu", tile=320, conf=0.9)(black)[0]) == 0


def test_augment_sees_mirrored_and_scaled_views_in_place(
    detector: Detector, images: list[Image]
) -> None:
    plain = detector(images[0])[0]
    augmented = Detector(device="cpu", augment=True)(images[0])[0]
    sure = plain.boxes.data[plain.boxes.conf > 0.6]
    overlap = box_iou(sure[:, :4], augmented.boxes.xyxy)
    overlap[sure[:, 5:6] != augmented.boxes.data[:, 5]] = 0
    assert overlap.max(1).values.min() > 0.5
    assert not torch.equal(plain.boxes.data, augmented.boxes.data[: len(plain)])


def test_views_of_augment_agree_about_positions() -> None:
    """A network that marks the brightest pixel: all views have to say the same place."""

    def brightest(x: torch.Tensor) -> torch.Tensor:
        place = int(x[0].sum(0).argmax())
        row, column = divmod(place, x.shape[3])
        return torch.tensor([[[column + 0.5, row + 0.5, 4.0, 4.0, 1.0, 1.0, 0.0, 0.0]]])

    x = torch.zeros(1, 3, 64, 128)
    x[:, :, 20:23, 100:103] = 1
    places = Augmented(StandIn(brightest))(x)[0, :, :2]
    assert places.shape == (3, 2)
    torch.testing.assert_close(places, torch.tensor([[101.5, 21.5]] * 3), rtol=0, atol=1.6)


def test_nan_never_becomes_a_box(monkeypatch: pytest.MonkeyPatch, images: list[Image]) -> None:
    real = Network.__call__

    def poisoned(self: Network, x: torch.Tensor) -> torch.Tensor:
        decoded = real(self, x)
        decoded[:, ::2] = float("nan")
        decoded[:, 1::4, 2] = float("nan")
        return decoded

    monkeypatch.setattr(Network, "__call__", poisoned)
    every: list[dict[str, Any]] = [{}, {"tile": 320}, {"augment": True}]
    for options in every:
        detector = Detector(device="cpu", **options)
        result = detector(images[0])[0]
        assert bool(result.boxes.data.isfinite().all())
        assert result.plot().shape == images[0].shape


def test_one_shape_for_a_compiled_network(
    monkeypatch: pytest.MonkeyPatch, images: list[Image], detector: Detector, tmp_path: Path
) -> None:
    shapes: set[tuple[int, ...]] = set()

    def compile_(model: torch.nn.Module, **_: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            shapes.add(tuple(x.shape))
            result: torch.Tensor = model(x)
            return result

        return forward

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("shutil.which", lambda name: name)
    compiled = Detector(device="cpu", engine="compile", batch=2)
    assert compiled.startup_s > 0
    results = compiled([images[0], np.ascontiguousarray(np.rot90(images[1])), images[2]])
    assert shapes == {(2, 3, 320, 320)}
    assert [result.input_shape for result in results] == [(320, 320)] * 3
    assert abs(len(results[0]) - len(detector(images[0])[0])) <= 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_graph_equals_eager(device: str, images: list[Image], detector: Detector) -> None:
    """On a CPU the kernels' references run."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    turned = np.ascontiguousarray(np.rot90(images[1]))
    mixed = [images[0], turned, images[1], images[2], images[3][:100, :120]]
    options: dict[str, Any] = {"device": device, "engine": "graph", "precision": "fp32"}
    graph = Detector(batch=2, **options)
    for expected, result in zip(detector(mixed), graph(mixed), strict=True):
        assert result.path == expected.path
        assert result.input_shape == expected.input_shape
        same(result, expected)
    few = Detector(classes=["WBC"], max_det=1, **options)(images[0])[0]
    assert few.boxes.cls.tolist() == [1]
    tiled = Detector(tile=320, **options)(images[0])[0]
    same(tiled, Detector(device="cpu", tile=320)(images[0])[0])


def test_candidates_beyond_the_capacity_are_counted(
    monkeypatch: pytest.MonkeyPatch, images: list[Image]
) -> None:
    def few(*arguments: Any, **options: Any) -> Detections:
        return batched_nms(*arguments, **{**options, "max_candidates": 3})

    monkeypatch.setattr("yolov7.suppression.batched_nms", few)
    result = Detector(device="cpu")(images[0])[0]
    assert result.overflow > 0
    assert len(result) <= 3


def test_a_model_is_copied() -> None:
    model = create_model("yolov7-tiny", 2, width=0.25, names=["a", "b"]).eval()
    keys = set(model.state_dict())
    detector = Detector(model, device="cpu", imgsz=64, conf=0.0)
    assert set(model.state_dict()) == keys
    assert detector.names == ["a", "b"]
    assert len(detector(np.zeros((50, 50, 3), np.uint8))[0]) > 0


def test_video_frames_are_numbered(tmp_path: Path, detector: Detector) -> None:
    path = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (96, 64))
    for _ in range(5):
        writer.write(np.zeros((64, 96, 3), np.uint8))
    writer.release()
    results = detector(path, vid_stride=2)
    assert [result.frame.number for result in results] == [1, 3, 5]


@pytest.mark.parametrize(
    "options",
    [
        {"conf": 1.5},
        {"iou": -0.1},
        {"batch": 0},
        {"max_det": 0},
        {"tile": 0},
        {"overlap": 1.0},
        {"imgsz": 0},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UserError, match=f"{name} is .*: give"):
        Detector(device="cpu", **options)


def test_speed_by_percentile() -> None:
    speed = Speed()
    assert str(speed) == "speed: no image"
    for ms in range(1, 102):
        speed.add({"pre": 1.0, "network": float(ms), "nms": 0.5})
    summary = speed.summary()
    assert summary["network"] == {"p50": 51.0, "p99": 100.0}
    assert summary["total"]["p50"] == 52.5
    assert str(speed) == (
        "speed per image (p50/p99 ms): pre 1.0/1.0, network 51.0/100.0, nms 0.5/0.5, "
        "total 52.5/101.5; 19.0 images/s"
    )


def _boxes_elsewhere(detector: Detector, image: Image) -> torch.Tensor:
    return detector(image)[0].boxes.data


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("given", ["embedded", "file", "model"])
def test_a_detector_can_be_copied(
    given: str, called: bool, images: list[Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model()
    save_model(model, tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    weights = {"embedded": None, "file": "a.safetensors", "model": model}[given]
    detector = Detector(weights, device="cpu", conf=0.4, classes=["RBC"], batch=2)
    if called:
        detector(images[0])
    with torch.no_grad():
        next(model.parameters()).zero_()  # the user's own, which goes on
    monkeypatch.chdir("/")
    expected = detector(images[0])[0]
    for copied in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        torch.testing.assert_close(copied(images[0])[0].boxes.data, expected.boxes.data)
        assert copied.batch == 2
        assert copied.network is not detector.network


def test_a_detector_goes_to_another_process(detector: Detector, images: list[Image]) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_boxes_elsewhere, (detector, images[0]))
    torch.testing.assert_close(found, detector(images[0])[0].boxes.data, rtol=1e-4, atol=1e-2)
