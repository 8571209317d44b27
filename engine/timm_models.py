"""Models and weights of timm, which is looked for when one is named: ``--model timm:NAME``."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from engine.errors import UserError

PREFIX = "timm:"


def create_timm_model(name: str, *, num_classes: int, drop: float = 0.0) -> nn.Module:
    """timm's model of that name, without ``PREFIX``, as timm initialises it; ``drop`` is its ``drop_rate``.

    Raises UserError where timm is not installed, does not know the name, has no such option for it or no classifier.
    """
    timm = _timm(name)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise UserError(f"--model {PREFIX}{name}: timm {timm.__version__} has no such model{hint}")
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **({"drop_rate": drop} if drop else {}))
    except TypeError as error:
        if not drop:
            raise UserError(f"--model {PREFIX}{name}: timm cannot build it ({error}); use another model") from error
        raise UserError(f"--drop {drop} does not go with --model {PREFIX}{name} ({error}); leave it out") from error
    if not classifier_names(model):
        raise UserError(f"--model {PREFIX}{name}: it ends in no classifier; use another model")
    return model


def download_timm_weights(name: str) -> dict[str, Tensor]:
    """The state dict of timm's own weights for a model, with the classifier that they were trained with.

    Raises UserError where there are none, or the download failed.
    """
    timm = _timm(name)
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    # The hub's client has errors of its own, and so has each HTTP library that it may stand on.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--pretrained: could not get timm's weights for {name} ({reason}); get the file elsewhere and pass it "
            "with --pretrained-path"
        ) from error


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Where a model of this project or of timm has its last layer: in some there are two of it, in encoders none."""
    described: Any = getattr(model, "pretrained_cfg", None)
    names = described["classifier"] if described else "fc"
    return (names,) if isinstance(names, str) else tuple(names or ())


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--model {PREFIX}{name} needs timm, which is not installed ({error}): pip install timm"
        ) from error
    return timm
