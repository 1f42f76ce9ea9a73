"""What to train and what to evaluate on: two splits that share no image."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from yolov7.dataset.reader import load_data
from yolov7.dataset.sample import Dataset, Sample
from yolov7.errors import UserError


def load_splits(
    spec: str | Path,
    train: str = "train",
    val: str = "val",
    *,
    val_fraction: float | None = None,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Read the images to train and those to evaluate on.

    Args:
        spec: See `load_data`.
        train: Split to train on.
        val: Split to evaluate on.
        val_fraction: Hold out this share of the split to train on, and read no other.
        seed: Of the choice of those images.

    Raises:
        UserError: A split is missing, two of them share images or name different classes.
    """
    if val_fraction is not None:
        return hold_out(load_data(spec, train), val_fraction, seed)
    first, second = load_data(spec, train), load_data(spec, val)
    if train == val:  # asked for by name
        return first, second
    if same := shared_images(first, second):
        raise UserError(
            f"{spec}: {len(same)} of {len(second.samples)} images of {val} are in {train}, too, "
            f"the first is {same[0]}: hold some out with --val-fraction 0.1, or name another split"
        )
    if set(first.names) != set(second.names):
        differ = ", ".join(sorted(set(first.names) ^ set(second.names))[:5])
        raise UserError(f"{spec}: {train} and {val} name different classes: {differ}")
    return first, second.in_order(first.names)


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """A data set without a share of its images, chosen by the seed, and these.

    The copies that Roboflow makes of an image (`a.rf.HASH.jpg`) stay together.

    Args:
        dataset: At least two images.
        fraction: Of the images, between 0 and 1.
        seed: Of the choice, which does not depend on the order of the images.

    Raises:
        UserError: The fraction leaves one side without images.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--val-fraction {fraction:g}: give a number between 0 and 1, such as 0.1")
    groups: dict[str, list[Sample]] = {}
    for sample in dataset.samples:
        groups.setdefault(str(sample.path).split(".rf.")[0], []).append(sample)
    if len(groups) < 2:
        raise UserError(f"--val-fraction {fraction:g}: one image cannot be split")
    count = min(max(round(fraction * len(groups)), 1), len(groups) - 1)
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    names = sorted(groups)
    held = {names[index] for index in order[:count]}
    kept = [s for name, samples in groups.items() if name not in held for s in samples]
    out = [s for name, samples in groups.items() if name in held for s in samples]
    return replace(dataset, samples=kept), replace(dataset, samples=out, skipped=[], problems=[])


def shared_images(first: Dataset, second: Dataset) -> list[Path]:
    """The images of the second data set that are files of the first, through links too."""
    known = {sample.path.name for sample in first.samples}
    alike = [sample.path for sample in second.samples if sample.path.name in known]
    if not alike:
        return []
    names = {path.name for path in alike}
    real = {os.path.realpath(s.path) for s in first.samples if s.path.name in names}
    return [path for path in alike if os.path.realpath(path) in real]
