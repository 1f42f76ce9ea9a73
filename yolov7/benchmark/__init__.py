"""How time is measured: the one clock, the ceilings it is held against, the stages of a detector.

`yolov7 bench` (yolov7/cli/bench.py) prints what is measured here. The suites of the repository's
folder bench/, which is not installed, are timed by the same clock against the same ceilings.
"""
