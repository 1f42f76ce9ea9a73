"""Training of the whole family: data, augmentation, assignment, loss, the loop.

from yolov7.train.loop import train
from yolov7.train.options import Train

result = train(Train(data="data.yaml", variant="yolov7-tiny", imgsz=320))
"""
