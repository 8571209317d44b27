"""What ``--fused-se`` does to a model, whose parameters and state dict stay what they are."""

from __future__ import annotations

from torch import nn

from engine.config import Config
from kernels import fuse_se, fuse_tails, se_modules


def fuse(model: nn.Module, config: Config) -> str:
    """Fuses ``model`` in place, as widely as ``config.fused_scope`` allows, and returns one line that says what.

    What has no fused counterpart runs as it is; a ``UserWarning`` of `kernels` names it and the reason.
    """
    if config.fused_scope == "block":
        fused = fuse_se(model)
        if not se_modules(model):
            return f"nothing fused: {config.model} has no SE module; --fused-scope tail fuses its residual tails"
        return f"{fused} SE modules fused"
    tails = fuse_tails(model)
    within = list(se_modules(model).values()).count("fused")
    alone = fuse_se(model)
    return f"{tails} tails fused, {within} of them with SE" + (f"; {alone} other SE modules fused" if alone else "")
