"""The rows of a manifest, as text, whether it is CSV or Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.samples import shorten
from engine.errors import UserError

REQUIRED = ("filename", "label")
OPTIONAL = ("split", "group", "weight")
HEAD_PREFIX = "label_"

_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Row:
    """One image of a manifest; ``split``, ``group`` and ``weight`` are None where it has no such column.

    ``place`` says where it stands, such as "line 7"; ``file`` is an absolute path; ``heads`` are the fields of the
    columns ``label_*`` by what follows the prefix, empty where there is no label; ``fields`` all that was read.
    """

    place: str
    file: str
    label: str
    split: str | None
    group: str | None
    weight: str | None
    heads: Mapping[str, str]
    fields: Mapping[str, str]


def read_rows(path: Path, base: Path, *, every_column: bool = False) -> list[Row]:
    """At least one row; relative file names start from ``base``. ``every_column``: also those without a meaning here.

    Raises UserError: it cannot be read, lacks a column, has none twice, lists nothing, or a field is empty.
    """
    folder = base.absolute()
    read = _parquet if _is_parquet(path) else _csv
    rows = [_row(path, folder, place, fields) for place, fields in read(path, every_column)]
    if not rows:
        raise UserError(f"{path} lists no file")
    return rows


def _is_parquet(path: Path) -> bool:
    """By its first bytes. Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _row(path: Path, folder: Path, place: str, fields: Mapping[str, str]) -> Row:
    for column in (*REQUIRED, *OPTIONAL):
        if fields.get(column) == "":
            raise UserError(f"{path}, {place}: empty {column}")
    heads = {column[len(HEAD_PREFIX) :]: text for column, text in fields.items() if column.startswith(HEAD_PREFIX)}
    split, group, weight = (fields.get(column) for column in OPTIONAL)
    return Row(place, str(folder / fields["filename"]), fields["label"], split, group, weight, heads, fields)


def _csv(path: Path, every_column: bool) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            wanted = _wanted(path, header, every_column)
            for fields in reader:
                if not fields:
                    continue
                place = f"line {reader.line_num}"
                if len(fields) > len(header):
                    raise UserError(
                        f"{path}, {place}: {len(fields)} fields under a header of {len(header)} "
                        '(a comma in a name needs quotes: "a, b.png")'
                    )
                fields += [""] * (len(header) - len(fields))
                yield place, {column: fields[i].strip() for column, i in wanted.items()}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error


def _parquet(path: Path, every_column: bool) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path} is a Parquet file, and pyarrow cannot be imported ({error}): "
            "pip install 'fused-se-engine[parquet]', or save it as CSV"
        ) from error
    try:
        header = parquet.read_schema(path).names
        wanted = _wanted(path, header, every_column)
        columns = {name: column.to_pylist() for name, column in _read_columns(parquet, path, wanted)}
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    for number, fields in enumerate(zip(*columns.values(), strict=True), 1):
        yield f"row {number}", dict(zip(columns, map(_as_text, fields), strict=True))


def _read_columns(parquet: Any, path: Path, wanted: Iterable[str]) -> Iterator[tuple[str, Any]]:
    table = parquet.read_table(path, columns=list(wanted))
    return zip(table.column_names, table.columns, strict=True)


def _as_text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _wanted(path: Path, header: Sequence[str], every_column: bool) -> dict[str, int]:
    """The columns that are read and where each stands."""
    for column in REQUIRED:
        if column not in header:
            raise UserError(
                f"{path} has no column {column!r} (its first line: {shorten(header) or 'empty'}): "
                f"begin it with the header {','.join(REQUIRED)}"
            )
    wanted: dict[str, int] = {}
    for i, column in enumerate(header):
        known = column in (*REQUIRED, *OPTIONAL) or (column.startswith(HEAD_PREFIX) and column != HEAD_PREFIX)
        if known or every_column:
            if column in wanted:
                raise UserError(f"{path} has the column {column!r} twice")
            wanted[column] = i
    return wanted
