"""Times one function against its peers, interleaved: every round runs each of them once, in turn.

A machine's speed drifts; the ratio of two runs that follow one another does not. So ratios are taken round by round,
and their median is the figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Entrant:
    """``prepare`` makes what ``run`` needs, off the clock, such as the graph of a backward pass."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    seconds: list[float] = field(default_factory=list)

    def timed(self) -> None:
        state = self.prepare()
        synchronize()
        began = time.perf_counter()
        self.run(state)
        synchronize()
        self.seconds.append(time.perf_counter() - began)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def race(benchmark: Any, ours: Entrant, peers: dict[str, Entrant], *, label: dict[str, str], rounds: int = 25) -> None:
    """Runs the rounds under pytest-benchmark, which reports ``ours``; the ratios go to its ``extra_info``.

    ``extra_info`` gets ``label``, ``ms`` (p20, p50, p80 of ours) and, for each peer, ``vs_<peer>``: the median over the
    rounds of the peer's time over ours, above 1 where ours is faster.
    """
    warmup = 3

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        for peer in peers.values():
            peer.timed()
        state = ours.prepare()
        synchronize()
        return (state,), {}

    def target(state: Any) -> None:
        began = time.perf_counter()
        ours.run(state)
        synchronize()
        ours.seconds.append(time.perf_counter() - began)

    benchmark.pedantic(target, setup=setup, rounds=rounds, warmup_rounds=warmup)
    mine = ours.seconds[warmup:]
    quintiles = statistics.quantiles(mine, n=5)
    benchmark.extra_info.update(label, ms=[1e3 * t for t in (quintiles[0], statistics.median(mine), quintiles[3])])
    for name, peer in peers.items():
        ratios = [theirs / t for theirs, t in zip(peer.seconds[warmup:], mine, strict=True)]
        benchmark.extra_info[f"vs_{name}"] = statistics.median(ratios)
