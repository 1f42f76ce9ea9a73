"""`yolov7 predict`: boxes in images, videos, cameras and streams."""

import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path

import cv2

from yolov7.checkpoint import in_words
from yolov7.cli.options import ModelOptions, which_weights
from yolov7.detector import Detector
from yolov7.engine.compile import COMPILED
from yolov7.errors import UserError
from yolov7.progress import progress
from yolov7.recorder import Outputs, Recorder
from yolov7.results import Results
from yolov7.runs import new_run, remove_empty, write_arguments
from yolov7.sources import Source
from yolov7.text import printable, without_secrets
from yolov7.window import Window


@dataclass(kw_only=True)
class Predict(ModelOptions):
    """Detect objects in images, videos, cameras and streams."""

    source: tuple[str, ...] = ()
    """files, folders, globs, .txt lists, URLs, videos, camera numbers, stream addresses (default:
    the four sample images)"""
    conf: float = 0.25
    """confidence that a box must exceed, 0 to 1"""
    iou: float = 0.45
    """overlap (IoU) with a surer box of its class above which a box is dropped, 0 to 1"""
    max_det: int = 300
    """boxes per image at most"""
    classes: tuple[str, ...] = ()
    """names or numbers of the classes to look for (default: all)"""
    agnostic: bool = False
    """let boxes of different classes suppress each other too"""
    batch: int = 1
    """images that go through the network together"""
    tile: int | None = None
    """side in pixels of overlapping tiles to look at beside the whole image, for small objects"""
    overlap: float = 0.2
    """least share of a tile that its neighbour covers too, 0 to 1"""
    augment: bool = False
    """look at three scales, one mirrored: slower, surer"""
    vid_stride: int = 1
    """take every n-th frame of videos and streams"""
    retry: float = 0.0
    """seconds for which a camera or stream that has dropped is tried again"""
    save_txt: bool = False
    """write labels/NAME.txt in YOLO form"""
    save_conf: bool = False
    """write confidences into these files too"""
    save_crop: bool = False
    """write every box as a picture of its own"""
    save_json: bool = False
    """write predictions.json, a COCO results file"""
    nosave: bool = False
    """write no annotated pictures and videos"""
    show: bool = False
    """show the annotated pictures in a window; q ends"""
    quiet: bool = False
    """print errors alone"""
    project: Path = Path("runs/predict")
    """folder of the run folders"""
    name: str | None = None
    """run folder (default: the next number)"""
    json: Path | None = None
    """write a list of path, height, width, boxes and speed per image to this file; -: to standard
    output, and the lines to standard error"""

    def outputs(self, folder: Path) -> Outputs:
        """What to write."""
        return Outputs(
            folder,
            pictures=not self.nosave,
            txt=self.save_txt,
            conf=self.save_conf,
            crop=self.save_crop,
            coco=self.save_json,
            json=self.json,
            vid_stride=self.vid_stride,
        )


def run(options: Predict) -> int:
    """Detect, print a line per image, write the run folder; see `detect`."""
    return detect(options, lambda detector, source: detector.stream(source))


def detect(options: Predict, way: Callable[[Detector, Source], Generator[Results]]) -> int:
    """Detect in a certain way, print a line per image, write the run folder.

    Args:
        options: What the user has said.
        way: From a detector and a source to results.

    Returns:
        1 if an image could not be read, 2 if it is not clear which weights are wanted.
    """
    if options.source and options.weights is None:  # blood cells in the street
        print(f"error: {which_weights()}", file=sys.stderr)
        return 2
    _silence_opencv()
    window = Window("yolov7") if options.show else None
    detector = Detector(
        **vars(options.runtime()),
        conf=options.conf,
        iou=options.iou,
        max_det=options.max_det,
        classes=options.classes or None,
        agnostic=options.agnostic,
        batch=options.batch,
        tile=options.tile,
        overlap=options.overlap,
        augment=options.augment,
    )
    _print_start(options, detector)
    errors: list[UserError] = []

    def report(error: UserError) -> None:
        errors.append(error)
        print(f"error: {error}", file=sys.stderr)

    with as_file(files("yolov7.assets") / "images") as samples:
        chosen: list[str | Path] = [*options.source] or [samples]
        source = Source(
            chosen,
            vid_stride=options.vid_stride,
            retry=options.retry,
            on_error=report,
            on_note=lambda line: print(f"note: {line}", file=sys.stderr),
        )
        folder = new_run(options.project, options.name)
        told = [without_secrets(source) for source in options.source]
        write_arguments(folder, asdict(options) | {"source": told})
        with (
            _left_out_if_empty(folder, detector),
            Recorder(options.outputs(folder)) as recorder,
            closing(way(detector, source)) as results,
            suppress(KeyboardInterrupt) if source.live else nullcontext(),  # ends a camera
        ):
            for result in results if options.quiet else _with_progress(results, source):
                print(result, flush=True)
                recorder.write(result)
                if window and window.show(result.plot(), wait=1) in ("q", "closed"):
                    break
    if detector.speed.images:
        print(detector.speed)
    if source.dropped:
        print(f"{source.dropped} frames dropped to keep up with the stream")
    if errors and len(source) > 1:
        print(f"{len(errors)} of {len(source)} sources could not be read", file=sys.stderr)
    if detector.speed.images:
        print(f"{'results' if options.nosave else 'annotated pictures'} in {folder}")
    return 1 if errors else 0


@contextmanager
def _left_out_if_empty(folder: Path, detector: Detector) -> Iterator[None]:
    """Leave no folder of a run that has seen no image, however it ends."""
    try:
        yield
    finally:
        if not detector.speed.images:
            remove_empty(folder)


def _with_progress(results: Iterable[Results], source: Source) -> Iterable[Results]:
    """A bar for images; the lines of a video's frames say how far it is."""
    if any(item.kind != "image" for item in source.items):
        return results
    return progress(results, "detecting", len(source))


def _print_start(options: Predict, detector: Detector) -> None:
    names = detector.names
    classes = printable(", ".join(names)) if len(names) <= 5 else f"{len(names)} classes"
    weights = in_words(options.weights)
    network = detector.network
    print(f"{weights} ({classes}): {network.device}, {network.precision}, {network.engine}")
    if detector.startup_s:
        kept = os.environ[COMPILED]
        print(f"compiled in {detector.startup_s:.1f} s; kept in {kept}, the next start is shorter")


def _silence_opencv() -> None:
    """Our errors are one line; OpenCV and FFmpeg would add several of their own."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
