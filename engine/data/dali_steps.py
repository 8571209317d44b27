"""The augmentation of `engine.data.augment` by DALI's operators, on the CPU or on a GPU.

`INPUTS` says what a pipeline is fed for it, `values` what that is for a planned batch, `prepare` what becomes of an
image. DALI's modules are handed in, so that nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.data.loader import Planned
from engine.data.torchvision_steps import blur_radius
from engine.data.transforms import Tone

BOX_INPUTS = {"start": ("INT32", 1), "shape": ("INT32", 1)}
"""By name: DALI's type and the number of dimensions of one sample."""
DRAWN_INPUTS = {
    "mirrored": ("INT32", 0),
    "warped": ("BOOL", 0),
    "warp": ("FLOAT", 2),
    "jittered": ("BOOL", 0),
    "color": ("FLOAT", 2),
    "pivot": ("FLOAT", 2),
    "sharpened": ("BOOL", 0),
    "sharpness": ("FLOAT", 0),
    "blurred": ("BOOL", 0),
    "sigma": ("FLOAT", 0),
    "window": ("INT32", 0),
    "erased": ("BOOL", 0),
    "erased_start": ("FLOAT", 1),
    "erased_shape": ("FLOAT", 1),
}
TONE_INPUTS = {"toned": ("BOOL", 0), "tone": ("INT32", 0), "kept_bits": ("UINT8", 0), "level": ("FLOAT", 0)}

MIRROR = np.array([[-1, 0, 1], [0, 1, 0]], dtype=np.float32)
"""A warp that is a horizontal flip and nothing else."""
SMOOTHING = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
"""torchvision's, for the sharpness."""


def values(planned: Planned) -> dict[str, np.ndarray]:
    """What the inputs hold for a batch; those of them that it has."""
    given: dict[str, np.ndarray] = {}
    img_size = planned.img_size
    if planned.boxes is not None:
        given |= {"start": planned.boxes[:, :2], "shape": planned.boxes[:, 2:]}
    drawn = planned.drawn
    if drawn is not None:
        windows = [2 * blur_radius(sigma, img_size) + 1 for sigma in drawn.sigma]
        erased = drawn.erased.astype(np.float32)
        mirrored = (drawn.warp == MIRROR).all(axis=(1, 2))
        given |= {
            "mirrored": mirrored.astype(np.int32),
            "warped": drawn.warped & ~mirrored,
            "warp": drawn.warp * np.array([1, 1, img_size], dtype=np.float32),  # the shift, in pixels
            "jittered": drawn.jittered,
            "color": drawn.color,
            "pivot": drawn.pivot,
            "toned": drawn.tone > 0,
            "tone": drawn.tone,
            "kept_bits": _highest_bits(np.where(drawn.tone == Tone.POSTERIZE, drawn.level, 8)),
            "level": drawn.level,
            "sharpened": np.not_equal(drawn.sharpness, 1),
            "sharpness": drawn.sharpness,
            "blurred": np.greater(drawn.sigma, 0),
            "sigma": drawn.sigma,
            "window": np.array(windows, dtype=np.int32),
            "erased": drawn.erased[:, 2] > 0,
            "erased_start": erased[:, :2],
            "erased_shape": erased[:, 2:],
        }
    return {name: np.ascontiguousarray(value) for name, value in given.items()}


def _highest_bits(count: np.ndarray) -> np.ndarray:
    """(n,) uint8 with the ``count`` highest of the eight bits set."""
    return (256 - 2 ** (8 - count)).astype(np.uint8)


def cut(fn: Any, image: Any, inputs: Mapping[str, Any]) -> Any:
    """The part of (H, W, 3) pixels that is shown, where not all of it is."""
    shown = box(inputs)
    return fn.slice(image, **shown) if shown else image


def box(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """How DALI's operators are told which part of an image is shown; nothing where all of it is."""
    if not BOX_INPUTS.keys() <= inputs.keys():
        return {}
    return {"start": inputs["start"], "shape": inputs["shape"], "axis_names": "HW"}


def prepare(
    dali: Any,
    image: Any,
    inputs: Mapping[str, Any],
    *,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: Any,
    device: str,
) -> Any:
    """What is shown, (h, w, 3) uint8 RGB -> (img_size, img_size, 3) of ``dtype``, normalised: a part of a pipeline.

    Values are float32 from 0 to 255 from the resize on and are rounded to ``dtype`` once.
    """
    fn, types = dali.fn, dali.types
    image = fn.resize(image, size=[img_size, img_size], mode="stretch", antialias=True, dtype=types.FLOAT)
    augmented = DRAWN_INPUTS.keys() <= inputs.keys()
    if augmented:
        image = _changed(dali, image, inputs, img_size, device)
    image = fn.crop_mirror_normalize(
        image,
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
        dtype=dtype,
        output_layout="HWC",
        **({"mirror": inputs["mirrored"]} if augmented else {}),  # which every step before commutes with
    )
    if augmented:
        image = _erased(fn, image, inputs)
    return image


def _changed(dali: Any, image: Any, inputs: Mapping[str, Any], img_size: int, device: str) -> Any:
    fn = dali.fn
    if inputs["warped"]:
        image = fn.warp_affine(image, matrix=inputs["warp"], fill_value=0, inverse_map=True)
    if inputs["jittered"]:
        mean_pixel = fn.reductions.mean(image, axes=[0, 1], keep_dims=True)
        shift = fn.coord_transform(mean_pixel, M=inputs["pivot"])
        image = dali.math.clamp(fn.coord_transform(image, M=inputs["color"]) + shift, 0, 255)
    if TONE_INPUTS.keys() <= inputs.keys():
        image = _toned(dali, image, inputs, img_size)
    if inputs["sharpened"]:
        smoothed = fn.filter(image, dali.types.Constant(SMOOTHING, device=device))
        inside = np.zeros((img_size, img_size, 1), dtype=np.float32)
        inside[1:-1, 1:-1] = 1  # torchvision leaves the outermost pixels as they are
        change = (image - smoothed) * dali.types.Constant(inside, device=device)
        image = dali.math.clamp(image + (inputs["sharpness"] - 1) * change, 0, 255)
    if inputs["blurred"]:
        image = fn.gaussian_blur(image, sigma=inputs["sigma"], window_size=inputs["window"])
    return image


def _toned(dali: Any, image: Any, inputs: Mapping[str, Any], img_size: int) -> Any:
    if inputs["toned"]:
        image = _tone(dali, image, inputs, img_size)
    return image


def _tone(dali: Any, image: Any, inputs: Mapping[str, Any], img_size: int) -> Any:
    fn, types = dali.fn, dali.types
    pixels = fn.cast(image, dtype=types.UINT8)
    if inputs["tone"] == Tone.POSTERIZE.value:
        pixels = pixels & inputs["kept_bits"]
    elif inputs["tone"] == Tone.SOLARIZE.value:
        pixels = _solarized(dali, pixels, inputs["level"])
    elif inputs["tone"] == Tone.AUTOCONTRAST.value:
        pixels = _autocontrast(dali, pixels)
    else:
        pixels = _equalized(dali, pixels, img_size)
    return fn.cast(pixels, dtype=types.FLOAT)


def _solarized(dali: Any, pixels: Any, level: Any) -> Any:
    fn, types = dali.fn, dali.types
    return pixels ^ (fn.cast(pixels >= level, dtype=types.UINT8) * types.Constant(255, dtype=types.UINT8))


def _autocontrast(dali: Any, pixels: Any) -> Any:
    fn, types = dali.fn, dali.types
    least = fn.reductions.min(pixels, axes=[0, 1], keep_dims=True)
    greatest = fn.reductions.max(pixels, axes=[0, 1], keep_dims=True)
    flat = greatest == least  # a channel of one value stays as it is
    scale = fn.cast(greatest - least, dtype=types.FLOAT) * (1 / 255) + flat
    # torchvision rounds down
    stretched = (pixels - least * (flat ^ True)) / scale
    return fn.cast(dali.math.floor(stretched), dtype=types.UINT8)


def _equalized(dali: Any, pixels: Any, img_size: int) -> Any:
    """torchvision's and Pillow's formula, to one level, from DALI's operator, which has OpenCV's.

    Of a channel's n pixels let c be fewer than v, and m less than the greatest value. OpenCV counts up to and with v
    and leaves out the least value, so that it turns the negative's 255 - v into 255 (1 - c / m), rounded. Pillow makes
    (c + s // 2) // s of v, with s = m // 255, and leaves the channel as it is where s = 0.
    """
    fn, types, math = dali.fn, dali.types, dali.math
    white = types.Constant(255, dtype=types.UINT8)
    equalize = getattr(fn, "equalize", fn.experimental.equalize)  # it left `experimental` in the course of DALI 2
    negative = fn.cast(equalize(pixels ^ white), dtype=types.FLOAT)
    greatest = fn.reductions.max(pixels, axes=[0, 1], keep_dims=True)
    ones = fn.cast(pixels == greatest, dtype=types.UINT8)
    m = float(img_size**2) - fn.reductions.sum(ones, axes=[0, 1], keep_dims=True, dtype=types.FLOAT)
    s = math.floor((m + 0.5) / 255)
    divisor = math.max(s, 1.0)
    gain = m / 255 / divisor
    # half a count keeps c, which is a whole number, clear of the edges of the division
    offset = 255 * gain + (math.floor(s / 2) + 0.5) / divisor
    leveled = fn.cast(math.floor(offset - negative * gain), dtype=types.UINT8)
    return math.max(leveled * (s > 0), pixels * (s == 0))


def _erased(fn: Any, image: Any, inputs: Mapping[str, Any]) -> Any:
    if inputs["erased"]:
        image = fn.erase(
            image, anchor=inputs["erased_start"], shape=inputs["erased_shape"], axis_names="HW", fill_value=0
        )
    return image
