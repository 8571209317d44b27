"""Which residual blocks of a model `residual_tail` can serve, and where a BatchNorm and its activation are a pair.

A block is told by structure and behaviour, whatever library it is from:

    candidate  children conv1, bn1, conv2, bn2 and perhaps conv3, bn3 (or norm1 ...)
    fusable    the other children are activations, an SE, a downsample branch and identities; nothing is attached to
               them that fusing would pass over; and a copy with drawn parameters, run on a small input in float64,
               gives the output, gradients and running statistics of its fused form, in training and in evaluation

A pair is told by its parent, which has to be known to run the one right after the other: an nn.Sequential, or the
ResNet of torchvision or timm, whose own BatchNorm and activation stand in front of the blocks. The same parents are
known to run a pool after that.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.modules import FusedSE, se_plan
from kernels.recognition import Plan, attachment, drawn_copy
from kernels.swapping import Fused
from kernels.tails import BlockPlan, FusedBlock, Stage, norm_obstacle

# Exactly these: a subclass may compute something else
ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}
# By class: the activation after bn1, and the methods that are known to run it there
_RESNETS = {
    "torchvision.models.resnet.ResNet": ("relu", ("forward", "_forward_impl")),
    "timm.models.resnet.ResNet": ("act1", ("forward", "forward_features", "forward_intermediates")),
}
# Of a layer: its widths, its mode and what `_signature` looks at otherwise
_NOT_SETTINGS = {"in_channels", "out_channels", "in_features", "out_features", "num_features", "training"}
_NOT_SETTINGS |= {"_modules", "_parameters", "_buffers", "_original"}


class BlockFinding(NamedTuple):
    """A residual block of a model: how to fuse it, or why not."""

    name: str
    module: nn.Module
    plan: BlockPlan | None
    reason: str


class PairFinding(NamedTuple):
    """A BatchNorm and the activation after it; ``reason`` is "ok", or why they cannot be fused."""

    name: str  # of the BatchNorm
    parent: nn.Module
    norm: str
    act: str
    pool: str | None  # the max pool of a stem after a ReLU, where there is one and nothing is attached to it
    reason: str


def find_blocks(model: nn.Module) -> list[BlockFinding]:
    """Every residual block of ``model``, each once; those inside a fused module are not looked at."""
    # Most blocks of a network differ in nothing but their width, and running one takes a while
    verdicts: dict[Any, tuple[BlockPlan | None, str]] = {}
    findings = []
    for name, module in _unfused_modules(model):
        convolutions = _convolutions(module)
        if not convolutions:
            continue
        signature = _signature(module)
        if signature not in verdicts:
            verdicts[signature] = _examine(module, convolutions)
        findings.append(BlockFinding(name, module, *verdicts[signature]))
    return findings


def find_pairs(model: nn.Module) -> list[PairFinding]:
    """Every BatchNorm with an activation after it, where the parent is known to run them so."""
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    findings = []
    for parent_name, parent in _unfused_modules(model):
        for norm_name, act_name, next_name in _neighbours(parent):
            norm, act = parent._modules[norm_name], parent._modules[act_name]
            # _BatchNorm's own 1d and 3d take no (N, C, H, W), and of what follows only an activation is meant
            if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) or not _is_activation(act):
                continue
            assert act is not None
            reason = norm_obstacle(norm)
            if reason is None and type(act) not in ACTIVATIONS:
                reason = f"a {type(act).__name__} follows, and the tail has ReLU and SiLU"
            if reason is None and attachment(act) is not None:
                reason = f"{act_name}: {attachment(act)}"
            if reason is None and places[id(norm)] > 1:
                reason = "it stands at several places"
            name = f"{parent_name}.{norm_name}" if parent_name else norm_name
            following = parent._modules.get(next_name or "")
            pool = next_name if type(act) is nn.ReLU and _is_stem_pool(following) else None
            findings.append(PairFinding(name, parent, norm_name, act_name, pool, reason or "ok"))
    return findings


def _unfused_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    covered = {inner for module in model.modules() if _replaces(module) for inner in module.modules()}
    for name, module in model.named_modules():
        if module not in covered and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def _replaces(module: nn.Module) -> bool:
    return isinstance(module, Fused) and not isinstance(module, FusedSE)


def _neighbours(parent: nn.Module) -> list[tuple[str, str, str | None]]:
    """The names of children each of which ``parent`` runs on what the one before it returned, and nothing else does.

    The third is None where no third one is known to be run so.
    """
    if isinstance(parent, nn.Sequential) and _inherits(parent, nn.Sequential, ("forward",)):
        names = [name for name, child in parent._modules.items() if child is not None]
        return list(zip(names, names[1:], [*names[2:], None], strict=False))
    for base in type(parent).__mro__:
        act, methods = _RESNETS.get(f"{base.__module__}.{base.__qualname__}", ("", ()))
        if act and _inherits(parent, base, methods) and {"bn1", act} <= parent._modules.keys():
            return [("bn1", act, "maxpool")]
    return []


def _is_stem_pool(module: nn.Module | None) -> bool:
    """Whether it is the pool that `norm_relu_pool` has."""
    if type(module) is not nn.MaxPool2d or attachment(module) is not None:
        return False
    numbers = (module.kernel_size, module.stride, module.padding, module.dilation)
    square = [n if isinstance(n, int) else n[0] if len(set(n)) == 1 else None for n in numbers]
    return square == [3, 2, 1, 1] and not module.return_indices and not module.ceil_mode


def _inherits(module: nn.Module, base: type, methods: tuple[str, ...]) -> bool:
    return all(
        getattr(type(module), method, None) is getattr(base, method, None) and method not in vars(module)
        for method in methods
    )


def _is_activation(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Module) and type(module).__module__ == nn.ReLU.__module__


def _convolutions(module: nn.Module) -> list[tuple[str, str]]:
    """The names of a candidate's convolutions and their norms; empty where it is none."""
    names = [name for name, child in module._modules.items() if child is not None]
    found = []
    for k in (1, 2, 3):
        conv, norm = f"conv{k}", next((name for name in (f"bn{k}", f"norm{k}") if name in names), None)
        # a norm in front of its convolution is a block of another kind (pre-activation, DenseNet)
        if norm is None or conv not in names or names.index(conv) > names.index(norm):
            break
        found.append((conv, norm))
    return found if len(found) > 1 else []


def _signature(module: nn.Module) -> Any:
    """Equal for modules of the same types, settings and attachments, whatever their widths and parameters' values."""
    settings: list[tuple[str, Any]] = []
    for name, value in sorted(vars(module).items()):
        if isinstance(value, Tensor):
            settings.append((name, value.dim()))
        elif "_hook" in name:
            settings.append((name, bool(value)))
        elif name not in _NOT_SETTINGS:
            settings.append((name, repr(value)))
    tensors = tuple((name, None if t is None else t.dim()) for name, t in _own_tensors(module))
    children = tuple((name, None if child is None else _signature(child)) for name, child in module._modules.items())
    return type(module), tuple(settings), tensors, children


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*module._parameters.items(), *module._buffers.items()]


def _examine(block: nn.Module, convolutions: list[tuple[str, str]]) -> tuple[BlockPlan | None, str]:
    try:
        plan = _plan(block, convolutions)
        _check_agreement(block, plan)
    except _Refusal as refusal:
        return None, str(refusal)
    except Exception as error:  # it is somebody's code, called in a way that it may not be meant for
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        return None, f"it does not run on a small input of drawn numbers ({first_line})"
    return plan, "ok"


class _Refusal(Exception):
    """Why a block is left alone."""


def _refuse_if(reason: str | None, name: str = "") -> None:
    if reason is not None:
        raise _Refusal(f"{name}: {reason}" if name else reason)


def _plan(block: nn.Module, convolutions: list[tuple[str, str]]) -> BlockPlan:
    """How a block is run, by its structure."""
    _refuse_if(_own_obstacle(block))
    children = {name: child for name, child in block._modules.items() if child is not None}
    stages = []
    for k, (conv, norm) in enumerate(convolutions, 1):
        _refuse_if(norm_obstacle(children[norm]), norm)
        act = next((name for name in (f"act{k}", f"relu{k}", "act", "relu") if name in children), None)
        # without one it is a function in the block's forward, most likely this one
        stages.append(Stage(conv, norm, "relu" if act is None else _activation(act, children[act])))
    known = {name for pair in convolutions for name in pair} | {"act", "relu"}
    known |= {f"{name}{k}" for name in ("act", "relu") for k in range(1, len(stages) + 1)}
    shortcut = next((name for name in ("downsample", "shortcut") if name in children), None)
    se: str | None = None
    plan_of_se: Plan | None = None
    for name, child in children.items():
        if name in known or name == shortcut:
            continue
        _refuse_if(attachment(child), name)
        if type(child) is nn.Identity:
            continue
        plan_of_se, reason = se_plan(child) if se is None else (None, "a second module after the last BatchNorm")
        _refuse_if(None if plan_of_se else reason, name)
        se = name
    residual_norm = shortcut is not None and _ends_in_norm(children[shortcut])
    return BlockPlan(tuple(stages), se, plan_of_se, shortcut, residual_norm)


def _activation(name: str, module: nn.Module) -> str:
    if type(module) not in ACTIVATIONS:
        raise _Refusal(f"{name}: it is a {type(module).__name__}, and the tail has ReLU, SiLU and Identity")
    _refuse_if(attachment(module), name)
    return ACTIVATIONS[type(module)]


def _own_obstacle(block: nn.Module) -> str | None:
    if "forward" in vars(block):
        return "its forward is replaced"
    if getattr(block, "_compiled_call_impl", None) is not None:
        return "it is compiled on its own"
    if any(t is not None for _, t in _own_tensors(block)):
        return "it has parameters or buffers of its own"
    if len(inspect.signature(block.forward).parameters) != 1:
        return "its forward takes more than x"
    return None


def _ends_in_norm(downsample: nn.Module) -> bool:
    """Whether the branch can be run up to its BatchNorm; where not, it is run whole, as a module."""
    if not isinstance(downsample, nn.Sequential) or not _inherits(downsample, nn.Sequential, ("forward",)):
        return False
    *layers, norm = downsample._modules.values() or (None,)
    hooked = any(value for name, value in vars(downsample).items() if name.endswith("_hooks"))
    return not hooked and None not in layers and norm is not None and norm_obstacle(norm) is None


def _check_agreement(block: nn.Module, plan: BlockPlan) -> None:
    """Refuses a block whose fused form differs from it in output, running statistics or gradients."""
    if any(_replaces(inner) for inner in block.modules()):
        raise _Refusal("fused modules stand inside it: call unfuse_tails(model) first")
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    with torch.inference_mode(False), torch.random.fork_rng(devices=()):
        copy = drawn_copy(block, draw, training=True).requires_grad_(True)
        for buffer in copy.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5, generator=generator)
        for inner in copy.modules():
            if isinstance(inner, FusedSE):
                inner.backend = "eager"
            if type(inner) is nn.SyncBatchNorm:  # the same within one process; this one takes no part in a collective
                inner.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        fused = FusedBlock(copy, plan, "eager")
        conv: Any = next(inner for inner in copy.modules() if isinstance(inner, nn.Conv2d))
        x = draw(3, conv.in_channels, 6, 5)
        for training in (True, False):
            expected, got = _run(copy.train(training), x), _run(fused.train(training), x)
            if not all(map(_alike, expected, got)):
                raise _Refusal("it computes something else than act(SE(BatchNorm(y)) + shortcut)")


def _run(block: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output, running statistics and gradients; the statistics are put back."""
    before = [buffer.clone() for buffer in block.buffers()]
    with torch.enable_grad():
        inputs = [x.clone().requires_grad_(), *block.parameters()]
        # not the leaf itself: a block may work in place
        out = block(inputs[0].clone())
        gradients = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
    after = [buffer.clone() for buffer in block.buffers()]
    with torch.no_grad():
        for buffer, value in zip(block.buffers(), before, strict=True):
            buffer.copy_(value)
    return [out.detach(), *after, *gradients]


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # wide enough for a module that computes in float32 inside, and for a bias in front of a BatchNorm, whose gradient
    # is the rounding of others
    scale = max(1.0, float(one.abs().max()))
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-5 * scale)
