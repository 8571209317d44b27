"""Prints the rows of `benchmarks.race` as a table, with the machine and the versions they were measured on."""

from __future__ import annotations

import platform
import statistics
from typing import Any

import torch

FIGURES = ("ms", "MB", "GB/s", "of_copy")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [row for bench in session.benchmarks for row in bench.extra_info.get("rows", [])] if session else []
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    peers = [name for name in names if name.startswith("vs_")]
    labels = [name for name in names if name not in (*FIGURES, *peers)]
    ratios = [f"{peer.removeprefix('vs_')} / ours" for peer in peers]
    table = [[*labels, "ms p20", "p50", "p80", "MB", "GB/s", "of copy", *ratios]]
    table += [_line(row, labels, peers) for row in rows]
    for backend, direction in dict.fromkeys((row.get("backend", ""), row["pass"]) for row in rows):
        chosen = [row for row in rows if (row.get("backend", ""), row["pass"]) == (backend, direction)]
        table.append(_means(f"{backend} {direction}, mean".strip(), chosen, labels, peers))
    table.append(_means("geometric mean", rows, labels, peers))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    terminalreporter.section("times and ratios, interleaved (above 1: ours is faster)")
    terminalreporter.line(_machine())
    for line in table:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _line(row: dict[str, Any], labels: list[str], peers: list[str]) -> list[str]:
    def show(name: str, form: str) -> str:
        return format(row[name], form) if name in row else ""

    times = [f"{ms:.3f}" for ms in row["ms"]]
    rates = [show("MB", ".1f"), show("GB/s", ".1f"), show("of_copy", ".0%")]
    return [*(row.get(name, "") for name in labels), *times, *rates, *(show(peer, ".2f") for peer in peers)]


def _means(title: str, rows: list[dict[str, Any]], labels: list[str], peers: list[str]) -> list[str]:
    """Geometric means of the ratios, and of the fraction of the copy's bandwidth."""

    def mean(name: str, form: str) -> str:
        values = [row[name] for row in rows if name in row]
        return format(statistics.geometric_mean(values), form) if values else ""

    blank = [""] * (len(labels) - 1 + 3 + 2)
    return [title, *blank, mean("of_copy", ".0%"), *(mean(peer, ".2f") for peer in peers)]


def _machine() -> str:
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name", platform.processor())
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {versions}"
