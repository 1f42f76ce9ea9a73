"""Which boxes of a video's frames show one object: ByteTrack, by the package `trackers`."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch

from yolov7.errors import UserError
from yolov7.results import Boxes, Results

LOW = 0.1  # confidence down to which a box may go on with a track that has begun
FPS = 30.0  # where a source names no rate, and in which the package counts
LONGEST_S = 3600.0


class Tracker:
    """Gives results the numbers of tracks, from 1, and leaves out boxes of no track.

    A track begins with two frames in a row that show a box surer than `conf`. Every video, camera
    and stream has tracks of its own; images that follow one another are taken as one video.

    Args:
        conf: What a box's confidence must exceed to begin a track, 0..1.
        lost: Seconds for which an object that is not seen keeps its number.

    Raises:
        UserError: The package is not installed, or a number makes no sense.
    """

    def __init__(self, *, conf: float, lost: float) -> None:
        if not 0 <= lost <= LONGEST_S:
            raise UserError(f"lost is {lost:g} seconds: give 0 to {LONGEST_S:g}")
        try:
            self._trackers, self._supervision = map(import_module, ("trackers", "supervision"))
        except ImportError:
            raise UserError("tracking needs a package: pip install trackers") from None
        self._conf, self._lost = conf, lost
        self._open: dict[int, _Sequence] = {}  # by item: cameras and streams run side by side

    def __call__(self, result: Results) -> Results:
        """The same result with the boxes that belong to a track, and its numbers."""
        frame, boxes = result.frame, result.boxes
        item = 0 if frame.kind == "image" else frame.item
        if item not in self._open:
            if frame.kind != "live":  # one after the other
                self._open.clear()
            self._open[item] = _Sequence(self._made(frame.fps or FPS))
        found = self._supervision.Detections(
            xyxy=boxes.xyxy.numpy(),
            confidence=boxes.conf.numpy(),
            class_id=boxes.cls.numpy(),
            data={"row": np.arange(len(boxes))},
        )
        time = None if frame.kind == "image" else frame.time
        tracked = self._open[item].update(found, time)
        chosen = np.flatnonzero(tracked.tracker_id >= 0)
        kept = tracked.data["row"][chosen] if len(chosen) else chosen
        rows, order = torch.from_numpy(kept).sort()
        numbers = torch.from_numpy(tracked.tracker_id[chosen]).long()[order] + 1
        return replace(result, boxes=Boxes(boxes.data[rows], boxes.shape, numbers))

    def _made(self, fps: float) -> Any:
        return self._trackers.ByteTrackTracker(
            lost_track_buffer=round(self._lost * FPS),
            frame_rate=fps,
            track_activation_threshold=self._conf,
            high_conf_det_threshold=self._conf,
        )


class _Sequence:
    """The tracker of one video, camera or stream."""

    def __init__(self, tracker: Any) -> None:
        self._tracker, self._time = tracker, -1.0

    def update(self, found: Any, time: float | None) -> Any:
        """The detections with their tracks; time never stands still, whatever a video says."""
        if time is not None:
            time = self._time = max(time, self._time + 1e-3)
        return self._tracker.update(found, timestamp=time)
