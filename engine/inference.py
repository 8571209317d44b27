"""A trained network as other programs take it: BatchNorm folded, normalisation and softmax inside."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class InferenceModel(nn.Module):
    """(N, 3, H, W) uint8 RGB images, already resized, to (N, classes) float32 probabilities and logits.

    Args:
        model: normalised images to logits.
        mean: of RGB in [0, 1], as ``std``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model((images.float() / 255 - self.mean) / self.std)
        return logits.softmax(dim=1), logits


def fold_norms(model: nn.Module) -> int:
    """Folds each BatchNorm right behind a convolution into it, in place, and leaves an nn.Identity; returns how many.

    The convolution gets other parameters, and a bias. What stands right behind what is read from the order of a
    module's children, which is the order that a ResNet's run in. All in evaluation mode.
    """
    pairs = [
        (parent, conv_name, conv, norm_name, norm)
        for parent in model.modules()
        for (conv_name, conv), (norm_name, norm) in pairwise(parent.named_children())
        if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d
    ]
    for parent, conv_name, conv, norm_name, norm in pairs:
        setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
        setattr(parent, norm_name, nn.Identity())
    return len(pairs)
