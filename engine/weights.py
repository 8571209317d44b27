"""Where pretrained weights come from: a file on disk, or torchvision's own download.

Both give a plain state dict; what of it fits a model is decided in ``engine.models``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import get_weight

from engine.errors import UserError

_TORCHVISION_WEIGHTS = {
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "resnet34": "ResNet34_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V2",
    "resnet101": "ResNet101_Weights.IMAGENET1K_V2",
    "resnet152": "ResNet152_Weights.IMAGENET1K_V2",
    "resnext50_32x4d": "ResNeXt50_32X4D_Weights.IMAGENET1K_V2",
    "resnext101_32x8d": "ResNeXt101_32X8D_Weights.IMAGENET1K_V2",
    "resnext101_64x4d": "ResNeXt101_64X4D_Weights.IMAGENET1K_V1",
}
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_weights_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a state dict from `path` onto the CPU.

    ``.safetensors`` is read as such; anything else by ``torch.load(weights_only=True)``, which runs no code from
    the file. A state dict under ``"state_dict"`` or ``"model"`` (timm's, and this project's checkpoints) is
    unwrapped, and the prefixes that DistributedDataParallel and torch.compile put before every key are dropped.

    Raises:
        UserError: the file is missing, is damaged, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; check --pretrained-path")
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    # Damaged bytes surface as nearly any exception inside the unpickler, and its texts do not help: "101", or advice
    # to run the file's code.
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as weights (no permission, damaged, or more in it than tensors and plain values); "
            "pass a state dict saved by torch.save, or a .safetensors file"
        ) from error

    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise UserError(
            f"{path}: holds no state dict; expected names and tensors, bare or under 'state_dict' or 'model'"
        )
    return _without_prefixes(loaded)


def download_imagenet_weights(name: str) -> dict[str, Tensor]:
    """Torchvision's ImageNet-1k state dict for `name`, a ResNet or ResNeXt without SE, on the CPU.

    Kept in torch's hub cache; the file's hash is checked after a download.

    Raises:
        UserError: the download failed.
    """
    weights: Any = get_weight(_TORCHVISION_WEIGHTS[name])
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    # No network, a name that does not resolve and a time-out are OSError; a wrong hash is RuntimeError; a damaged
    # file in the cache is any of the last three.
    except (OSError, HTTPException, RuntimeError, EOFError, UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--pretrained: could not get torchvision's weights from {weights.url} ({reason}); "
            "download the file elsewhere and pass it with --pretrained-path"
        ) from error


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return dict(state)
