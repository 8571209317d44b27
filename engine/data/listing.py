"""Images with the names that a split goes by and with all that their manifest says of them; manifests written whole."""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.data.array_sources import holds_arrays, read_arrays
from engine.data.folder import read_splits_folder
from engine.data.manifest import read_manifest, read_manifest_splits
from engine.data.samples import Samples, shorten
from engine.data.selection import Selection, require_all
from engine.data.splitting import PARTS
from engine.data.table import REQUIRED, read_rows
from engine.errors import UserError

_NEVER_KEPT = (*REQUIRED, "split")  # a manifest that is split again has no more use for its old split


@dataclass(frozen=True, eq=False)
class Listing:
    """n labelled images.

    Attributes:
        samples: the files, or arrays, and their labels.
        names: each file's name, relative to the folder that they come from where it lies below it, with "/"; an
            array's name as the samples have it.
        columns: the manifest's further columns, n values each.
    """

    samples: Samples
    names: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]

    def grouped(self, groups: Sequence[str], *, column: bool) -> Listing:
        """With n names of groups, which ``column`` also makes the column that says so in a manifest."""
        columns = {**self.columns, "group": tuple(groups)} if column else self.columns
        return Listing(replace(self.samples, groups=tuple(groups)), self.names, columns)

    def subset(self, indices: Iterable[int]) -> Listing:
        chosen = list(indices)
        columns = {name: tuple(values[i] for i in chosen) for name, values in self.columns.items()}
        return Listing(self.samples.subset(chosen), tuple(self.names[i] for i in chosen), columns)


def read_listing(
    source: Path,
    base: Path | None = None,
    class_names: tuple[str, ...] | None = None,
    *,
    allow_links: bool = False,
    selection: Selection | None = None,
) -> Listing:
    """``source/CLASS/*``, or a manifest whose relative names start from ``base`` (by default its own folder).

    A manifest's own split is passed over, unless ``class_names`` are given: then it is test. ``selection`` says what of
    the source counts.

    Raises:
        UserError: as ``read_splits_folder`` and ``read_manifest``; a folder that is split already, or arrays.
    """
    if holds_arrays(source):
        raise UserError(
            f"{source} holds images as arrays, and a manifest can only name files: train on it as it is by --data-dir, "
            "which holds out --val-fraction of each class for validation where there is no such set"
        )
    if source.is_dir():
        parts = read_parts(source, allow_links=allow_links, selection=selection)
        if "all" not in parts:
            raise UserError(f"{source} is split already: it has train/; name the folder that holds the class folders")
        return parts["all"]
    if class_names is None:
        return join_listings(list(read_manifest_parts(source, base, selection=selection).values()))
    samples = read_manifest(source, base, class_names, classes=selection.classes if selection else ())
    return _of_manifest(selection.of_samples(samples, source) if selection else samples, source, base)


def read_manifest_parts(
    path: Path, base: Path | None = None, *, selection: Selection | None = None
) -> dict[str, Listing]:
    """Train, val and test by a manifest's column ``split``; without one, all as train."""
    found = (
        selection.of_samples(part, path) if part is not None and selection is not None else part
        for part in read_manifest_splits(path, base, selection.classes if selection else ())
    )
    parts = zip(PARTS, found, strict=True)
    return {name: _of_manifest(part, path, base) for name, part in parts if part is not None}


def read_parts(folder: Path, *, allow_links: bool = False, selection: Selection | None = None) -> dict[str, Listing]:
    """``folder/train/CLASS/*``, val and test where there are any, by these names; or ``folder/CLASS/*`` as "all"."""
    try:
        found = read_splits_folder(folder, allow_links=allow_links, selection=selection)
        names = PARTS if (folder / "train").is_dir() else ("all",)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    parts = zip(names, found, strict=False)
    return {name: Listing(part, relative_names(part, folder), {}) for name, part in parts if part is not None}


def read_array_parts(source: Path) -> dict[str, Listing]:
    """Train, val and test of CIFAR's files or an NPZ file, those that there are; none of another source."""
    parts = zip(PARTS, read_arrays(source) or (), strict=False)
    return {name: Listing(part, part.files, {}) for name, part in parts if part is not None}


def join_listings(parts: Sequence[Listing]) -> Listing:
    """One after the other; with the further columns that all of them have, and the first one's classes.

    Of arrays the names and labels alone: parts may have other heights and widths.
    """
    samples = Samples(
        tuple(file for part in parts for file in part.samples.files),
        np.concatenate([part.samples.labels for part in parts]),
        parts[0].samples.class_names,
    )
    common = [name for name in parts[0].columns if all(name in part.columns for part in parts)]
    columns = {name: tuple(value for part in parts for value in part.columns[name]) for name in common}
    return Listing(samples, tuple(name for part in parts for name in part.names), columns)


def read_groups(listing: Listing, source: str, column: str | None, selection: Selection) -> Sequence[str] | None:
    """The group of each file: a column of its manifest, or as a run has it by ``Selection.groups_of``."""
    if column is None:
        return selection.groups_of(listing.names, listing.columns.get("group"))
    if column not in listing.columns:
        known = shorten(listing.columns) or "no further column"
        raise UserError(f"--group-column {column}: {source} has {known}; for names use --group-regex")
    require_all(listing.columns[column], listing.names, f"--group-column {column}: empty")
    return listing.columns[column]


def format_manifest(listing: Listing, folder: Path) -> str:
    """A CSV with the columns ``filename,label`` and the listing's own, to stand in ``folder``.

    Names are relative where a file lies below ``folder``, so that both can move together, and absolute elsewhere.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*REQUIRED, *listing.columns])
    top = f"{folder.absolute()}{os.sep}"
    samples = listing.samples
    for i, file in enumerate(samples.files):
        try:
            file.encode()
        except UnicodeEncodeError:
            raise UserError(f"{printable(file)}: its name is not UTF-8, which a CSV here must be; rename it") from None
        name = file.removeprefix(top)
        name = f".{os.sep}{name}" if name != name.strip() else name  # readers strip a field
        writer.writerow(
            [name, samples.class_names[samples.labels[i]], *(values[i] for values in listing.columns.values())]
        )
    return text.getvalue()


def write_all(folder: Path, files: Mapping[str, bytes], *, stale: Iterable[str] = ()) -> None:
    """Writes ``folder/NAME`` for each name, all of them or none, and then removes the ``stale`` ones.

    Every file is on the disk before the first is put in its place.
    """
    staging: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
        for name, content in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            with (staging / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name in files:
            (staging / name).replace(folder / name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): name another --output") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def printable(name: str) -> str:
    """A file name with ``\\xNN`` for what is not UTF-8, so that it can be printed anywhere."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def relative_names(samples: Samples, folder: Path) -> tuple[str, ...]:
    """Each file's name relative to the folder where it lies below it, with "/"; an array's as it is."""
    top = f"{folder.absolute()}{os.sep}"
    return tuple(file.removeprefix(top).replace(os.sep, "/") for file in samples.files)


def _of_manifest(samples: Samples, path: Path, base: Path | None) -> Listing:
    folder = base if base is not None else path.parent
    return Listing(samples, relative_names(samples, folder), _further_columns(path, folder, samples))


def _further_columns(path: Path, folder: Path, samples: Samples) -> dict[str, tuple[str, ...]]:
    fields = {row.file: row.fields for row in read_rows(path, folder, every_column=True)}
    columns = [name for name in fields[samples.files[0]] if name not in _NEVER_KEPT]
    return {name: tuple(fields[file][name] for file in samples.files) for name in columns}
