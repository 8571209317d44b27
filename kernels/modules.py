"""SE modules with the fused operator inside, and swapping them into a model and out again.

A swapped module holds the very children of the one it replaces, under the same names: parameters keep their identity,
the state dict its keys, and an optimizer made before the swap goes on working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.backends import BACKENDS
from kernels.reference import ACTIVATIONS, GATES, SEBlock, squeezed_channels
from kernels.squeeze_excite import squeeze_excite

_ACTIVATION_MODULES = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
_GATE_MODULES = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}


class _Plan(NamedTuple):
    """Where a module keeps the parts of SE."""

    reduce: str  # the layer C -> R
    expand: str  # the layer R -> C
    act: str
    gate: str


class FusedSE(nn.Module):
    """Stands in for an eager SE module: its children under their own names, the fused operator as its forward.

    Shape: x (N, C, H, W) -> (N, C, H, W). Raises what `squeeze_excite` raises.
    """

    def __init__(self, original: nn.Module, plan: _Plan, backend: str) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        # In a tuple, so that it is not a submodule and adds no key to the state dict
        self._original = (original,)
        self._plan = plan
        self.backend = backend
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        # Any: Linear or Conv2d, both of which have a weight and a bias
        reduce: Any = self.get_submodule(self._plan.reduce)
        expand: Any = self.get_submodule(self._plan.expand)
        return squeeze_excite(
            x,
            reduce.weight,
            expand.weight,
            reduce.bias,
            expand.bias,
            act=self._plan.act,
            gate=self._plan.gate,
            backend=self.backend,
        )

    def unfused(self) -> nn.Module:
        """The eager module, with the same parameters."""
        (original,) = self._original
        for name, child in self.named_children():
            original.add_module(name, child)
        return original.train(self.training)

    def extra_repr(self) -> str:
        return f"act={self._plan.act}, gate={self._plan.gate}, backend={self.backend}"


class FusedSEBlock(FusedSE):
    """`SEBlock`, fused: the same function and the same state dict.

    Args:
        channel: C, the channels of the input.
        reduction: C / R.
        bias: whether the two layers have biases (``fc.0.bias`` (R,), ``fc.2.bias`` (C,)).
        act: "relu", "silu" or "gelu".
        gate: "sigmoid" or "hardsigmoid".
        backend: "auto", or one of `available_backends`.

    Shape: x (N, C, H, W) -> (N, C, H, W) in x's dtype and memory format.

    Raises:
        ValueError: an unknown name, or a reduction that leaves no channel.
    """

    def __init__(
        self,
        channel: int,
        reduction: int = 16,
        *,
        bias: bool = False,
        act: str = "relu",
        gate: str = "sigmoid",
        backend: str = "auto",
    ) -> None:
        for name, value, known in (
            ("act", act, tuple(ACTIVATIONS)),
            ("gate", gate, tuple(GATES)),
            ("backend", backend, ("auto", *BACKENDS)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {known}")
        block = SEBlock(channel, reduction)
        if bias or (act, gate) != ("relu", "sigmoid"):
            R = squeezed_channels(channel, reduction)
            block.fc = nn.Sequential(
                nn.Linear(channel, R, bias=bias),
                _ACTIVATION_MODULES[act](),
                nn.Linear(R, channel, bias=bias),
                _GATE_MODULES[gate](),
            )
        super().__init__(block, _Plan("fc.0", "fc.2", act, gate), backend)


def fuse_se(model: nn.Module, *, backend: str = "auto") -> int:
    """Swaps every SE module inside ``model`` for a fused one, in place, and returns how many.

    Taken by structure: `SEBlock`; two 1x1 convolutions named ``fc1`` and ``fc2`` with an activation and a gate
    (torchvision's ``SqueezeExcitation``, timm's ``SEModule``). What the operator cannot express (a norm between the
    layers, an added max pool, another activation or gate, hooks) is left alone. Parameters and state-dict keys stay
    what they were.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is not one of {('auto', *BACKENDS)}")
    swaps = [
        (parent, name, child, plan) for parent, name, child in _children(model) if (plan := _plan(child)) is not None
    ]
    for parent, name, child, plan in swaps:
        setattr(parent, name, FusedSE(child, plan, backend))
    return len(swaps)


def unfuse_se(model: nn.Module) -> int:
    """Puts the eager modules back, in place, with the parameters as they are now; returns how many."""
    swaps = [(parent, name, child) for parent, name, child in _children(model) if isinstance(child, FusedSE)]
    for parent, name, child in swaps:
        setattr(parent, name, child.unfused())
    return len(swaps)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _plan(module: nn.Module) -> _Plan | None:
    """How the operator would serve ``module``; None where it is no SE module or one that it cannot express."""
    if isinstance(module, FusedSE) or _has_hooks(module):
        return None
    parts = dict(module.named_children())
    if type(module) is SEBlock:
        fc = dict(parts["fc"].named_children())
        act, gate = _recognised(fc["1"], ACTIVATIONS), _recognised(fc["3"], GATES)
        layers = ("fc.0", "fc.2")
    elif {"fc1", "fc2"} <= parts.keys() and _is_squeeze_and_expand(parts["fc1"], parts["fc2"]):
        act = _recognised(parts.get("activation", parts.get("act")), ACTIVATIONS)
        gate = _recognised(parts.get("scale_activation", parts.get("gate")), GATES)
        known = {"fc1", "fc2", "avgpool", "activation", "act", "scale_activation", "gate"}
        rest = [child for name, child in parts.items() if name not in known and not isinstance(child, nn.Identity)]
        if rest or getattr(module, "add_maxpool", False):
            return None
        layers = ("fc1", "fc2")
    else:
        return None
    if act is None or gate is None or any(_has_hooks(child) for child in module.modules()):
        return None
    return _Plan(*layers, act, gate)


def _is_squeeze_and_expand(fc1: nn.Module, fc2: nn.Module) -> bool:
    """Two 1x1 convolutions C -> R -> C, without groups, stride or padding."""
    return all(
        type(fc) is nn.Conv2d
        and (fc.kernel_size, fc.stride, fc.groups) == ((1, 1), (1, 1), 1)
        and fc.padding in (0, (0, 0))
        for fc in (fc1, fc2)
    ) and (fc1.in_channels, fc1.out_channels) == (fc2.out_channels, fc2.in_channels)


def _recognised(module: nn.Module | None, functions: dict[str, Callable[[Tensor], Tensor]]) -> str | None:
    """The name of the function that ``module`` computes, told by its values: libraries have classes of their own."""
    if module is None or any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    probe = torch.linspace(-8, 8, 129, dtype=torch.float64)
    with torch.no_grad():
        try:
            got = module(probe.clone())
        except (RuntimeError, TypeError, ValueError, IndexError):  # a layer that takes no vector is no activation
            return None
        for name, function in functions.items():
            if isinstance(got, Tensor) and got.shape == probe.shape and torch.allclose(got, function(probe), atol=1e-9):
                return name
    return None


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)
