"""Swapping modules of a model in place, and saying what was left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn

from kernels.backends import BACKENDS

_NAMED = 4  # modules that a report names for each reason


class Fused(nn.Module):
    """A module that runs a fused operator in place of the modules inside it, which are not looked at again."""

    def served_se(self) -> nn.Module | None:
        """The SE module whose work it does."""
        return None


class Left(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str: ...


def check_backend(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is not one of {('auto', *BACKENDS)}")


def swap(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Puts each value of ``swaps`` at every place inside ``model`` where its key stands."""
    # _modules, and not named_children(), which passes over a second name of the same module
    places = [
        (parent, name, swaps[child])
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in swaps
    ]
    for parent, name, module in places:
        setattr(parent, name, module)


def report(title: str, left: Sequence[Left]) -> str:
    """``title``, and below it a line for each reason with the modules that were left for it."""
    by_reason: dict[str, list[str]] = {}
    for finding in left:
        by_reason.setdefault(finding.reason, []).append(finding.name or "the model itself")
    lines = [title]
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"  {', '.join(names[:_NAMED])}{more}: {reason}")
    return "\n".join(lines)
