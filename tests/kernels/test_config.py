"""Configs on disk: what is found, what is refused, and what is said about it."""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from yolov7.cache import cache_folder
from yolov7.kernels import runtime
from yolov7.kernels.conv import ConvConfig, ConvLaunch, config
from yolov7.kernels.conv.cases import Record, layer_of, meta_call
from yolov7.kernels.conv.config import Entry, find_config, read_entries, user_configs, write_entries
from yolov7.kernels.runtime import recording

CONFIG = ConvConfig(block_m=64, block_n=64, block_k=32)
CUDA = torch.device("cuda")
GPU = "Some_GPU"


def write(base: Path, *entries: Entry, **head: Any) -> Path:
    path = base / GPU / "conv.json"
    write_entries(path, {entry.key: entry for entry in entries}, (9, 0), GPU)
    path.write_text(json.dumps({**json.loads(path.read_text()), **head}))
    return path


def entry(block_m: int, *size: int, kind: str = "3x3s1-fp16") -> Entry:
    return Entry(kind, size, replace(CONFIG, block_m=block_m), 3.5, 40)


def test_written_entries_are_read(own_configs: Path) -> None:
    entries = entry(64, 1000, 64, 576), entry(128, 9000, 64, 576)
    path = write(own_configs, *entries)
    assert read_entries(path) == {e.key: e for e in entries}
    assert read_entries(path.with_name("none.json")) == {}
    assert [p.name for p in path.parent.iterdir()] == ["conv.json"]


def test_nearest_size_within_a_factor_of_two(own_configs: Path) -> None:
    one = entry(256, 200, 64, kind="1x1s1-fp16")
    write(own_configs, entry(64, 100, 64), entry(128, 300, 64), one)
    assert find_config(("3x3s1-fp16", (100, 64)), torch.device("cpu")) is None
    with recording((9, 0), GPU):

        def found(*size: int, kind: str = "3x3s1-fp16") -> int | None:
            tuned = find_config((kind, size), CUDA)
            return None if tuned is None else tuned.block_m

        assert found(160, 64) == 64
        assert found(180, 64) == 128
        assert found(50, 128) == 64
        assert found(600, 32) == 128
        assert found(200, 64, kind="5x5s1-fp16") is None
        assert found(49, 64) is None
        assert found(601, 64) is None
        assert found(300, 31) is None
        assert found(100, 64, 576) is None  # of another form


def test_the_user_comes_before_the_package(
    own_configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "PACKAGED", tmp_path / "package")
    write(tmp_path / "package", entry(64, 100, 64), entry(64, 1000, 64))
    write(own_configs, entry(128, 100, 64))
    with recording((9, 0), GPU):
        blocks = [find_config(("3x3s1-fp16", (rows, 64)), CUDA) for rows in (100, 1000)]
    assert [c and c.block_m for c in blocks] == [128, 64]


def test_users_folder_is_the_one_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in ({"YOLOV7_CACHE": "/a"}, {"XDG_CACHE_HOME": "/b"}, {}):
        for name in ("YOLOV7_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert user_configs() == cache_folder("configs")


def test_a_user_without_a_home_has_tuned_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("YOLOV7_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as of a uid without a name
    assert not user_configs().exists()


FIELDS = asdict(CONFIG)
UNUSABLE: dict[str, tuple[Any, str]] = {
    "lacking": ({k: v for k, v in FIELDS.items() if k != "tma"}, "a config lacks tma"),
    "unknown": ({**FIELDS, "TMA": 1}, "a config has an unknown TMA"),
    "type": ({**FIELDS, "block_m": "64"}, "the block_m of a config is '64'"),
    "flag": ({**FIELDS, "block_m": True}, "the block_m of a config is True"),
    "negative": ({**FIELDS, "split_k": -1}, "the split_k of a config is -1"),
    "form": ([64], r"a config is \[64\]"),
}


def launch() -> ConvLaunch:
    return ConvLaunch([meta_call(layer_of(Record(64, 64, 3, 1, 8, 8), 1), torch.float16)])


@pytest.mark.parametrize(("values", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_entry_is_one_warning_and_the_default(
    values: Any, message: str, own_configs: Path
) -> None:
    key = launch().key
    other = (key[0], (10 * key[1][0], *key[1][1:]))
    path = write(own_configs, Entry(*key, CONFIG, 1.0, 9), Entry(*other, CONFIG, 1.0, 9))
    content = json.loads(path.read_text())
    content["entries"][0]["config"] = values
    path.write_text(json.dumps(content))
    with recording((9, 0), GPU):
        default = launch().configs()[0]
        with pytest.warns(UserWarning, match=message) as caught:
            assert launch().chosen() == default == launch().chosen()
        assert find_config(other, CUDA) == CONFIG  # the rest of the file is used
    assert len(caught) == 1
    assert "yolov7 tune" in str(caught[0].message)
    assert str(path) in str(caught[0].message)
    assert "\n" not in str(caught[0].message)


MAJOR, MINOR, *_ = triton.__version__.split(".")
FILES: dict[str, tuple[dict[str, Any], str]] = {
    "older": ({"triton": "3.1.0"}, "tuned with Triton 3.1.0, this is"),
    "entries": ({"entries": 3}, "no config file"),
    "entry": ({"entries": [{"kind": "3x3s1-fp16"}]}, "an entry is incomplete"),
    "row": ({"entries": [3]}, "an entry is incomplete"),
}


@pytest.mark.parametrize(("head", "message"), FILES.values(), ids=FILES)
def test_unusable_file_is_one_warning_and_the_default(
    head: dict[str, Any], message: str, own_configs: Path
) -> None:
    write(own_configs, Entry(*launch().key, CONFIG, 1.0, 9), **head)
    with recording((9, 0), GPU), pytest.warns(UserWarning, match=message) as caught:
        assert launch().chosen() == launch().configs()[0] == launch().chosen()
    assert len(caught) == 1


def test_another_patch_version_of_triton_will_do(own_configs: Path) -> None:
    write(own_configs, Entry(*launch().key, CONFIG, 1.0, 9), triton=f"{MAJOR}.{MINOR}.99")
    with recording((9, 0), GPU), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch().chosen() == CONFIG


def test_damaged_file_is_one_warning(own_configs: Path) -> None:
    path = write(own_configs)
    path.write_text(path.read_text()[:20])
    with recording((9, 0), GPU), pytest.warns(UserWarning, match="no config file"):
        launch().chosen()


@pytest.mark.usefixtures("own_configs")
def test_untuned_device_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "device_folder", lambda _: "NVIDIA_L4")
    with pytest.warns(UserWarning, match="NVIDIA_L4.*: yolov7 tune$") as caught:
        assert {find_config(launch().key, CUDA) for _ in range(3)} == {None}
    assert len(caught) == 1
    monkeypatch.setattr(runtime, "device_folder", lambda _: "NVIDIA_A10")
    with pytest.warns(UserWarning, match="NVIDIA_A10"):
        find_config(launch().key, CUDA)


@pytest.mark.usefixtures("own_configs")
def test_what_is_compiled_for_another_device_says_nothing() -> None:
    with recording((9, 0), GPU), warnings.catch_warnings():
        warnings.simplefilter("error")
        launch().chosen()


def test_tuned_config_that_does_not_suit_the_tensors_is_not_taken(own_configs: Path) -> None:
    """Descriptors need strides of 16 bytes; a kind says nothing of strides."""
    odd = launch().calls[0]
    wide = torch.empty(odd.x.shape[0], 65, dtype=torch.float16, device="meta")
    odd = replace(odd, x=wide[:, :64])
    write(own_configs, Entry(*launch().key, replace(CONFIG, tma=True), 1.0, 9))
    with recording((9, 0), GPU):
        assert launch().chosen().tma
        assert not ConvLaunch([odd]).chosen().tma
