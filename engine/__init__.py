"""Training engine for image classification on imbalanced data: SE-ResNets, channels-last, mixed precision.

``from engine import load``: a trained classifier, by `engine.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kernels as _kernels

if TYPE_CHECKING:
    from engine.api import load as load

if not hasattr(_kernels, "fuse_se"):
    raise ImportError(
        f"the package `kernels` found at {_kernels.__file__} is another one (Hugging Face publishes an unrelated "
        "package of that name); install this project in a virtual environment of its own, or `pip uninstall kernels`"
    )


def __getattr__(name: str) -> Any:
    # imported when it is first asked for: most who import a part of the engine have no use for all of it
    if name == "load":
        from engine.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
