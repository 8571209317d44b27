"""What a model costs: parameters, arithmetic, memory kept for the backward pass, and time as training runs it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine.config import Config
from engine.device import Precision
from engine.heads import Heads
from engine.mixing import make_mixing
from engine.models import create_model
from engine.stages import make_freezing
from engine.step import batch_loss, make_training

FLOPS_PER_MAC = 2
PHASES = ("forward", "backward", "optimizer")
_WARM_UP_STEPS, _FEWEST_STEPS = 2, 3


@dataclass(frozen=True)
class Quantiles:
    """In milliseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, milliseconds: Iterable[float]) -> Quantiles:
        return cls(*np.quantile(list(milliseconds), (0.2, 0.5, 0.8)).tolist())


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of one image: of convolutions, linear layers and their gradients, two a multiply-accumulate.

    Attributes:
        forward: of the forward pass.
        training: of the forward and the backward pass.
        by_layer: of the forward pass, by `layers`.
    """

    forward: int
    training: int
    by_layer: dict[str, int]


@dataclass(frozen=True)
class Times:
    """Of training steps on one batch that stays on the device.

    Attributes:
        phases: of ``PHASES``, mixing and the loss in the forward pass; step: all of them.
        forward_by_layer: p50 of the forward pass of each of `layers`, in milliseconds.
        saved_bytes: what autograd keeps of a batch from the forward pass for the backward pass, parameters left out.
        peak_bytes: the most memory that torch held on the GPU; None on a CPU.
    """

    phases: dict[str, Quantiles]
    step: Quantiles
    forward_by_layer: dict[str, float]
    saved_bytes: int
    peak_bytes: int | None


def count_arithmetic(config: Config, num_classes: int, heads: Heads | None = None) -> Arithmetic:
    """Of the model that a run trains, as it is frozen at first, by torch's own counter; nothing is computed."""
    n = 2  # a BatchNorm takes no single value
    with torch.device("meta"):
        shapes = None if heads is None else heads.shapes()
        model = create_model(config.model, num_classes=num_classes, heads=shapes, **config.model_options())
        images = torch.empty(n, 3, config.img_size, config.img_size)
    make_freezing(model, config)
    with FlopCounterMode(display=False) as counter:
        out = model(images)
        forward = counter.get_total_flops()
        by_module = {str(module): sum(by_op.values()) for module, by_op in counter.get_flop_counts().items()}
        torch.stack([logits.sum() for logits in (out.values() if heads else [out])]).sum().backward()
        training = counter.get_total_flops()
    root = type(model).__name__
    by_layer = {name: by_module.get(f"{root}.{name}", 0) // n for name in layers(model)}
    return Arithmetic(forward // n, training // n, by_layer)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The top-level children of a model, and in place of its heads, which no call runs together, each of them."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        parts = child.named_children() if isinstance(child, nn.ModuleDict) else ()
        found |= {f"{name}.{part}": module for part, module in parts} or {name: child}
    return found


def saved_storages(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> dict[int, int]:
    """{storage: bytes} of what ``forward`` keeps for its gradient, each storage once, ``parameters`` left out."""
    held: list[Tensor] = []  # a storage that is freed could be met again as another

    def note(t: Tensor) -> Tensor:
        held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = forward()
    assert result.requires_grad
    own = {storage_key(p) for p in parameters}
    return {storage_key(t): t.untyped_storage().nbytes() for t in held if storage_key(t) not in own}


def storage_key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def time_training(
    model: nn.Module,
    criterion: nn.Module,
    num_targets: int,
    config: Config,
    device: torch.device,
    precision: Precision,
    *,
    seconds: float,
) -> Times:
    """Trains the model on noise for about ``seconds`` after a warm-up, by the steps of a run's first epoch.

    Each step is of one batch: gradients are not accumulated.

    Args:
        criterion: of the model's output and targets (B,) int64.
        num_targets: those are drawn below it.
    """
    training = make_training(model, config, precision, steps_per_epoch=1)
    mixing = make_mixing(config, num_targets)
    # as a loader delivers them
    shape = (config.batch_size, config.img_size, config.img_size, 3)
    images = torch.randn(shape, device=device).to(precision.input_dtype).permute(0, 3, 1, 2)
    targets = torch.randint(num_targets, (config.batch_size,), device=device)
    watch = _Stopwatch(device)

    def forward() -> Tensor:
        shown = mixing(images, targets, 0, len(watch)) if mixing else (images, targets)
        return batch_loss(model, criterion, *shown, config, precision)

    def step() -> None:
        watch.begin_step()
        with watch.span("forward"):
            loss = forward()
        with watch.span("backward"):
            training.scaler.scale(loss).backward()
        with watch.span("optimizer"):
            training.update(config.clip_grad)

    saved_bytes = sum(saved_storages(forward, model.parameters()).values())
    with _watched_layers(model, watch):
        for _ in range(_WARM_UP_STEPS):
            step()
        watch.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        while len(watch) < _FEWEST_STEPS or time.perf_counter() - began < seconds:
            step()
    phases = {phase: watch.milliseconds(phase) for phase in PHASES}
    return Times(
        phases={phase: Quantiles.of(found) for phase, found in phases.items()},
        step=Quantiles.of(map(sum, zip(*phases.values(), strict=True))),
        forward_by_layer={name: Quantiles.of(watch.milliseconds(name)).p50 for name in layers(model)},
        saved_bytes=saved_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


@contextmanager
def _watched_layers(model: nn.Module, watch: _Stopwatch) -> Iterator[None]:
    """Notes a span for every forward pass of one of `layers`, under its name."""
    began: dict[str, Any] = {}

    def before(name: str, *_: Any) -> None:
        began[name] = watch.now()

    def after(name: str, *_: Any) -> None:
        watch.note(name, began[name])

    handles = []
    for name, layer in layers(model).items():
        handles.append(layer.register_forward_pre_hook(partial(before, name)))
        handles.append(layer.register_forward_hook(partial(after, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stopwatch:
    """Named spans of time, step by step: by events on a GPU, for which the host does not wait, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[dict[str, list[tuple[Any, Any]]]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def begin_step(self) -> None:
        self._steps.append(defaultdict(list))

    def clear(self) -> None:
        self._steps.clear()

    def now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def note(self, name: str, began: Any) -> None:
        self._steps[-1][name].append((began, self.now()))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.note(name, began)

    def milliseconds(self, name: str) -> list[float]:
        """Of each step, all spans of that name together."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [sum(a.elapsed_time(b) for a, b in step[name]) for step in self._steps]
        return [sum(1000 * (b - a) for a, b in step[name]) for step in self._steps]
