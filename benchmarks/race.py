"""Times functions against their peers, interleaved: every round runs each of them, in turn.

A machine's speed drifts; the ratio of two runs that follow one another does not. So ratios are taken round by round,
and their median is the figure.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# Holds a GPU back for a few milliseconds, until the calls that follow are queued: the time between two events is then
# the GPU's own, where a call of 50 microseconds is over sooner than Python issues the next.
HOLD_CYCLES = 8_000_000
WARMUP = 3  # rounds that do not count


@dataclass
class Entrant:
    """``prepare(i)`` makes what ``run`` needs for call i, off the clock, such as the graph of a backward pass.

    ``calls``: how many are timed at once; ``seconds`` gets the time of one. ``bytes_moved``: by one call.
    """

    run: Callable[[Any], object]
    prepare: Callable[[int], Any] = lambda _: None
    calls: int = 1
    bytes_moved: int = 0
    seconds: list[float] = field(default_factory=list)

    def timed(self) -> None:
        states = [self.prepare(i) for i in range(self.calls)]
        clock = seconds_on_gpu if torch.cuda.is_available() else seconds_on_cpu
        self.seconds.append(clock(self.run, states) / self.calls)

    def milliseconds(self) -> list[float]:
        """p20, p50 and p80 of the rounds that count."""
        counted = [1e3 * t for t in self.seconds[WARMUP:]]
        p20, *_, p80 = statistics.quantiles(counted, n=5)
        return [p20, statistics.median(counted), p80]


def seconds_on_cpu(run: Callable[[Any], object], states: list[Any]) -> float:
    began = time.perf_counter()
    for state in states:
        run(state)
    return time.perf_counter() - began


def seconds_on_gpu(run: Callable[[Any], object], states: list[Any]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HOLD_CYCLES)
    began.record()
    for state in states:
        run(state)
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def keep_freed_memory() -> None:
    """Tells glibc's malloc to give no memory back to the kernel.

    Else new pages are cleared for whichever entrant happens to allocate after another has freed, at more than the time
    of a kernel, and the order of the entrants decides the race.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)


def race(
    benchmark: Any,
    ours: Entrant | dict[str, Entrant],
    peers: dict[str, Entrant],
    *,
    label: dict[str, str],
    rounds: int = 25,
) -> None:
    """Runs the rounds under pytest-benchmark; its ``extra_info["rows"]`` gets a row for each of ``ours``.

    A row is the label, ``backend`` (its name in ``ours``), ``ms`` (p20, p50, p80), ``MB`` and ``GB/s`` where the bytes
    are known, and for each peer ``vs_<peer>``: the median over the rounds of the peer's time over ours, above 1 where
    ours is faster. For the peer named ``copy`` it is ``of_copy``: our bytes a second over the copy's.

    pytest-benchmark's own columns are the wall-clock time of the first of ours, with all of its calls and what prepares
    them.
    """
    keep_freed_memory()
    entrants = {"": ours} if isinstance(ours, Entrant) else ours
    first, *others = [*entrants.values(), *peers.values()]

    def others_first() -> None:
        for entrant in others:
            entrant.timed()

    benchmark.pedantic(first.timed, setup=others_first, rounds=rounds, warmup_rounds=WARMUP)
    rows = []
    for name, entrant in entrants.items():
        mine = entrant.seconds[WARMUP:]
        ms = entrant.milliseconds()
        row: dict[str, Any] = {**label, **({"backend": name} if name else {}), "ms": ms}
        if entrant.bytes_moved:
            row |= {"MB": entrant.bytes_moved / 1e6, "GB/s": entrant.bytes_moved / ms[1] / 1e6}
        for peer_name, peer in peers.items():
            ratio = statistics.median(theirs / t for theirs, t in zip(peer.seconds[WARMUP:], mine, strict=True))
            if peer_name == "copy":
                row["of_copy"] = ratio * entrant.bytes_moved / peer.bytes_moved
            else:
                row[f"vs_{peer_name}"] = ratio
        rows.append(row)
    benchmark.extra_info["rows"] = rows
