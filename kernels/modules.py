"""SE modules with the fused operator inside, and swapping them into a model and out again.

A swapped module holds the very children of the one it replaces, under the same names: parameters keep their identity,
the state dict its keys, and an optimizer made before the swap goes on working.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from kernels.backends import BACKENDS
from kernels.recognition import Plan, attachment, find_se
from kernels.reference import ACTIVATIONS, GATES, SEBlock, squeezed_channels
from kernels.squeeze_excite import squeeze_excite
from kernels.swapping import Fused, check_backend, report, swap

_ACTIVATION_MODULES = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
_GATE_MODULES = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}


class FusedSE(Fused):
    """Stands in for an eager SE module: its children under their own names, the fused operator as its forward.

    Shape: x (N, C, H, W) -> (N, C, H, W). Raises what `squeeze_excite` raises.
    """

    def __init__(self, original: nn.Module, plan: Plan, backend: str) -> None:
        super().__init__()
        for name, child in original._modules.items():
            self.add_module(name, child)
        # In a tuple, so that it is not a submodule and adds no key to the state dict
        self._original = (original,)
        self._plan = plan
        self.backend = backend
        self.training = original.training

    def forward(self, x: Tensor) -> Tensor:
        reduce, expand = layer(self, self._plan.reduce), layer(self, self._plan.expand)
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

    def served_se(self) -> nn.Module:
        return self

    def unfused(self) -> nn.Module:
        """The eager module, with the same parameters."""
        (original,) = self._original
        for name, child in self._modules.items():
            original.add_module(name, child)
        original.training = self.training
        return original

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
        super().__init__(block, Plan("fc.0", "fc.2", act, gate), backend)


def layer(module: Any, path: str) -> Any:
    """The Linear or Conv2d of that name; get_submodule would say as much, at five times the cost."""
    for name in path.split("."):
        module = module._modules[name]
    return module


def se_plan(se: nn.Module) -> tuple[Plan | None, str]:
    """Where an SE module, eager or fused, keeps its parts; or None and the reason why the operator cannot serve it."""
    if isinstance(se, FusedSE):
        reason = attachment(se)
        return (se._plan, "ok") if reason is None else (None, reason)
    for finding in find_se(se, Fused):
        if finding.module is se:
            return finding.plan, finding.reason
    return None, f"no Squeeze-and-Excitation, but a {type(se).__name__}"


def fuse_se(model: nn.Module, *, backend: str = "auto") -> int:
    """Swaps every SE module inside ``model`` for a fused one, in place, and returns how many.

    Recognised by structure and behaviour, from any library: `SEBlock`, torchvision's ``SqueezeExcitation``, timm's
    ``SEModule`` and ``SqueezeExcite``, and whatever else computes ``x * gate(W2 act(W1 mean_hw(x) + b1) + b2)`` with
    two Linear or 1x1 convolution layers. The Parameter objects, the state-dict keys and an optimizer made before stay
    what they were. A module that stands at several places is swapped at all of them and counted once.

    An SE module that the operator cannot stand in for (a norm or dropout inside, a max pool, another activation, hooks,
    parametrizations, quantized layers) is left as it is, and one ``UserWarning`` names those modules and the reasons;
    `se_modules` gives the same as a dict.

    Args:
        model: in whose inside to swap.
        backend: "auto", or one of `available_backends`; looked at when the model runs.

    Raises:
        ValueError: an unknown backend, or ``model`` is itself an SE module, which has no place to be swapped at.
    """
    check_backend(backend)
    findings = find_se(model, Fused)
    swaps: dict[nn.Module, nn.Module] = {f.module: FusedSE(f.module, f.plan, backend) for f in findings if f.plan}
    if model in swaps:
        raise ValueError(
            f"model is itself an SE module ({type(model).__name__}) and cannot be swapped in place: "
            "put it into nn.Sequential(model) and fuse that, or build a FusedSEBlock"
        )
    swap(model, swaps)
    left = [f for f in findings if f.plan is None]
    if left:
        counts = f"{len(left)} of {len(findings)}"
        title = f"fuse_se left {counts} SE modules as they are (kernels.se_modules lists them all):"
        warnings.warn(report(title, left), stacklevel=2)
    return len(swaps)


def unfuse_se(model: nn.Module) -> int:
    """Puts the eager modules back, in place, with the parameters as they are now; returns how many.

    Raises:
        ValueError: ``model`` is itself a fused module; its `FusedSE.unfused` gives the eager one.
    """
    if isinstance(model, FusedSE):
        raise ValueError("model is itself a fused SE module and cannot be swapped in place: take model.unfused()")
    swaps: dict[nn.Module, nn.Module] = {
        module: module.unfused() for module in model.modules() if isinstance(module, FusedSE)
    }
    swap(model, swaps)
    return len(swaps)


def se_modules(model: nn.Module) -> dict[str, str]:
    """Maps each SE module's qualified name to ``"fused"``, ``"ok"`` (`fuse_se` would swap it) or the reason why not."""
    served = {module.served_se() for module in model.modules() if isinstance(module, Fused)}
    fused = {name: "fused" for name, module in model.named_modules() if module in served}
    return fused | {finding.name: finding.reason for finding in find_se(model, Fused)}
