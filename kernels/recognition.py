"""Which modules of a model are Squeeze-and-Excitation, and which of those the operator can stand in for.

Told by structure and behaviour, whatever library a module is from:

    candidate  its weights are those of one or two pointwise layers (Linear or 1x1 convolution), C -> R -> C
    SE         run on a small input with drawn weights, it multiplies each (sample, channel) by one number
    fusable    nothing is attached to it that fusing would pass over, and that number is
               gate(W2 act(W1 mean(x) + b1) + b2) in training and in evaluation mode, for a known act and gate

The runs are on a copy without hooks, on the CPU, with parameters of its own: the model is not touched.
"""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from kernels.reference import ACTIVATIONS, GATES

# Beyond any SE module: a transformer's MLP has the same structure, and its weights would take seconds to draw
_MOST_WEIGHTS = 2**24
_SAMPLES = 32


class Plan(NamedTuple):
    """Where a module keeps the parts of SE."""

    reduce: str  # the layer C -> R
    expand: str  # the layer R -> C
    act: str
    gate: str


class Finding(NamedTuple):
    """An SE module of a model: how to fuse it, or why not."""

    name: str
    module: nn.Module
    plan: Plan | None
    reason: str


class _Probe(NamedTuple):
    module: nn.Module  # the copy that ran
    x: Tensor
    out: Tensor


def find_se(model: nn.Module, fused: type[nn.Module]) -> list[Finding]:
    """Every SE module of ``model``, the innermost ones, each once; those inside a ``fused`` one are not looked at."""
    covered = {inner for module in model.modules() if isinstance(module, fused) for inner in module.modules()}
    findings: dict[nn.Module, Finding] = {}
    gates: dict[nn.Module, Finding] = {}
    for name, module in model.named_modules():
        if module in covered or isinstance(module, torch.jit.ScriptModule):
            continue
        for order in _candidate_layers(module):
            probe = _probe(module, C=_widths(order[0][1])[0])
            if probe is None:
                continue
            if _scales_channels(probe):
                plan, reason = _plan(module, order, probe)
                findings[module] = Finding(name, module, plan, reason)
                break
            if _returns_gate(probe):
                gates[module] = Finding(name, module, None, "it returns the gate, and its parent multiplies by it")
                break
    taken = covered | findings.keys()
    wrappers = {m for m in findings if any(inner in taken for inner in m.modules() if inner is not m)}
    inside = {inner for m in findings for inner in m.modules()}
    return [f for m, f in (findings | gates).items() if m not in wrappers and (m in findings or m not in inside)]


def _candidate_layers(module: nn.Module) -> list[tuple[tuple[str, Any], ...]]:
    """The one or two pointwise layers of a candidate with their names, in each order that maps C channels to C."""
    layers: list[tuple[str, Any]] = []
    for name, unit in _units(module):
        if _widths(unit) is not None:
            layers.append((name, unit))
        elif any(p.dim() > 1 for p in unit.parameters()):
            return []
        if len(layers) > 2:
            return []
    orders = [order for order in itertools.permutations(layers) if order]
    return [o for o in orders if _widths(o[0][1])[0] == _widths(o[-1][1])[1] and _size(o) <= _MOST_WEIGHTS]


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Layers, and whatever else has nothing inside, with their names."""
    for name, child in module.named_children():
        if _widths(child) is not None or next(child.children(), None) is None:
            yield prefix + name, child
        else:
            yield from _units(child, f"{prefix}{name}.")


def _widths(layer: Any) -> Any:
    """(channels in, channels out) of a Linear, a 1x1 convolution or what stands in for one (quantized); else None."""
    if getattr(layer, "kernel_size", None) == (1, 1):
        widths = getattr(layer, "in_channels", None), getattr(layer, "out_channels", None)
    else:
        widths = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return widths if all(isinstance(width, int) and width > 0 for width in widths) else None


def _size(layers: tuple[tuple[str, Any], ...]) -> int:
    return max(_widths(layer)[0] * _widths(layer)[1] for _, layer in layers)


def _probe(module: nn.Module, C: int, training: bool = False) -> _Probe | None:
    """Runs a copy of ``module`` on a drawn x (32, C, 2, 3) in float64; None where it does not take that."""
    if next(module.parameters(), None) is None:
        return _run(module, C, training, torch.float32)  # quantized layers, which take no other
    # shapes alone at first, for little: a transformer's MLP is turned away here
    if _run(module, C, training, torch.float64, "meta") is None:
        return None
    return _run(module, C, training, torch.float64)


def _run(module: nn.Module, C: int, training: bool, dtype: torch.dtype, device: str = "cpu") -> _Probe | None:
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator if device == "cpu" else None, dtype=dtype, device=device)

    try:
        copy = drawn_copy(module, draw, training)
        # the channels' means differ widely, so that both ends of act and gate are reached
        x = draw(_SAMPLES, C, 2, 3) + 2 * draw(_SAMPLES, C, 1, 1)
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            out = copy(x.clone())
    except Exception:  # it is somebody's code, called in a way that it may not be meant for
        return None
    scales_or_gates = isinstance(out, Tensor) and out.shape in (x.shape, (*x.shape[:2], 1, 1))
    return _Probe(copy, x, out) if scales_or_gates else None


def drawn_copy(module: nn.Module, draw: Callable[..., Tensor], training: bool) -> nn.Module:
    """``module`` and all inside without hooks, with parameters that ``draw(*shape)`` gives, and buffers of ones."""
    one = draw()

    def weight(like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        # as wide as makes some of the gates saturate
        return draw(*like.shape) * (1.5 / (like[0].numel() ** 0.5 if like.dim() > 1 else 1.0))

    def buffer(like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        return torch.ones(like.shape, dtype=one.dtype if like.is_floating_point() else like.dtype, device=one.device)

    copy = module.__new__(type(module))
    state = vars(copy)
    for name, value in vars(module).items():
        if name.endswith("_hooks"):
            value = OrderedDict()
        elif isinstance(value, Tensor):
            value = weight(value)
        state[name] = value
    state.pop("forward", None)  # a replaced forward is bound to the module itself
    state["_compiled_call_impl"] = None
    state["training"] = training
    state["_parameters"] = {name: weight(p) for name, p in module._parameters.items()}
    state["_buffers"] = {name: buffer(b) for name, b in module._buffers.items()}
    state["_modules"] = {
        name: None if child is None else drawn_copy(child, draw, training) for name, child in module._modules.items()
    }
    return copy


def _scales_channels(probe: _Probe) -> bool:
    """out / x is one number over (H, W), and not the same for every sample."""
    if probe.out.shape != probe.x.shape:
        return False
    ratio = probe.out / probe.x
    tolerance = 1e-3 * ratio.abs().max()
    over_pixels, over_samples = ((ratio.amax(dims) - ratio.amin(dims)).max() for dims in ((2, 3), (0,)))
    return bool(over_pixels <= tolerance < over_samples)


def _returns_gate(probe: _Probe) -> bool:
    gate = probe.out
    return gate.shape == (*probe.x.shape[:2], 1, 1) and bool(0 <= gate.min() < gate.max() <= 1)


def _plan(module: nn.Module, layers: tuple[tuple[str, Any], ...], probe: _Probe) -> tuple[Plan | None, str]:
    """How the operator serves an SE module, or the reason why it cannot."""
    reason = _obstacle(module, layers)
    if reason is None:
        (reduce, _), (expand, _) = layers
        trained = _probe(module, probe.x.shape[1], training=True)
        for act, gate in itertools.product(ACTIVATIONS, GATES):
            if trained is not None and all(_computes(p, reduce, expand, act, gate) for p in (probe, trained)):
                return Plan(reduce, expand, act, gate), "ok"
        reason = "it computes something else than x * gate(W2 act(W1 mean(x) + b1) + b2)"
    return None, reason


def _obstacle(module: nn.Module, layers: tuple[tuple[str, Any], ...]) -> str | None:
    """What of a module the operator would pass over, told by its structure."""
    attached = attachment(module)
    if attached is not None:
        return attached
    if len(layers) == 1:
        return "it has one layer C -> C, and the operator two"
    for name, layer in layers:
        if not _is_plain(layer):
            return f"{name} is no plain Linear or 1x1 Conv2d, but {layer}"
    if _has_state(module):
        return "it has parameters or buffers of its own"
    for name, unit in _units(module):
        if _widths(unit) is None and (_has_state(unit) or not _is_known(unit)):
            return f"{name} is a {type(unit).__name__}, which the operator does not have"
    if len(inspect.signature(module.forward).parameters) != 1:
        return "its forward takes more than x"
    return None


def attachment(module: nn.Module) -> str | None:
    """What is attached to a module or inside it that runs with it, and would not where another does its work."""
    for name, inner in module.named_modules():
        if is_parametrized(inner):
            return f"{name or 'it'} is parametrized"
        if any(hooks for attribute, hooks in vars(inner).items() if attribute.endswith("_hooks")):
            return f"hooks on {name or 'it'}"
        if "forward" in vars(inner):
            return f"the forward of {name or 'the module'} is replaced"
    return None


def _is_plain(layer: Any) -> bool:
    if type(layer) is nn.Conv2d:
        padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
        plain = (layer.stride, layer.groups) == ((1, 1), 1) and padding in ("valid", "same", (0, 0))
    else:
        plain = type(layer) is nn.Linear
    return plain and type(layer.weight) in (nn.Parameter, Tensor) and layer.weight.is_floating_point()


def _has_state(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _is_known(unit: nn.Module) -> bool:
    """Whether a module without weights, where it maps numbers one by one, is an act, a gate or the identity.

    Told by its values: libraries have classes of their own for the same function.
    """
    probe = torch.linspace(-8, 8, 129, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            got = drawn_copy(unit, lambda *shape: torch.ones(shape, dtype=torch.float64), True)(probe.clone())
    except Exception:  # a pooling or a reshaping takes no vector; what it does shows when the whole module runs
        return True
    if not isinstance(got, Tensor) or got.shape != probe.shape:
        return True
    functions = (*ACTIVATIONS.values(), *GATES.values(), torch.clone)
    return any(torch.allclose(got, function(probe), rtol=0, atol=1e-9) for function in functions)


def _computes(probe: _Probe, reduce: str, expand: str, act: str, gate: str) -> bool:
    """Whether the module that was run computes the operator's function with this act and gate."""
    first: Any = probe.module.get_submodule(reduce)
    second: Any = probe.module.get_submodule(expand)
    hidden = F.linear(probe.x.mean((2, 3)), first.weight.flatten(1), first.bias)
    gates = GATES[gate](F.linear(ACTIVATIONS[act](hidden), second.weight.flatten(1), second.bias))
    expected = probe.x * gates[:, :, None, None]
    # wide enough for a module that computes its gate in float32
    return probe.out.shape == expected.shape and torch.allclose(probe.out.double(), expected.double(), 1e-5, 1e-5)
