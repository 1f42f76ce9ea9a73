"""`yolov7 track`: boxes in videos, cameras and streams, and which of them show one object."""

from dataclasses import dataclass, replace
from pathlib import Path

from yolov7.cli.predict import Predict, detect
from yolov7.recorder import Outputs


@dataclass(kw_only=True)
class Track(Predict):
    """Track objects through videos, cameras and streams, with ByteTrack."""

    lost: float = 1.0
    """seconds for which an object that is not seen keeps its number"""
    save_mot: bool = False
    """write tracks/NAME.txt in MOTChallenge form"""
    project: Path = Path("runs/track")
    """folder of the run folders"""

    def outputs(self, folder: Path) -> Outputs:
        """What to write, tracks too."""
        return replace(super().outputs(folder), mot=self.save_mot)


def run(options: Track) -> int:
    """Track, print a line per frame, write the run folder; see `yolov7.cli.predict.run`."""
    return detect(options, lambda detector, source: detector.track(source, lost=options.lost))
