"""The drawn augmentation: its frequencies and ranges, and each operator of each pipeline against torchvision."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from scipy.stats import binomtest, ks_2samp
from torchvision.transforms import RandomErasing, RandomResizedCrop

from benchmarks.parity import NO_COLOR, NO_WARP, OPERATIONS, Fixed, by_operator, pictures, repeated
from engine.data import Augmentation, DaliLoader, ResidentLoader, TorchvisionLoader
from engine.data.augment import PROBABILITIES, Drawn, class_rarity
from engine.data.decode import decode_image
from engine.data.torchvision_steps import prepare
from engine.data.transforms import centre_boxes, color_matrices, random_boxes, warp_matrices, widest_boxes
from engine.errors import UserError
from tests.data_helpers import make_loader, make_samples, picture

SIDE = 48
PIPELINES = pytest.mark.parametrize("pipeline", (DaliLoader, ResidentLoader, TorchvisionLoader))
NEVER = dict.fromkeys(PROBABILITIES, 0.0)
# An operator leaves its own trace in what is drawn
TRACES = {
    "rotation": lambda drawn: np.abs(drawn.warp[:, 0, 1]) > 0,
    "affine": lambda drawn: np.abs(drawn.warp[:, 0, 2]) > 0,
    "hflip": lambda drawn: drawn.warp[:, 0, 0] < 0,
    "vflip": lambda drawn: drawn.warp[:, 1, 1] < 0,
    "jitter": lambda drawn: drawn.jittered,
    "sharpness": lambda drawn: drawn.sharpness != 1,
    "blur": lambda drawn: drawn.sigma > 0,
    "erasing": lambda drawn: drawn.erased[:, 2] > 0,
}


def draw(augmentation: Augmentation, n: int = 20_000, seed: int = 0, epoch: int = 0, **options: Any) -> Drawn:
    return augmentation.draw(seed, epoch, np.arange(n), **({"img_size": SIDE} | options))


# Frequencies and ranges


@pytest.mark.parametrize("operator", PROBABILITIES)
def test_every_operator_has_its_own_frequency(operator):
    drawn = draw(Augmentation(**NEVER | {operator: 0.3}), seed=1, epoch=2)
    on = int(TRACES[operator](drawn).sum())
    assert binomtest(on, 20_000, 0.3).pvalue > 0.001
    assert binomtest(on, 20_000, 0.35).pvalue < 1e-6


def test_operators_are_independent():
    often = dict.fromkeys(PROBABILITIES, 0.5)
    alone = [TRACES[name](draw(Augmentation(**NEVER | {name: 0.5}))) for name in PROBABILITIES]
    assert np.abs(np.corrcoef(alone) - np.eye(len(alone))).max() < 0.03
    together = draw(Augmentation(**often))
    for name, on in zip(PROBABILITIES, alone, strict=True):
        if name not in ("rotation", "affine", "hflip", "vflip"):  # which one matrix holds together
            assert np.array_equal(TRACES[name](together), on), name


def test_off_means_untouched():
    drawn = draw(Augmentation())
    identity = np.eye(2, 3, dtype=np.float32)
    assert 0.6 < drawn.warped.mean() < 0.7  # 1 - 0.7^3
    assert (drawn.warp[~drawn.warped] == identity).all()
    assert (drawn.warp[drawn.warped] != identity).any(axis=(1, 2)).all()
    assert (drawn.color[~drawn.jittered] == np.eye(3)).all()
    assert (drawn.pivot[~drawn.jittered] == 0).all()
    assert (drawn.color[drawn.jittered] != np.eye(3)).any(axis=(1, 2)).all()
    assert drawn.boxes is None
    assert (drawn.sharpness == 1).all()
    assert not drawn.sigma.any()
    assert not drawn.erased.any()


def test_magnitudes_fill_their_ranges():
    rotation = draw(Augmentation(**NEVER | {"rotation": 1}), 5000).warp
    degrees = np.rad2deg(np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0]))
    assert -15 <= degrees.min() < -14.9
    assert 14.9 < degrees.max() <= 15
    always = Augmentation(**NEVER | {"affine": 1})
    shift = draw(replace(always, scale=(1, 1), shear=0), 5000).warp[:, :, 2]
    assert np.abs(shift).max() == pytest.approx(0.1, abs=1e-3)
    zoom = draw(replace(always, translate=0, shear=0), 5000).warp[:, 0, 0]
    assert (1 / zoom).min() == pytest.approx(0.9, abs=1e-3)
    assert (1 / zoom).max() == pytest.approx(1.1, abs=1e-3)
    jitter = Augmentation(**NEVER | {"jitter": 1}, contrast=0, saturation=0, hue=0)
    brightness = draw(jitter, 5000).color[:, 0, 0]
    assert (brightness.min(), brightness.max()) == pytest.approx((0.8, 1.2), abs=1e-3)
    sigma = draw(Augmentation(**NEVER | {"blur": 1}), 5000).sigma
    assert (sigma.min(), sigma.max()) == pytest.approx((0.1, 2.0), abs=2e-3)


SIZES = np.array([[100, 160], [64, 64], [37, 500], [400, 21]])


def test_crops_have_the_areas_and_ratios_asked_for_and_lie_inside():
    sizes = np.repeat(SIZES[:2], 3000, axis=0)
    boxes = draw(Augmentation(crop_scale=(0.2, 0.8), crop_ratio=(0.5, 2.0)), len(sizes), sizes=sizes).boxes
    top, left, height, width = boxes.T.astype(float)
    assert (boxes >= [0, 0, 1, 1]).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    area, ratio = height * width / sizes.prod(axis=1), width / height
    assert (area.min(), area.max()) == pytest.approx((0.2, 0.8), abs=0.02)
    assert (ratio.min(), ratio.max()) == pytest.approx((0.5, 2.0), rel=0.03)
    # every place that there is, the first and the last with the others
    free = sizes[:, 0] - height
    assert (top == 0).any()
    assert (top == free)[free > 5].any()


def test_crops_are_distributed_as_torchvisions():
    ours = draw(Augmentation(crop_scale=(0.08, 1)), 3000, sizes=np.tile(SIZES[0], (3000, 1))).boxes
    torch.manual_seed(0)
    image = torch.empty(3, *SIZES[0])
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001, column


@pytest.mark.parametrize("size", SIZES.tolist())
def test_where_no_try_fits_the_widest_centred_box_is_taken(size):
    never_fits = np.full((1, 22), 0.999)
    fallback = widest_boxes(np.array([size]), (0.7, 1.3))
    box = random_boxes(np.array([size]), never_fits, area=(2.0, 2.0), ratio=(0.7, 1.3), fallback=fallback)
    torch.manual_seed(0)
    theirs = RandomResizedCrop.get_params(torch.empty(3, *size), [2.0, 2.0], [0.7, 1.3])
    assert box[0].tolist() == list(theirs)


def test_erased_boxes_are_torchvisions():
    ours = draw(Augmentation(**NEVER | {"erasing": 1}), 3000).erased
    torch.manual_seed(0)
    image = torch.empty(3, SIDE, SIDE)
    theirs = [RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 3.3), [0.0])[:4] for _ in range(3000)]
    for column in range(4):
        assert ks_2samp(ours[:, column], np.array(theirs)[:, column]).pvalue > 0.001, column


def test_rarer_classes_are_changed_more_often():
    counts = np.array([1000, 100, 10, 0])
    np.testing.assert_allclose(class_rarity(counts)[:3], [0, 0.5, 1])
    assert (class_rarity(np.array([7, 7])) == 0).all()
    rarity = np.repeat([0.0, 0.5, 1.0], 7000)
    drawn = draw(Augmentation(**NEVER | {"jitter": 0.2}, minority=0.5), len(rarity), rarity=rarity)
    for level, expected in ((0.0, 0.2), (0.5, 0.4), (1.0, 0.6)):
        on = drawn.jittered[rarity == level]
        assert binomtest(int(on.sum()), len(on), expected).pvalue > 0.001
    assert not drawn.warped.any()  # what is off stays off


# A pure function of (seed, epoch, position)


EVERYTHING = Augmentation(**dict.fromkeys(PROBABILITIES, 0.5), crop_scale=(0.2, 1.0), minority=0.5)


def test_draws_depend_on_seed_epoch_and_position_alone():
    sizes, rarity = np.tile(SIZES, (500, 1)), np.linspace(0, 1, 2000)
    whole = draw(EVERYTHING, 2000, sizes=sizes, rarity=rarity)
    positions = np.array([17, 3, 4, 5, 1999, 3])
    some = EVERYTHING.draw(0, 0, positions, img_size=SIDE, sizes=sizes[positions], rarity=rarity[positions])
    for field in fields(Drawn):
        np.testing.assert_array_equal(getattr(some, field.name), getattr(whole, field.name)[positions])
    for seed, epoch in ((1, 0), (0, 1)):
        other = draw(EVERYTHING, 2000, seed, epoch, sizes=sizes, rarity=rarity)
        assert (other.jittered != whole.jittered).mean() > 0.3


def test_no_positions_give_no_draws():
    assert draw(Augmentation(), 0).warp.shape == (0, 2, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rotation": 1.1}, {"hflip": -0.1}, {"hue": 0.6}, {"degrees": -1}, {"scale": (1.1, 0.9)}, {"scale": (0, 1)}),
        *({"crop_scale": (0.5, 1.5)}, {"crop_ratio": (0, 1)}, {"sigma": (2, 1)}, {"minority": 2}),
    ],
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Augmentation(**wrong)


# Through the pipelines, against torchvision. Images of SIDE x SIDE pass the resize untouched: the operator is compared.


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return make_samples(tmp_path_factory.mktemp("augment"), (2, 2), height=SIDE, width=SIDE)


def changed(pipeline, samples, img_size: int = SIDE, **change) -> torch.Tensor:
    """The samples, changed; by torchvision as its loader's workers do it, but here, since each would have to start."""
    augmentation, n = Fixed(change=change), len(samples)
    if pipeline is TorchvisionLoader:
        drawn = augmentation.draw(0, 0, np.arange(n))
        box = None if drawn.boxes is None else drawn.boxes[0]
        images = [torch.from_numpy(decode_image(file).copy()).permute(2, 0, 1) for file in samples.files]
        options = {"mean": (0, 0, 0), "std": (1, 1, 1)}
        return torch.stack([prepare(image, img_size, box, drawn, i, **options) for i, image in enumerate(images)])
    loader = make_loader(samples, pipeline=pipeline, training=True, img_size=img_size, augmentation=augmentation)
    images, labels = next(loader.epoch(0))
    order = loader.sampler.draw(0)
    assert labels.tolist() == samples.labels[order].tolist()
    return images[np.argsort(order)]


def plain(samples) -> torch.Tensor:
    return torch.stack([torch.from_numpy(decode_image(f) / np.float32(255)).permute(2, 0, 1) for f in samples.files])


def levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs() * 255


ROUNDING = 1e-3  # one pipeline divides by 255, another multiplies by 1 / 255
BILINEAR = {"interpolation": F.InterpolationMode.BILINEAR}


@PIPELINES
@pytest.mark.parametrize("degrees", [-15.0, 90.0])
def test_rotation_equals_torchvision(pipeline, samples, degrees):
    expected = F.rotate(plain(samples), degrees, **BILINEAR)
    difference = levels(changed(pipeline, samples, degrees=degrees), expected)
    assert difference.max() < 0.05
    # The corners turned in from outside are black in both.
    assert (expected == 0).any() == (degrees != 90.0)


@PIPELINES
@pytest.mark.parametrize(
    ("translate", "scale", "shear"),
    [
        ((4, -3), 1.0, 0.0),
        ((0, 0), 0.9, 10.0),
        ((3, -2), 1.1, -8.0),
    ],
)
def test_affine_equals_torchvision(pipeline, samples, translate, scale, shear):
    x, y = translate
    image = plain(samples)
    expected = F.affine(image, angle=0.0, translate=[x, y], scale=scale, shear=[shear, 0.0], **BILINEAR)
    actual = changed(pipeline, samples, translate_x=x / SIDE, translate_y=y / SIDE, scale=scale, shear=shear)
    assert levels(actual, expected).max() < 0.05
    assert levels(actual, image).mean() > 1


@PIPELINES
def test_flips_are_exact(pipeline, samples):
    image = plain(samples)
    assert levels(changed(pipeline, samples, hflip=True), F.horizontal_flip(image)).max() < ROUNDING
    assert levels(changed(pipeline, samples, vflip=True), F.vertical_flip(image)).max() < ROUNDING
    both = F.vertical_flip(F.horizontal_flip(image))
    assert levels(changed(pipeline, samples, hflip=True, vflip=True), both).max() < ROUNDING


@PIPELINES
def test_rotation_affine_and_flip_compose_in_torchvisions_order(pipeline, samples):
    """Rotation first. torchvision samples twice and so blurs: smooth pictures are compared, away from the border."""
    image = F.gaussian_blur(plain(samples), [9, 9])
    expected = F.rotate(image, 12.0, **BILINEAR)
    expected = F.affine(expected, angle=0.0, translate=[4, -2], scale=1.1, shear=[9.0, 0.0], **BILINEAR)
    expected = F.gaussian_blur(F.horizontal_flip(expected), [9, 9])
    change = {"translate_x": 4 / SIDE, "translate_y": -2 / SIDE, "scale": 1.1, "shear": 9.0, "hflip": True}
    actual = F.gaussian_blur(F.gaussian_blur(changed(pipeline, samples, degrees=12.0, **change), [9, 9]), [9, 9])
    inner = (..., slice(12, -12), slice(12, -12))
    assert levels(actual, expected)[inner].mean() < 1.0
    assert levels(F.horizontal_flip(actual), expected)[inner].mean() > 10

    def matrix(**change: Any) -> np.ndarray:
        return np.vstack([warp_matrices(**repeated(NO_WARP, change, 1))[0], [0, 0, 1]])

    flip, affine = matrix(hflip=True), matrix(**change | {"hflip": False})
    rotate = matrix(degrees=12.0)  # from output to input the last operator comes first
    np.testing.assert_allclose(matrix(degrees=12.0, **change), rotate @ affine @ flip, atol=1e-6)
    assert np.abs(affine @ rotate @ flip - rotate @ affine @ flip).max() > 1e-2


@PIPELINES
@pytest.mark.parametrize(("operator", "factor"), [("brightness", 1.2), ("contrast", 0.8), ("saturation", 1.2)])
def test_color_factor_equals_torchvision(pipeline, samples, operator, factor):
    image = plain(samples)
    expected = getattr(F, f"adjust_{operator}")(image, factor)
    actual = changed(pipeline, samples, **{operator: factor})
    assert levels(actual, expected).max() < 0.1
    assert levels(actual, image).mean() > 1
    assert actual.max() <= 1


@PIPELINES
def test_color_factors_compose_in_order(pipeline, samples):
    image = plain(samples)
    expected = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(image, 0.85), 0.8), 1.15)
    assert levels(changed(pipeline, samples, brightness=0.85, contrast=0.8, saturation=1.15), expected).max() < 0.2


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


@PIPELINES
@pytest.mark.parametrize("box", ((5, 3, 30, 40), (0, 0, SIDE, SIDE), (10, 20, 3, 7)))
def test_resized_crop_equals_torchvision(pipeline, samples, box):
    """Magnified or as it is; what is reduced differs at the border, where torchvision cuts its filter off."""
    image = plain(samples)
    expected = F.resized_crop(image, *box, [SIDE, SIDE], antialias=True)
    assert levels(changed(pipeline, samples, boxes=box), expected).max() < 0.05


@PIPELINES
def test_a_reduced_crop_equals_torchvision_but_for_its_border(pipeline, samples):
    expected = F.resized_crop(plain(samples), 4, 2, 40, 44, [16, 16], antialias=True)
    difference = levels(changed(pipeline, samples, img_size=16, boxes=(4, 2, 40, 44)), expected)
    assert difference[..., 1:-1, 1:-1].max() < 0.05
    assert difference.max() < 5


@PIPELINES
@pytest.mark.parametrize("factor", (0.0, 2.0))
def test_sharpness_equals_torchvision(pipeline, samples, factor):
    image = plain(samples)
    actual = changed(pipeline, samples, sharpness=factor)
    assert levels(actual, F.adjust_sharpness(image, factor)).max() < 0.05
    assert levels(actual, image).mean() > 1


@PIPELINES
@pytest.mark.parametrize(("sigma", "window"), ((0.3, 3), (2.0, 13)))
def test_blur_equals_torchvision(pipeline, samples, sigma, window):
    image = plain(samples)
    actual = changed(pipeline, samples, sigma=sigma)
    assert levels(actual, F.gaussian_blur(image, [window, window], [sigma, sigma])).max() < 0.05
    assert sigma < 0.5 or levels(actual, image).mean() > 1


@PIPELINES
def test_a_blur_wider_than_the_image_is_cut_to_it(pipeline, samples):
    actual = changed(pipeline, samples, img_size=4, sigma=2.0)
    assert actual.isfinite().all()
    assert actual.std((2, 3)).max() < plain(samples).std()


@PIPELINES
def test_erasing_equals_torchvision(pipeline, samples):
    image = plain(samples)
    actual = changed(pipeline, samples, erased=(5, 40, 20, 8))
    assert levels(actual, F.erase(image, 5, 40, 20, 8, torch.zeros(()))).max() < ROUNDING


@pytest.mark.slow
def test_every_operator_of_the_triton_kernel_equals_torchvision():
    image = pictures()[:1]
    plain = torch.from_numpy(image).permute(0, 3, 1, 2) / 255
    for operation in OPERATIONS:
        if "hue" not in operation.change:  # which has another definition
            actual = by_operator(image, operation, "triton").cpu()
            assert levels(actual, operation.torchvision(plain)).max() < 0.05, operation.name


def test_erased_is_the_mean_colour_after_normalisation(samples):
    loaders = [
        make_loader(
            samples,
            pipeline=p,
            training=True,
            img_size=SIDE,
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.3, 0.4),
            augmentation=Fixed(change={"erased": (0, 0, 10, 10)}),
        )
        for p in (DaliLoader, TorchvisionLoader)
    ]
    for loader in loaders:
        images, _ = next(loader.epoch(0))
        assert not images[..., :10, :10].any()
        assert images[..., 10:, :].abs().mean() > 0.1


def test_the_centre_of_an_evaluated_image_is_shown(tmp_path):
    samples = make_samples(tmp_path, (1, 1), height=60, width=90)
    assert centre_boxes(np.array([[60, 90]]), 0.8).tolist() == [[6, 21, 48, 48]]
    for pipeline in (DaliLoader, TorchvisionLoader):
        images, _ = next(make_loader(samples, pipeline=pipeline, img_size=48, crop_pct=0.8).epoch(0))
        for i, file in enumerate(samples.files):
            pixels = np.asarray(Image.open(file))[6:54, 21:69]
            assert levels(images[i], torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255).max() < ROUNDING


def test_both_pipelines_make_the_same_of_a_whole_epoch(tmp_path):
    samples = make_samples(tmp_path, (9, 3), height=SIDE, width=SIDE)
    options = {"training": True, "img_size": SIDE, "augmentation": replace(EVERYTHING, crop_scale=(1, 1)), "seed": 4}
    for epoch in range(2):
        a, b = (make_loader(samples, pipeline=p, **options).epoch(epoch) for p in (DaliLoader, TorchvisionLoader))
        for (images, labels), (other_images, other_labels) in zip(a, b, strict=True):
            assert labels.tolist() == other_labels.tolist()
            assert levels(images, other_images).max() < 0.3


def test_the_loader_changes_the_drawn_images_and_no_others(tmp_path):
    samples = make_samples(tmp_path, (20, 20), height=SIDE, width=SIDE)
    augmentation = Augmentation()
    loader = make_loader(samples, training=True, batch_size=10, img_size=SIDE, augmentation=augmentation, seed=3)
    images = torch.cat([images for images, _ in loader.epoch(2)])
    originals = torch.cat([images for images, _ in make_loader(samples, img_size=SIDE).epoch(0)])
    originals = originals[loader.sampler.draw(2)]
    drawn = augmentation.draw(3, 2, np.arange(40), img_size=SIDE)
    same = (images == originals).flatten(1).all(dim=1).numpy()
    np.testing.assert_array_equal(same, ~(drawn.warped | drawn.jittered))
    assert 0 < same.sum() < 40
    only_flipped = (drawn.warp[:, 0, 0] == -1) & ~drawn.jittered
    assert only_flipped.any()
    assert torch.equal(images[only_flipped], originals[only_flipped].flip(3))
