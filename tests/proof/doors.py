"""The doors through which files of strangers come in, each with seeds and what reads them.

An input is what is worth changing, a program or a table; the reader wraps it as its format has it.
An input that begins as the whole file does is taken for one.
"""

import json
import struct
import zipfile
from dataclasses import asdict, replace
from functools import cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch

from tests.proof.reader import Door, Read
from tests.yolov7.data_sets import coco_content, coco_data, yolo_data
from tests.yolov7.exports import METADATA
from yolov7.checkpoint import DEMO_WEIGHTS, load_model
from yolov7.cli.check import Check
from yolov7.cli.check import run as check
from yolov7.dataset.check import check_data
from yolov7.detector import Detector
from yolov7.download import published_weights
from yolov7.engine.exported import ExportedNetwork
from yolov7.images import image_size, read_image
from yolov7.schema import from_json
from yolov7.train.config import HyperParameters
from yolov7.train.distributed import Ranks
from yolov7.train.loop import Run
from yolov7.train.options import Train, resumed_options
from yolov7.train.report import CsvWriter, read_rows
from yolov7.train.schedule import Schedule
from yolov7.train.state import load_state, reading_state
from yolov7.train.step import Progress


def archive(entries: dict[str, bytes]) -> bytes:
    """A zip file."""
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return content.getvalue()


def picture(size: int = 64) -> np.ndarray:
    """[size, size, 3] uint8 noise."""
    return np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)


# Checkpoints: a pickle, which is wrapped as torch.save does, or the whole .pt.


def checkpoint_seeds() -> list[bytes]:
    """Our tensors under the authors' names, as a state dict and as modules."""
    whole = BytesIO()
    shapes = {"0.conv.weight": (32, 3, 3, 3), "1.bn.weight": (2,), "2.m.0.bias": (18,)}
    tensors = {f"model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save({"model": tensors, "epoch": 3, "names": {1, (2, 3)}}, whole)
    with zipfile.ZipFile(whole) as file:
        program = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"
        b"I0\n(I2\nI2\nt(I2\nI1\ntI00\nNtR"
    )
    module = (
        b"ctorch.nn\nModule\n(tR(dV_parameters\n(dVx\n" + tensor + b"ssV_modules\n(dsVnames\n(lsb"
    )
    evil = b"cos\nsystem\n(Vtrue\ntR."
    return [program, tensor + b".", b"(dVmodel\n" + module + b"s.", evil, whole.getvalue()]


def open_checkpoint(folder: Path) -> Read:
    """Read weights of the authors."""
    path = folder / "x.pt"

    def read(data: bytes) -> None:
        if not data.startswith(b"PK"):
            data = archive({"a/data.pkl": data, **{f"a/data/{i}": bytes(3456) for i in range(4)}})
        path.write_bytes(data)
        load_model(path)

    return read


# Our weights: the JSON of the header and of our metadata in it; the numbers are the demo's.


@cache
def _demo() -> tuple[bytes, dict[str, Any], bytes]:
    """Metadata, header and tensors of the demo weights."""
    content = files("yolov7.assets").joinpath(DEMO_WEIGHTS).read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = json.loads(header.pop("__metadata__")["yolov7"]) | {"imgsz": 64}
    return json.dumps(metadata).encode(), header, content[8 + length :]


def weights_seeds() -> list[bytes]:
    """The demo's metadata alone, and with the header."""
    metadata, header, _ = _demo()
    some = dict(list(header.items())[:2])
    return [metadata, json.dumps({"__metadata__": {"yolov7": metadata.decode()}, **some}).encode()]


def open_weights(folder: Path) -> Read:
    """Detect with our weights, and draw what was found."""
    path, image = folder / "x.safetensors", picture()
    _, header, tensors = _demo()

    def read(data: bytes) -> None:
        if not data.startswith(b'{"__metadata__"'):
            table = {"__metadata__": {"yolov7": data.decode(errors="surrogateescape")}, **header}
            data = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(data)) + data + tensors)
        for result in Detector(path, conf=0.001, max_det=5)(image):
            result.plot()

    return read


# Pictures.


def image_seeds() -> list[bytes]:
    """A small picture in every format that OpenCV writes, some in several kinds."""
    kinds: list[tuple[str, list[int], np.ndarray]] = [
        *(
            (suffix, [], picture(16))
            for suffix in (".png", ".jpg", ".bmp", ".webp", ".tiff", ".ppm")
        ),
        *((suffix, [], picture(64)) for suffix in (".gif", ".jp2", ".avif")),
        (".png", [], picture(16).astype(np.uint16) * 257),
        (".png", [], picture(16)[:, :, 0]),
        (".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], picture(16)),
        (".tiff", [], picture(16).astype(np.uint16)),
        (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101], picture(16)),
    ]
    seeds = []
    for suffix, options, pixels in kinds:
        done, encoded = cv2.imencode(suffix, pixels, options)
        if done:
            seeds.append(encoded.tobytes())
    png, jpeg = seeds[0], seeds[1]
    empty_frame = b"\0\0\0\0fdAT\0\0\0\0"
    exif = (
        b"\xff\xe1\0\x22Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    return [*seeds, png[:33] + empty_frame + png[33:], jpeg[:2] + exif + jpeg[2:]]


def open_image(folder: Path) -> Read:
    """Measure and decode a picture, which have to agree."""
    path = folder / "x.jpg"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        size = image_size(path)
        shape = read_image(path).shape
        assert shape == (*size, 3), f"measured {size}, decoded {shape}"

    return read


# Data sets.


def yaml_seeds() -> list[bytes]:
    """Descriptions as text and as JSON, which is YAML."""
    plain = {
        "path": ".",
        "train": "images/val",
        "val": ["images/val"],
        "nc": 2,
        "names": ["a", "b"],
    }
    poses = plain | {"names": {"0": "a", "1": "b"}, "kpt_shape": [17, 3]}
    text = b"# cells\nval: ../images/val\nnames:\n  0: cell\n  1: dot\n"
    return [text, *(json.dumps(content).encode() for content in (plain, poses))]


def open_yaml(folder: Path) -> Read:
    """Check the data set that a data.yaml describes."""
    path = yolo_data(folder / "yaml")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check(Check(data=str(path), json=folder / "report.json"))

    return read


def label_seeds() -> list[bytes]:
    """A box, a polygon, a pose."""
    return [b"0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.5 0.1 0.5 0.9\n", b"0 0.5 0.5 0.2 0.2 0.1 0.1 2\n"]


def open_labels(folder: Path) -> Read:
    """Check a data set with a file of labels."""
    path = yolo_data(folder / "labels")

    def read(data: bytes) -> None:
        (path.parent / "labels/val/a.txt").write_bytes(data)
        check_data(path).to_dict()

    return read


def coco_seeds() -> list[bytes]:
    """A whole one."""
    return [json.dumps(coco_content()).encode()]


def open_coco(folder: Path) -> Read:
    """Check a data set in COCO form."""
    path = coco_data(folder / "coco")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_data(path).to_dict()

    return read


# Exported files: the JSON of their metadata.


def metadata_seeds() -> list[bytes]:
    """The metadata of our exports, and of others'."""
    table = {
        key: json.dumps(value) for key, value in asdict(replace(METADATA, names=["a", "b"])).items()
    }
    return [
        json.dumps(table).encode(),
        b'{"names": "x"}',
        json.dumps(table | {"kind": '"aoti"'}).encode(),
    ]


def onnx_file(metadata: dict[str, str]) -> bytes:
    """A network of 3 boxes that are always the same, with two classes, for images of 32 pixels."""
    from onnx import TensorProto, helper

    boxes = np.tile(np.array([16, 16, 8, 8, 0.9, 0.9, 0.1], np.float32), (1, 3, 1))
    graph = helper.make_graph(
        [helper.make_node("Identity", ["boxes"], ["output"])],
        "boxes",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 3, 7])],
        [helper.make_tensor("boxes", TensorProto.FLOAT, boxes.shape, boxes.ravel())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()


def open_onnx(folder: Path) -> Read:
    """Detect with a file for ONNX Runtime, and draw what was found."""
    path, image = folder / "x.onnx", picture()

    def read(data: bytes) -> None:
        if data.startswith(b"{"):
            try:
                table = {str(k): str(v) for k, v in json.loads(data).items()}
                data = onnx_file(table)
            except (ValueError, AttributeError, RecursionError):  # no table, or no text
                pass
        path.write_bytes(data)
        for result in Detector(path, conf=0.001, max_det=5)(image):
            result.plot()

    return read


def pt2_seeds() -> list[bytes]:
    """Metadata, and a whole archive of them."""
    metadata = metadata_seeds()[0].replace(b"onnx", b"torch-export")
    return [metadata, archive({"a/extra/yolov7.json": metadata, "a/version": b"1"})]


def open_pt2(folder: Path) -> Read:
    """Ask a .pt2 what it is; without trust no more is read."""
    path = folder / "x.pt2"

    def read(data: bytes) -> None:
        whole = data.startswith(b"PK")
        path.write_bytes(data if whole else archive({"a/extra/yolov7.json": data}))
        ExportedNetwork(path)

    return read


# What is kept.


def record_seeds() -> list[bytes]:
    """The record of downloads, with the digest of what lies there."""
    digest = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"  # of a zero byte
    return [json.dumps({"yolov7.pt": digest}).encode()]


def open_record(folder: Path) -> Read:
    """Ask for published weights that lie in the cache."""
    path = folder / "cache/weights/yolov7.pt"
    path.parent.mkdir(parents=True, exist_ok=True)

    def read(data: bytes) -> None:
        path.write_bytes(b"\0")
        (path.parent / "sha256.json").write_bytes(data)
        published_weights("yolov7.pt", load_model, release=f"file://{folder}/nothing/")

    return read


# A run that is resumed.


def state_seeds() -> list[bytes]:
    """A pickled state without the tensors of the network, and a whole file."""
    state = {
        "progress": asdict(Progress(epoch=1, step=2)),
        "image_weights": torch.ones(8),
        "options": asdict(Train(epochs=3)),
        "hyper": asdict(HyperParameters()),
        "images": 8,
        "data": "0",
    }
    whole = BytesIO()
    torch.save(state, whole)
    with zipfile.ZipFile(whole) as file:
        program = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    return [program, whole.getvalue()]


def open_state(folder: Path) -> Read:
    """Read what a run goes on from, but for the tensors of the network."""
    step = SimpleNamespace(
        load_state_dict=lambda _: None,
        schedule=Schedule(HyperParameters(), 4, batches=2, batch=4, linear=False),
    )
    run: Any = SimpleNamespace(
        folder=folder,
        train_set=SimpleNamespace(samples=range(8)),
        fingerprint="0",
        epochs=4,
        ranks=Ranks(),
        sampler=SimpleNamespace(),
        step=step,
    )

    def read(data: bytes) -> None:
        if not data.startswith(b"PK"):
            parts = {"version": b"3", "byteorder": b"little", "data/0": bytes(32), "data.pkl": data}
            data = archive({f"a/{name}": part for name, part in parts.items()})
        (folder / "state.pt").write_bytes(data)
        state = load_state(folder)
        with reading_state(folder):
            resumed_options(Train(resume=str(folder)), state)
            from_json(HyperParameters, state["hyper"])
            Run._restore(run, state)

    return read


def rows_seeds() -> list[bytes]:
    """Three epochs."""
    return [b"epoch,lr,box,AP\r\n1,0.01,0.5,\r\n2,0.005,0.25,0.1\r\n3,0.001,0.125,0.2\r\n"]


def open_rows(folder: Path) -> Read:
    """Cut a results.csv as a run that is resumed does, and read it to draw it."""
    path = folder / "results.csv"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        CsvWriter(path, 2)
        read_rows(path)

    return read


DOORS = {
    "checkpoint": Door(checkpoint_seeds, open_checkpoint),
    "weights": Door(weights_seeds, open_weights),
    "image": Door(image_seeds, open_image),
    "yaml": Door(yaml_seeds, open_yaml),
    "labels": Door(label_seeds, open_labels),
    "coco": Door(coco_seeds, open_coco),
    "onnx": Door(metadata_seeds, open_onnx),
    "pt2": Door(pt2_seeds, open_pt2),
    "record": Door(record_seeds, open_record),
    "state": Door(state_seeds, open_state),
    "rows": Door(rows_seeds, open_rows),
}
