import torch

from yolov7.boxes import (
    box_iou,
    clip_boxes,
    cxcywh_to_xyxy,
    frame_table,
    in_frames,
    xyxy_to_cxcywh,
)
from yolov7.letterbox import Geometry


def test_formats_are_inverse() -> None:
    xyxy = torch.tensor([[[1.0, 2.0, 4.0, 8.0]], [[0.0, 0.0, 0.0, 0.0]]])
    cxcywh = xyxy_to_cxcywh(xyxy)
    assert cxcywh[0, 0].tolist() == [2.5, 5.0, 3.0, 6.0]
    assert torch.equal(cxcywh_to_xyxy(cxcywh), xyxy)


def test_iou_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    b = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    expected = torch.tensor([[1.0, 1 / 7, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(box_iou(a, b), expected)


def test_iou_of_no_boxes() -> None:
    assert box_iou(torch.empty(0, 4), torch.ones(3, 4)).shape == (0, 3)


def test_clip_cuts_at_the_border() -> None:
    boxes = torch.tensor([[-5.0, -1.0, 30.0, 12.0]])
    assert clip_boxes(boxes, (10, 20)).tolist() == [[0.0, 0.0, 20.0, 10.0]]


def test_in_frames_undoes_scale_and_pad_then_clips() -> None:
    boxes = torch.tensor([[10.0, 20.0, 110.0, 60.0], [0.0, 0.0, 200.0, 200.0]])
    half = Geometry((100, 150), (0.5, 0.5), (10.0, 20.0), (50, 75), (20, 20, 10, 10))
    other = Geometry((1000, 1000), (1.0, 2.0), (0.0, 0.0), (2000, 1000), (0, 0, 0, 0))
    back = in_frames(torch.stack([boxes, boxes]), frame_table([half, other]))
    assert back[0].tolist() == [[0.0, 0.0, 150.0, 80.0], [0.0, 0.0, 150.0, 100.0]]
    assert back[1].tolist() == [[10.0, 10.0, 110.0, 30.0], [0.0, 0.0, 200.0, 100.0]]
