"""TrivialAugment: to each image one operation, drawn uniformly, in a strength that is drawn uniformly.

Mueller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021, with the wide space
of strengths, as torchvision's TrivialAugmentWide has it; but every operation is put into the numbers of
`engine.data.transforms`, so that it costs no step of its own. What that changes: geometry is sampled once, together
with what else was drawn, and bilinearly, where torchvision's default is the nearest pixel; and brightness, colour,
contrast and sharpness are not rounded to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.data.transforms import Tone, color_matrices, composed_warps, warp_matrices

STRENGTHS = 31
_SHARE = np.arange(STRENGTHS) / (STRENGTHS - 1)
_NO_STRENGTH = np.zeros(STRENGTHS)

SPACE: dict[str, tuple[np.ndarray, bool]] = {
    "identity": (_NO_STRENGTH, False),
    "shear_x": (0.99 * _SHARE, True),
    "shear_y": (0.99 * _SHARE, True),
    "translate_x": (np.trunc(32 * _SHARE), True),
    "translate_y": (np.trunc(32 * _SHARE), True),
    "rotate": (135 * _SHARE, True),
    "brightness": (0.99 * _SHARE, True),
    "color": (0.99 * _SHARE, True),
    "contrast": (0.99 * _SHARE, True),
    "sharpness": (0.99 * _SHARE, True),
    "posterize": (np.rint(8 - 6 * _SHARE), False),
    "solarize": (255 * (1 - _SHARE), False),
    "autocontrast": (_NO_STRENGTH, False),
    "equalize": (_NO_STRENGTH, False),
}
"""Operations, the magnitudes of their 31 strengths, and whether a coin gives a magnitude its sign.

Shears are tangents, about the top left corner. Shifts are whole pixels of the square, whatever its side: up to 32, a
seventh of it at 224 pixels and all of it at 32. Rotations are degrees, counter-clockwise, about the centre. Of the four
up to sharpness, the factor is 1 + magnitude. Posterize keeps so many bits, solarize inverts from such a value on.
"""

_NAMES = tuple(SPACE)
_MAGNITUDES = np.stack([magnitudes for magnitudes, _ in SPACE.values()])
_SIGNED = np.array([signed for _, signed in SPACE.values()])
_TONES = np.array([Tone[name.upper()] if name.upper() in Tone.__members__ else Tone.NONE for name in _NAMES])


@dataclass(frozen=True, eq=False)
class Trivial:
    """What the operations of n images are in numbers; the fields are as in `engine.data.augment.Drawn`."""

    warp: np.ndarray
    color: np.ndarray
    pivot: np.ndarray
    tone: np.ndarray
    level: np.ndarray
    sharpness: np.ndarray


def trivial(operation_draws: np.ndarray, strength_draws: np.ndarray, img_size: int) -> Trivial:
    """The operations that two draws of each image, (n,) in [0, 1), choose; the second one holds strength and sign."""
    operation = (operation_draws * len(SPACE)).astype(np.int64)
    strength, negative = np.divmod((strength_draws * 2 * STRENGTHS).astype(np.int64), 2)
    magnitude = _MAGNITUDES[operation, strength] * np.where(_SIGNED[operation] & (negative == 1), -1, 1)

    def of(name: str) -> np.ndarray:
        return np.where(operation == _NAMES.index(name), magnitude, 0.0)

    off, one = np.zeros(len(operation)), np.ones(len(operation))
    moved = warp_matrices(
        degrees=of("rotate"),
        translate_x=of("translate_x") / img_size,
        translate_y=of("translate_y") / img_size,
        scale=one,
        shear=off,
        hflip=off > 0,
        vflip=off > 0,
    )
    sheared = np.stack([one, of("shear_x"), off, of("shear_y"), one, off], axis=-1).reshape(-1, 2, 3)
    color, pivot = color_matrices(
        brightness=1 + of("brightness"), contrast=1 + of("contrast"), saturation=1 + of("color"), hue=off
    )
    tone = _TONES[operation].astype(np.int32)
    return Trivial(
        warp=composed_warps(moved, sheared),
        color=color,
        pivot=pivot,
        tone=tone,
        level=np.where(tone > 0, magnitude, 0).astype(np.float32),
        sharpness=(1 + of("sharpness")).astype(np.float32),
    )
