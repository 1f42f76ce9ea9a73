"""What an exported file tells of itself."""

from yolov7.formats.metadata import FORMAT, Metadata

METADATA = Metadata(
    format=FORMAT,
    kind="onnx",
    variant="yolov7-tiny",
    names=["cell"],
    stride=32,
    imgsz=(32, 32),
    batch=1,
    precision="fp32",
    layout="grid",
    letterbox=False,
    nms=None,
    device="cpu",
    version="",
)
