"""Labelled images: where they come from, whether they can be read, and how they reach the model.

DALI is imported by ``engine.data.dali`` alone, and there only when a loader is made.
"""

from engine.data.augment import Augmentation
from engine.data.check import BadFile, check_images, drop_bad, drop_bad_samples
from engine.data.dali import IMAGENET_MEAN, IMAGENET_STD, DaliLoader
from engine.data.digits import write_digits
from engine.data.sampler import WeightedSampler
from engine.data.samples import Samples, Splits
from engine.data.splits import open_samples, open_splits

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augmentation",
    "BadFile",
    "DaliLoader",
    "Samples",
    "Splits",
    "WeightedSampler",
    "check_images",
    "drop_bad",
    "drop_bad_samples",
    "open_samples",
    "open_splits",
    "write_digits",
]
