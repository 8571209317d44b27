"""MixUp and CutMix on the device: images of a batch mixed with their neighbours, and their labels alike.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix: Regularization Strategy to
Train Strong Classifiers with Localizable Features", ICCV 2019. As in torchvision, an image's partner is the one before
it in the batch, and one mixing coefficient holds for the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from engine.config import Config
from engine.data.counter import Purpose, generator
from engine.errors import UserError

_BLOCKS_PER_STEP = 64  # of random numbers: drawing from a beta distribution takes now fewer, now more


@dataclass(frozen=True)
class MixedIndices:
    """Which images a mixed batch shows, for a criterion that looks up their labels by itself.

    Attributes:
        own, partners: (B,) int64, the same indices in another order.
        kept: the share of its own image in each of them; the rest is its partner's.
    """

    own: Tensor
    partners: Tensor
    kept: float


@dataclass(frozen=True)
class Mixing:
    """Mixes each batch by MixUp or CutMix, as a pure function of (seed, epoch, step).

    Attributes:
        num_classes: columns of the targets; None: it is given indices of images for labels, and gives `MixedIndices`.
        seed: any integer.
        mixup, cutmix: alpha of Beta(alpha, alpha), which the coefficient is drawn from; 0 leaves that one out.
        prob: of mixing a batch at all.
        switch_prob: of CutMix, where a batch is mixed and both are on.

    Raises:
        UserError: a value out of its range.
    """

    num_classes: int | None
    seed: int
    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        for flag, value in (("--mixup", self.mixup), ("--cutmix", self.cutmix)):
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{flag} {value} does not work: it must be at least 0")
        for flag, value in (("--mixup-prob", self.prob), ("--mixup-switch-prob", self.switch_prob)):
            if not 0 <= value <= 1:
                raise UserError(f"{flag} {value} does not work: it must be between 0 and 1")

    def __bool__(self) -> bool:
        """Whether it ever mixes anything."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor | MixedIndices]:
        """images (B, C, H, W) and labels (B,) int64 -> mixed images and targets, (B, num_classes) float32 of labels.

        The images keep their dtype and memory format and are not changed in place.
        """
        images, kept = self._mixed(images, epoch, step)
        if self.num_classes is None:
            return images, MixedIndices(labels, labels.roll(1, 0), kept)
        return images, mixed_targets(labels, self.num_classes, kept)

    def _mixed(self, images: Tensor, epoch: int, step: int) -> tuple[Tensor, float]:
        """The pictures, and the share of its own image in each of them."""
        rng = generator(Purpose.MIXING, self.seed, epoch, block=step * _BLOCKS_PER_STEP)
        mixes, switches, *place = rng.random(4)
        if not self or mixes >= self.prob:
            return images, 1.0
        cuts = self.cutmix > 0 and (self.mixup == 0 or switches < self.switch_prob)
        alpha = self.cutmix if cuts else self.mixup
        kept = float(rng.beta(alpha, alpha))
        if cuts:
            return cut_in(images, kept, *place)
        return images.lerp(images.roll(1, 0), 1 - kept), kept


def make_mixing(config: Config, num_classes: int) -> Mixing:
    """False where a run mixes nothing. ``num_classes`` are those of a model without heads."""
    return Mixing(
        None if config.heads else num_classes,
        config.seed,
        mixup=config.mixup,
        cutmix=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
    )


def cut_in(images: Tensor, kept: float, u: float, v: float) -> tuple[Tensor, float]:
    """Pastes a box of each image's partner into it, of the image's own proportions and about 1 - kept of its area.

    The box lies about (u * W, v * H) and is cut off at the border; returned with the images is the share of an image
    that really stays.
    """
    H, W = images.shape[-2:]
    half_h, half_w = (int(0.5 * math.sqrt(1 - kept) * size) for size in (H, W))
    x, y = int(u * W), int(v * H)
    rows = slice(max(0, y - half_h), min(H, y + half_h))
    columns = slice(max(0, x - half_w), min(W, x + half_w))
    pasted = images.clone()
    pasted[..., rows, columns] = images[..., rows, columns].roll(1, 0)
    return pasted, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (H * W)


def mixed_targets(labels: Tensor, num_classes: int, kept: float) -> Tensor:
    """(B, num_classes) float32: ``kept`` at an image's own label, the rest at its partner's."""
    targets = F.one_hot(labels, num_classes).float()
    return targets.lerp(targets.roll(1, 0), 1 - kept)
