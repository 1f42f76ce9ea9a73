"""Checkpoints: the authors' form, state dicts, safetensors, and files that mean harm."""

import copy
import json
import os
import pickle
import re
import struct
import sys
import time
import types
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import yolov7
from yolov7.checkpoint import DEMO_WEIGHTS, load_model, read_metadata, save_model
from yolov7.cli import main
from yolov7.errors import UserError
from yolov7.model import YOLOv7
from yolov7.variants import TINY, V7, V7_MIT, VARIANTS, W6, scaled

TINY_NAMES = ["cat", "dog"]


@pytest.fixture
def authors_package(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Module classes that pickle under the authors' names and cannot be found afterwards."""
    classes: dict[str, type] = {}
    for module, name in [("models.yolo", "Model"), ("models.yolo", "IDetect"),
                         ("models.common", "Conv"), ("models.common", "Concat")]:  # fmt: skip
        home = sys.modules.get(module) or types.ModuleType(module)
        monkeypatch.setitem(sys.modules, module, home)
        cls = type(name, (nn.Module,), {"__module__": module})
        setattr(home, name, cls)
        classes[name] = cls
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    return classes


def authors_module(model: YOLOv7, classes: dict[str, type], act: nn.Module) -> nn.Module:
    """`model`, a tiny, as the authors would have pickled it."""
    root = classes["Model"]()
    layers: list[nn.Module] = []
    for module in model.modules():
        if type(module).__name__ == "Conv":
            layer = classes["Conv"]()
            layer.conv, layer.bn, layer.act = module.conv, module.bn, act
            layers += [layer, classes["Concat"]()]  # layers without tensors lie between
    head = classes["IDetect"]()
    cells = model.head.anchors / torch.tensor(model.head.strides).view(-1, 1, 1)
    head.register_buffer("anchors", cells)
    head.register_buffer("anchor_grid", model.head.anchors.clone().view(3, 1, -1, 1, 1, 2))
    head.m = model.head.lead
    for ours, theirs in (("implicit_a", "ia"), ("implicit_m", "im")):
        vectors = nn.ModuleList()
        for value in getattr(model.head, ours):
            vector = classes["Concat"]()
            vector.implicit = value
            vectors.append(vector)
        setattr(head, theirs, vectors)
    root.model = nn.Sequential(*layers, head)
    root.names = TINY_NAMES
    return root


def official_state(model: YOLOv7) -> "OrderedDict[str, Tensor]":
    """The state dict of `model`, a tiny, under names like the authors'."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    layer = -1
    head = {"lead": "m", "implicit_a": "ia", "implicit_m": "im"}
    last = ""
    for name, tensor in model.state_dict().items():
        if name.startswith("head."):
            parts = name.split(".")[1:]
            if parts[0] == "anchors":
                continue
            tail = ["implicit"] if parts[0].startswith("implicit") else []
            state[".".join(["model.200", head[parts[0]], *parts[1:], *tail])] = tensor
            continue
        block, kind, part = name.rsplit(".", 2)
        layer += block != last
        last = block
        state[f"model.{layer}.{kind}.{part}"] = tensor
    return state


@pytest.fixture(scope="module")
def tiny() -> YOLOv7:
    torch.manual_seed(0)
    model = YOLOv7(VARIANTS["yolov7-tiny"], 2, "training").half()
    model.head.anchors.mul_(1.5)  # as after autoanchor
    return model


def assert_same(ours: YOLOv7, model: YOLOv7) -> None:
    state = ours.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor.float() if tensor.ndim else tensor, msg=name)
    assert not ours.training


def test_authors_pickle(tiny: YOLOv7, authors_package: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    theirs = authors_module(tiny, authors_package, nn.LeakyReLU(0.1))
    torch.save({"epoch": 3, "model": None, "ema": theirs, "opt": None}, path)
    for module in ("models.yolo", "models.common", "models"):
        sys.modules.pop(module)
    loaded = load_model(path)
    assert_same(loaded, tiny)
    assert loaded.names == TINY_NAMES
    assert loaded.variant.name == "yolov7-tiny"
    assert loaded.form == "training"


MIT_NAMES = (
    (r"head\.lead\.(\d+)\.", r"200.heads.\1.head_conv."),
    (r"head\.(implicit_[am])\.(\d+)", r"200.heads.\2.\1.implicit"),
    (r"spp\.cv(\d)\.", r"100.cv\1."),
    ("cv1", "pre_conv.0"), ("cv2", "short_conv"), ("cv3", "pre_conv.1"), ("cv4", "pre_conv.2"),
    ("cv5", "post_conv.0"), ("cv6", "post_conv.1"), ("cv7", "merge_conv"),
    (r"lead_convs\.(\d+)\.", r"19\1."),
    (r"dense\.0", "conv1.conv"), (r"dense\.1", "conv1.bn"),
    (r"pointwise\.0", "conv2.conv"), (r"pointwise\.1", "conv2.bn"),
)  # fmt: skip


def mit_state(model: YOLOv7) -> dict[str, Tensor]:
    """The state dict of `model`, a base model, as MultimediaTechLab/YOLO names such."""
    state: dict[str, Tensor] = {}
    others: dict[str, int] = {}  # a plain convolution -> its layer
    for name, tensor in model.state_dict().items():
        theirs = name
        for ours, new in MIT_NAMES:
            theirs = re.sub(ours, new, theirs)
        if theirs == name and name != "head.anchors":
            block, kind, part = name.rsplit(".", 2)
            before = 101 if name.startswith(("top", "bottom")) else 0  # behind the spp
            theirs = f"{before + others.setdefault(block, len(others))}.{kind}.{part}"
        if name != "head.anchors":
            state[f"layers.{theirs}"] = tensor
    return state


def test_permissive_weights_run_in_the_graph_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = YOLOv7(V7_MIT, 2, "training").half()
    state = mit_state(model)
    assert {"layers.200.heads.2.implicit_m.implicit", "layers.0.conv.weight"} < state.keys()
    torch.save(state, tmp_path / "v7.pt")
    with pytest.warns(UserWarning, match=r"they run in their own graph.*--variant yolov7 takes"):
        loaded = load_model(tmp_path / "v7.pt")
    assert_same(loaded, model)
    assert loaded.variant == V7_MIT
    bare = {name.removeprefix("layers."): tensor for name, tensor in state.items()}
    torch.save({"model": bare}, tmp_path / "libre.pt")
    forced = load_model(tmp_path / "libre.pt", variant="yolov7")  # without a word
    assert_same(forced, model)
    assert forced.variant == V7
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        own, papers = loaded(x), forced(x)
        assert torch.equal(own, model.float().eval()(x))
    assert not torch.equal(own, papers)
    save_model(loaded, tmp_path / "kept.safetensors")
    assert load_model(tmp_path / "kept.safetensors").variant == V7_MIT


def test_ema_is_preferred_and_activation_tells_tiny_silu(
    tiny: YOLOv7, authors_package: Any, tmp_path: Path
) -> None:
    other = YOLOv7(VARIANTS["yolov7-tiny"], 2, "training")
    checkpoint = {
        "model": authors_module(other, authors_package, nn.SiLU()),
        "ema": authors_module(tiny, authors_package, nn.SiLU()),
    }
    torch.save(checkpoint, tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt")
    assert loaded.variant.name == "yolov7-tiny-silu"
    assert_same(loaded, tiny)


@pytest.mark.parametrize("shuffled", [False, True])
def test_state_dict_under_the_authors_names(tiny: YOLOv7, tmp_path: Path, shuffled: bool) -> None:
    state = official_state(tiny)
    if shuffled:
        state = OrderedDict(sorted(state.items()))
    torch.save(state, tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt")
    assert loaded.variant.activation == "leaky_relu"
    loaded.head.anchors.mul_(1.5)  # a bare state dict has none: the variant's serve
    assert_same(loaded, tiny)
    silu = load_model(tmp_path / "a.pt", variant="yolov7-tiny-silu")
    assert silu.variant.name == "yolov7-tiny-silu"


@pytest.mark.parametrize("form", ["training", "deploy", "fused"])
def test_safetensors_round_trip(tmp_path: Path, form: str) -> None:
    spec = scaled(VARIANTS["yolov7-w6"], 0.5, 0.25, "downc", multiplier=0.5)
    model = YOLOv7(spec, 3, "deploy" if form == "fused" else form)  # type: ignore[arg-type]  # a Literal
    model.names, model.imgsz = ["a", "b", "ü"], 416
    model.eval()
    if form == "fused":
        model.fuse()
    save_model(model, tmp_path / "new" / "m.safetensors", training={"epochs": 3})
    loaded = load_model(tmp_path / "new" / "m.safetensors")
    assert_same(loaded, model)
    assert (loaded.names, loaded.imgsz, loaded.form) == (model.names, 416, form)
    assert loaded.variant == spec
    x = torch.rand(1, 3, 128, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    assert read_metadata(tmp_path / "new" / "m.safetensors")["training"] == {"epochs": 3}
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "m.safetensors"]


WAYS = {
    "another head": replace(TINY, head="repconv"),
    "another name": replace(TINY, name="my-tiny"),
    "a name of the family": replace(TINY, name="yolov7", activation="silu"),
    "another neck": replace(V7, neck_taps="pairs", neck_down="downc", spp="tiny"),
    "two levels": replace(
        TINY,
        levels=TINY.levels[:2],
        anchors=TINY.anchors[:2],
        stem=((16, 2), (32, 1)),
        backbone=TINY.backbone[1:],
    ),
    "an extended ELAN": replace(W6, parallel=2, pairs=1, auxiliary=0.5),
}


@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize("way", WAYS)
def test_a_file_holds_its_architecture(tmp_path: Path, way: str, form: str) -> None:
    spec = scaled(WAYS[way], multiplier=0.1)
    torch.manual_seed(0)
    model = YOLOv7(spec, 2, "training").eval()
    if form == "fused":
        model.fuse()
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert (loaded.variant, loaded.form) == (spec, form)
    x = torch.rand(1, 3, 128, 128)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_what_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    """Days of training must not end in weights that nothing reads."""
    path = tmp_path / "m.safetensors"
    for change, message in {
        "lead_convs": r"not written, as nothing could load it: tensor lead_convs\.0\.\S+ differs",
        "names": r"nothing could load it: names\[0\] is 3, not a text",
        "imgsz": r"nothing could load it: imgsz is 8192, not 1 to 4096 pixels",
    }.items():
        model = YOLOv7(scaled(TINY, multiplier=0.1), 1, "deploy")
        value = {"lead_convs": nn.ModuleList(), "names": [3], "imgsz": 8192}[change]
        setattr(model, change, value)
        with pytest.raises(UserError, match=message):
            save_model(model, path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = YOLOv7(scaled(VARIANTS["yolov7-tiny"], width=0.1), 1, "deploy")
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"m\.safetensors: cannot be written \(No space"):
        save_model(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loaded_model_is_not_what_becomes_of_its_file(
    small: YOLOv7, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "weights.safetensors"
    save_model(copy.deepcopy(small).to(dtype), path)
    model = load_model(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_embedded_weights_are_the_default() -> None:
    model = load_model()
    assert model.names == ["RBC", "WBC", "Platelets"]
    assert (model.variant.name, model.imgsz) == ("yolov7-tiny", 320)
    file = Path(yolov7.__file__).parent / "assets" / DEMO_WEIGHTS
    assert file.stat().st_size < 3e6


# --- files that are wrong, and files that mean harm ------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(path)
    message = str(error.value)
    assert str(path) in message
    assert message.isprintable()
    return message


def test_truncated_and_foreign_files(tiny: YOLOv7, tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(official_state(tiny), whole)
    data = whole.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 30):
        path = tmp_path / f"{length}.pt"
        path.write_bytes(data[:length])
        assert "truncated or not a PyTorch checkpoint" in refused(path)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    path = tmp_path / "flipped.pt"
    path.write_bytes(flipped)
    assert "damaged" in refused(path)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pt"
    torch.save(OrderedDict({"layer1.weight": torch.zeros(2)}), path)
    assert "not named as the authors name theirs" in refused(path)
    torch.save(OrderedDict({"model.0.conv.weight": torch.zeros(48, 3, 6, 6)}), path)
    assert "not the detection head of a YOLOv7" in refused(path)
    torch.save(
        OrderedDict(
            {"model.0.conv.weight": torch.zeros(48, 3, 6, 6), "model.1.m.0.bias": torch.zeros(21)}
        ),
        path,
    )
    assert "another architecture" in refused(path)
    torch.save([1, 2], path)
    assert "holds a list, not a model" in refused(path)
    torch.save({"model": None}, path)
    assert "no tensors" in refused(path)


def test_nan_weights_are_named(tiny: YOLOv7, tmp_path: Path) -> None:
    state = OrderedDict((k, v.clone()) for k, v in official_state(tiny).items())
    state["model.0.conv.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "a.pt")
    assert "stem.0.conv.weight holds NaN" in refused(tmp_path / "a.pt")


def test_safetensors_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"\x00" * 5)
    assert "truncated or not a safetensors file" in refused(path)
    save_file({"x": torch.zeros(1)}, path)
    assert "no yolov7 metadata" in refused(path)
    save_model(YOLOv7(scaled(VARIANTS["yolov7-tiny"], width=0.1), 1, "deploy"), path)
    metadata = read_metadata(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"yolov7": json.dumps(metadata)})
    assert "do not fit its metadata" in refused(path)
    metadata["format"] = "yolov7-triton/9"
    save_file({"x": torch.zeros(1)}, path, metadata={"yolov7": json.dumps(metadata)})
    assert "of format yolov7-triton/9" in refused(path)


@pytest.fixture(scope="module")
def small() -> YOLOv7:
    return YOLOv7(scaled(VARIANTS["yolov7-tiny"], width=0.1), 1, "deploy")


# Numbers of a thousand million would be built until memory ends.
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", DEEP, "no yolov7 metadata"),
        ("format", "9" * 5000, "no yolov7 metadata"),
        ("format", '"\\n\\u001b[31m"', "of format"),
        ("spec", '"v8"', "spec is 'v8', not a table"),
        ("spec", "{}", "spec.name is missing"),
        ("spec.name", "7", "spec.name is 7, not a text"),
        ("spec.name", '"\\u001b[31m"', "name is no printable text"),
        ("spec.size", "7", "spec.'size' is not known"),
        (
            "spec.pairs",
            "1000000000",
            "337 tensors for 16000000018 convolutions",
        ),
        ("spec.pairs", "1" + "0" * 4000, "spec.pairs is too large"),
        ("spec.pairs", "-1", "give 1 or more"),
        ("spec.pairs", "true", "spec.pairs is True, not a whole number"),
        ("spec.parallel", "1000000000", "convolutions"),
        ("spec.stem", "[[2147483647, 2], [2147483647, 2]]", "fit"),
        ("spec.stem", "[[32, 1]]", "stem and backbone have strides"),
        ("spec.stem", '[[32, "x"]]', "spec.stem[0][1] is 'x', not a whole number"),
        ("spec.stem", "[[1, 2, 3]]", "spec.stem[0] has 3 values instead of 2"),
        ("spec.levels", "[]", "levels are 0 of 4 stages"),
        ("spec.backbone", "[]", "levels are 3 of 0 stages"),
        ("spec.anchors", "[[1, 2], [1, 2], [1]]", "anchors must be as many pairs"),
        ("spec.anchors", "[[], [], []]", "anchors must be as many pairs"),
        ("spec.auxiliary", "1e400", "spec.auxiliary is inf"),
        ("spec.auxiliary", "-1", "auxiliary is -1"),
        ("spec.head", '"x"', "spec.head is 'x', not conv, repconv"),
        ("spec.neck_down", DEEP, "no yolov7 metadata"),
        ("spec.neck_down", "[]", "spec.neck_down is a list, not conv, pool"),
        ("form", '"x"', "form is 'x'"),
        ("names", '"x"', "names is no list"),
        ("names", "[1]", "names[0] is 1, not a text"),
        ("names", "[]", "fit"),
        ("imgsz", "Infinity", "imgsz is inf"),
        ("imgsz", "-32", "imgsz is -32"),
        ("imgsz", "1000000", "imgsz is 1000000, not 1 to 4096 pixels"),
        ("ranges", "[1]", "ranges is a list"),
        ("ranges", '{"int8": {"a": 1e400}}', "ranges.'int8'.'a' is inf"),
    ],
)
def test_metadata_that_means_harm(
    small: YOLOv7, tmp_path: Path, key: str, value: str, message: str
) -> None:
    path = tmp_path / "m.safetensors"
    save_model(small, path)
    metadata = read_metadata(path)
    *tables, last = key.split(".")
    (metadata[tables[0]] if tables else metadata)[last] = "VALUE"
    text = json.dumps(metadata).replace('"VALUE"', value)
    save_file(load_file(path), path, metadata={"yolov7": text})
    start = time.perf_counter()
    assert message in refused(path)
    assert time.perf_counter() - start < 1


def test_metadata_without_end_is_not_parsed(small: YOLOv7, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(small, path)
    text = json.dumps({**read_metadata(path), "note": "x" * (1 << 24)})
    save_file(load_file(path), path, metadata={"yolov7": text})
    assert "no yolov7 metadata" in refused(path)


def test_safetensors_with_nan_are_named(small: YOLOv7, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(small, path)
    tensors, metadata = load_file(path), read_metadata(path)
    tensors["stem.0.bn.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"yolov7": json.dumps(metadata)})
    assert "stem.0.bn.bias holds NaN or infinity" in refused(path)


def test_weights_beyond_fp16_are_not_written_as_infinity(tmp_path: Path) -> None:
    model = YOLOv7(scaled(VARIANTS["yolov7-tiny"], width=0.1), 1, "deploy")
    model.get_buffer("stem.0.bn.running_var")[0] = 1e5
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    whole = path.read_bytes()
    message = r"m\.safetensors: tensor stem\.0\.bn\.running_var .* fp16: use --precision fp32"
    with pytest.raises(UserError, match=message):
        save_model(model.half(), path)
    with pytest.raises(UserError, match=r"bn\.running_var holds NaN or infinity"):
        save_model(model.float(), path)
    assert path.read_bytes() == whole


def test_outputs_that_cannot_be_written(small: YOLOv7, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "m.safetensors", tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            save_model(small, path)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_missing_file_and_unknown_variant(tmp_path: Path) -> None:
    assert "no such weights file" in refused(tmp_path / "none.pt")
    with pytest.raises(UserError, match="no variant"):
        load_model(tmp_path / "none.pt", variant="v8")


def test_pickle_protocols_of_the_wild(tiny: YOLOv7, tmp_path: Path) -> None:
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        path = tmp_path / f"{protocol}.pt"
        torch.save(official_state(tiny), path, pickle_protocol=protocol)
        assert load_model(path).head.num_classes == 2


def test_a_file_that_is_no_safetensors_says_so_in_short(tmp_path: Path) -> None:
    header = json.dumps({"a": "\x1b" + "x" * 5000}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="truncated or not a safetensors file") as caught:
        load_model(path)
    assert len(str(caught.value)) < 400


def test_the_name_of_a_variant_is_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model()
    model.variant = replace(model.variant, name="[/red]")
    save_model(model, tmp_path / "a.safetensors")
    assert main(["info", str(tmp_path / "a.safetensors")]) == 0
    assert "[/red], " in capsys.readouterr().out
