"""Prints the ratios of `benchmarks.race` as a table, with the machine and the versions they were measured on."""

from __future__ import annotations

import platform
import statistics
from typing import Any

import torch


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [bench.extra_info for bench in session.benchmarks if "ms" in bench.extra_info] if session else []
    if not rows:
        return
    labels = [name for name in rows[0] if name != "ms" and not name.startswith("vs_")]
    peers = sorted({name for row in rows for name in row if name.startswith("vs_")})
    header = [*labels, "ms p20", "p50", "p80", *(f"{peer.removeprefix('vs_')} / ours" for peer in peers)]
    table = [header]
    for row in rows:
        ratios = [f"{row[peer]:.2f}x" if peer in row else "" for peer in peers]
        table.append([*(row[name] for name in labels), *(f"{ms:.3f}" for ms in row["ms"]), *ratios])
    means = [statistics.geometric_mean([row[peer] for row in rows if peer in row]) for peer in peers]
    table.append(["geometric mean", *[""] * (len(labels) + 2), *(f"{mean:.2f}x" for mean in means)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    terminalreporter.section("times and ratios, interleaved (above 1: ours is faster)")
    terminalreporter.line(_machine())
    for line in table:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _machine() -> str:
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name", platform.processor())
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {versions}"
