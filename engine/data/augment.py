"""Random augmentation as plain numbers: four operators, each switched on by itself with its own probability.

Rotation, affine (translation, scale, shear), horizontal flip and colour jitter, in torchvision's order and sense. What
happens to an image is drawn here, as a pure function of (seed, epoch, position in the epoch), and handed as matrices to
whatever executes it, which so has no random state: a run resumes at any batch, and two executors make the same picture.

Geometry. The three geometric operators compose into one matrix, so that the image is resampled once. It maps a point
of the output to the point of the input that it shows. Coordinates (x, y) are fractions of the square image's side:
(0, 0) is its top left corner, (1, 1) its bottom right one. What lies outside the image is black.

Colour. Brightness b, contrast c, saturation s and hue h, in that order, are linear in a pixel x = (R, G, B), and the
last two leave grey as it is. So they compose into

    y = color @ x + pivot @ mean(x),    color = b c H(h) S(s),    pivot = b (1 - c) 1 w^T

where w are the luma weights and mean(x) is the image's mean pixel; y is clamped once, at the end. H turns colours about
the grey axis. torchvision turns them in HSV, which is not linear: it keeps a pixel's largest channel where H keeps its
mean; the hue moves by the same angle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine.data.counter import DRAWS_PER_BLOCK, Purpose, generator
from engine.errors import UserError

LUMA = np.array([0.299, 0.587, 0.114])

_BLOCKS_PER_IMAGE = 4
_DRAWS = (
    *("rotation", "affine", "hflip", "jitter"),
    *("degrees", "translate_x", "translate_y", "scale", "shear"),
    *("brightness", "contrast", "saturation", "hue"),
)
"""What each of an image's draws is for. Their order is part of every run's results."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """What happens to n images.

    Attributes:
        rotation, affine, hflip, jitter: (n,) bool, whether that operator is on.
        warp: (n, 2, 3) float32, from output to input coordinates in fractions of the side.
        color, pivot: (n, 3, 3) float32, y = color @ x + pivot @ mean(x).
    """

    rotation: np.ndarray
    affine: np.ndarray
    hflip: np.ndarray
    jitter: np.ndarray
    warp: np.ndarray
    color: np.ndarray
    pivot: np.ndarray

    @property
    def warped(self) -> np.ndarray:
        """(n,) bool: whether any geometric operator is on."""
        return self.rotation | self.affine | self.hflip


@dataclass(frozen=True)
class Augmentation:
    """Four operators, each on with its own probability; a magnitude of zero leaves that part out.

    Attributes:
        probability: of rotation, of affine and of colour jitter, each on its own.
        hflip: probability of the horizontal flip; 0 where left and right differ in meaning (digits, text).
        degrees: rotation, counter-clockwise, uniform in [-degrees, degrees].
        translate: shift along x and along y, each uniform in [-translate, translate], in fractions of the side.
        scale: zoom factor, uniform between the two.
        shear: along x, uniform in [-shear, shear] degrees.
        brightness, contrast, saturation: factors, each uniform in [max(0, 1 - value), 1 + value].
        hue: shift, uniform in [-hue, hue], in turns of the colour circle.

    Raises:
        UserError: a value out of range.
    """

    probability: float = 0.3
    hflip: float = 0.3
    degrees: float = 15.0
    translate: float = 0.1
    scale: tuple[float, float] = (0.9, 1.1)
    shear: float = 10.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05

    def __post_init__(self) -> None:
        limits = {"probability": 1.0, "hflip": 1.0, "degrees": 180.0, "translate": 1.0, "shear": 80.0, "hue": 0.5}
        limits |= dict.fromkeys(("brightness", "contrast", "saturation"), 10.0)
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"augmentation: {name} = {getattr(self, name)} must lie between 0 and {limit:g}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"augmentation: scale = {self.scale} must be two factors above 0, the smaller one first")

    def draw(self, seed: int, epoch: int, positions: np.ndarray) -> Drawn:
        """What happens to the images at ``positions``, (n,) places in the epoch; the batch size plays no part."""
        draws = dict(zip(_DRAWS, _uniform_draws(seed, epoch, positions), strict=False))
        rotation, affine, jitter = (draws[name] < self.probability for name in ("rotation", "affine", "jitter"))
        hflip = draws["hflip"] < self.hflip

        def between(name: str, low: float, high: float) -> np.ndarray:
            return low + draws[name] * (high - low)

        def around_one(name: str) -> np.ndarray:
            return between(name, max(0.0, 1 - getattr(self, name)), 1 + getattr(self, name))

        warp = warp_matrices(
            degrees=np.where(rotation, between("degrees", -self.degrees, self.degrees), 0),
            translate_x=np.where(affine, between("translate_x", -self.translate, self.translate), 0),
            translate_y=np.where(affine, between("translate_y", -self.translate, self.translate), 0),
            scale=np.where(affine, between("scale", *self.scale), 1),
            shear=np.where(affine, between("shear", -self.shear, self.shear), 0),
            hflip=hflip,
        )
        color, pivot = color_matrices(
            brightness=np.where(jitter, around_one("brightness"), 1),
            contrast=np.where(jitter, around_one("contrast"), 1),
            saturation=np.where(jitter, around_one("saturation"), 1),
            hue=np.where(jitter, between("hue", -self.hue, self.hue), 0),
        )
        return Drawn(rotation, affine, hflip, jitter, warp, color, pivot)


def warp_matrices(
    *,
    degrees: np.ndarray,
    translate_x: np.ndarray,
    translate_y: np.ndarray,
    scale: np.ndarray,
    shear: np.ndarray,
    hflip: np.ndarray,
) -> np.ndarray:
    """Rotation, then affine, then flip, all about the centre: (n, 2, 3) float32 from output to input coordinates.

    Args (each (n,)): as in ``Augmentation``; ``hflip`` bool. The affine part shears, zooms, then translates.
    """
    angle = np.deg2rad(degrees)
    rotate = _linear(np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle))
    one, zero = np.ones_like(angle), np.zeros_like(angle)
    zoom_shear = _linear(scale, -scale * np.tan(np.deg2rad(shear)), zero, scale)
    flip = _linear(np.where(hflip, -1.0, 1.0), zero, zero, one)

    # About the centre: out = flip (zoom_shear rotate in + shift), and the executor needs the inverse.
    inverse = np.linalg.inv(flip @ zoom_shear @ rotate)
    shift = flip @ np.stack([translate_x, translate_y], axis=-1)[..., None]
    centre = np.full((2, 1), 0.5)
    return np.concatenate([inverse, centre - inverse @ (centre + shift)], axis=-1).astype(np.float32)


def color_matrices(
    *, brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, hue: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Brightness, contrast, saturation, then hue: ``color`` and ``pivot``, (n, 3, 3) float32 each (see the module).

    Args (each (n,)): three factors, and the hue shift in turns.
    """
    b, c, s, angle = (v[:, None, None] for v in (brightness, contrast, saturation, 2 * math.pi * hue))
    grey = np.ones((3, 1))
    saturate = s * np.eye(3) + (1 - s) * (grey @ LUMA[None])
    # Rodrigues' rotation about the grey axis, red towards green.
    turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    rotate = np.cos(angle) * np.eye(3) + np.sin(angle) * turn + (1 - np.cos(angle)) * (grey @ grey.T) / 3
    color = b * c * rotate @ saturate
    pivot = b * (1 - c) * (grey @ LUMA[None])
    return color.astype(np.float32), pivot.astype(np.float32)


def _linear(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.stack([np.stack([a, b], axis=-1), np.stack([c, d], axis=-1)], axis=-2)


def _uniform_draws(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """(draws of an image, n) float64 in [0, 1), column i a function of (seed, epoch, positions[i])."""
    positions = np.asarray(positions, dtype=np.int64)
    per_image = _BLOCKS_PER_IMAGE * DRAWS_PER_BLOCK
    draws = np.empty((len(positions), per_image))
    # A run of consecutive positions, as a batch is, takes one generator.
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    for start, stop in zip(starts, [*starts[1:], len(positions)], strict=False):
        block = int(positions[start]) * _BLOCKS_PER_IMAGE
        draws[start:stop] = generator(Purpose.AUGMENTATION, seed, epoch, block=block).random((stop - start, per_image))
    return draws.T
