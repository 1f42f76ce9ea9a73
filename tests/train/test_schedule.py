import pytest
import torch
from torch import nn

from yolov7.errors import UserError
from yolov7.model import create_model
from yolov7.train.config import PRESETS, preset_name
from yolov7.train.ema import EMA
from yolov7.train.optimizer import (
    build_optimizer,
    clip_gradients,
    first_bad_tensor,
    gradient_norm,
    parameter_groups,
    set_rates,
)
from yolov7.train.schedule import Schedule
from yolov7.variants import VARIANTS

P5 = PRESETS["p5"]


def test_cosine_and_linear_fall_from_lr0_to_its_share() -> None:
    cosine, linear = (Schedule(P5, 100, 2000, 64, linear) for linear in (False, True))
    assert cosine.factor(0) == linear.factor(0) == 1
    assert cosine.factor(100) == pytest.approx(0.1)
    assert linear.factor(100) == pytest.approx(0.1)
    assert cosine.factor(50) == linear.factor(50) == pytest.approx(0.55)
    assert cosine.factor(25) == pytest.approx(1 - 0.9 * (1 - 2**-0.5) / 2)
    assert linear.factor(25) == pytest.approx(0.775)


def test_warm_up_is_linear_in_the_batch_number() -> None:
    schedule = Schedule(P5, 300, 1000, 16)
    assert schedule.warmup == 3000
    start, middle, end = (schedule.at(0, step) for step in (0, 1500, 3000))
    assert (start.lr, start.bias_lr, start.momentum, start.accumulate) == (0, 0.1, 0.8, 1)
    assert middle.lr == pytest.approx(0.005)
    assert middle.bias_lr == pytest.approx(0.055)
    assert middle.momentum == pytest.approx((0.8 + 0.937) / 2)
    assert middle.accumulate == 2  # round(2.5), to even
    assert (end.lr, end.bias_lr, end.momentum, end.accumulate) == (0.01, 0.01, 0.937, 4)
    assert schedule.at(150, 150_000).lr == pytest.approx(0.0055)


@pytest.mark.parametrize(
    ("epochs", "batches", "asked", "expected"),
    [
        (300, 1000, None, 3000),  # the authors' 3 epochs
        (300, 50, None, 1000),  # and their 1000 batches
        (101, 100, None, 1000),
        (100, 100, None, 1000),  # a tenth
        (100, 13, None, 130),
        (30, 13, None, 39),
        (20, 450, None, 900),
        (5, 1990, None, 995),  # a tenth, though 3 epochs are more
        (1, 3, None, 0),
        (100, 13, 0.5, 6),  # what is asked for
        (300, 1000, 0.5, 500),
        (300, 1000, 0.0, 0),
    ],
)
def test_length_of_the_warm_up(
    epochs: int, batches: int, asked: float | None, expected: int
) -> None:
    hyper = P5 if asked is None else P5.with_values({"warmup_epochs": asked})
    schedule = Schedule(hyper, epochs, batches, 16)
    assert schedule.warmup == expected
    if expected:
        assert schedule.at(0, expected - 1).bias_lr > schedule.at(0, expected - 1).lr
    rates = schedule.at(0, expected)
    assert rates.lr == rates.bias_lr == 0.01


def test_a_schedule_says_what_it_is() -> None:
    assert str(Schedule(P5, 100, 13, 16)) == (
        "100 epochs of 13 batches of 16 images, a step every batch; warm-up 130 batches (as in all "
        "runs of up to 10000)"
    )
    assert str(Schedule(P5, 300, 1000, 64)) == (
        "300 epochs of 1000 batches of 64 images, a step every batch; warm-up 3000 batches"
    )


@pytest.mark.parametrize(
    ("batch", "accumulate", "decay"), [(16, 4, 5e-4), (24, 3, 5.625e-4), (128, 1, 1e-3)]
)
def test_accumulation_and_decay_follow_the_nominal_batch(
    batch: int, accumulate: int, decay: float
) -> None:
    schedule = Schedule(P5, 300, 1000, batch)
    assert schedule.accumulate == accumulate
    assert schedule.weight_decay == pytest.approx(decay)


@pytest.mark.parametrize(
    ("epochs", "batch", "accumulate"), [(100, 16, 1), (101, 16, 4), (100, 4, 4), (100, 32, 1)]
)
def test_short_runs_step_more_often(epochs: int, batch: int, accumulate: int) -> None:
    assert Schedule(P5, epochs, 100, batch).accumulate == accumulate


def test_a_small_data_set_has_a_step_an_epoch() -> None:
    schedule = Schedule(P5.with_values({"warmup_epochs": 10}), 30, 2, 4)
    assert schedule.accumulate == schedule.at(9, 19).accumulate == 2
    assert schedule.weight_decay == pytest.approx(5e-4 / 8)


def test_accumulation_can_be_asked_for() -> None:
    schedule = Schedule(P5.with_values({"warmup_epochs": 1}), 300, 1000, 16, every=10)
    assert schedule.accumulate == 10
    assert schedule.at(0, 500).accumulate == 6  # round(5.5), to even
    assert schedule.weight_decay == pytest.approx(5e-4 * 160 / 64)


def test_presets() -> None:
    names = {name: preset_name(variant) for name, variant in VARIANTS.items()}
    assert names == {
        "yolov7-tiny": "tiny",
        "yolov7-tiny-silu": "tiny",
        "yolov7": "p5",
        "yolov7x": "p5",
        "yolov7-w6": "p6",
        "yolov7-e6": "p6",
        "yolov7-d6": "p6",
        "yolov7-e6e": "p6",
    }
    assert [PRESETS[k].lrf for k in ("p5", "p6", "tiny", "custom")] == [0.1, 0.2, 0.01, 0.1]
    assert PRESETS["custom"].augmentation.mixup == 0
    changed = P5.with_values({"lr0": 0.02, "mosaic": 0.5})
    assert (changed.lr0, changed.augmentation.mosaic) == (0.02, 0.5)
    with pytest.raises(UserError, match="unknown hyper-parameter 'lr1': choose from box, cls"):
        P5.with_values({"lr1": 1})


def test_only_convolution_weights_decay() -> None:
    model = create_model("yolov7-tiny", 2, width=0.125)
    names = {id(p): n for n, p in model.named_parameters()}
    biases, weights, others = (
        {names[id(p)] for p in group["params"]}  # type: ignore[attr-defined]  # a list
        for group in parameter_groups(model, 5e-4)
    )
    assert biases | weights | others == set(names.values())
    assert all(n.endswith("bias") for n in biases)
    implicit = {n for n in names.values() if "implicit" in n}
    assert {n for n, p in model.named_parameters() if p.ndim == 4} == weights | implicit
    assert implicit < others
    assert any(n.endswith("bn.weight") for n in others)
    frozen = model.stem.requires_grad_(False)
    kept = [len(g["params"]) for g in parameter_groups(model, 0)]  # type: ignore[arg-type]  # lists
    assert sum(kept) == len(names) - len(list(frozen.parameters()))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_rates_reach_the_optimizer(name: str) -> None:
    model = create_model("yolov7-tiny", 2, width=0.125)
    optimizer = build_optimizer(model, name, 5e-4)  # type: ignore[arg-type]  # parametrized
    set_rates(optimizer, Schedule(P5, 300, 1000, 16).at(0, 1500))
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.055, 0.005, 0.005])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0, 5e-4, 0]
    group = optimizer.param_groups[0]
    momentum = group["betas"][0] if name != "sgd" else group["momentum"]
    assert momentum == pytest.approx(0.8685)


def test_gradients_are_clipped_to_their_joint_norm() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0]]), torch.tensor([4.0])
    assert gradient_norm(model) == pytest.approx(5)
    clip_gradients(model, 5.0, 0.0)
    assert gradient_norm(model) == pytest.approx(5)
    clip_gradients(model, 5.0, 1.0)
    assert gradient_norm(model) == pytest.approx(1, rel=1e-5)


def test_the_first_bad_tensor_is_named() -> None:
    model = nn.Linear(2, 1)
    terms = {"box": torch.tensor(1.0), "classes": torch.tensor(float("nan"))}
    assert first_bad_tensor(model, terms) == "loss term classes"
    terms.pop("classes")
    model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.tensor([float("inf")])
    assert first_bad_tensor(model, terms) == "gradient of bias"
    model.weight.data.fill_(float("nan"))
    assert first_bad_tensor(model, terms) == "weight weight"


def test_moving_average() -> None:
    model = create_model("yolov7-tiny", 2, width=0.125)
    ema = EMA(model)
    weight, start = model.stem[0].conv.weight, ema.model.stem[0].conv.weight.clone()  # type: ignore[union-attr, operator]  # modules
    with torch.no_grad():
        weight.add_(1.0)  # type: ignore[operator]  # a tensor
    model.stem[0].bn.num_batches_tracked.fill_(7)  # type: ignore[union-attr, operator]
    for _ in range(2):
        ema.update(model)
    kept = 1.0
    for t in (1, 2):
        kept *= 0.9999 * (1 - 2.718281828459045 ** (-t / 2000))
    expected = start + (1 - kept)
    torch.testing.assert_close(ema.model.stem[0].conv.weight, expected)  # type: ignore[union-attr]
    assert ema.model.stem[0].bn.num_batches_tracked == 7  # type: ignore[union-attr]
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
