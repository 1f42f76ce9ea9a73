"""The newest frame of a camera, its boxes, and how long they took: `python camera.py 0`.

A camera, or a stream such as rtsp://camera/1, is read all the time; what comes while the network is
busy is dropped, so that boxes are as young as they can be. One that fails is opened again.
"""

import sys
import time

import numpy as np

from yolov7 import Detector
from yolov7.sources import Source

source = sys.argv[1] if len(sys.argv) > 1 else "0"
weights = sys.argv[2] if len(sys.argv) > 2 else "yolov7-tiny.pt"
# A GPU: engine="graph" after `yolov7 tune`. A CPU: imgsz=320, and engine="compile" where some
# seconds at the start do not matter; precision="int8" with weights that are calibrated for it.
detector = Detector(weights, imgsz=320, conf=0.4)
detector(np.zeros((480, 640, 3), np.uint8))  # what comes first is slow: not the first frame
frames = Source(source, retry=30, on_error=print, on_note=print)
said = time.monotonic()
for result in detector.stream(frames):
    stages = ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in result.speed.items())
    print(f"frame {result.frame.number}: {len(result.boxes)} boxes; {stages}")
    if time.monotonic() - said > 5:
        print(f"{detector.speed}; {frames.dropped} frames dropped")
        said = time.monotonic()
print(f"{detector.speed}; {frames.dropped} frames dropped")
