"""Random augmentation: one description, which every pipeline executes alike.

What happens to an image is drawn here, as a pure function of (seed, epoch, position in the epoch), and handed as plain
numbers (`engine.data.transforms`) to whatever executes it, which so has no random state: a run resumes at any batch,
and two executors make the same picture. The steps, in this order, are

    crop and resize    a random resized crop of the image, or all of it, to a square, antialiased
    warp               rotation, affine (shear, zoom, shift) and flips in one resampling
    colour             brightness, contrast, saturation, hue as one matrix
    tone               posterize, solarize, autocontrast or equalize, on 8-bit values
    sharpness          away from, or towards, a smoothed picture
    blur               Gaussian
    erasing            of a rectangle, after normalisation: it becomes the mean colour

each on by itself with its own probability, under torchvision's names and definitions. ``auto_augment`` draws one more
operation for every image (`engine.data.trivial`), which takes its place among them: a warp after the others, colours
after the jitter, and a sharpness instead of the other one; the tone comes from it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from engine.data.counter import DRAWS_PER_BLOCK, Purpose, generator
from engine.data.transforms import (
    TRIES,
    color_matrices,
    composed_colors,
    composed_warps,
    random_boxes,
    warp_matrices,
    widest_boxes,
)
from engine.data.trivial import Trivial, trivial
from engine.errors import UserError

PROBABILITIES = ("rotation", "affine", "jitter", "hflip", "vflip", "sharpness", "blur", "erasing")
"""The fields of `Augmentation` that are one, each of an operator."""
AUTO_AUGMENTS = ("none", "trivial")

_BOX = 2 * TRIES + 2
_DRAWS = {
    **dict.fromkeys(("rotation", "affine", "hflip", "jitter"), 1),
    **dict.fromkeys(("degrees", "translate_x", "translate_y", "scale", "shear"), 1),
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 1),
    **dict.fromkeys(("vflip", "sharpness", "blur", "sigma", "erasing"), 1),
    "crop_box": _BOX,
    "erased_box": _BOX,
    **dict.fromkeys(("auto_operation", "auto_strength"), 1),
}
"""How many of an image's draws are for what. Their order is part of every run's results."""
_BLOCKS_PER_IMAGE = -(-sum(_DRAWS.values()) // DRAWS_PER_BLOCK)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What happens to n images.

    Attributes:
        boxes: (n, 4) int32, the part of the image that is shown: top, left, height, width in its pixels; None: all.
        warped, jittered: (n,) bool, whether ``warp``, and ``color`` with ``pivot``, change anything.
        warp: (n, 2, 3) float32, from output to input coordinates in fractions of the side.
        color, pivot: (n, 3, 3) float32, y = color @ x + pivot @ mean(x).
        tone: (n,) int32, a `Tone`; 0: none.
        level: (n,) float32, of the tone: the bits that posterize keeps, the value that solarize begins at (of 255).
        sharpness: (n,) float32, 1 leaves the image as it is, 0 smooths it, 2 sharpens it.
        sigma: (n,) float32, of the Gaussian blur, in pixels of the square; 0: none.
        erased: (n, 4) int32, top, left, height, width in the square; zeros: nothing.
    """

    boxes: np.ndarray | None
    warped: np.ndarray
    warp: np.ndarray
    jittered: np.ndarray
    color: np.ndarray
    pivot: np.ndarray
    tone: np.ndarray
    level: np.ndarray
    sharpness: np.ndarray
    sigma: np.ndarray
    erased: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """Which operators are on, how often and how strongly. Pairs are uniform ranges; a probability of 0 is off.

    Attributes:
        crop_scale: share of the image's area that a random resized crop shows; (1, 1): no crop.
        crop_ratio: of its width to its height; uniform in the logarithm.
        rotation, affine, jitter, hflip, vflip, sharpness, blur, erasing: probabilities, each on its own. No flips where
            left and right, or up and down, differ in meaning (digits, text).
        degrees: rotation, counter-clockwise, uniform in [-degrees, degrees].
        translate: shift along x and along y, each uniform in [-translate, translate], in fractions of the side.
        scale: zoom factor.
        shear: along x, uniform in [-shear, shear] degrees.
        brightness, contrast, saturation: factors, each uniform in [max(0, 1 - value), 1 + value].
        hue: shift, uniform in [-hue, hue], in turns of the colour circle.
        sharpness_factor: as torchvision's; 0 smooths, 1 changes nothing, 2 sharpens.
        sigma: of the blur, in pixels of the square.
        erased_area: share of the square; its ratio of sides is uniform in the logarithm between 0.3 and 3.3.
        minority: between 0 and 1: of the rarest class, every probability p that is not 0 is raised to
            p + minority * (1 - p), of the others by less, in proportion to the logarithm of their rarity.
        auto_augment: "trivial" draws an operation of TrivialAugment for every image, whatever its class; "none": off.

    Raises:
        UserError: a value out of range.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotation: float = 0.3
    affine: float = 0.3
    jitter: float = 0.3
    hflip: float = 0.3
    vflip: float = 0.0
    sharpness: float = 0.0
    blur: float = 0.0
    erasing: float = 0.0
    degrees: float = 15.0
    translate: float = 0.1
    scale: tuple[float, float] = (0.9, 1.1)
    shear: float = 10.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05
    sharpness_factor: float = 1.2
    sigma: tuple[float, float] = (0.1, 2.0)
    erased_area: tuple[float, float] = (0.02, 1 / 3)
    minority: float = 0.0
    auto_augment: str = "none"

    def __post_init__(self) -> None:
        limits = dict.fromkeys((*PROBABILITIES, "translate", "minority"), 1.0)
        limits |= {"degrees": 180.0, "shear": 80.0, "hue": 0.5}
        limits |= dict.fromkeys(("brightness", "contrast", "saturation", "sharpness_factor"), 10.0)
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"augmentation: {name} = {getattr(self, name)} must lie between 0 and {limit:g}")
        shares = {"crop_scale": 1.0, "erased_area": 1.0}
        for name in (field.name for field in fields(self) if isinstance(field.default, tuple)):
            pair, limit = getattr(self, name), shares.get(name, 100.0)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= limit:
                raise UserError(
                    f"augmentation: {name} = {pair} must be two numbers above 0 and up to {limit:g}, the smaller first"
                )
        if self.auto_augment not in AUTO_AUGMENTS:
            known = ", ".join(AUTO_AUGMENTS)
            raise UserError(f"augmentation: auto_augment = {self.auto_augment!r} must be one of: {known}")

    @property
    def crops(self) -> bool:
        return self.crop_scale != (1.0, 1.0)

    @property
    def tones(self) -> bool:
        """Whether any image can get a tone."""
        return self.auto_augment != "none"

    def draw(
        self,
        seed: int,
        epoch: int,
        positions: np.ndarray,
        *,
        img_size: int,
        sizes: np.ndarray | None = None,
        rarity: np.ndarray | None = None,
    ) -> Drawn:
        """What happens to the images at ``positions``, (n,) places in the epoch; the batch size plays no part.

        Args:
            img_size: side of the square, in pixels.
            sizes: (n, 2), heights and widths of the images themselves; needed for crops alone.
            rarity: (n,) in [0, 1], of each image's class (`class_rarity`); needed for ``minority`` alone.
        """
        n = len(positions)
        draws = _uniform_draws(seed, epoch, positions)
        raised = self.minority * rarity if rarity is not None else 0.0
        on = {name: draws[name] < _raised(getattr(self, name), raised) for name in PROBABILITIES}

        def between(name: str, low: float, high: float, switch: str, off: float) -> np.ndarray:
            return np.where(on[switch], low + draws[name] * (high - low), off)

        def around_one(name: str) -> np.ndarray:
            value = getattr(self, name)
            return between(name, max(0.0, 1 - value), 1 + value, "jitter", 1)

        color, pivot = color_matrices(
            brightness=around_one("brightness"),
            contrast=around_one("contrast"),
            saturation=around_one("saturation"),
            hue=between("hue", -self.hue, self.hue, "jitter", 0),
        )
        warp = warp_matrices(
            degrees=between("degrees", -self.degrees, self.degrees, "rotation", 0),
            translate_x=between("translate_x", -self.translate, self.translate, "affine", 0),
            translate_y=between("translate_y", -self.translate, self.translate, "affine", 0),
            scale=between("scale", *self.scale, "affine", 1),
            shear=between("shear", -self.shear, self.shear, "affine", 0),
            hflip=on["hflip"],
            vflip=on["vflip"],
        )
        square = np.full((n, 2), img_size)
        nowhere = np.zeros((n, 4), dtype=np.int32)
        erased = random_boxes(
            square, draws["erased_box"], area=self.erased_area, ratio=(0.3, 3.3), fallback=nowhere, smaller=True
        )
        drawn = Drawn(
            boxes=self._boxes(sizes, draws["crop_box"]),
            warped=on["rotation"] | on["affine"] | on["hflip"] | on["vflip"],
            warp=warp,
            jittered=on["jitter"],
            color=color,
            pivot=pivot,
            tone=np.zeros(n, dtype=np.int32),
            level=np.zeros(n, dtype=np.float32),
            sharpness=np.where(on["sharpness"], self.sharpness_factor, 1).astype(np.float32),
            sigma=between("sigma", *self.sigma, "blur", 0).astype(np.float32),
            erased=np.where(on["erasing"][:, None], erased, nowhere),
        )
        if self.auto_augment == "trivial":
            return _then(drawn, trivial(draws["auto_operation"], draws["auto_strength"], img_size))
        return drawn

    def _boxes(self, sizes: np.ndarray | None, draws: np.ndarray) -> np.ndarray | None:
        if not self.crops:
            return None
        assert sizes is not None, "a random resized crop depends on the image's size"
        fallback = widest_boxes(sizes, self.crop_ratio)
        return random_boxes(sizes, draws, area=self.crop_scale, ratio=self.crop_ratio, fallback=fallback)


def class_rarity(counts: np.ndarray) -> np.ndarray:
    """(num_classes,) float64: 0 for the largest class, 1 for the smallest, the logarithm of the count in between."""
    logs = np.log(np.maximum(counts, 1))
    span = logs.max() - logs[counts > 0].min()
    return np.clip((logs.max() - logs) / span, 0, 1) if span > 0 else np.zeros(len(counts))


def _then(drawn: Drawn, auto: Trivial) -> Drawn:
    color, pivot = composed_colors((drawn.color, drawn.pivot), (auto.color, auto.pivot))
    return replace(
        drawn,
        warped=drawn.warped | _differs(auto.warp, np.eye(2, 3)),
        warp=composed_warps(drawn.warp, auto.warp),
        jittered=drawn.jittered | _differs(auto.color, np.eye(3)),
        color=color,
        pivot=pivot,
        tone=auto.tone,
        level=auto.level,
        sharpness=np.where(auto.sharpness != 1, auto.sharpness, drawn.sharpness),
    )


def _differs(matrices: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return (matrices != matrix).any(axis=(1, 2))


def _raised(probability: float, by: np.ndarray | float) -> np.ndarray | float:
    return probability + by * (1 - probability) if probability > 0 else probability


def _uniform_draws(seed: int, epoch: int, positions: np.ndarray) -> Mapping[str, np.ndarray]:
    """The draws of n images by what they are for, (n,) or (n, k) float64 in [0, 1).

    Those of an image are a function of (seed, epoch, its position).
    """
    positions = np.asarray(positions, dtype=np.int64)
    draws = np.empty((len(positions), _BLOCKS_PER_IMAGE * DRAWS_PER_BLOCK))
    # A run of consecutive positions, as a batch is, takes one generator.
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    for start, stop in zip(starts, [*starts[1:], len(positions)], strict=False):
        block = int(positions[start]) * _BLOCKS_PER_IMAGE
        draws[start:stop] = generator(Purpose.AUGMENTATION, seed, epoch, block=block).random(draws[start:stop].shape)
    ends = np.cumsum(list(_DRAWS.values()))
    columns = {name: draws[:, end - width : end] for (name, width), end in zip(_DRAWS.items(), ends, strict=True)}
    return {name: column[:, 0] if _DRAWS[name] == 1 else column for name, column in columns.items()}
