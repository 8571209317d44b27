"""The augmentation of `engine.data.augment` by torchvision's functions, which the other pipelines follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from engine.data.augment import Drawn
from engine.data.transforms import Tone


def prepare(
    image: Tensor,
    img_size: int,
    box: np.ndarray | None,
    drawn: Drawn | None,
    i: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """One image as the model sees it: (3, H, W) uint8 RGB -> (3, img_size, img_size) float32, normalised.

    ``box`` is the part of it that is shown, None: all. ``drawn`` holds under ``i`` what happens to it on the way; None:
    nothing.
    """
    if box is not None:
        image = F.crop(image, *box.tolist())
    x = F.resize(image.float() / 255, [img_size, img_size], F.InterpolationMode.BILINEAR, antialias=True)
    if drawn is not None:
        x = _change(x, drawn, i)
    x = F.normalize(x, list(mean), list(std))
    if drawn is not None:
        x = F.erase(x, *drawn.erased[i].tolist(), torch.zeros(()))
    return x


def _change(x: Tensor, drawn: Drawn, i: int) -> Tensor:
    if drawn.warped[i]:
        a, b, c, d, e, f = drawn.warp[i].ravel().tolist()
        side = x.shape[-1]
        # the coefficients of a perspective without perspective, in pixels
        x = F.perspective(x, None, None, F.InterpolationMode.BILINEAR, None, [a, b, c * side, d, e, f * side, 0.0, 0.0])
    if drawn.jittered[i]:
        color, pivot = torch.from_numpy(drawn.color[i]), torch.from_numpy(drawn.pivot[i])
        shift = pivot @ x.mean((1, 2))
        x = (torch.einsum("ij,jhw->ihw", color, x) + shift[:, None, None]).clamp(0, 1)
    if drawn.tone[i]:
        x = _toned(x, int(drawn.tone[i]), float(drawn.level[i]))
    if drawn.sharpness[i] != 1:
        x = F.adjust_sharpness(x, float(drawn.sharpness[i]))
    if drawn.sigma[i] > 0:
        x = F.gaussian_blur(x, [2 * blur_radius(drawn.sigma[i], x.shape[-1]) + 1] * 2, [float(drawn.sigma[i])] * 2)
    return x


def _toned(x: Tensor, tone: int, level: float) -> Tensor:
    pixels = (255 * x).round().to(torch.uint8)
    if tone == Tone.POSTERIZE:
        pixels = F.posterize(pixels, int(level))
    elif tone == Tone.SOLARIZE:
        pixels = F.solarize(pixels, level)
    elif tone == Tone.AUTOCONTRAST:
        pixels = F.autocontrast(pixels)
    else:
        pixels = F.equalize(pixels)
    return pixels.float() / 255


def blur_radius(sigma: float, img_size: int) -> int:
    """Of the Gaussian's window, three standard deviations; reflection at the border gives no more than the image."""
    return min(math.ceil(3 * sigma), img_size - 1)
