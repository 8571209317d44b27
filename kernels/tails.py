"""Modules that run `residual_tail`: for one's own models, and in place of a residual block or of a BatchNorm and its
activation.

Parameters and buffers stay in the eager modules that were there, which stay where they were: `FusedTail` and
`FusedBlock` hold them as children, and `FusedNormAct` shares the tensors of its BatchNorm. What the eager modules would
do is looked up in every forward pass: their mode, momentum and process group count as they are then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from kernels.modules import layer, se_plan
from kernels.norm_pool import norm_relu_pool, serves
from kernels.norms import Norm
from kernels.recognition import Plan, attachment
from kernels.residual_tail import SE, TAIL_ACTIVATIONS, residual_tail
from kernels.swapping import Fused, check_backend

# Exactly these: a subclass may compute something else
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FusedTail(Fused):
    """``act(se(norm(y)) + residual_norm(residual))`` by `residual_tail`, for one's own models.

    Its children are the modules given, under the names of the arguments: their parameters, buffers and modes are the
    tail's. Hooks on them do not fire. `unfuse_tails` leaves it: with ``tail.backend = "eager"`` it is plain PyTorch.

    Args:
        norm: the nn.BatchNorm2d or nn.SyncBatchNorm of y. A SyncBatchNorm in training takes its statistics over the
            ranks of its process group where torch.distributed is initialised with more than one, on the CPU too.
        se: an SE module, eager or fused, of any library (see `fuse_se`).
        residual_norm: a BatchNorm of the residual (a downsample branch's).
        act: "relu", "silu" or "identity".
        backend: "auto", or one of `available_backends` but "cuda"; looked at when the tail runs.

    Shape: y and residual (N, C, H, W) -> (N, C, H, W) in y's dtype and memory format. A residual of another dtype or
    shape, or a y that is no (N, C, H, W), is left to the eager modules.

    Raises:
        ValueError: a module that the operator cannot stand in for, or an unknown name. From ``forward``: what
            `residual_tail` raises, such as for a residual_norm without a residual.
    """

    def __init__(
        self,
        norm: nn.Module,
        *,
        se: nn.Module | None = None,
        residual_norm: nn.Module | None = None,
        act: str = "relu",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if act not in TAIL_ACTIVATIONS:
            raise ValueError(f"act={act!r} is not one of {tuple(TAIL_ACTIVATIONS)}")
        check_backend(backend)
        channels = _channels("norm", norm)
        if residual_norm is not None and _channels("residual_norm", residual_norm) != channels:
            raise ValueError(
                f"residual_norm has {residual_norm.num_features} channels and norm {channels}; make them alike"
            )
        self.norm = norm
        self.se = se
        self.residual_norm = residual_norm
        self.act = act
        self.backend = backend
        self._se_plan = None if se is None else _plan_for(se, channels)

    def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_tail(
            y,
            self.norm,
            se=self.se,
            se_plan=self._se_plan,
            residual=residual,
            residual_norm=self.residual_norm,
            act=self.act,
            backend=self.backend,
        )

    def served_se(self) -> nn.Module | None:
        return self.se

    def extra_repr(self) -> str:
        return f"act={self.act}, backend={self.backend}"


def _channels(name: str, norm: Any) -> int:
    reason = norm_obstacle(norm)
    if reason is not None:
        raise ValueError(f"{name}: {reason}; build the tail of a BatchNorm as PyTorch has it")
    channels: int = norm.num_features
    return channels


def _plan_for(se: nn.Module, channels: int) -> Plan:
    plan, reason = se_plan(se)
    if plan is None:
        raise ValueError(f"se: {reason}; leave it out, and apply it between a tail with act='identity' and the sum")
    width = layer(se, plan.reduce).weight.shape[1]
    if width != channels:
        raise ValueError(f"se is made for {width} channels, and norm has {channels}; make them alike")
    return plan


class Stage(NamedTuple):
    """A convolution of a block, its BatchNorm and what follows, by the names of the children."""

    conv: str
    norm: str
    act: str  # of `TAIL_ACTIVATIONS`


class BlockPlan(NamedTuple):
    """How a residual block is run: all but the last stage in a row, and the last one with SE and the shortcut."""

    stages: tuple[Stage, ...]
    se: str | None
    se_plan: Plan | None
    downsample: str | None
    residual_norm: bool  # whether the downsample branch ends in a BatchNorm that the tail takes in


class FusedBlock(Fused):
    """Stands in for an eager residual block: its children under their own names, `residual_tail` between them.

    The convolutions, and the downsample branch up to its BatchNorm, are run as modules: hooks on them and on the block
    fire as before; hooks put on a BatchNorm, an activation or an SE inside after the block was fused do not. A child
    that is replaced later counts: ``nn.SyncBatchNorm.convert_sync_batchnorm`` may come before or after.

    Shape: x (N, C_in, H_in, W_in) -> (N, C, H, W), the block's own. Raises what `residual_tail` raises.
    """

    def __init__(self, original: nn.Module, plan: BlockPlan, backend: str) -> None:
        super().__init__()
        for name, child in original._modules.items():
            self.add_module(name, child)
        # In a tuple, so that it is not a submodule and adds no key to the state dict
        self._original = (original,)
        self._plan = plan
        self.backend = backend
        self.training = original.training
        _share_hooks(original, self)

    def forward(self, x: Tensor) -> Tensor:
        plan, child = self._plan, self._modules
        y = x
        for conv, norm, act in plan.stages[:-1]:
            y = run_tail(child[conv](y), child[norm], act=act, backend=self.backend)  # type: ignore[misc]
        conv, norm, act = plan.stages[-1]
        y = child[conv](y)  # type: ignore[misc]
        residual, residual_norm = self._shortcut(x)
        return run_tail(
            y,
            child[norm],
            se=self.served_se(),
            se_plan=plan.se_plan,
            residual=residual,
            residual_norm=residual_norm,
            act=act,
            backend=self.backend,
        )

    def _shortcut(self, x: Tensor) -> tuple[Tensor, nn.Module | None]:
        if self._plan.downsample is None:
            return x, None
        downsample: Any = self._modules[self._plan.downsample]
        if not self._plan.residual_norm:
            return downsample(x), None
        *layers, norm = downsample._modules.values()
        for module in layers:
            x = module(x)
        return x, norm

    def served_se(self) -> nn.Module | None:
        return None if self._plan.se is None else self._modules[self._plan.se]

    def unfused(self) -> nn.Module:
        """The eager block, with the same parameters."""
        (original,) = self._original
        for name, child in self._modules.items():
            original.add_module(name, child)
        original.training = self.training
        _share_hooks(self, original)
        return original

    def extra_repr(self) -> str:
        return f"{type(self._original[0]).__name__}, backend={self.backend}"


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    # The very dicts, so that a handle got before takes its hook away afterwards
    vars(target).update({name: value for name, value in vars(source).items() if "_hook" in name})


class FusedNormAct(Fused):
    """Stands in for a BatchNorm and the activation after it, at the BatchNorm's place.

    It has the BatchNorm's Parameters and buffers under their own names, and shows the BatchNorm itself, ``norm``, as
    a submodule that adds no key: ``model.modules()`` and ``model.apply`` meet it, and putting it into evaluation mode
    or changing its momentum counts. ``nn.SyncBatchNorm.convert_sync_batchnorm`` may come before or after: it converts
    ``norm`` inside, and the activation stays. (A subclass of nn.BatchNorm2d would be replaced by it whole.)

    Shape: (N, C, H, W) -> (N, C, H, W). Raises what `residual_tail` raises.
    """

    _version = nn.BatchNorm2d._version  # of the state dict

    def __init__(self, norm: nn.Module, act: nn.Module, act_name: str, backend: str) -> None:
        super().__init__()
        self.add_module("norm", norm)
        self._act = (act,)
        self._act_name = act_name
        self.backend = backend
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        return run_tail(x, self.norm, act=self._act_name, backend=self.backend)

    @property
    def norm(self) -> nn.Module:
        # In a tuple and not in _modules, where its tensors would have keys of their own
        return self._norm[0]

    @property
    def act(self) -> nn.Module:
        """The eager activation."""
        return self._act[0]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Takes what ``norm`` is replaced by, as convert_sync_batchnorm does for each of `named_children`."""
        if name != "norm" or type(module) not in NORMS:
            raise ValueError(
                f"a fused BatchNorm and activation cannot take {name} = {type(module).__name__}: "
                "call unfuse_tails(model) before replacing modules"
            )
        assert module is not None
        self._norm = (module,)
        # The very dicts, so that what is loaded, cast or assigned here is so there
        self._parameters, self._buffers = module._parameters, module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "norm":
            self.add_module(name, value)
        else:
            super().__setattr__(name, value)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        yield "norm", self.norm

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        # who asks for duplicates wants every name that a tensor has, and norm gives it none
        if remove_duplicate:
            yield from self.norm.named_modules(memo, f"{prefix}.norm" if prefix else "norm")

    def _load_from_state_dict(self, *args: Any) -> None:
        # knows files from before num_batches_tracked
        self.norm._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"{self.norm.extra_repr()}, act={self._act_name}, backend={self.backend}"


class FusedNormActPool(FusedNormAct):
    """A `FusedNormAct` of a ReLU that also does the work of the nn.MaxPool2d after it, by `norm_relu_pool`.

    Shape: (N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2)). An input that the operator has no kernels for, such as one
    that is not channels-last, goes through the two that it is made of one after the other. Raises what they raise.
    """

    def __init__(self, norm: nn.Module, act: nn.Module, pool: nn.Module, backend: str) -> None:
        super().__init__(norm, act, "relu", backend)
        self._pool = (pool,)

    def forward(self, x: Tensor) -> Tensor:
        if serves(x):
            return norm_relu_pool(x, _operand(self.norm), backend=self.backend)
        out: Tensor = self.pool(super().forward(x))
        return out

    def without_pool(self) -> FusedNormAct:
        """One of the same modules that leaves the pool to others."""
        return FusedNormAct(self.norm, self.act, self._act_name, self.backend)

    @property
    def pool(self) -> nn.Module:
        """The eager pool."""
        return self._pool[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, and a pool"


def norm_obstacle(norm: nn.Module) -> str | None:
    """Why the operator cannot stand in for a normalisation."""
    if type(norm) not in NORMS:
        return f"it is a {type(norm).__name__}, and no plain BatchNorm2d or SyncBatchNorm"
    return attachment(norm)


def run_tail(
    y: Tensor,
    norm: Any,
    *,
    se: nn.Module | None = None,
    se_plan: Plan | None = None,
    residual: Tensor | None = None,
    residual_norm: Any = None,
    act: str,
    backend: str,
) -> Tensor:
    """``act(se(norm(y)) + residual_norm(residual))`` of eager modules, by `residual_tail`."""
    if y.dim() != 4 or (residual is not None and (residual.dtype != y.dtype or residual.shape != y.shape)):
        return _run_modules(y, norm, se, residual, residual_norm, act)
    return residual_tail(
        y,
        _operand(norm),
        se=None if se is None or se_plan is None else _squeeze(se, se_plan),
        residual=residual,
        residual_norm=None if residual_norm is None else _operand(residual_norm),
        act=act,
        backend=backend,
    )


def _run_modules(
    y: Tensor, norm: nn.Module, se: nn.Module | None, residual: Tensor | None, residual_norm: nn.Module | None, act: str
) -> Tensor:
    out: Tensor = norm(y)
    if se is not None:
        out = se(out)
    if residual is not None:
        # in place, as the blocks do it: the sum keeps out's dtype
        out += residual if residual_norm is None else residual_norm(residual)
    return TAIL_ACTIVATIONS[act](out)


def _squeeze(se: nn.Module, plan: Plan) -> SE:
    reduce, expand = layer(se, plan.reduce), layer(se, plan.expand)
    return SE(reduce.weight, expand.weight, reduce.bias, expand.bias, plan.act, plan.gate)


def _operand(norm: Any) -> Norm:
    """What a BatchNorm hands to its function in this forward pass, which it counts."""
    if type(norm) not in NORMS:
        raise ValueError(
            f"a fused tail found a {type(norm).__name__} where a BatchNorm was: "
            "call unfuse_tails(model) before replacing modules"
        )
    tracks = norm.training and norm.track_running_stats
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the average of all batches; float() would wait for the device
            wide = torch.promote_types(norm.running_mean.dtype, torch.float32)
            momentum = norm.num_batches_tracked.to(wide).reciprocal().to(norm.running_mean.dtype)
    with_running = tracks or not norm.training
    return Norm(
        norm.running_mean if with_running else None,
        norm.running_var if with_running else None,
        norm.weight,
        norm.bias,
        training=norm.training or (norm.running_mean is None and norm.running_var is None),
        momentum=momentum,
        eps=norm.eps,
        group=_group(norm),
    )


def _group(norm: Any) -> str:
    """The process group whose ranks share this BatchNorm's statistics, "" where there is none but this process."""
    if not (type(norm) is nn.SyncBatchNorm and norm.training and distributed.is_initialized()):
        return ""
    group: Any = norm.process_group or distributed.group.WORLD
    name: str = group.group_name
    return name if distributed.get_world_size(group) > 1 else ""
