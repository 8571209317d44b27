"""What ``engine.split`` and ``engine.verify`` print: class counts, ranges of names, leaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from engine.data.leakage import Leak
from engine.data.listing import Listing, printable

SHOWN = 10


def count_classes(parts: Mapping[str, Listing]) -> dict[str, dict[str, int]]:
    """{part: {class: images}}; every class is in every part."""
    return {
        name: dict(zip(part.samples.class_names, part.samples.class_counts().tolist(), strict=True))
        for name, part in parts.items()
    }


def name_ranges(parts: Mapping[str, Listing]) -> dict[str, dict[str, dict[str, Any]]]:
    """{part: {class: images, first and last file name}}, without the classes that a part has no image of."""
    ranges: dict[str, dict[str, dict[str, Any]]] = {}
    for name, part in parts.items():
        ranges[name] = {}
        for label, class_name in enumerate(part.samples.class_names):
            found = sorted(part.names[i] for i in np.flatnonzero(part.samples.labels == label))
            if found:
                ranges[name][class_name] = {"images": len(found), "first": found[0], "last": found[-1]}
    return ranges


def format_counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    """A line for each class and a column for each part, with totals and each class's share of all images."""
    classes = list(dict.fromkeys(name for part in counts.values() for name in part))
    rows = [[part.get(name, 0) for part in counts.values()] for name in classes]
    total = max(1, sum(map(sum, rows)))
    lines = [["class", *counts, "total", "share"]]
    lines += [
        [name, *map(str, row), str(sum(row)), f"{sum(row) / total:.1%}"]
        for name, row in zip(classes, rows, strict=True)
    ]
    sums = [sum(part.values()) for part in counts.values()]
    return format_table([*lines, ["total", *map(str, sums), str(sum(sums)), ""]], range(1, len(counts) + 3))


def format_ranges(ranges: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A line for each part and class: how many images, the first and the last file name."""
    lines = [["split", "class", "images", "first", "last"]]
    for part, classes in ranges.items():
        for name, found in classes.items():
            first, last = (PurePosixPath(found[end]).name for end in ("first", "last"))
            lines.append([part, name, str(found["images"]), first, last])
    return format_table(lines, range(2, 3))


def format_leaks(title: str, leaks: Sequence[Leak], names: Sequence[str], parts: Sequence[str]) -> str:
    """``title``, how many there are, and the first of them.

    Args:
        names: of all files; parts: the part that each is in.
    """
    lines = [f"{title}: {len(leaks)}"]
    for leak in leaks[:SHOWN]:
        a, b = leak.first, leak.second
        lines.append(f"  {parts[a]} {names[a]}, {parts[b]} {names[b]}  ({leak.why})")
    if len(leaks) > SHOWN:
        lines.append(f"  and {len(leaks) - SHOWN} more")
    return printable("\n".join(lines))


def describe_leaks(leaks: Sequence[Leak], names: Sequence[str], parts: Sequence[str]) -> list[dict[str, Any]]:
    """For a JSON report."""
    return [
        {
            "files": [printable(names[i]) for i in (leak.first, leak.second)],
            "parts": [parts[leak.first], parts[leak.second]],
            "why": leak.why,
        }
        for leak in leaks
    ]


def format_table(lines: Sequence[Sequence[str]], numbers: range) -> str:
    """Columns one under the other; those whose index is in ``numbers`` to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [
            f"{cell:{'>' if k in numbers else '<'}{width}}"
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    )
    return printable("\n".join("  ".join(cells).rstrip() for cells in padded))
