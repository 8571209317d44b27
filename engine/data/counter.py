"""Random numbers as a pure function of what they are for.

Every draw of the data side comes from Philox, a counter-based generator (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011), keyed by the purpose, the seed and the epoch. Nothing has a state that a checkpoint would
have to keep: epoch 7 is drawn alike whether or not epochs 0 to 6 were.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

DRAWS_PER_BLOCK = 4
"""64-bit draws that one step of the counter gives (Philox4x64)."""


class Purpose(IntEnum):
    """Keeps draws for different purposes independent under one seed. The values are part of every run's results."""

    VALIDATION_SPLIT = 1
    SAMPLER = 2
    AUGMENTATION = 3
    MIXING = 4
    SPLIT = 5
    DROPOUT = 6
    LONG_TAIL = 7


def generator(purpose: Purpose, seed: int, stream: int, *, block: int = 0) -> np.random.Generator:
    """A generator that stands ``block`` counter steps into the stream of (purpose, seed, stream).

    Args:
        seed: any integer, taken modulo 2^64.
        stream: the epoch, or a class: 0 <= stream < 2^32.
        block: steps of ``DRAWS_PER_BLOCK`` 64-bit draws to stand ahead.
    """
    key = np.array([seed % 2**64, (int(purpose) << 32) + stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=block))
