from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from yolov7.letterbox import Geometry
from yolov7.tiling import _in_image, drop_cut_boxes, tile_grid

sides = st.integers(1, 2000)


@given(height=sides, width=sides, tile=st.integers(32, 900), overlap=st.floats(0, 0.9))
def test_tiles_cover_the_image_and_overlap(
    height: int, width: int, tile: int, overlap: float
) -> None:
    tiles = tile_grid((height, width), tile, overlap)
    assert len(set(tiles)) == len(tiles)
    for near, far, side in ((0, 2, width), (1, 3, height)):
        spans = sorted({(t[near], t[far]) for t in tiles})
        assert spans[0][0] == 0
        assert spans[-1][1] == side
        assert {end - start for start, end in spans} == {min(tile, side)}
        for (_, end), (start, _) in pairwise(spans):
            assert end - start >= int(tile * overlap)
    columns = len({t[0] for t in tiles})
    assert len(tiles) == columns * len({t[1] for t in tiles})


def test_no_more_tiles_than_needed() -> None:
    assert tile_grid((640, 640), 640, 0.2) == [(0, 0, 640, 640)]
    assert [t[0] for t in tile_grid((640, 1152), 640, 0.2)] == [0, 512]
    assert [t[0] for t in tile_grid((640, 1153), 640, 0.2)] == [0, 256, 513]


def test_rows_of_a_tile_come_to_their_place_and_end_at_its_edge() -> None:
    rows = torch.tensor([[50.0, 40.0, 20.0, 20.0, 0.9, 0.8], [0.0, 10.0, 40.0, 20.0, 0.5, 0.4]])
    where = Geometry((60, 80), (0.5, 0.5), (10.0, 0.0), (30, 40), (0, 0, 10, 10))
    placed = _in_image(rows, (100, 200, 180, 260), where, 1.0)
    # Row 0: corners (40..60, 30..50) / 0.5 less the pad: (60..100 cut at 80, 60..100 cut at 60).
    assert placed.tolist()[0][:4] == [170.0, 260.0, 20.0, 0.0]
    assert placed.tolist()[1][:4] == [110.0, 220.0, 20.0, 40.0]
    assert torch.equal(placed[:, 4:], rows[:, 4:])
    halved = _in_image(rows, (100, 200, 180, 260), where, 0.5)
    assert torch.equal(halved[:, :4], placed[:, :4] / 2)


def test_pieces_of_a_whole_box_go_and_the_rest_stays() -> None:
    tiles = tile_grid((100, 180), 100, 0.2)
    assert [t[0] for t in tiles] == [0, 80]
    whole = [70.0, 10.0, 130.0, 50.0, 0.8, 0.0]
    boxes = torch.tensor(
        [
            [70.0, 10.0, 99.8, 50.0, 0.9, 0.0],  # a piece, although surer
            whole,
            [70.0, 10.0, 100.0, 50.0, 0.7, 1.0],  # a piece of another class
            [40.0, 60.0, 100.0, 90.0, 0.6, 0.0],  # a piece that nothing shows whole
            [75.0, 15.0, 95.0, 45.0, 0.5, 0.0],  # within the whole, ending at no edge
            [70.0, 0.0, 130.0, 50.0, 0.4, 1.0],  # ends at the image's border
        ]
    )
    kept = drop_cut_boxes(boxes, tiles, (100, 180), 1.0)
    assert torch.equal(kept, boxes[[1, 3, 4, 5]])
    scaled = boxes * torch.tensor([0.5, 0.5, 0.5, 0.5, 1, 1])
    assert torch.equal(drop_cut_boxes(scaled, tiles, (100, 180), 0.5), scaled[[1, 3, 4, 5]])


def test_no_boxes() -> None:
    tiles = tile_grid((100, 180), 100, 0.2)
    assert drop_cut_boxes(torch.zeros(0, 6), tiles, (100, 180), 1.0).shape == (0, 6)
