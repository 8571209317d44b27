"""What augmentation does to an image, as plain numbers: crop boxes, warp matrices, colour matrices.

Geometry. A warp maps a point of the output to the point of the input that it shows. Coordinates (x, y) are fractions of
the square image's side: (0, 0) is its top left corner, (1, 1) its bottom right one. What lies outside is black.

Colour. Brightness b, contrast c, saturation s and hue h, in that order, are linear in a pixel x = (R, G, B), and the
last two leave grey as it is. So they compose into

    y = color @ x + pivot @ mean(x),    color = b c H(h) S(s),    pivot = b (1 - c) 1 w^T

where w are the luma weights and mean(x) is the image's mean pixel; y is clamped once, at the end. H turns colours about
the grey axis. torchvision turns them in HSV, which is not linear: it keeps a pixel's largest channel where H keeps its
mean; the hue moves by the same angle.

Tone. What is not linear in a pixel is done on the picture rounded to 8 bits, by `Tone`.

Boxes are (top, left, height, width) in pixels, as torchvision's functions take them.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])
TRIES = 10
"""How often a random box is drawn anew if it does not fit, before something that fits is taken instead."""


class Tone(IntEnum):
    """What is done to 8-bit values, each as torchvision does it to uint8. The numbers are what pipelines are told."""

    NONE = 0
    POSTERIZE = 1
    """keeps the highest ``level`` bits"""
    SOLARIZE = 2
    """turns values v >= ``level`` into 255 - v"""
    AUTOCONTRAST = 3
    """stretches each channel from its least and greatest value to 0 and 255"""
    EQUALIZE = 4
    """makes each channel's histogram level"""


def warp_matrices(
    *,
    degrees: np.ndarray,
    translate_x: np.ndarray,
    translate_y: np.ndarray,
    scale: np.ndarray,
    shear: np.ndarray,
    hflip: np.ndarray,
    vflip: np.ndarray,
) -> np.ndarray:
    """Rotation, then affine, then flips, all about the centre: (n, 2, 3) float32 from output to input coordinates.

    Args (each (n,)): as in ``Augmentation``; ``hflip`` and ``vflip`` bool. The affine part shears, zooms, then
    translates.
    """
    angle = np.deg2rad(degrees)
    rotate = _linear(np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle))
    zero = np.zeros_like(angle)
    zoom_shear = _linear(scale, -scale * np.tan(np.deg2rad(shear)), zero, scale)
    flip = _linear(np.where(hflip, -1.0, 1.0), zero, zero, np.where(vflip, -1.0, 1.0))

    # About the centre: out = flip (zoom_shear rotate in + shift), and the executor needs the inverse.
    inverse = np.linalg.inv(flip @ zoom_shear @ rotate)
    shift = flip @ np.stack([translate_x, translate_y], axis=-1)[..., None]
    centre = np.full((2, 1), 0.5)
    return np.concatenate([inverse, centre - inverse @ (centre + shift)], axis=-1).astype(np.float32)


def composed_warps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The warp that does ``first``, then ``second``: (n, 2, 3) float32 each."""
    # both lead from output to input, so that the last one is passed first
    linear = first[:, :, :2].astype(np.float64)
    shift = linear @ second[:, :, 2:] + first[:, :, 2:]
    return np.concatenate([linear @ second[:, :, :2], shift], axis=-1).astype(np.float32)


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


def composed_colors(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The ``color`` and ``pivot`` that do those of ``first``, then those of ``second``, with no clamp between.

    The mean that the second one turns about is the mean of what the first one makes: (color + pivot) @ mean(x).
    """
    (color1, pivot1), (color2, pivot2) = first, second
    color1, pivot1 = color1.astype(np.float64), pivot1.astype(np.float64)
    pivot = color2 @ pivot1 + pivot2 @ (color1 + pivot1)
    return (color2 @ color1).astype(np.float32), pivot.astype(np.float32)


def random_boxes(
    sizes: np.ndarray,
    draws: np.ndarray,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    fallback: np.ndarray,
    smaller: bool = False,
) -> np.ndarray:
    """A box in each image, of a random share of its area and a random ratio of width to height: (n, 4) int32.

    As torchvision's RandomResizedCrop and RandomErasing draw it: the share uniformly, the ratio uniformly in its
    logarithm, up to ``TRIES`` times until the box fits, and its place uniformly among those inside the image.

    Args:
        sizes: (n, 2), height and width.
        draws: (n, 2 * TRIES + 2) in [0, 1).
        fallback: (n, 4), taken where no try fits.
        smaller: whether a box must be smaller than the image in both directions to fit.
    """
    H, W = (sizes[:, i, None].astype(np.float64) for i in range(2))
    pixels = H * W * _between(draws[:, :TRIES], *area)
    ratios = np.exp(_between(draws[:, TRIES : 2 * TRIES], math.log(ratio[0]), math.log(ratio[1])))
    widths, heights = np.rint(np.sqrt(pixels * ratios)), np.rint(np.sqrt(pixels / ratios))
    most_h, most_w = H - smaller, W - smaller
    fits = (widths >= 1) & (heights >= 1) & (heights <= most_h) & (widths <= most_w)
    first = fits.argmax(axis=1)[:, None]
    h, w = (np.take_along_axis(v, first, axis=1)[:, 0] for v in (heights, widths))
    top = np.floor(draws[:, -2] * (H[:, 0] - h + 1))
    left = np.floor(draws[:, -1] * (W[:, 0] - w + 1))
    boxes = np.stack([top, left, h, w], axis=1)
    return np.where(fits.any(axis=1)[:, None], boxes, fallback).astype(np.int32)


def widest_boxes(sizes: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The largest centred box whose ratio of width to height lies in ``ratio``: (n, 4) int32 for (n, 2) sizes."""
    H, W = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    h = np.where(ratio[0] > W / H, np.rint(W / ratio[0]), H)
    w = np.where(ratio[1] < W / H, np.rint(H * ratio[1]), W)
    return np.stack([(H - h) // 2, (W - w) // 2, h, w], axis=1).astype(np.int32)


def centre_boxes(sizes: np.ndarray, share: float) -> np.ndarray:
    """The centred square of ``share`` times the shorter side: (n, 4) int32 for (n, 2) sizes.

    It is what resizing the shorter side to S / share and cutting out the central S x S keeps.
    """
    side = np.maximum(1, np.rint(share * sizes.min(axis=1))).astype(np.int64)
    top, left = ((sizes[:, i] - side) // 2 for i in range(2))
    return np.stack([top, left, side, side], axis=1).astype(np.int32)


def _between(draws: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + draws * (high - low)


def _linear(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.stack([np.stack([a, b], axis=-1), np.stack([c, d], axis=-1)], axis=-2)
