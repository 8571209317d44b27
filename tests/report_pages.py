"""Pages of `engine.report`, and what stands in them."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from engine import report
from engine.cli import run

HOSTILE = ("<script>alert(1)</script>", "a&b </style> \"x\" 'y' &lt;", "${7*7}{{7*7}}$")
HOSTILE_FILE = 'test/"><img src=x onerror=alert(1)>&.png'
TREE = {
    "diagnosis": {"classes": {"benign": ["b"], "malignant": ["e", "l"]}},
    "subtype": {"classes": {"early": ["e"], "late": ["l"]}, "when": {"diagnosis": "malignant"}},
}


def make(tmp_path: Path, *argv: object) -> str:
    assert run(report.main, [*map(str, argv), "--no-images", "--output", str(tmp_path / "page.html")]) == 0
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def table(page: str, caption: str) -> list[list[str]]:
    """The rows of the table with that caption; a figure is given with all its digits."""
    (found,) = re.findall(rf"<caption[^>]*>{re.escape(caption)}</caption>(.*?)</table>", page, re.DOTALL)
    rows = []
    for row in re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL):
        cells = re.findall(r"<(?:th|td)[^>]*>(.*?)</(?:th|td)>", row, re.DOTALL)
        values = (re.search(r'<data value="([^"]*)"', cell) or re.search(r"^(?:<bdi>)?([^<]*)", cell) for cell in cells)
        rows.append([unescape(value[1]).strip() for value in values])
    return rows
