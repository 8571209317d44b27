"""Swapping residual blocks, and pairs of a BatchNorm and an activation, for fused ones, and back."""

from __future__ import annotations

import warnings

from torch import nn

from kernels.block_recognition import ACTIVATIONS, BlockFinding, PairFinding, find_blocks, find_pairs
from kernels.swapping import check_backend, report, swap
from kernels.tails import FusedBlock, FusedNormAct, FusedTail


def fuse_tails(model: nn.Module, *, backend: str = "auto") -> int:
    """Lets `residual_tail` run the residual blocks inside ``model``, in place; returns how many places were swapped.

    Two kinds of place count, one each:

    - a residual block: convolutions each with its BatchNorm and ReLU or SiLU, perhaps SE, a downsample branch and the
      sum, as in this project's, torchvision's and timm's ``BasicBlock`` and ``Bottleneck``. Recognised by structure and
      behaviour, from any library. It becomes a `FusedBlock` with the block's own children.
    - outside of them, a BatchNorm with a ReLU or SiLU after it, in an nn.Sequential or as the ``bn1`` of torchvision's
      or timm's ResNet. The BatchNorm's place takes a `FusedNormAct`, the activation's an nn.Identity: a model that is
      cut between the two afterwards has the activation in its first part.

    The Parameter objects, the names of parameters and buffers, the state-dict keys and an optimizer made before stay
    what they were. Each BatchNorm goes by its own mode, training or evaluation. A hook on a block goes on firing. SE
    modules that `fuse_se` swapped before are taken over, and after `fuse_tails` it has nothing to do inside a block.
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` may come before or after.

    What the operator cannot stand in for (stochastic depth, drop block, anti-aliasing, an attention that is no SE,
    other norms and activations, hooks or parametrizations on what is passed over, another forward) is left as it is,
    and one ``UserWarning`` names those modules and the reasons; `tail_modules` gives the same as a dict.

    Args:
        model: in whose inside to swap.
        backend: "auto", or one of `available_backends` but "cuda"; looked at when the model runs.

    Raises:
        ValueError: an unknown backend, or ``model`` is itself a residual block, which has no place to be swapped at.
    """
    check_backend(backend)
    blocks, pairs = find_blocks(model), find_pairs(model)
    swaps: dict[nn.Module, nn.Module] = {b.module: FusedBlock(b.module, b.plan, backend) for b in blocks if b.plan}
    if model in swaps:
        raise ValueError(
            f"model is itself a residual block ({type(model).__name__}) and cannot be swapped in place: "
            "put it into nn.Sequential(model) and fuse that"
        )
    fused_pairs = [pair for pair in pairs if pair.reason == "ok"]
    for pair in fused_pairs:
        norm, act = (pair.parent.get_submodule(name) for name in (pair.norm, pair.act))
        setattr(pair.parent, pair.norm, FusedNormAct(norm, act, ACTIVATIONS[type(act)], backend))
        setattr(pair.parent, pair.act, nn.Identity().train(act.training))
    swap(model, swaps)
    findings: list[BlockFinding | PairFinding] = [*blocks, *pairs]
    left = [finding for finding in findings if finding.reason != "ok"]
    if left:
        counts = f"{len(left)} of {len(findings)}"
        title = f"fuse_tails left {counts} places as they are (kernels.tail_modules lists them all):"
        warnings.warn(report(title, left), stacklevel=2)
    return len(swaps) + len(fused_pairs)


def unfuse_tails(model: nn.Module) -> int:
    """Puts back the eager modules that `fuse_tails` swapped, in place, with the parameters as they are now.

    A `FusedTail`, which was never anything else, stays. Returns how many places were swapped.

    Raises:
        ValueError: ``model`` is itself a fused block, whose `FusedBlock.unfused` gives the eager one; or the
            nn.Identity that an activation left behind is gone.
    """
    if isinstance(model, FusedBlock):
        raise ValueError("model is itself a fused block and cannot be swapped in place: take model.unfused()")
    pairs = [
        (parent, name, child, _identity_after(parent, name))
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, FusedNormAct)
    ]
    for parent, name, pair, act_name in pairs:
        setattr(parent, name, pair.norm)
        setattr(parent, act_name, pair.act.train(pair.training))
    swaps: dict[nn.Module, nn.Module] = {
        module: module.unfused() for module in model.modules() if isinstance(module, FusedBlock)
    }
    swap(model, swaps)
    return len(swaps) + len(pairs)


def _identity_after(parent: nn.Module, name: str) -> str:
    names = [other for other, child in parent._modules.items() if child is not None]
    following = names[names.index(name) + 1 :]
    if not following or type(parent._modules[following[0]]) is not nn.Identity:
        raise ValueError(
            f"{name} is a fused BatchNorm and activation, and the nn.Identity after it, at the activation's place, "
            "is gone: put one there and call again"
        )
    return following[0]


def tail_modules(model: nn.Module) -> dict[str, str]:
    """Maps the name of each residual block, and of each BatchNorm with an activation after it, to what is the case.

    That is ``"fused"``, ``"ok"`` (`fuse_tails` would swap it) or the reason why not.
    """
    fused = (FusedBlock, FusedNormAct, FusedTail)
    names = {name: "fused" for name, module in model.named_modules() if isinstance(module, fused)}
    findings: list[BlockFinding | PairFinding] = [*find_blocks(model), *find_pairs(model)]
    return names | {finding.name: finding.reason for finding in findings}
