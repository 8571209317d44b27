"""Labelled images: where they come from, whether they can be read, and how they reach the model.

DALI is imported by ``engine.data.dali_decoder`` alone, and there only when a loader is made.
"""

from engine.data.augment import Augmentation
from engine.data.backends import DATA_BACKENDS, make_loader
from engine.data.check import BadFile, check_images, drop_bad, drop_bad_samples
from engine.data.dali import DaliLoader
from engine.data.digits import write_digits
from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD, Loader
from engine.data.resident import ResidentLoader
from engine.data.sampler import WeightedSampler
from engine.data.samples import Samples, Splits
from engine.data.splits import open_samples, open_splits
from engine.data.torchvision_loader import TorchvisionLoader

__all__ = [
    "DATA_BACKENDS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augmentation",
    "BadFile",
    "DaliLoader",
    "Loader",
    "ResidentLoader",
    "Samples",
    "Splits",
    "TorchvisionLoader",
    "WeightedSampler",
    "check_images",
    "drop_bad",
    "drop_bad_samples",
    "make_loader",
    "open_samples",
    "open_splits",
    "write_digits",
]
