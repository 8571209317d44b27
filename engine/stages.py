"""The stages of a model, from its input to its output, and which of them stand still while it trains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.config import Config
from engine.errors import UserError


def stages(model: nn.Module) -> list[list[str]]:
    """The names of the parameters: those of the stem, of each stage, and of what follows the last one.

    The stages of a ResNet are its ``layer1`` to ``layer4``; those of timm's models are as timm groups them. Of a model
    without any, all parameters are one stage.
    """
    names = [name for name, _ in model.named_parameters()]
    group_matcher: Any = getattr(model, "group_matcher", None)
    if group_matcher is not None:
        from timm.models import group_parameters

        depths = group_parameters(model, group_matcher(coarse=True), reverse=True)
        # what timm has not been told of is put last, as it does with a classifier
        depth_of = [depths.get(name, len(names)) for name in names]
    else:
        found = [re.match(r"layer(\d+)\.", name) for name in names]
        first = next((i for i, match in enumerate(found) if match), 0)
        depth_of = [int(m[1]) if m else 0 if i < first else len(names) for i, m in enumerate(found)]
    return [
        [name for name, depth in zip(names, depth_of, strict=True) if depth == wanted]
        for wanted in sorted(set(depth_of))
    ]


@dataclass(frozen=True)
class Freezing:
    """What stands still: parameters without a gradient, and with them the statistics of the BatchNorms that own them.

    Attributes:
        frozen: names of parameters, by the stage that they are in, from the input on.
        unfreeze_epochs: after so many epochs the last stage that is still frozen is let go, after as many again the one
            before it (gradual unfreezing; Howard and Ruder, "Universal Language Model Fine-tuning for Text
            Classification", ACL 2018); None: never.
    """

    frozen: tuple[tuple[str, ...], ...] = ()
    unfreeze_epochs: int | None = None

    def names(self, epoch: int) -> set[str]:
        """The parameters that stand still in an epoch."""
        released = 0 if self.unfreeze_epochs is None else epoch // self.unfreeze_epochs
        return {name for stage in self.frozen[: max(0, len(self.frozen) - released)] for name in stage}

    def train(self, model: nn.Module, epoch: int) -> nn.Module:
        """``model`` in training mode, but for what is frozen in that epoch, which is in evaluation mode."""
        model.train()
        if self.frozen:
            names = self.names(epoch)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in names)
            for module in model.modules():
                own = list(module.parameters())
                if own and not any(parameter.requires_grad for parameter in own):
                    module.eval()
        return model


def make_freezing(model: nn.Module, config: Config) -> Freezing:
    """What ``config`` freezes of a model, with what it freezes in the first epoch frozen already.

    Raises UserError where it names what the model does not have, or leaves nothing to train.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = {name for prefix in config.freeze for name in _below(prefix, names, "--freeze")}
    if config.freeze_until is not None:
        last = _below(config.freeze_until, names, "--freeze-until")[-1]
        chosen |= set(names[: names.index(last) + 1])
    if chosen == set(names):
        raise UserError("--freeze and --freeze-until leave nothing to train; name earlier layers")
    by_stage = (tuple(name for name in stage if name in chosen) for stage in stages(model))
    freezing = Freezing(tuple(stage for stage in by_stage if stage), config.unfreeze_epochs)
    freezing.train(model, 0)
    return freezing


def frozen_at_random(config: Config) -> str | None:
    """One line that says so where layers are frozen that have learnt nothing."""
    if (config.freeze or config.freeze_until) and not (config.pretrained or config.pretrained_path):
        return "frozen layers keep their random weights: add --pretrained or --pretrained-path"
    return None


def _below(prefix: str, names: Sequence[str], flag: str) -> list[str]:
    found = [name for name in names if name == prefix or name.startswith(f"{prefix}.")]
    if not found:
        known = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        raise UserError(f"{flag} {prefix}: the model has no such layer; it has {known}, and what is inside them")
    return found
