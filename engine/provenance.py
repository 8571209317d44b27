"""``about.json``: what a run was made of: its images, its software and the machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from engine.build import data_folder
from engine.config import Config
from engine.data import BadFile, Samples, Splits
from engine.data.listing import printable
from engine.device import Precision
from engine.predictions import names_below

_PACKAGES = (
    *("fused-se-engine", "torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy", "pillow", "torchmetrics"),
    *("timm", "apex"),
)


def describe_run(
    config: Config, splits: Splits, left_out: Sequence[BadFile], device: torch.device, precision: Precision
) -> dict[str, Any]:
    """What ``about.json`` holds.

    - ``started``: local time, to the second.
    - ``data``: ``description``, the splits in one line; ``counts``, ``{split: {class: images}}`` of what is used; and
      ``left_out``, ``{file, reason}`` of each image that cannot be read, the names relative to the data's folder.
    - ``device``, ``precision``, and ``versions`` by package.
    """
    parts = {"train": splits.train, "validation": splits.val, "test": splits.test}
    names = names_below([file.path for file in left_out], data_folder(config.data_dir, config.csv))
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "data": {
            "description": printable(splits.description),
            "counts": {name: _counts(samples) for name, samples in parts.items() if samples is not None},
            "left_out": [
                {"file": printable(name), "reason": file.reason} for name, file in zip(names, left_out, strict=True)
            ],
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "precision": str(precision),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _counts(samples: Samples) -> dict[str, int]:
    return dict(zip(map(printable, samples.class_names), samples.class_counts().tolist(), strict=True))


def _versions() -> dict[str, str]:
    """Those of what is installed; torch's with what it was built for."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}
