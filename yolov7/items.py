"""What a source stands for: images to load, videos and cameras to open, one after the other."""

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from yolov7.buckets import STORES, list_bucket, read_bucket
from yolov7.errors import UserError
from yolov7.fetch import LARGEST, REFUSALS, fetch, open_url, unreachable
from yolov7.images import IMAGE_SUFFIXES, decode_image, read_image, to_bgr
from yolov7.letterbox import Image
from yolov7.text import one_line, without_secrets

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
    | {".ogv", ".ts", ".webm", ".wmv"}
)
STREAM_SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtp", "udp", "tcp", "srt"})
ASKED_AT_ONCE = 8  # addresses whose names do not tell what they are
SLACK = 0.01  # by which resizing may carry the values of a tensor beyond 1
SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


@dataclass(frozen=True)
class Item:
    """One thing that frames come from.

    Attributes:
        name: File, URL, "camera 0", "array 0" and the like.
        kind: "image"; "video"; "live" for a camera or stream; "sources" for what is iterated over.
        load: Loads an image.
        here: Whether loading waits for nothing: an array or tensor.
        target: What OpenCV opens of a video, camera or stream.
        sources: That come one by one, and are not asked for before their turn.
    """

    name: str
    kind: Literal["image", "video", "live", "sources"]
    load: Callable[[], Image | Tensor] | None = None
    here: bool = False
    target: str | int = ""
    sources: Iterable[object] = ()


def find_items(source: object) -> list[Item]:
    """The items that a source, or a list of them, stands for; see `yolov7.sources.Source`.

    Raises:
        UserError: It is nothing that images come from.
    """
    found = list(_found(source))
    unknown = [address for address in found if isinstance(address, str)]
    if not unknown:
        return [item for item in found if isinstance(item, Item)]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        answers = pool.map(_ask, unknown)
        return [next(answers) if isinstance(item, str) else item for item in found]


def _found(source: object) -> Iterator[Item | str]:
    """The items, and addresses of which only the server knows what they are."""
    if isinstance(source, (list, tuple)):
        for member in source:
            yield from _found(member)
    elif isinstance(source, np.ndarray):
        for index, array in enumerate(source if source.ndim == 4 else [source]):
            name = f"array {index}"
            yield Item(name, "image", partial(to_bgr, array, name), here=True)
    elif isinstance(source, Tensor):
        for index, tensor in enumerate(source if source.ndim == 4 else [source]):
            name = f"tensor {index}"
            yield Item(name, "image", partial(_from_tensor, tensor, name), here=True)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        yield Item("bytes", "image", partial(decode_image, bytes(source), "bytes"))
    elif isinstance(source, (str, os.PathLike)) or type(source) is int:
        yield from _from_name(os.fsdecode(source) if isinstance(source, os.PathLike) else source)
    elif _is_pil(source):
        name = str(getattr(source, "filename", "")) or "image"
        yield Item(name, "image", partial(_from_pil, source, name))
    elif hasattr(source, "read"):
        stated = getattr(source, "name", None)  # a number, of a descriptor
        name = stated if isinstance(stated, str) else "file"
        yield Item(name, "image", partial(_from_file, source, name))
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        yield Item(type(source).__name__, "sources", sources=source)
    else:
        raise UserError(
            f"a source cannot be a {type(source).__name__}: give a path, URL, array, tensor, PIL "
            "image, bytes, file or a list"
        )


def _from_name(source: str | int) -> Iterator[Item | str]:
    if source == "":
        raise UserError("the source is empty: name a file, a folder, a camera or a stream")
    if isinstance(source, int) or (source.isdecimal() and not os.path.exists(source)):
        yield Item(f"camera {source}", "live", target=int(source))
    elif source.partition("://")[0] in STORES:
        yield from _from_bucket(source)
    elif "://" in source:
        yield _from_url(source)
    else:
        yield from _from_path(Path(source))


def _from_tensor(tensor: Tensor, name: str) -> Image | Tensor:
    if _stays(tensor):
        return tensor.detach().flip(0).movedim(0, 2).contiguous()
    pixels = tensor.detach().cpu()
    if pixels.is_floating_point():
        pixels = pixels.float().nan_to_num()
        if pixels.numel() and (largest := pixels.max().item()) > 1 + SLACK:
            raise UserError(f"{name}: values up to {largest:g}: give 0 to 1, or uint8 for 0 to 255")
        pixels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8)
    if pixels.ndim == 3:
        pixels = pixels.movedim(0, 2)
        if pixels.shape[2] in (3, 4):
            pixels = pixels[:, :, [2, 1, 0]]
    return to_bgr(pixels.numpy(), name)


def _stays(tensor: Tensor) -> bool:
    """Whether a tensor stays on its GPU: the kernels take it as it is."""
    return tensor.is_cuda and tensor.dtype == torch.uint8 and tensor.ndim == 3 and len(tensor) == 3


def _is_pil(source: object) -> bool:
    """Whether it is an image of PIL, which nobody has who has not imported it."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(source, pil.Image)


def _from_pil(image: Any, name: str) -> Image:
    """The pixels of a PIL image as they lie, whatever its EXIF record says: boxes fit it."""
    if image.mode in ("F", "I"):
        raise UserError(f"{name}: pixels of mode {image.mode}: convert it to L, I;16 or RGB first")
    try:
        if image.mode == "L" or image.mode.startswith("I;16"):
            return to_bgr(np.asarray(image).astype(np.uint8 if image.mode == "L" else "u2"), name)
        return to_bgr(np.asarray(image.convert("RGB"))[:, :, ::-1], name)
    except (OSError, SyntaxError, ValueError) as error:  # it is decoded only now
        raise UserError(f"{name}: PIL cannot decode it ({one_line(error)})") from None


def _from_file(file: Any, name: str) -> Image:
    try:
        data = file.read(LARGEST + 1)
    except Exception as error:  # closed, made for writing, or whatever such an object throws
        raise UserError(f"{name}: cannot be read ({one_line(error)})") from None
    if not isinstance(data, (bytes, bytearray)):
        kind = type(data).__name__
        raise UserError(f"{name}: its read() gives {kind}, not bytes: open it with mode 'rb'")
    if len(data) > LARGEST:
        raise UserError(f"{name}: over the limit of {LARGEST >> 20} MB: give its path")
    if not data:
        raise UserError(f"{name}: empty, or read to its end before: go back with seek(0)")
    return decode_image(bytes(data), name)


def _from_path(path: Path) -> Iterator[Item | str]:
    name = str(path)
    try:
        if name.startswith("~") and not path.exists():
            path = path.expanduser()
        if path.suffix.lower() == ".txt" and path.is_file():
            yield from _from_list(path)
            return
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            missing = "a folder without images or videos: give another, or one of its parts"
        elif not path.exists() and any(letter in name for letter in "*?["):
            matches = (Path(match) for match in glob.glob(str(path), recursive=True))
            found = sorted(p for p in matches if p.suffix.lower() in SUFFIXES)
            missing = "matches no image or video: check the pattern"
        else:
            found, missing = [path], ""
    # A folder that may not be read, a name too long, a NUL in it, a user who has no home.
    except (OSError, ValueError, RuntimeError) as error:
        found, missing = [], f"cannot be read: {getattr(error, 'strerror', None) or error}"
    for file in found:
        if file.suffix.lower() in VIDEO_SUFFIXES and os.path.isfile(file):
            yield Item(str(file), "video", target=str(file))
        else:
            yield Item(str(file), "image", partial(read_image, file))
    if not found:
        yield _failing(name, UserError(f"{name}: {missing}"))


def _from_list(path: Path) -> Iterator[Item | str]:
    """The sources that a text file names, one a line, beside it or where the process works."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"over the limit of {LARGEST >> 20} MB")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        yield _failing(str(path), UserError(f"{path}: no list of sources: {one_line(error)}"))
        return
    if not any(lines):
        yield _failing(str(path), UserError(f"{path}: an empty list: name a source a line"))
    for line in filter(None, lines):
        beside = path.parent / line
        if line.lower().endswith(".txt"):
            yield _failing(line, UserError(f"{path}: names the list {line}: name its sources"))
        elif "://" not in line and os.path.exists(beside):
            yield from _from_path(beside)
        else:
            yield from _from_name(line)


def _from_bucket(address: str) -> Iterator[Item]:
    try:
        for found in list_bucket(address):
            yield Item(without_secrets(found), "image", partial(_read_bucket_image, found))
    except UserError as error:
        yield _failing(without_secrets(address), error)


def _read_bucket_image(address: str) -> Image:
    return decode_image(read_bucket(address), without_secrets(address))


def _from_url(address: str) -> Item | str:
    name = without_secrets(address)
    try:
        parts = urlsplit(address)
    except ValueError as error:
        return _failing(name, unreachable(name, error))
    suffix = Path(parts.path).suffix.lower()
    if parts.scheme in STREAM_SCHEMES:
        return Item(name, "live", target=address)
    if parts.scheme not in ("http", "https"):
        known = ", ".join(sorted(STREAM_SCHEMES | STORES.keys() - {"memory"} | {"http", "https"}))
        return _failing(name, UserError(f"{name}: give one of {known}"))
    if suffix in VIDEO_SUFFIXES:
        return Item(name, "video", target=address)
    if suffix in IMAGE_SUFFIXES:
        return Item(name, "image", partial(_download_image, address, name))
    return address


def _ask(address: str) -> Item:
    """What the server says that an address is."""
    name = without_secrets(address)
    try:
        with open_url(address) as answer:
            kind = answer.headers.get_content_maintype()
    except REFUSALS as error:
        return _failing(name, unreachable(name, error))
    if kind == "image":
        return Item(name, "image", partial(_download_image, address, name))
    return Item(name, "video" if kind == "video" else "live", target=address)


def _download_image(address: str, name: str) -> Image:
    return decode_image(fetch(address), name)


def _failing(name: str, error: UserError) -> Item:
    """An item that is reported when its turn comes."""
    return Item(name, "image", partial(_fail, error))


def _fail(error: UserError) -> Image:
    raise error
