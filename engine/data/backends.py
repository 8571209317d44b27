"""The input pipelines by the names that ``--data-backend`` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.data.dali import DaliLoader
from engine.data.loader import Loader
from engine.data.resident import ResidentLoader
from engine.data.samples import Samples
from engine.data.torchvision_loader import TorchvisionLoader

_LOADERS: dict[str, Callable[..., Loader]] = {
    "dali": DaliLoader,
    "resident": ResidentLoader,
    "torchvision": TorchvisionLoader,
}
DATA_BACKENDS = tuple(_LOADERS)


def make_loader(backend: str, samples: Samples, **options: Any) -> Loader:
    """The `Loader` of one of ``DATA_BACKENDS``; ``options`` are a Loader's."""
    return _LOADERS[backend](samples, **options)
