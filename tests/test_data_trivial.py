"""TrivialAugment: what is drawn, against torchvision's space, and each operation's pixels in each pipeline."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from scipy.stats import chisquare
from torchvision.transforms.v2 import TrivialAugmentWide

from engine.build import make_augmentation
from engine.command_line import parse_args
from engine.data import Augmentation, ResidentLoader, Samples, WeightedSampler, augment
from engine.data.augment import PROBABILITIES, Drawn
from engine.data.counter import Purpose, generator
from engine.data.torchvision_steps import prepare
from engine.data.transforms import Tone, composed_colors, composed_warps, warp_matrices
from engine.data.trivial import SPACE, STRENGTHS
from engine.errors import UserError
from tests.data_helpers import make_loader, picture, save

SIDE = 48
ALONE = Augmentation(**dict.fromkeys(PROBABILITIES, 0.0), auto_augment="trivial")
WITH_OTHERS = Augmentation(**dict.fromkeys(PROBABILITIES, 0.5), minority=0.5, auto_augment="trivial")
THEIRS = TrivialAugmentWide(interpolation=F.InterpolationMode.BILINEAR)
THEIR_SPACE = dict(zip(SPACE, THEIRS._AUGMENTATION_SPACE.items(), strict=True))


def draw(augmentation: Augmentation = ALONE, n: int = 40_000, seed: int = 0, epoch: int = 0) -> Drawn:
    return augmentation.draw(seed, epoch, np.arange(n), img_size=SIDE, rarity=np.zeros(n))


# What is drawn


def test_the_space_is_torchvisions():
    for name, (theirs, (their_magnitudes, their_sign)) in THEIR_SPACE.items():
        magnitudes, signed = SPACE[name]
        expected = their_magnitudes(STRENGTHS, SIDE, SIDE)
        expected = np.zeros(STRENGTHS) if expected is None else expected.double().numpy()
        # half of 32 pixels is a hair's breadth less in torchvision's float32
        expected = {"translate": np.trunc(expected + 1e-5), "solarize": 255 * expected}.get(
            name.split("_")[0], expected
        )
        assert name.replace("_", "") == theirs.lower()
        assert signed == their_sign
        np.testing.assert_allclose(magnitudes, expected, atol=2e-5, err_msg=name)


def test_every_operation_is_drawn_equally_often_and_alone():
    drawn = draw()
    (_, along_x, shift_x), (along_y, _, shift_y) = drawn.warp.T.swapaxes(0, 1)
    tinted = drawn.color[:, 0, 1] != 0
    pivoted = drawn.pivot.any(axis=(1, 2))
    traces = {
        "shear_x": (along_x != 0) & (along_y == 0),
        "shear_y": (along_x == 0) & (along_y != 0),
        "rotate": (along_x != 0) & (along_y != 0),
        "translate_x": (along_x == 0) & (shift_x != 0),
        "translate_y": (along_y == 0) & (shift_y != 0),
        "brightness": drawn.jittered & ~tinted & ~pivoted,
        "color": tinted,
        "contrast": pivoted,
        "sharpness": drawn.sharpness != 1,
        **{tone.name.lower(): drawn.tone == tone for tone in Tone if tone},
    }
    counts = np.array([traces[name].sum() for name in SPACE if name != "identity"])
    nothing = ~np.any(list(traces.values()), axis=0)
    # the weakest of 31 strengths changes nothing, where there are strengths
    seen = np.array(
        [1 if name in ("posterize", "solarize") or not m.any() else 30 / 31 for name, (m, _) in SPACE.items()]
    )
    expected = len(drawn.tone) / 14 * seen[1:]
    assert chisquare([*counts, nothing.sum()], [*expected, len(drawn.tone) - expected.sum()]).pvalue > 0.001
    assert np.array_equal(np.sum(list(traces.values()), axis=0), ~nothing)
    assert np.array_equal(drawn.warped, traces["rotate"] | (drawn.warp != np.eye(2, 3)).any(axis=(1, 2)))
    assert np.array_equal(drawn.jittered, traces["brightness"] | tinted | pivoted)


def test_strengths_and_signs_are_uniform():
    drawn = draw()
    sharper = drawn.sharpness[drawn.sharpness != 1] - 1
    sheared = drawn.warp[(drawn.warp[:, 0, 1] != 0) & (drawn.warp[:, 1, 0] == 0), 0, 1]
    for signed in (sharper, sheared):
        strength = np.rint(signed * 30 / 0.99).astype(int)
        np.testing.assert_allclose(signed, 0.99 * strength / 30, atol=1e-6)
        assert chisquare(np.delete(np.bincount(strength + 30, minlength=61), 30)).pvalue > 0.001
    solarized = drawn.level[drawn.tone == Tone.SOLARIZE]
    assert chisquare(np.unique(solarized, return_counts=True)[1]).pvalue > 0.001
    assert set(drawn.level[drawn.tone == Tone.POSTERIZE]) == set(range(2, 9))


def test_draws_depend_on_seed_epoch_and_position_alone():
    whole = draw(WITH_OTHERS, 500)
    positions = np.array([17, 3, 4, 5, 499, 3])
    some = WITH_OTHERS.draw(0, 0, positions, img_size=SIDE, rarity=np.zeros(6))
    for name in (field.name for field in fields(Drawn) if field.name != "boxes"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[positions])
    for other in (draw(WITH_OTHERS, 500, seed=1), draw(WITH_OTHERS, 500, epoch=1)):
        assert (other.tone != whole.tone).mean() > 0.2


def test_what_is_drawn_without_it_stays_as_it_was():
    row = generator(Purpose.AUGMENTATION, 3, 1, block=16 * 7).random(64)
    draws = augment._uniform_draws(3, 1, np.array([7]))
    assert draws["rotation"] == row[0]
    assert draws["crop_box"].tolist() == [row[18:40].tolist()]
    assert draws["erased_box"].tolist() == [row[40:62].tolist()]

    others, both = draw(replace(WITH_OTHERS, auto_augment="none"), 500), draw(WITH_OTHERS, 500)
    auto = draw(n=500)
    assert not others.tone.any()
    assert not others.level.any()
    for name in ("sigma", "erased"):
        np.testing.assert_array_equal(getattr(both, name), getattr(others, name))
    for names, changed in ((("warp", "warped"), auto.warped), (("color", "pivot", "jittered"), auto.jittered)):
        for name in names:
            np.testing.assert_array_equal(getattr(both, name)[~changed], getattr(others, name)[~changed])
    np.testing.assert_array_equal(both.sharpness, np.where(auto.sharpness != 1, auto.sharpness, others.sharpness))


def test_operations_come_after_what_else_was_drawn():
    def warp(**change: float) -> np.ndarray:
        neutral = dict.fromkeys(("degrees", "translate_x", "translate_y", "shear", "hflip", "vflip"), 0.0) | {
            "scale": 1
        }
        return warp_matrices(**{name: np.full(1, change.get(name, value)) for name, value in neutral.items()})

    # of two warps in one, rotation comes before shift
    np.testing.assert_allclose(
        composed_warps(warp(degrees=30), warp(translate_x=0.1)), warp(degrees=30, translate_x=0.1), atol=1e-6
    )
    rng = np.random.default_rng(0)
    (color, pivot, other_color, other_pivot) = rng.normal(size=(4, 1, 3, 3)).astype(np.float32)
    x = rng.normal(size=(3, 50))

    def applied(color: np.ndarray, pivot: np.ndarray, x: np.ndarray) -> np.ndarray:
        return color[0] @ x + pivot[0] @ x.mean(axis=1, keepdims=True)

    composed = composed_colors((color, pivot), (other_color, other_pivot))
    np.testing.assert_allclose(
        applied(*composed, x), applied(other_color, other_pivot, applied(color, pivot, x)), atol=1e-5
    )


def test_the_flag_turns_it_on():
    assert make_augmentation(parse_args(["--aa", "trivial"])[0]).auto_augment == "trivial"
    assert make_augmentation(parse_args([])[0]).auto_augment == "none"
    with pytest.raises(UserError, match="auto_augment = 'rand' must be one of: none, trivial"):
        Augmentation(auto_augment="rand")


# Through the pipelines, against torchvision. Images of SIDE x SIDE pass the resize untouched: the operator is compared.


TOLERANCES = dict.fromkeys(SPACE, 1e-3) | {
    **dict.fromkeys(("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "sharpness"), 0.05),
    **dict.fromkeys(("brightness", "color", "contrast"), 0.1),
}
"""Of 255 levels."""
WHITE = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
ODD = {
    "one colour": np.full_like(WHITE, (7, 0, 255)),
    "too few to equalize": np.where(np.arange(SIDE**2).reshape(SIDE, SIDE, 1) < 100, [3, 250, 0], WHITE).astype(
        np.uint8
    ),
    "a third black": picture(SIDE, SIDE) * (np.arange(SIDE) >= SIDE // 3)[:, None],
    "a narrow range": 100 + picture(SIDE, SIDE) // 16,
}


class Case(NamedTuple):
    """An operation in a strength from 0 to 30, negative where the coin says so, and what it is done to."""

    operation: str
    strength: int
    pixels: np.ndarray
    changes: bool


CASES = [
    *(
        Case(name, strength, picture(SIDE, SIDE, seed=abs(strength)), name != "identity")
        for name, (_, signed) in SPACE.items()
        for strength in (30, -14 if signed else 14)
    ),
    *(Case(name, 0, pixels, False) for name in ("autocontrast", "equalize") for pixels in ODD.values()),
]


def by_dali(folder: Path, pictures: list[np.ndarray], augmentation: Augmentation, **options: Any) -> torch.Tensor:
    """The pictures, changed as those of epoch 0."""
    labels = np.zeros(len(pictures), dtype=int)
    sampler = WeightedSampler(labels, 1, sampling="none", seed=0)
    files = [save(folder / f"{i:03d}.png", pixels) for i, pixels in enumerate(pictures)]
    samples = Samples(tuple(files[i] for i in np.argsort(sampler.draw(0))), labels, ("a",))
    options |= {"training": True, "sampler": sampler, "augmentation": augmentation}
    return next(make_loader(samples, batch_size=len(files), img_size=SIDE, **options).epoch(0))[0].cpu()


def by_dali_on_a_gpu(folder: Path, pictures: list[np.ndarray], augmentation: Augmentation) -> torch.Tensor:
    return by_dali(folder, pictures, augmentation, device=torch.device("cuda"))


def by_resident(folder: Path, pictures: list[np.ndarray], augmentation: Augmentation) -> torch.Tensor:
    return by_dali(folder, pictures, augmentation, pipeline=ResidentLoader)


def by_reference(_: Path, pictures: list[np.ndarray], augmentation: Augmentation) -> torch.Tensor:
    drawn = augmentation.draw(0, 0, np.arange(len(pictures)), img_size=SIDE)
    images = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in pictures]
    return torch.stack([prepare(x, SIDE, None, drawn, i, mean=(0,) * 3, std=(1,) * 3) for i, x in enumerate(images)])


def by_torchvision(image: torch.Tensor, name: str, strength: int) -> torch.Tensor:
    theirs, (magnitudes, _) = THEIR_SPACE[name]
    steps = magnitudes(STRENGTHS, SIDE, SIDE)
    magnitude = 0.0 if steps is None else float(steps[abs(strength)]) * (-1 if strength < 0 else 1)
    on_bytes = name.upper() in Tone.__members__  # the others are not rounded here
    pixels = F.to_dtype(image, torch.uint8, scale=True) if on_bytes else image
    changed = THEIRS._apply_image_or_video_transform(pixels, theirs, magnitude, THEIRS.interpolation, THEIRS._fill)
    return changed.float() / 255 if on_bytes else changed


NEEDS_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize(
    "pipeline", (by_reference, by_resident, by_dali, pytest.param(by_dali_on_a_gpu, marks=NEEDS_A_GPU))
)
def test_operations_equal_torchvisions(pipeline, tmp_path, monkeypatch):
    """After a flip, which tells in what order the two are composed."""
    draw_others = augment._uniform_draws
    operations = np.array([list(SPACE).index(case.operation) for case in CASES])
    strengths = np.array([2 * abs(case.strength) + (case.strength < 0) for case in CASES])

    def draw_cases(seed: int, epoch: int, positions: np.ndarray) -> dict[str, np.ndarray]:
        chosen = {"auto_operation": (operations + 0.5) / 14, "auto_strength": (strengths + 0.5) / 62}
        return {**draw_others(seed, epoch, positions), **{name: draws[positions] for name, draws in chosen.items()}}

    monkeypatch.setattr(augment, "_uniform_draws", draw_cases)
    images = pipeline(tmp_path, [case.pixels for case in CASES], replace(ALONE, hflip=1.0))
    for image, (name, strength, pixels, changes) in zip(images, CASES, strict=True):
        original = torch.from_numpy(pixels).permute(2, 0, 1).flip(2) / 255
        difference = 255 * (image - by_torchvision(original, name, strength))
        # DALI's equalize comes within one level of torchvision's
        one_level = pipeline is by_dali_on_a_gpu or (pipeline is by_dali and name == "equalize")
        assert difference.abs().max() < (1.001 if one_level else TOLERANCES[name]), name
        assert not changes or difference.mean().abs() < 0.1, name
        assert not changes or 255 * (image - original).abs().mean() > 1, name


def test_both_pipelines_make_the_same_of_everything_at_once(tmp_path):
    """What others leave between two levels can become either in a tone, and so one step of it."""
    pictures = [picture(SIDE, SIDE, seed=i) for i in range(80)]
    difference = 255 * (by_dali(tmp_path, pictures, WITH_OTHERS) - by_reference(tmp_path, pictures, WITH_OTHERS)).abs()
    toned = draw(WITH_OTHERS, len(pictures)).tone > 0
    assert 10 < toned.sum() < 40
    assert difference[~toned].max() < 0.3
    assert (difference[toned] > 1.5).float().mean() < 1e-3
