"""Swapping residual blocks, and pairs of a BatchNorm and an activation, for fused ones, and back."""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

from torch import nn

from kernels.block_recognition import ACTIVATIONS, BlockFinding, PairFinding, find_blocks, find_pairs
from kernels.swapping import check_backend, report, swap
from kernels.tails import FusedBlock, FusedNormAct, FusedNormActPool, FusedTail

_LOOKS_BETWEEN = "forward_intermediates"  # of timm's ResNet


def fuse_tails(model: nn.Module, *, backend: str = "auto") -> int:
    """Lets `residual_tail` run the residual blocks inside ``model``, in place; returns how many places were swapped.

    Two kinds of place count, one each:

    - a residual block: convolutions each with its BatchNorm and ReLU or SiLU, perhaps SE, a downsample branch and the
      sum, as in this project's, torchvision's and timm's ``BasicBlock`` and ``Bottleneck``. Recognised by structure and
      behaviour, from any library. It becomes a `FusedBlock` with the block's own children.
    - outside of them, a BatchNorm with a ReLU or SiLU after it, in an nn.Sequential or as the ``bn1`` of torchvision's
      or timm's ResNet. The BatchNorm's place takes a `FusedNormAct`, the activation's an nn.Identity: a model that is
      cut between the two afterwards has the activation in its first part. Where the pool of a ResNet's stem,
      nn.MaxPool2d(3, 2, 1), follows a ReLU, it is taken in as well, and leaves an nn.Identity too.

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
        _swap_pair(pair, backend)
    swap(model, swaps)
    findings: list[BlockFinding | PairFinding] = [*blocks, *pairs]
    left = [finding for finding in findings if finding.reason != "ok"]
    if left:
        counts = f"{len(left)} of {len(findings)}"
        title = f"fuse_tails left {counts} places as they are (kernels.tail_modules lists them all):"
        warnings.warn(report(title, left), stacklevel=2)
    return len(swaps) + len(fused_pairs)


def _swap_pair(pair: PairFinding, backend: str) -> None:
    children = pair.parent._modules
    norm, act, pool = children[pair.norm], children[pair.act], children[pair.pool] if pair.pool else None
    assert norm is not None and act is not None
    if pool is None:
        fused = FusedNormAct(norm, act, ACTIVATIONS[type(act)], backend)
    else:
        fused = FusedNormActPool(norm, act, pool, backend)
    setattr(pair.parent, pair.norm, fused)
    for name, module in ((pair.act, act), (pair.pool, pool)):
        if name and module is not None:
            setattr(pair.parent, name, nn.Identity().train(module.training))
    if pair.pool and hasattr(pair.parent, _LOOKS_BETWEEN):
        setattr(pair.parent, _LOOKS_BETWEEN, functools.partial(_look_between, pair.parent, pair.norm, pair.pool))


def _look_between(parent: nn.Module, norm: str, pool: str, *args: Any, **kwargs: Any) -> Any:
    """timm's ``forward_intermediates``, which may return what stands between the activation and the pool."""
    fused, identity = parent._modules[norm], parent._modules[pool]
    apart = (fused.without_pool(), fused.pool) if isinstance(fused, FusedNormActPool) else (fused, identity)
    parent._modules[norm], parent._modules[pool] = apart
    try:
        return getattr(type(parent), _LOOKS_BETWEEN)(parent, *args, **kwargs)
    finally:
        parent._modules[norm], parent._modules[pool] = fused, identity


def unfuse_tails(model: nn.Module) -> int:
    """Puts back the eager modules that `fuse_tails` swapped, in place, with the parameters as they are now.

    A `FusedTail`, which was never anything else, stays. Returns how many places were swapped.

    Raises:
        ValueError: ``model`` is itself a fused block, whose `FusedBlock.unfused` gives the eager one; or the
            nn.Identity that an activation or a pool left behind is gone.
    """
    if isinstance(model, FusedBlock):
        raise ValueError("model is itself a fused block and cannot be swapped in place: take model.unfused()")
    pairs = [
        (parent, name, child, _identities_after(parent, name, child))
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, FusedNormAct)
    ]
    for parent, name, pair, places in pairs:
        setattr(parent, name, pair.norm)
        for place, module in places.items():
            setattr(parent, place, module.train(pair.training))
        vars(parent).pop(_LOOKS_BETWEEN, None)
    swaps: dict[nn.Module, nn.Module] = {
        module: module.unfused() for module in model.modules() if isinstance(module, FusedBlock)
    }
    swap(model, swaps)
    return len(swaps) + len(pairs)


def _identities_after(parent: nn.Module, name: str, pair: FusedNormAct) -> dict[str, nn.Module]:
    """The places behind a fused BatchNorm, and the eager modules that are to stand there again."""
    taken = {"activation": pair.act} | ({"pool": pair.pool} if isinstance(pair, FusedNormActPool) else {})
    names = [other for other, child in parent._modules.items() if child is not None]
    following = names[names.index(name) + 1 :]
    for place, what in itertools.zip_longest(following[: len(taken)], taken):
        if place is None or type(parent._modules[place]) is not nn.Identity:
            raise ValueError(
                f"{name} is a fused BatchNorm and {' and '.join(taken)}, and the nn.Identity after it, at the {what}'s "
                "place, is gone: put one there and call again"
            )
    return dict(zip(following, taken.values(), strict=False))


def tail_modules(model: nn.Module) -> dict[str, str]:
    """Maps the name of each residual block, and of each BatchNorm with an activation after it, to what is the case.

    That is ``"fused"``, ``"ok"`` (`fuse_tails` would swap it) or the reason why not.
    """
    fused = (FusedBlock, FusedNormAct, FusedTail)
    names = {name: "fused" for name, module in model.named_modules() if isinstance(module, fused)}
    findings: list[BlockFinding | PairFinding] = [*find_blocks(model), *find_pairs(model)]
    return names | {finding.name: finding.reason for finding in findings}
