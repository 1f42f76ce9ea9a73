from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from yolov7.dataset.sample import Labels
from yolov7.train.augment import Augmenter, jitter_colour, mixup, mosaic4, mosaic9
from yolov7.train.config import PRESETS, Augmentation
from yolov7.train.paste import CutOut, copy_paste, cut_out, gather, paste_in
from yolov7.train.scene import Scene, flipped, letterboxed, perspective

NOTHING = Augmentation(
    0, 0, 0, translate=0, scale=0, fliplr=0, mosaic=0, mixup=0, copy_paste=0, paste_in=0
)
SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)


def scene(
    *boxes: tuple[int, int, int, int], height: int = 100, width: int = 160, outlined: bool = True
) -> Scene:
    """Filled rectangles on black, each of its own brightness, the class being the brightness."""
    image = np.zeros((height, width, 3), np.uint8)
    classes = [250 - 15 * i for i in range(len(boxes))]
    for (x1, y1, x2, y2), class_ in zip(boxes, classes, strict=True):
        image[y1:y2, x1:x2] = class_
    array = np.array(boxes, np.float32).reshape(-1, 4)
    outlines = tuple([SQUARE * (box[2:] - box[:2]) + box[:2]] if outlined else [] for box in array)
    return Scene(image, np.array(classes, np.int64), array, outlines)


def shown(result: Scene, class_: int, near: int) -> NDArray[np.float32]:
    """The box around the pixels of an object's brightness."""
    y, x = np.nonzero(abs(result.image[..., 0].astype(int) - class_) <= near)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float32)


def assert_boxes_fit(result: Scene, tolerance: float, near: int = 0) -> None:
    assert len(result.boxes) > 0
    for class_, box in zip(result.classes.tolist(), result.boxes, strict=True):
        assert np.abs(shown(result, class_, near) - box).max() <= tolerance, (class_, box)


TRANSFORMS: dict[str, Augmentation] = {
    "scale": replace(NOTHING, scale=0.5),
    "translate": replace(NOTHING, translate=0.3),
    "shear": replace(NOTHING, shear=20),
    "rotation": replace(NOTHING, degrees=45),
    "perspective": replace(NOTHING, perspective=0.001),
    "everything": replace(
        NOTHING, scale=0.4, translate=0.2, shear=10, degrees=30, perspective=0.0005
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("seed", range(3))
def test_perspective_refits_outlines(name: str, seed: int) -> None:
    before = scene((60, 30, 100, 60))
    after = perspective(before, (120, 150), TRANSFORMS[name], np.random.default_rng(seed))
    assert after.shape == (120, 150)
    assert_boxes_fit(after, 1.5, near=125)


def test_outlines_of_several_parts_make_one_box() -> None:
    whole = scene((60, 30, 70, 60), (90, 40, 100, 70))
    parts = [part for outline in whole.outlines for part in outline]
    two = replace(
        whole,
        image=(whole.image > 0).astype(np.uint8) * 250,
        classes=np.array([250]),
        boxes=np.array([[60, 30, 100, 70]], np.float32),
        outlines=(parts,),
    )
    config = replace(NOTHING, scale=0.3, degrees=10)
    for seed in range(3):
        assert_boxes_fit(perspective(two, (100, 160), config, rng(seed)), 1.5, near=125)


def test_perspective_of_boxes_bounds_their_corners() -> None:
    config = replace(NOTHING, degrees=40)
    before = scene((60, 30, 100, 60))
    boxed = perspective(scene((60, 30, 100, 60), outlined=False), (100, 160), config, rng(1))
    outlined = perspective(before, (100, 160), config, rng(1))
    assert np.abs(boxed.boxes - outlined.boxes).max() < 1.5


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_perspective_drops_what_hardly_shows() -> None:
    config = replace(NOTHING, translate=0.5)
    kept = dropped = 0
    for seed in range(40):
        result = perspective(scene((0, 40, 30, 60), outlined=False), (100, 160), config, rng(seed))
        for box in result.boxes:
            kept += 1
            assert (box[2] - box[0]) * (box[3] - box[1]) > 0.1 * 600
        dropped += 1 - len(result.boxes)
    assert kept > 5
    assert dropped > 5


@pytest.mark.parametrize("mosaic", [mosaic4, mosaic9])
@pytest.mark.parametrize("seed", range(4))
def test_mosaic_boxes_follow_their_images(mosaic: Callable[..., Scene], seed: int) -> None:
    shapes = [(100, 160), (160, 100), (120, 160), (160, 160), (160, 90), (60, 160), (160, 131)]
    count = 4 if mosaic is mosaic4 else 9
    scenes = []
    for i in range(count):
        height, width = shapes[(i + seed) % len(shapes)]
        plain = scene((10, 20, 50, 40), height=height, width=width)
        class_ = 250 - 15 * i
        scenes.append(replace(plain, image=plain.image // 250 * class_, classes=np.array([class_])))
    result = mosaic(scenes, 160, rng(seed))
    assert result.shape == (320, 320)
    assert_boxes_fit(result, 0)


@pytest.mark.parametrize("horizontally", [True, False])
def test_flips_are_exact(horizontally: bool) -> None:
    before = scene((60, 30, 100, 60), (20, 70, 45, 95))
    after = flipped(before, horizontally=horizontally)
    assert_boxes_fit(after, 0)
    for box, (outline,) in zip(after.boxes, after.outlines, strict=True):
        assert np.array_equal(np.concatenate([outline.min(0), outline.max(0)]), box)
    assert np.array_equal(flipped(after, horizontally=horizontally).image, before.image)


@pytest.mark.parametrize("shape", [(100, 160), (160, 160), (97, 320), (64, 33)])
def test_letterbox_moves_boxes_and_outlines(shape: tuple[int, int]) -> None:
    after = letterboxed(scene((60, 30, 100, 60)), shape)
    assert after.shape == shape
    assert_boxes_fit(after, 1.0, near=125)
    outline = after.outlines[0][0]
    assert np.allclose(np.concatenate([outline.min(0), outline.max(0)]), after.boxes[0])


def test_mixup_keeps_the_objects_of_both() -> None:
    a, b = scene((60, 30, 100, 60)), scene((20, 70, 45, 95), (0, 0, 9, 9), outlined=False)
    result = mixup(a, b, rng(0))
    assert result.classes.tolist() == [250, 250, 235]
    assert len(result.outlines) == 3
    ratio = result.image[40, 80, 0] / 250
    assert 0.2 < ratio < 0.8
    assert result.image[80, 30, 0] == pytest.approx((1 - ratio) * 250, abs=2)


def test_colour_keeps_geometry_and_its_strength_is_bounded() -> None:
    before = replace(scene((60, 30, 100, 60)), image=np.full((8, 8, 3), (40, 90, 160), np.uint8))
    assert jitter_colour(before, NOTHING, rng(0)) is before
    brightness = [
        jitter_colour(before, replace(NOTHING, hsv_v=0.5), rng(i)).image.max() / 160
        for i in range(50)
    ]
    assert 0.45 < min(brightness) < 0.6
    assert 1.4 < max(brightness) <= 1.51


def test_copy_paste_mirrors_outlined_objects() -> None:
    before = scene((10, 30, 40, 60))
    after = copy_paste(before, 1.0, rng(0))
    assert after.boxes.tolist() == [[10, 30, 40, 60], [120, 30, 150, 60]]
    assert after.classes.tolist() == [250, 250]
    assert (after.image[31:59, 121:149] == 250).all()
    assert copy_paste(scene((10, 30, 40, 60), outlined=False), 1.0, rng(0)).boxes.shape == (1, 4)
    assert len(copy_paste(scene((60, 30, 100, 60)), 1.0, rng(0)).boxes) == 1  # onto itself


def test_half_of_the_outlined_objects_of_any_images_are_offered() -> None:
    images = [scene(*[(10 * i, 10, 10 * i + 10, 40) for i in range(6)]) for _ in range(40)]
    cuts = gather(images.__getitem__, [0, 2], rng(0))
    assert len(cuts) == 6
    assert all((cut.image[cut.mask > 0] == cut.class_).all() for cut in cuts)
    asked: list[int] = []

    def load(index: int) -> Scene:
        asked.append(index)
        return images[index]

    for seed in range(30):
        assert len(gather(load, range(40), rng(seed))) == 24  # 8 images at most
    assert set(asked) == set(range(40))
    assert gather(load, [], rng(0)) == []
    assert cut_out(scene((10, 10, 19, 40)), 0) is None
    assert cut_out(scene((10, 10, 40, 40), outlined=False), 0) is None


def test_paste_in_respects_what_is_there() -> None:
    bank = [CutOut(np.full((40, 40, 3), 200, np.uint8), np.full((40, 40), 255, np.uint8), 7)]
    pasted = 0
    for seed in range(20):
        before = scene((100, 100, 200, 200), height=320, width=320)
        after = paste_in(before, bank, rng(seed))
        pasted += len(after.boxes) - 1
        assert after.classes[1:].tolist() == [7] * (len(after.boxes) - 1)
        for x1, y1, x2, y2 in after.boxes[1:].astype(int):
            assert (after.image[y1:y2, x1:x2] >= 200).all()
            assert min(x2 - x1, y2 - y1) >= 10
        assert (after.image[100:200, 100:200] == 200).mean() < 0.3 * 3  # a few may each cover 30 %
        assert (before.image[100:200, 100:200] == 250).all()
    assert pasted > 20
    assert paste_in(before, [], rng(0)) is before


def test_labels_that_cannot_be_trained_on_are_dropped() -> None:
    labels = Labels(
        classes=np.arange(4),
        boxes=np.array([[0, 0, 9, 9], [5, 5, 5, 9], [-9, 2, 4, 99], [60, 0, 70, 9]], np.float32),
        polygons=([], [], [], []),
        crowd=np.array([True, False, False, False]),
        areas=np.zeros(4),
    )
    result = Scene.from_labels(np.zeros((20, 40, 3), np.uint8), labels, 20, 40)
    assert result.classes.tolist() == [2]
    assert result.boxes.tolist() == [[0, 2, 4, 20]]
    half = Scene.from_labels(np.zeros((10, 20, 3), np.uint8), labels, 20, 40)
    assert half.boxes.tolist() == [[0, 1, 2, 10]]


@pytest.mark.parametrize("preset", PRESETS)
def test_augmenter_gives_square_images_and_is_seeded(preset: str) -> None:
    images = [scene((60, 30, 100, 60), (20, 70, 45, 95)), scene(height=160, width=90)]
    config = replace(PRESETS[preset].augmentation, mosaic=0.7, flipud=0.5, paste_in=1.0)  # type: ignore[index]  # parametrized by the keys
    augment = Augmenter(config, 160, images.__getitem__, len(images), [0])
    for seed in range(8):
        a, b = augment(0, (160, 160), rng(seed)), augment(0, (160, 160), rng(seed))
        assert a.shape == (160, 160)
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.boxes, b.boxes)
        assert (a.boxes >= 0).all()
        assert (a.boxes <= 160).all()
        assert not np.array_equal(a.image, augment(0, (160, 160), rng(seed + 100)).image)


def test_the_others_of_a_mosaic_are_those_that_were_drawn() -> None:
    asked: list[int] = []

    def load(index: int) -> Scene:
        asked.append(index)
        return scene()

    config = replace(NOTHING, mosaic=1.0, mosaic9=1.0, mixup=1.0)
    Augmenter(config, 64, load, 1000)(1, (64, 64), rng(0), range(100, 117))
    assert asked == [1, *range(100, 117)]
    asked.clear()
    Augmenter(config, 64, load, 1000)(1, (64, 64), rng(0))
    assert len(asked) == 18
    assert max(asked) > 117


def test_outlines_keep_their_corners() -> None:
    """Of a star of thin rays, points that are even along its index miss the tips."""
    angle = np.linspace(0, 2 * np.pi, 73, endpoint=False)
    radius = np.where(np.arange(73) % 2, 3.0, 200.0)
    star = np.stack([320 + radius * np.cos(angle), 320 + radius * np.sin(angle)], 1)
    outline = star.astype(np.float32)
    box = np.concatenate([outline.min(0), outline.max(0)])[None]
    image = np.zeros((640, 640, 3), np.uint8)
    before = Scene(image, np.zeros(1, np.int64), box, ([outline],))
    (after,) = perspective(before, (640, 640), replace(NOTHING, translate=0.01), rng(0)).boxes
    np.testing.assert_allclose(after[2:] - after[:2], box[0, 2:] - box[0, :2], atol=1e-3)
