"""``python -m engine.verify``: opens and decodes every image, and says what is wrong with which, and what there is."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.class_picture import save_class_counts
from engine.cli import ArgumentParser, run
from engine.data.array_sources import holds_arrays
from engine.data.check import ARRAY, BadFile, find_links_out, find_odd_folders, probe_samples
from engine.data.leakage import Leakage, Picture, find_copies, find_identical, find_leakage, find_shared_bytes
from engine.data.listing import (
    Listing,
    join_listings,
    printable,
    read_array_parts,
    read_groups,
    read_listing,
    read_manifest_parts,
    read_parts,
    write_all,
)
from engine.data.probe import Probe
from engine.errors import UserError
from engine.image_flags import add_image_flags, make_selection
from engine.tables import SHOWN, count_classes, describe_leaks, format_counts, format_leaks, format_table

BAD_FILES, SUMMARY, PICTURE = "bad_files.csv", "summary.json", "classes.png"


def main(argv: list[str] | None) -> int:
    """Returns 1 where a file is bad or has two labels, or where two parts share a group or a file; else 0."""
    args = _parser().parse_args(argv)
    parts = _open(args)
    everything = join_listings(list(parts.values()))
    where = [name for name, part in parts.items() for _ in part.names]
    number = np.unique(where, return_inverse=True)[1]
    groups = read_groups(everything, "not every manifest", args.group_column, make_selection(args))

    probes = [found for part in parts.values() for found in probe_samples(part.samples, workers=args.workers)]
    bad = _bad_files(args, everything.samples.files, probes)
    pictures = [picture for part in parts.values() for picture in part.samples.pictures()]
    identical = find_identical(pictures, workers=args.workers)
    contradictions = find_shared_bytes(identical, everything.samples.labels)
    copies = find_copies(identical, number)
    leakage = _leakage(args, pictures, number, groups, identical) if len(parts) > 1 else Leakage([], [], 0)
    counts = count_classes(parts)
    part_of = dict(zip(everything.samples.files, where, strict=True))
    facts = describe_images(everything.samples.files, probes)

    print(f"{len(probes)} images, {len(bad)} bad\n\n{format_counts(counts)}\n\n{format_facts(facts)}")
    if bad:
        print(f"\nbad files: {len(bad)}\n{_format_bad(bad[:SHOWN], part_of)}")
        if len(bad) > SHOWN:
            print(f"  and {len(bad) - SHOWN} more{'' if args.output else ' (--output DIR lists them all)'}")
    for title, leaks in (
        ("same image under two labels", contradictions),
        ("on two sides", leakage.shared),
        ("more than once on one side", copies),
        ("near-duplicates on two sides", leakage.near),
    ):
        if leaks:
            print("\n" + format_leaks(title, leaks, everything.names, where))
    if args.output:
        summary = {
            "images": len(probes),
            "bad": len(bad),
            "classes": counts,
            **facts,
            "contradictions": describe_leaks(contradictions, everything.names, where),
            "copies": describe_leaks(copies, everything.names, where),
            "shared": describe_leaks(leakage.shared, everything.names, where),
            "near_duplicates": describe_leaks(leakage.near, everything.names, where),
        }
        _write(Path(args.output), bad, part_of, summary)
    return int(bool(bad or contradictions or leakage.shared))


def describe_images(files: Sequence[str], probes: Sequence[Probe]) -> dict[str, Any]:
    """Of the good ones: how many of each format and mode, [smallest, median, largest] width, height and file size in
    bytes, and how many have another format's extension."""
    good = [(file, found) for file, found in zip(files, probes, strict=True) if found.reason is None]
    known = Image.registered_extensions()
    measures = {
        "width": [found.width for _, found in good],
        "height": [found.height for _, found in good],
        "bytes": [_size(file) for file, found in good if found.format != ARRAY],
    }
    return {
        **{name: [min(v), float(np.median(v)), max(v)] if v else None for name, v in measures.items()},
        "formats": dict(Counter(found.format for _, found in good).most_common()),
        "modes": dict(Counter(found.mode for _, found in good).most_common()),
        "named_otherwise": sum(
            found.format not in (ARRAY, known.get(Path(file).suffix.lower())) for file, found in good
        ),
    }


def format_facts(facts: Mapping[str, Any]) -> str:
    """Three columns of sizes, then formats and modes in a line each."""
    lines = [["", "smallest", "median", "largest"]]
    lines += [[name, *(f"{v:,.0f}" for v in facts[name])] for name in ("width", "height", "bytes") if facts[name]]
    otherwise = f" ({facts['named_otherwise']} named as another)" if facts["named_otherwise"] else ""
    formats, modes = (", ".join(f"{key} {n}" for key, n in facts[what].items()) for what in ("formats", "modes"))
    return f"{format_table(lines, range(1, 4))}\n\nformats  {formats or 'none'}{otherwise}\nmodes    {modes or 'none'}"


def _open(args: argparse.Namespace) -> dict[str, Listing]:
    """The listings by part: those of a folder, or one for each manifest, by its file's name."""
    sources = [Path(name) for name in args.sources]
    absent = [source for source in sources if not source.exists()]
    if absent:
        raise UserError(
            f"{printable(str(absent[0]))} does not exist: name a folder of images, manifests (CSV) or arrays"
        )
    arrays = [source for source in sources if holds_arrays(source)]
    if arrays:
        if len(sources) > 1:
            raise UserError(f"{arrays[0]} holds images as arrays, and all their sets: name it alone")
        return read_array_parts(arrays[0])
    if sources[0].is_dir():
        if len(sources) > 1:
            raise UserError(f"{sources[0]} is a folder: name it alone, or manifests")
        # links that lead out are named below
        return read_parts(sources[0], allow_links=True, selection=make_selection(args))
    base = Path(args.data_dir) if args.data_dir else None
    if len(sources) == 1:
        parts = read_manifest_parts(sources[0], base, selection=make_selection(args))
        return parts if len(parts) > 1 else {"all": parts["train"]}
    names = [source.stem for source in sources]
    if len(set(names)) < len(names):
        names = [str(source) for source in sources]
    first = read_listing(sources[0], base, selection=make_selection(args))
    others = [
        read_listing(source, base, first.samples.class_names, selection=make_selection(args)) for source in sources[1:]
    ]
    return dict(zip(names, [first, *others], strict=True))


def _bad_files(args: argparse.Namespace, files: Sequence[str], probes: Sequence[Probe]) -> list[BadFile]:
    bad = [BadFile(file, found.reason) for file, found in zip(files, probes, strict=True) if found.reason]
    root = Path(args.sources[0])
    if root.is_dir() and not any(found.format == ARRAY for found in probes):
        bad += find_odd_folders(root)
        if not args.allow_links:
            known = {file.path for file in bad}
            bad += [file for file in find_links_out(files, root) if file.path not in known]
    return sorted(bad, key=lambda file: file.path)


def _leakage(
    args: argparse.Namespace,
    pictures: Sequence[Picture],
    part: np.ndarray,
    groups: Sequence[str] | None,
    identical: Sequence[Sequence[int]],
) -> Leakage:
    return find_leakage(
        pictures,
        part,
        groups=groups,
        identical=identical,
        near_distance=args.near_distance,
        workers=args.workers,
    )


def _format_bad(bad: Sequence[BadFile], part_of: Mapping[str, str]) -> str:
    return format_table([["", part_of.get(file.path, "-"), file.path, file.reason] for file in bad], range(0))


def _write(folder: Path, bad: Sequence[BadFile], part_of: Mapping[str, str], summary: Mapping[str, Any]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["filename", "split", "reason"])
    writer.writerows([printable(file.path), part_of.get(file.path, ""), printable(file.reason)] for file in bad)
    picture = io.BytesIO()
    save_class_counts(summary["classes"], picture)
    written = {
        BAD_FILES: table.getvalue().encode(),
        SUMMARY: (json.dumps(summary, indent=2) + "\n").encode(),
        PICTURE: picture.getvalue(),
    }
    write_all(folder, written)
    print(f"\nwritten to {folder}: {BAD_FILES}, {SUMMARY}, {PICTURE}")


def _size(file: str) -> int:
    try:
        return Path(file).stat().st_size
    except OSError:  # gone since it was decoded
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engine.verify",
        description="Decode every image; report bad files, classes, sizes, and what two splits share. "
        "Exit status: 0 all is well, 1 something is wrong with the images, 2 with the command.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "sources",
        metavar="DIR|CSV|NPZ",
        nargs="+",
        help="a folder, the manifests of one experiment, CIFAR's files or an NPZ file",
    )
    parser.add_argument("--output", metavar="DIR", help=f"folder for {BAD_FILES}, {SUMMARY} and {PICTURE}")
    add_image_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
