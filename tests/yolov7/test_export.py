"""Exporting: the graphs, what is in the files, and what is refused."""

import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import yolov7
from yolov7 import YOLOv7, create_model, load_model
from yolov7.boxes import box_iou, frame_table, in_frames
from yolov7.detector import Detector
from yolov7.engine.exported import ExportedNetwork
from yolov7.engine.frames import to_input
from yolov7.errors import UserError
from yolov7.export import Exported, Settings, Suppression, export, write
from yolov7.export.report import input_port, output_ports
from yolov7.formats import onnx_graph
from yolov7.formats.metadata import Metadata
from yolov7.formats.onnx import OnnxRuntime
from yolov7.formats.pt2 import read_metadata
from yolov7.head import Detect
from yolov7.images import read_image
from yolov7.kernels.nms import batched_nms
from yolov7.layers import conv_layers
from yolov7.letterbox import letterbox, letterbox_geometry
from yolov7.variants import VARIANTS

SAMPLES = sorted((Path(yolov7.__file__).parent / "assets" / "images").glob("*.jpg"))
NMS = Suppression(conf=0.25, iou=0.45, max_det=300)


def lively(name: str, num_classes: int) -> YOLOv7:
    """A narrow, shallow member of the family whose outputs depend on the image."""
    torch.manual_seed(len(name))
    model = create_model(name, num_classes, depth=0.3, width=0.2).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=1.5 * module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.2)
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, 0.0, 0.1)
    for head in model.head.lead:
        nn.init.normal_(head.bias, 0.0, 1.0)  # type: ignore[arg-type]  # a Conv2d's
    return model


class Sketch(YOLOv7):
    """A detection head on the image itself: all that exporting sees, in a second."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(VARIANTS["yolov7-tiny"], num_classes, "training")
        torch.manual_seed(num_classes)
        self.stem = nn.Sequential()
        self.backbone = self.top_down = self.bottom_up = self.lead_convs = nn.ModuleList()
        self.spp = nn.Identity()  # type: ignore[assignment]  # not called
        variant = self.variant
        self.head = Detect([3] * 3, num_classes, variant.anchors, variant.strides, implicit=True)
        for head in self.head.lead:
            nn.init.normal_(head.weight, std=3.0)  # type: ignore[arg-type]  # a Conv2d's
            nn.init.normal_(head.bias)  # type: ignore[arg-type]
        self.eval()

    def features(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [], [F.avg_pool2d(x, stride) for stride in self.head.strides]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # never raw
        return self.head.decode(self.head.raw(self.features(x)[1]))


def batch_of(paths: list[Path], size: tuple[int, int]) -> Tensor:
    images = [read_image(path) for path in paths]
    boxed = [letterbox(image, letterbox_geometry(image.shape[:2], size)) for image in images]
    return to_input(boxed, torch.device("cpu"), torch.float32)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def assert_fused(path: Path, model: YOLOv7) -> None:
    """Only standard operators, one convolution each, and no constants of anything else."""
    file = onnx.load(path)
    operators = Counter(node.op_type for node in file.graph.node)
    convolutions = len(conv_layers(load_fused(model), 128, 128))
    assert operators["Conv"] == convolutions
    assert not operators.keys() & {"BatchNormalization", "If", "Loop", "Scan"}
    assert {node.domain for node in file.graph.node} == {""}
    assert not file.functions
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 18)]
    channel_maps = [c for c in file.graph.initializer if len(c.dims) == 4 and c.dims[0] == 1]
    assert all(c.dims[2] * c.dims[3] > 1 or c.dims[1] == 1 for c in channel_maps)  # no ImplicitA
    text = str(file.graph.node) + str(file.metadata_props)
    assert str(Path(yolov7.__file__).parent) not in text  # nothing of the exporting machine


def load_fused(model: YOLOv7) -> YOLOv7:
    fused = YOLOv7(model.variant, model.head.num_classes, "deploy")
    return fused.fuse()


CASES = {
    "yolov7-tiny": (1, Settings(imgsz=(64, 64))),
    "yolov7-tiny-silu": (3, Settings(imgsz=(64, 96), batch="dynamic", layout="classes-first")),
    "yolov7": (3, Settings(imgsz=(64, 96), batch=2)),
    "yolov7x": (1, Settings(imgsz=(64, 64), batch="dynamic", nms=NMS)),
    "yolov7-w6": (3, Settings(imgsz=(65, 50), batch="dynamic")),
    "yolov7-e6": (1, Settings(imgsz=(64, 64), layout="classes-first")),
    "yolov7-d6": (3, Settings(imgsz=(64, 64), precision="fp16")),
    "yolov7-e6e": (3, Settings(imgsz=(64, 64), batch="dynamic", nms=NMS)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_variant_exports_its_fused_graph(name: str, tmp_path: Path) -> None:
    classes, settings = CASES[name]
    model = lively(name, classes)
    wanted = settings.imgsz
    assert isinstance(wanted, tuple)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exported = export(model, tmp_path / "m.onnx", settings)
    assert exported.metadata.imgsz == tuple(-(-n // model.stride) * model.stride for n in wanted)
    assert_fused(exported.path, model)
    assert model.form == "training"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    network, x = ExportedNetwork(exported.path), batch_of(SAMPLES[:3], exported.metadata.imgsz)
    with torch.no_grad():
        expected = model(x)
    if settings.nms is not None:
        assert exported.check.detections
        found = batched_nms(expected, conf=NMS.conf, iou=NMS.iou)
        again = batched_nms(network(x), conf=NMS.conf, iou=1.0)
        assert found.counts.sum() > 0
        assert torch.equal(found.counts, again.counts)
        torch.testing.assert_close(found.boxes, again.boxes, rtol=1e-4, atol=1e-2)
        return
    tolerance = 1e-2 if settings.precision == "fp16" else 1e-4
    result = network(x)
    assert rms(result[..., :4] - expected[..., :4]) < tolerance * rms(expected[..., :4])
    scores, expected_scores = (p[..., 4:5] * p[..., 5:] for p in (result, expected))
    if classes == 1:  # the one class says nothing
        scores, expected_scores = result[..., 4:5], expected[..., 4:5]
    assert rms(scores - expected_scores) < tolerance * rms(expected_scores)
    assert expected_scores.std() > 0.01  # the comparison means something
    if settings.precision == "fp16":
        assert_halved(exported)


def assert_halved(exported: Exported) -> None:
    """Weights are fp16, inputs and outputs fp32."""
    assert exported.check.scores > 1e-6
    graph = onnx.load(exported.path).graph
    ports = [*graph.input, *graph.output]
    assert {p.type.tensor_type.elem_type for p in ports} == {onnx.TensorProto.FLOAT}
    weights = [c for c in graph.initializer if len(c.dims) == 4 and c.dims[0] > 1]
    assert {c.data_type for c in weights} == {onnx.TensorProto.FLOAT16}


@pytest.fixture(scope="module")
def demo() -> YOLOv7:
    return load_model()


@pytest.fixture(scope="module")
def sketch() -> YOLOv7:
    return Sketch(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def suppressing(demo: YOLOv7, folder: Path) -> Exported:
    return export(demo, folder / "nms.onnx", Settings(batch="dynamic", nms=NMS))


@pytest.fixture(scope="module")
def raw_frames(demo: YOLOv7, folder: Path) -> Exported:
    settings = Settings(letterbox=True, nms=NMS, imgsz=(256, 320))
    return export(demo, folder / "frames.onnx", settings)


@pytest.mark.parametrize("engine", ["auto", "openvino"])
def test_first_calls_from_several_threads(engine: str, suppressing: Exported) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    expected = [found.boxes.data for found in Detector(suppressing.path, engine=engine)(SAMPLES)]
    for _ in range(3):
        detector, start = Detector(suppressing.path, engine=engine), threading.Barrier(4)

        def first(path: Path, detector: Detector = detector, start: Any = start) -> Tensor:
            start.wait()
            return detector(path)[0].boxes.data

        with ThreadPoolExecutor(4) as pool:
            for found, alone in zip(pool.map(first, SAMPLES[:4]), expected, strict=False):
                torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-2)


@pytest.fixture(scope="module")
def program(sketch: YOLOv7, folder: Path) -> Exported:
    settings = Settings(kind="torch-export", batch="dynamic", imgsz=(64, 64))
    return export(sketch, folder / "program.pt2", settings)


@pytest.fixture
def plain_file(folder: Path) -> Iterator[Path]:
    """A graph of one convolution that calls itself a detector."""
    model = nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.Flatten(2))
    path = folder / "plain.onnx"
    with pytest.warns():  # of its own making
        torch.onnx.export(model.eval(), (torch.zeros(1, 3, 32, 32),), path, verbose=False)
    yield path
    path.unlink()


def test_suppression_equals_ours(suppressing: Exported, demo: YOLOv7) -> None:
    assert suppressing.check.detections is not None
    assert suppressing.check.detections > 40
    session = onnxruntime.InferenceSession(suppressing.path)
    x = batch_of(SAMPLES, (320, 320))
    boxes, counts = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        expected = batched_nms(demo(x), conf=NMS.conf, iou=NMS.iou)
    assert counts.tolist() == expected.counts.tolist()
    for found, wanted, count in zip(boxes, expected.boxes, counts, strict=True):
        assert (found[count:] == 0).all()
        assert found[:count, 5].tolist() == wanted[:count, 5].tolist()
        overlap = box_iou(torch.from_numpy(found[:count, :4]), wanted[:count, :4]).diagonal()
        assert (overlap > 0.99).all()


def test_the_limit_holds_for_all_classes_together(sketch: YOLOv7, tmp_path: Path) -> None:
    nms = Suppression(conf=0.01, iou=0.45, max_det=7)
    path = export(sketch, tmp_path / "m.onnx", Settings(nms=nms, imgsz=(160, 160))).path
    x = batch_of(SAMPLES[:1], (160, 160))
    boxes, counts = onnxruntime.InferenceSession(path).run(None, {"images": x.numpy()})
    with torch.no_grad():
        expected = batched_nms(sketch(x), conf=0.01, iou=0.45, max_det=7)
    assert boxes.shape == (1, 7, 6)
    assert counts.tolist() == [7]
    assert len(set(boxes[0, :, 5])) > 1  # of several classes
    assert (boxes[0, :-1, 4] >= boxes[0, 1:, 4]).all()
    torch.testing.assert_close(torch.from_numpy(boxes), expected.boxes, rtol=1e-4, atol=1e-2)


def test_frames_of_any_size_go_in(raw_frames: Exported, demo: YOLOv7) -> None:
    session = onnxruntime.InferenceSession(raw_frames.path)
    for image in (read_image(SAMPLES[0]), read_image(SAMPLES[1])[:333], read_image(SAMPLES[2])):
        boxes, counts = session.run(None, {"image": image})
        found = torch.from_numpy(boxes[0, : counts[0]])
        where = letterbox_geometry(image.shape[:2], (256, 320))
        x = to_input([letterbox(image, where)], torch.device("cpu"), torch.float32)
        with torch.no_grad():
            kept = batched_nms(demo(x), conf=NMS.conf, iou=NMS.iou)
        wanted = kept.boxes[0, : int(kept.counts)].clone()
        wanted[:, :4] = in_frames(wanted[None, :, :4], frame_table([where]))[0]
        # Inside, pixels are not rounded between letterbox and network: scores move a little.
        sure = wanted[wanted[:, 4] > NMS.conf + 0.02]
        assert len(sure) > 5
        assert len(found) >= len(sure)
        assert (box_iou(sure[:, :4], found[:, :4]).amax(1) > 0.9).all()
        assert (found[:, [0, 1]] >= 0).all()
        assert (found[:, 2] <= image.shape[1]).all()
        assert (found[:, 3] <= image.shape[0]).all()


def test_dense_boxes_of_frames_are_in_their_pixels(tmp_path: Path) -> None:
    model = Sketch(2)
    settings = Settings(letterbox=True, layout="classes-first", imgsz=(64, 64))
    path = export(model, tmp_path / "m.onnx", settings).path
    image = read_image(SAMPLES[0])
    (result,) = onnxruntime.InferenceSession(path).run(None, {"image": image})
    rows = torch.from_numpy(result.transpose(0, 2, 1))
    with torch.no_grad():
        expected = model(batch_of(SAMPLES[:1], (64, 64)))[..., :4].clone()
    expected[..., 1] -= 8  # 480 x 640 becomes 48 x 64
    error = (rows[..., :4] - 10 * expected).abs().max()
    assert error < 0.05 * (10 * expected).abs().max()


def test_metadata_and_ports_are_those_of_the_file(suppressing: Exported, demo: YOLOv7) -> None:
    session = OnnxRuntime(suppressing.path, "cpu")
    metadata = Metadata.from_text(session.text, suppressing.path)
    assert metadata == suppressing.metadata
    assert metadata.names == demo.names
    assert (metadata.stride, metadata.imgsz, metadata.nms) == (32, (320, 320), NMS)
    assert (metadata.kind, metadata.variant, metadata.version) == (
        "onnx",
        "yolov7-tiny",
        yolov7.__version__,
    )


@pytest.mark.parametrize("fixture", ["suppressing", "raw_frames"])
def test_described_ports_are_the_real_ones(fixture: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(fixture)
    session = onnxruntime.InferenceSession(exported.path)
    ports = [input_port(exported.metadata)], output_ports(exported.metadata)
    types = {"float32": "tensor(float)", "int32": "tensor(int32)", "uint8": "tensor(uint8)"}
    for described, real in zip(ports, (session.get_inputs(), session.get_outputs()), strict=True):
        assert [(p.name, types[p.type], list(p.shape)) for p in described] == [
            (p.name, p.type, p.shape) for p in real
        ]


def test_a_program_runs_without_our_code(program: Exported, sketch: YOLOv7) -> None:
    assert read_metadata(program.path) == program.metadata
    x = batch_of(SAMPLES[:3], (64, 64))
    module = torch.export.load(program.path).module()
    operators = {str(node.target) for node in torch.export.load(program.path).graph.nodes}
    assert not [name for name in operators if "batch_norm" in name]
    with torch.no_grad():
        torch.testing.assert_close(module(x), sketch(x), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(
            ExportedNetwork(program.path, trust=True)(x[:1]), sketch(x[:1]), rtol=1e-4, atol=1e-3
        )
    assert program.note == ""
    assert program.command.endswith("program.pt2 --trust")


def test_a_program_of_ours_needs_no_pickle(program: Exported) -> None:
    """Its tensors are plain bytes, and there are no example images."""
    with zipfile.ZipFile(program.path) as archive:
        kinds = [name for name in archive.namelist() if name.endswith("_config.json")]
        payload = [json.loads(archive.read(name))["config"].values() for name in kinds]
        pickles = [name for name in archive.namelist() if archive.read(name)[:2] == b"PK"]
        samples = [archive.read(n) for n in archive.namelist() if "/sample_inputs/" in n]
    assert sum(map(len, payload)) > 5
    assert not any(entry["use_pickle"] for entries in payload for entry in entries)
    assert not any(samples)
    assert not pickles


def test_compiled_for_this_machine(tmp_path: Path) -> None:
    model = Sketch(1)
    settings = Settings(kind="aoti", batch="dynamic", imgsz=(64, 64), layout="classes-first")
    exported = export(model, tmp_path / "m.pt2", settings)
    with pytest.raises(UserError, match=r"is a program, which runs .* add --trust"):
        ExportedNetwork(exported.path)
    network, x = ExportedNetwork(exported.path, trust=True), batch_of(SAMPLES[:3], (64, 64))
    assert network.engine == read_metadata(exported.path).kind == "aoti"
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(network(x)[..., :5], expected[..., :5], rtol=1e-3, atol=1e-3)


def test_what_differs_is_not_kept(
    sketch: YOLOv7, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(b"older")

    def other(model: YOLOv7, metadata: Metadata) -> write.Deploy:
        network = original(model, metadata)
        assert isinstance(network.model, YOLOv7)
        with torch.no_grad():
            network.model.head.lead[0].bias.add_(0.01)  # type: ignore[operator]  # a Conv2d's
        return network

    original = write._reference
    monkeypatch.setattr(write, "_reference", other)
    with pytest.raises(UserError, match=r"not kept: its .* differ from PyTorch's by"):
        export(sketch, path, Settings(kind="torch-export", imgsz=(64, 64)))
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_suppression_is_not_kept(
    sketch: YOLOv7, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "CLASS_OFFSET", 0.0)  # classes suppress each other
    with pytest.raises(UserError, match="not kept: of an image with"):
        export(sketch, tmp_path / "m.onnx", Settings(nms=Suppression(conf=0.01, iou=0.05)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(kind="aoti", nms=NMS), "aoti has no nms inside: export onnx"),
        (Settings(kind="torch-export", letterbox=True), "no letterbox inside: export onnx"),
        (Settings(kind="tflite"), "format tflite: choose from onnx, openvino, torch-export, aoti"),
        (Settings(nms=NMS, layout="classes-first"), "leave the layout out"),
        (Settings(letterbox=True, batch="dynamic"), "leave the batch out"),
        (Settings(batch=0), "batch is 0"),
        (Settings(nms=Suppression(agnostic=True)), "no more than conf, iou and max_det"),
        (Settings(device="cuda"), "leave device cuda out"),
        (Settings(imgsz=(0, 64)), r"imgsz is \(0, 64\)"),
        (Settings(imgsz=(64, 4128)), r"imgsz is \(64, 4128\): give 1 to 4096 pixels"),
    ],
)
def test_settings_that_do_not_fit(
    settings: Settings, message: str, sketch: YOLOv7, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(sketch, tmp_path / "m.onnx", settings)
    assert not list(tmp_path.iterdir())


def test_the_packages_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert yolov7.export.__doc__ is not None
    _, example = yolov7.export.__doc__.split("\n\n")
    exec(compile(example, "example", "exec"))
    assert [path.suffix for path in tmp_path.iterdir()] == [".onnx"]


def test_targets_that_cannot_be_written(sketch: YOLOv7, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must end in \.onnx"):
        export(sketch, tmp_path / "m.pt2", Settings())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export(sketch, tmp_path / "file" / "m.onnx", Settings())
    (tmp_path / "d.onnx").mkdir()
    with pytest.raises(UserError, match=r"d\.onnx: cannot be written \(Is a directory\)"):
        export(sketch, tmp_path / "d.onnx", Settings())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    missing: str, sketch: YOLOv7, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(
        UserError, match=rf"{missing} is not installed: pip install 'yolov7-triton\[export\]'"
    ):
        export(sketch, tmp_path / "m.onnx", Settings())


def test_files_of_others(plain_file: Path) -> None:
    with pytest.raises(UserError, match=r"lacks .*names.*layout.*: give --names and --layout"):
        ExportedNetwork(plain_file)
    with pytest.raises(UserError, match="lacks"):
        ExportedNetwork(plain_file, names=["a"])
    network = ExportedNetwork(plain_file, names=[str(n) for n in range(20)], layout="classes-first")
    x = torch.rand(2, 3, 32, 32)
    assert network(x).shape == (2, 16, 25)
    with pytest.raises(UserError, match="not of layout grid"):
        ExportedNetwork(plain_file, names=["a"], layout="grid")(x)


def test_own_files_know_their_names(suppressing: Exported) -> None:
    with pytest.raises(UserError, match="leave --names and --layout out"):
        ExportedNetwork(suppressing.path, names=["a", "b", "c"], layout="grid")


def test_files_that_cannot_be_read(
    suppressing: Exported, program: Exported, tmp_path: Path
) -> None:
    for source in (suppressing.path, program.path):
        cut = tmp_path / f"cut{source.suffix}"
        cut.write_bytes(source.read_bytes()[:100_000])
        with pytest.raises(UserError, match=f"cut{source.suffix}: truncated, or not"):
            ExportedNetwork(cut, trust=True)
    with pytest.raises(UserError, match="no such file"):
        ExportedNetwork(tmp_path / "nothing.onnx")
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/archive_format", "pt2")
    with pytest.raises(UserError, match="its metadata lacks format, kind"):
        ExportedNetwork(other, trust=True)


def test_wishes_that_came_too_late(suppressing: Exported, program: Exported) -> None:
    path = suppressing.path
    for wish, message in {
        ("imgsz", 640): "takes 320 x 320 pixels only",
        ("precision", "fp16"): "is fp32: export it with fp16",
        ("variant", "yolov7"): "is a yolov7-tiny: leave the variant out",
        ("augment", True): "leave augment out",
        ("engine", "compile"): "use auto or openvino",
    }.items():
        with pytest.raises(UserError, match=message):
            Detector(path, **dict([wish]))  # type: ignore[arg-type]  # each of its own type
    with pytest.raises(UserError, match="names and layout are for ONNX files"):
        Detector(names=["a"])
    with pytest.raises(UserError, match="takes images of 320 x 320 pixels only"):
        ExportedNetwork(path)(torch.zeros(1, 3, 64, 64))


def test_openvino_finds_the_same(suppressing: Exported) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    x = batch_of(SAMPLES[:2], (320, 320))
    result = ExportedNetwork(suppressing.path, engine="openvino")(x)
    torch.testing.assert_close(result, ExportedNetwork(suppressing.path)(x), rtol=1e-2, atol=0.1)


def test_openvinos_own_files(demo: YOLOv7, tmp_path: Path) -> None:
    """With letterbox and suppression inside; a pair that does not belong together is refused."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    settings = Settings(kind="openvino", imgsz=320, nms=NMS, letterbox=True)
    exported = export(demo, tmp_path / "a.xml", settings)
    assert exported.check.detections
    assert {path.name for path in tmp_path.iterdir()} == {"a.xml", "a.bin"}
    assert "MiB in its .bin" in exported.note
    detector = Detector(exported.path)
    assert detector.network.engine == "openvino"
    for found, wanted in zip(detector(SAMPLES), Detector(demo, imgsz=320)(SAMPLES), strict=True):
        assert len(found.boxes) == pytest.approx(len(wanted.boxes), abs=2)  # letterboxed unrounded
    plain = export(demo, tmp_path / "b.xml", Settings(kind="openvino", imgsz=320))
    assert ExportedNetwork(plain.path).metadata.layout == "grid"
    tensors = bytearray((tmp_path / "b.bin").read_bytes())
    tensors[1000] ^= 1
    (tmp_path / "b.bin").write_bytes(tensors)
    with pytest.raises(UserError, match=r"b\.xml: its \.bin is another file's"):
        ExportedNetwork(plain.path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match=r"a\.xml: truncated, or not an OpenVINO model"):
        ExportedNetwork(exported.path)
    (tmp_path / "c.xml").write_text("<net/>")
    with pytest.raises(UserError, match=r"c\.xml: truncated, or not an OpenVINO model"):
        ExportedNetwork(tmp_path / "c.xml")


def test_what_openvino_gets_wrong_leaves_nothing(
    sketch: YOLOv7, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    reference = write._reference
    monkeypatch.setattr(write, "_reference", lambda *of: lambda x: reference(*of)(x) + 1)
    with pytest.raises(UserError, match=r"a\.xml: not kept: its boxes differ from PyTorch's"):
        export(sketch, tmp_path / "a.xml", Settings(kind="openvino", imgsz=64))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [14, 17, 21])
@pytest.mark.parametrize("layout", ["grid", "classes-first"])
def test_operators_of_other_versions(
    opset: int, layout: Any, sketch: YOLOv7, tmp_path: Path
) -> None:
    settings = Settings(imgsz=64, opset=opset, layout=layout, batch="dynamic")
    exported = export(sketch, tmp_path / "a.onnx", settings)
    file = onnx.load(exported.path)
    assert [entry.version for entry in file.opset_import] == [opset]
    assert file.ir_version == 8 or opset > 18
    assert exported.note == f"opset {opset}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(opset=13), "opset 13: give 14 to 24$"),
        (Settings(opset=17, nms=NMS), "opset 17: give 18 to 24 with a letterbox or NMS inside"),
        (Settings(kind="torch-export", opset=18), "torch-export has no opset: leave it out"),
    ],
)
def test_versions_that_there_are_not(
    settings: Settings, message: str, sketch: YOLOv7, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(sketch, tmp_path / "a.onnx", settings)


def test_opencv_reads_the_plain_graph(demo: YOLOv7, tmp_path: Path) -> None:
    """The constants of the decoding have the shapes of what they meet, as OpenCV 4.6 wants it."""
    path = export(demo, tmp_path / "a.onnx", Settings(imgsz=(96, 128))).path
    x = batch_of(SAMPLES[:1], (96, 128))
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(x.numpy())
    (expected,) = OnnxRuntime(path, "cpu")(x)
    found = torch.from_numpy(network.forward())
    assert rms(found - expected) < 1e-6 * rms(expected)
    file = onnx.load(path)
    constants = {c.name: list(c.dims) for c in file.graph.initializer}
    added = [n.input[1] for n in file.graph.node if n.op_type == "Add"]
    assert [constants[name] for name in added] == [
        [1, 3, 96 // stride, 128 // stride, 2] for stride in (8, 16, 32)
    ]
    assert not {node.op_type for node in file.graph.node} & {"Gather", "Unsqueeze", "Expand", "Pow"}
