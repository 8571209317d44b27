"""Grad-CAM: where in an image the evidence for a class stands.

Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017.
With a linear classifier right after global average pooling it is the class activation map of Zhou et al., "Learning
Deep Features for Discriminative Localization", CVPR 2016.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from engine.build import make_eval_loader, shown_once
from engine.config import Config
from engine.data import Samples
from engine.data.decode import BadImage
from engine.device import Precision
from engine.errors import UserError
from engine.originals import Originals
from engine.pictures.mistakes import Example, example, typical_hits, worst_mistakes
from engine.predictions import Predictions


def grad_cam(model: nn.Module, images: Tensor, labels: Tensor | None = None, *, head: str | None = None) -> Tensor:
    """relu(sum over the channels of weight * feature map), where weight is the mean of d logit / d feature map.

    The feature map is the last one: of a ResNet, fused or not, the output of ``layer4``, and of timm's models that of
    ``forward_features``. The model is put into evaluation mode; its parameters and their gradients stay as they are.

    Args:
        model: images to (B, classes) logits, or to {head: that}.
        images: (B, 3, H, W), normalised, of the model's dtype and device.
        labels: (B,) integers, the class that each map is of; by default the one that the model says.
        head: which head's logits; a model with heads needs one.

    Returns:
        (B, H, W) float32 in [0, 1] on the CPU: enlarged bilinearly, the largest value of each image 1. All of it is 0
        where nothing in the image speaks for the class.

    Raises:
        UserError: the model has no feature map, as transformers without stages, or one of a single place; or there is
            no such head.
    """
    model.eval()
    with torch.inference_mode(False), torch.enable_grad(), _feature_map(model) as kept:
        logits = _of_head(model(_trackable(images)), head)
        features = kept[0]
        labels = logits.argmax(dim=1) if labels is None else _trackable(labels).to(logits.device)
        (slope,) = torch.autograd.grad(logits.gather(1, labels.long()[:, None]).sum(), features)
    slope, features = (_channels_first(map_, model).float() for map_ in (slope, features.detach()))
    if features.shape[2:].numel() == 1:
        raise UserError(
            f"Grad-CAM: at {images.shape[2]} x {images.shape[3]} pixels the last feature map is a single place, which "
            "shows nothing of where; train with a larger --img-size"
        )
    weights = slope.mean(dim=(2, 3), keepdim=True)
    maps = F.relu((weights * features).sum(dim=1, keepdim=True))
    maps = F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    largest = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(largest > 0, maps / largest, 0.0).cpu()


@dataclass(frozen=True, eq=False)
class Explained:
    """n images as a model is shown them, and where it finds its evidence.

    Attributes:
        images: (n, S, S, 3) float32 in [0, 1]; NaN for one that cannot be read.
        maps: (n, S, S) float32 in [0, 1], those of `grad_cam`; NaN likewise.
        reasons: why an image cannot be read, by index.
    """

    images: np.ndarray
    maps: np.ndarray
    reasons: dict[int, str]


def explain(
    model: nn.Module,
    samples: Samples,
    config: Config,
    device: torch.device,
    *,
    labels: Sequence[int] | None = None,
    head: str | None = None,
) -> Explained:
    """Grad-CAM of a run's model on images, which it is shown as in scoring, in float32.

    Args:
        samples: n images, at least one; their labels do not count.
        config: how the model was trained, and is shown images.
        labels: of each image the class that its map is of; by default the one that the model says.
        head: as for `grad_cam`, whose errors are raised.
    """
    size = (len(samples), config.img_size, config.img_size)
    images, maps = np.full((*size, 3), np.nan, np.float32), np.full(size, np.nan, np.float32)
    # with a class for each image, the labels of a batch tell which images it holds
    numbers = np.arange(len(samples))
    numbered = dataclasses.replace(samples, labels=numbers, class_names=tuple(map(str, numbers)))
    lenient = dataclasses.replace(config, max_bad_fraction=1.0)
    with shown_once(numbered, config, device):
        loader = make_eval_loader(numbered, lenient, device, Precision(device, False, config.amp_dtype))
    mean, std = (np.array(values, dtype=np.float32) for values in (loader.mean, loader.std))
    for batch, indices in loader.epoch(0):
        shown = indices.cpu().numpy()
        wanted = None if labels is None else torch.as_tensor(labels)[indices.cpu()]
        maps[shown] = grad_cam(model, batch, wanted, head=head).numpy()
        images[shown] = (batch.permute(0, 2, 3, 1).cpu().numpy() * std + mean).clip(0, 1)
    return Explained(images, maps, dict(loader.reasons_lost))


def explained_examples(
    model: nn.Module,
    predictions: Predictions,
    originals: Originals,
    config: Config,
    device: torch.device,
    *,
    head: str | None = None,
    classes: int = 6,
    wrong: int = 2,
    right: int = 2,
) -> dict[str, list[Example]]:
    """Of each class its worst mistakes and some images that are recognised, with the evidence for the predicted class.

    For `engine.pictures.draw_evidence`. Of more classes than ``classes`` those of the lowest recall are taken, of those
    that have images. An image that cannot be read any more has no picture and a reason.

    Args:
        predictions: those of the model, of a model with heads those of ``head``.
        originals: the images that they name.
        wrong, right: how many at most of each class.

    Raises:
        UserError: as `grad_cam` does.
    """
    chosen = {
        label: worst_mistakes(predictions, wrong, label=label) + typical_hits(predictions, label, right)
        for label in _lowest_recall(predictions, classes)
    }
    reasons: dict[int, str] = {}
    readable = []
    for i in (i for indices in chosen.values() for i in indices):
        try:
            originals.pixels(predictions.files[i])
            readable.append(i)
        except BadImage as error:
            reasons[i] = str(error)
    images, evidence = {}, {}
    if readable:
        samples = originals.samples([predictions.files[i] for i in readable])
        labels = predictions.predictions[readable].tolist()
        found = explain(model, samples, config, device, labels=labels, head=head)
        reasons |= {readable[k]: reason for k, reason in found.reasons.items()}
        images, evidence = (dict(zip(readable, arrays, strict=True)) for arrays in (found.images, found.maps))

    def shown(i: int) -> Example:
        if i in reasons:
            return example(predictions, i, reason=reasons[i])
        return example(predictions, i, image=images[i], evidence=evidence[i])

    return {predictions.class_names[label]: [shown(i) for i in indices] for label, indices in chosen.items()}


def _lowest_recall(predictions: Predictions, count: int) -> list[int]:
    """The labels, in their order."""
    classes = len(predictions.class_names)
    labels = predictions.labels.numpy()
    images = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[predictions.predictions.numpy() == labels], minlength=classes)
    present = np.flatnonzero(images)
    return sorted(present[np.argsort(hits[present] / images[present], kind="stable")][:count].tolist())


def _trackable(tensor: Tensor) -> Tensor:
    """A tensor that was made under inference mode cannot be saved for the way back, and a copy of it can."""
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def _feature_map(model: nn.Module) -> Iterator[list[Tensor]]:
    """Gives a list that holds the last feature map after a forward pass. What stands before it needs no gradient."""
    kept: list[Tensor] = []

    def keep(features: Tensor) -> Tensor:
        if not isinstance(features, Tensor) or features.dim() != 4:
            raise UserError(f"Grad-CAM needs a feature map, and {type(model).__name__} has none; leave it out")
        kept.append(features.detach().requires_grad_())
        return kept[0]

    if isinstance(model, ResNet):
        hook = model.layer4.register_forward_hook(lambda module, args, output: keep(output))
        try:
            yield kept
        finally:
            hook.remove()
        return
    trunk: Any = model
    if not hasattr(trunk, "forward_features"):
        raise UserError(f"Grad-CAM knows ResNets and the models of timm, and {type(model).__name__} is neither")
    forward_features = trunk.forward_features
    trunk.forward_features = lambda *args, **options: keep(forward_features(*args, **options))
    try:
        yield kept
    finally:
        del trunk.forward_features  # the class's own shows again


def _channels_first(features: Tensor, model: nn.Module) -> Tensor:
    """Some of timm's models keep the channels last."""
    channels = getattr(model, "num_features", features.shape[1])
    if features.shape[1] != channels and features.shape[3] == channels:
        return features.permute(0, 3, 1, 2)
    return features


def _of_head(logits: Any, head: str | None) -> Tensor:
    if isinstance(logits, Tensor):
        if head is not None:
            raise UserError(f"Grad-CAM: head {head!r}: the model has no heads; leave it out")
        return logits
    if head not in logits:
        raise UserError(f"Grad-CAM: head {head!r}: name one of {', '.join(logits)}")
    return logits[head]
