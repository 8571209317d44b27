"""The drawn augmentation: its frequencies and ranges, and its matrices against torchvision through DALI."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from scipy.stats import binomtest

from engine.data import Augmentation
from engine.data.augment import Drawn, color_matrices, warp_matrices
from engine.errors import UserError
from tests.data_helpers import make_loader, make_samples, picture

SIDE = 48
OPERATORS = ("rotation", "affine", "hflip", "jitter")

# Frequencies and ranges


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Augmentation().draw(seed=0, epoch=0, positions=np.arange(20_000))


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_its_own_frequency(operator):
    chosen = Augmentation(probability=0.3, hflip=0.6).draw(1, 2, np.arange(20_000))
    expected = 0.6 if operator == "hflip" else 0.3
    assert binomtest(int(getattr(chosen, operator).sum()), 20_000, expected).pvalue > 0.001
    assert binomtest(int(getattr(chosen, operator).sum()), 20_000, expected + 0.05).pvalue < 1e-6


def test_operators_are_independent(drawn):
    correlation = np.corrcoef([getattr(drawn, operator) for operator in OPERATORS])
    assert np.abs(correlation - np.eye(4)).max() < 0.03


def test_off_means_untouched(drawn):
    identity = np.eye(2, 3, dtype=np.float32)
    assert 0.6 < drawn.warped.mean() < 0.7  # 1 - 0.7^3
    assert (drawn.warp[~drawn.warped] == identity).all()
    assert (drawn.warp[drawn.warped] != identity).any(axis=(1, 2)).all()
    assert (drawn.color[~drawn.jitter] == np.eye(3)).all()
    assert (drawn.pivot[~drawn.jitter] == 0).all()
    assert (drawn.color[drawn.jitter] != np.eye(3)).any(axis=(1, 2)).all()


def test_magnitudes_fill_their_ranges():
    always = Augmentation(probability=1, hflip=0)
    positions = np.arange(5000)
    rotation = replace(always, translate=0, scale=(1, 1), shear=0).draw(0, 0, positions).warp
    degrees = np.rad2deg(np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0]))
    assert -15 <= degrees.min() < -14.9
    assert 14.9 < degrees.max() <= 15
    shift = replace(always, degrees=0, scale=(1, 1), shear=0).draw(0, 0, positions).warp[:, :, 2]
    assert np.abs(shift).max() == pytest.approx(0.1, abs=1e-3)
    zoom = replace(always, degrees=0, translate=0, shear=0).draw(0, 0, positions).warp[:, 0, 0]
    assert (1 / zoom).min() == pytest.approx(0.9, abs=1e-3)
    assert (1 / zoom).max() == pytest.approx(1.1, abs=1e-3)
    brightness = replace(always, contrast=0, saturation=0, hue=0).draw(0, 0, positions).color[:, 0, 0]
    assert (brightness.min(), brightness.max()) == pytest.approx((0.8, 1.2), abs=1e-3)


# A pure function of (seed, epoch, position)


def test_draws_depend_on_seed_epoch_and_position_alone(drawn):
    positions = np.array([17, 3, 4, 5, 19_999, 3])
    some = Augmentation().draw(0, 0, positions)
    for name in (*OPERATORS, "warp", "color", "pivot"):
        np.testing.assert_array_equal(getattr(some, name), getattr(drawn, name)[positions])
    for seed, epoch in ((1, 0), (0, 1)):
        other = Augmentation().draw(seed, epoch, np.arange(20_000))
        assert (other.hflip != drawn.hflip).mean() > 0.3


def test_no_positions_give_no_draws():
    assert Augmentation().draw(0, 0, np.arange(0)).warp.shape == (0, 2, 3)


def test_flip_can_be_switched_off_alone():
    chosen = Augmentation(hflip=0).draw(0, 0, np.arange(1000))
    assert not chosen.hflip.any()
    assert chosen.rotation.any()


@pytest.mark.parametrize(
    "wrong",
    [{"probability": 1.1}, {"hflip": -0.1}, {"hue": 0.6}, {"degrees": -1}, {"scale": (1.1, 0.9)}, {"scale": (0, 1)}],
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Augmentation(**wrong)


# Through DALI, against torchvision: images of SIDE x SIDE pass the resize untouched, so only the operator is compared.


NO_WARP = {"degrees": 0.0, "translate_x": 0.0, "translate_y": 0.0, "scale": 1.0, "shear": 0.0, "hflip": False}
NO_COLOR = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


def repeated(neutral: dict[str, Any], change: dict[str, Any], n: int) -> dict[str, np.ndarray]:
    return {name: np.full(n, change.get(name, value)) for name, value in neutral.items()}


@dataclass(frozen=True)
class Fixed(Augmentation):
    """One and the same change for every image."""

    change: Any = None

    def draw(self, seed: int, epoch: int, positions: np.ndarray) -> Drawn:
        n = len(positions)
        warped = np.full(n, not NO_WARP.keys().isdisjoint(self.change))
        jitter = np.full(n, not NO_COLOR.keys().isdisjoint(self.change))
        warp = warp_matrices(**repeated(NO_WARP, self.change, n))
        return Drawn(warped, warped, warped, jitter, warp, *color_matrices(**repeated(NO_COLOR, self.change, n)))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return make_samples(tmp_path_factory.mktemp("augment"), (2, 2), height=SIDE, width=SIDE)


def changed(samples, **change) -> torch.Tensor:
    loader = make_loader(samples, training=True, img_size=SIDE, augmentation=Fixed(change=change))
    images, labels = next(loader.epoch(0))
    order = loader.sampler.draw(0)
    assert labels.tolist() == samples.labels[order].tolist()
    return images[np.argsort(order)]


def plain(samples) -> torch.Tensor:
    return next(make_loader(samples, img_size=SIDE).epoch(0))[0]


def levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs() * 255


BILINEAR = {"interpolation": F.InterpolationMode.BILINEAR}


@pytest.mark.parametrize("degrees", [-15.0, 7.0, 90.0])
def test_rotation_equals_torchvision(samples, degrees):
    expected = F.rotate(plain(samples), degrees, **BILINEAR)
    difference = levels(changed(samples, degrees=degrees), expected)
    assert difference.max() < 0.05
    # The corners turned in from outside are black in both.
    assert (expected == 0).any() == (degrees != 90.0)


@pytest.mark.parametrize(
    ("translate", "scale", "shear"),
    [
        ((4, 0), 1.0, 0.0),
        ((0, -3), 1.0, 0.0),
        ((0, 0), 0.9, 0.0),
        ((0, 0), 1.1, 0.0),
        ((0, 0), 1.0, 10.0),
        ((3, -2), 1.1, -8.0),
    ],
)
def test_affine_equals_torchvision(samples, translate, scale, shear):
    x, y = translate
    image = plain(samples)
    expected = F.affine(image, angle=0.0, translate=[x, y], scale=scale, shear=[shear, 0.0], **BILINEAR)
    actual = changed(samples, translate_x=x / SIDE, translate_y=y / SIDE, scale=scale, shear=shear)
    assert levels(actual, expected).max() < 0.05
    assert levels(actual, image).mean() > 1


def test_horizontal_flip_is_exact(samples):
    assert torch.equal(changed(samples, hflip=True), F.horizontal_flip(plain(samples)))


def test_rotation_affine_and_flip_compose_in_torchvisions_order(samples):
    """Rotation first. torchvision samples twice and so blurs: smooth pictures are compared, away from the border."""
    image = F.gaussian_blur(plain(samples), [9, 9])
    expected = F.rotate(image, 12.0, **BILINEAR)
    expected = F.affine(expected, angle=0.0, translate=[4, -2], scale=1.1, shear=[9.0, 0.0], **BILINEAR)
    expected = F.gaussian_blur(F.horizontal_flip(expected), [9, 9])
    change = {"translate_x": 4 / SIDE, "translate_y": -2 / SIDE, "scale": 1.1, "shear": 9.0, "hflip": True}
    actual = F.gaussian_blur(F.gaussian_blur(changed(samples, degrees=12.0, **change), [9, 9]), [9, 9])
    inner = (..., slice(12, -12), slice(12, -12))
    assert levels(actual, expected)[inner].mean() < 1.0
    assert levels(F.horizontal_flip(actual), expected)[inner].mean() > 10

    def matrix(**change: Any) -> np.ndarray:
        return np.vstack([warp_matrices(**repeated(NO_WARP, change, 1))[0], [0, 0, 1]])

    flip, affine = matrix(hflip=True), matrix(**change | {"hflip": False})
    rotate = matrix(degrees=12.0)  # from output to input the last operator comes first
    np.testing.assert_allclose(matrix(degrees=12.0, **change), rotate @ affine @ flip, atol=1e-6)
    assert np.abs(affine @ rotate @ flip - rotate @ affine @ flip).max() > 1e-2


@pytest.mark.parametrize("factor", [0.8, 1.2])
@pytest.mark.parametrize("operator", ["brightness", "contrast", "saturation"])
def test_color_factor_equals_torchvision(samples, operator, factor):
    image = plain(samples)
    expected = getattr(F, f"adjust_{operator}")(image, factor)
    actual = changed(samples, **{operator: factor})
    assert levels(actual, expected).max() < 0.1
    assert levels(actual, image).mean() > 1
    assert actual.max() <= 1


def test_color_factors_compose_in_order(samples):
    image = plain(samples)
    expected = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(image, 0.85), 0.8), 1.15)
    assert levels(changed(samples, brightness=0.85, contrast=0.8, saturation=1.15), expected).max() < 0.2


def test_hue_comes_after_saturation():
    def matrix(**change: float) -> np.ndarray:
        return color_matrices(**repeated(NO_COLOR, change, 1))[0][0]

    hue, saturation = matrix(hue=0.1), matrix(saturation=0.5)
    np.testing.assert_allclose(matrix(hue=0.1, saturation=0.5), hue @ saturation, atol=1e-6)
    assert np.abs(saturation @ hue - hue @ saturation).max() > 1e-2


@pytest.mark.parametrize("hue", [-0.05, 0.05, 0.1])
def test_hue_turns_as_far_as_torchvisions_and_keeps_grey_and_mean(hue):
    rgb = torch.tensor(picture(40, 40) / 255).permute(2, 0, 1)
    color, pivot = color_matrices(**repeated(NO_COLOR, {"hue": hue}, 1))
    turned = torch.einsum("ij,jhw->ihw", torch.tensor(color[0], dtype=torch.float64), rgb)
    assert (pivot == 0).all()
    torch.testing.assert_close(turned.mean(dim=0), rgb.mean(dim=0), atol=1e-6, rtol=0)
    np.testing.assert_allclose(color[0] @ np.full(3, 0.4), 0.4, atol=1e-6)

    def chroma_angle(image: torch.Tensor) -> torch.Tensor:
        r, g, b = image
        return torch.atan2(3**0.5 * (g - b), 2 * r - g - b)

    colored = (rgb.amax(dim=0) - rgb.amin(dim=0)) > 0.1
    apart = (chroma_angle(turned) - chroma_angle(F.adjust_hue(rgb, hue)))[colored]
    apart = torch.rad2deg(torch.atan2(apart.sin(), apart.cos())).abs()
    assert apart.max() < 2.5, "degrees; HSV's hue is an angle on a hexagon, this one on a circle"


def test_the_loader_changes_the_drawn_images_and_no_others(tmp_path):
    samples = make_samples(tmp_path, (20, 20), height=SIDE, width=SIDE)
    augmentation = Augmentation()
    loader = make_loader(samples, training=True, batch_size=10, img_size=SIDE, augmentation=augmentation, seed=3)
    images = torch.cat([images for images, _ in loader.epoch(2)])
    originals = torch.cat([images for images, _ in make_loader(samples, img_size=SIDE).epoch(0)])
    originals = originals[loader.sampler.draw(2)]
    drawn = augmentation.draw(3, 2, np.arange(40))
    same = (images == originals).flatten(1).all(dim=1).numpy()
    np.testing.assert_array_equal(same, ~(drawn.warped | drawn.jitter))
    assert 0 < same.sum() < 40
    only_flipped = drawn.hflip & ~drawn.rotation & ~drawn.affine & ~drawn.jitter
    assert only_flipped.any()
    assert torch.equal(images[only_flipped], originals[only_flipped].flip(3))
