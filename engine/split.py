"""``python -m engine.split``: divides images into train, validation and test, or into folds, without leakage."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.cli import ArgumentParser, run, warn
from engine.data.cautions import find_class_gaps, find_patients
from engine.data.division import Division, divide
from engine.data.folder import find_split_names
from engine.data.held_out import DUPLICATES, Tied, tie_duplicates
from engine.data.leakage import Leakage, find_identical, find_leakage
from engine.data.listing import Listing, format_manifest, printable, read_groups, read_listing, write_all
from engine.data.samples import shorten
from engine.data.selection import Selection
from engine.errors import UserError
from engine.image_flags import WORDS, add_image_flags, make_selection
from engine.tables import count_classes, describe_leaks, format_counts, format_leaks, format_ranges, name_ranges

REPORT = "split.json"
_OURS = re.compile(r"(fold\d+/)?(train|val|test)\.csv")


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    _settle(args)
    output = Path(args.output)
    old = _require_free(output, args)

    selection = make_selection(args)
    listing = _read(args, selection)
    warnings = [*selection.warnings, *_doubts(listing, args, selection)]
    warn(warnings)
    listing, dropped = _without_copies(listing, args) if args.dedupe else (listing, [])
    listing, tied = _with_ties(listing, args)
    division = divide(
        listing.samples,
        listing.names,
        fractions=(1 - args.val_fraction - args.test_fraction, args.val_fraction, args.test_fraction),
        folds=args.folds,
        first=args.method == "first",
        seed=args.seed,
    )
    leakage = _find_leakage(listing, tied, division, args)
    _require_no_leakage(leakage, listing, division, args)

    parts = _parts(listing, division)
    gaps = find_class_gaps({name: part.samples for name, part in parts.items() if name != "train"})
    warn(gaps)
    manifests = _manifests(listing, division, folds=args.folds is not None)
    files = {name: format_manifest(part, (output / name).parent).encode() for name, part in manifests.items()}
    report = _report(args, parts, sorted(files), leakage, listing, division, dropped) | {"warnings": warnings + gaps}
    files[REPORT] = (json.dumps(report, indent=2) + "\n").encode()
    write_all(output, files, stale=old - files.keys())

    print(format_ranges(name_ranges(parts)) if args.method == "first" else format_counts(count_classes(parts)))
    if remarks := selection.remarks + ([tied.told] if tied else []):
        print("\n" + "; ".join(remarks))
    if dropped:
        print(f"\ncopies of another image, left out: {len(dropped)} ({printable(shorten(dropped, limit=3))})")
    where = division.name_of_each()
    if leakage.shared:
        print("\n" + format_leaks("on two sides (--allow-leakage)", leakage.shared, listing.names, where))
    if leakage.near:
        print("\n" + format_leaks("near-duplicates on two sides", leakage.near, listing.names, where))
    if leakage.undecoded:
        print(f"\nnot compared: {leakage.undecoded} files that cannot be decoded (python -m engine.verify names them)")
    print(f"\nwritten to {output}: {', '.join(files)}")


def _read(args: argparse.Namespace, selection: Selection) -> Listing:
    source = Path(args.source)
    if not source.exists():
        raise UserError(f"{source} does not exist: name a folder with a folder for each class, or a CSV")
    base = Path(args.data_dir) if args.data_dir else None
    listing = read_listing(source, base, allow_links=args.allow_links, selection=selection)
    selection.require_each_class(listing.samples, source)
    groups = read_groups(listing, args.source, args.group_column, selection)
    return listing if groups is None else listing.grouped(groups, column=args.group_regex is not None)


def _doubts(listing: Listing, args: argparse.Namespace, selection: Selection) -> list[str]:
    source = Path(args.source)
    found = [
        find_split_names(source, listing.samples, selection) if source.is_dir() else None,
        find_patients(listing.samples, listing.names),
    ]
    return [warning for warning in found if warning is not None]


def _without_copies(listing: Listing, args: argparse.Namespace) -> tuple[Listing, list[str]]:
    """Without those that ``--dedupe`` leaves out, and their names."""
    copies: set[int] = set()
    for members in find_identical(listing.samples.files, workers=args.workers):
        labels = {listing.samples.class_names[listing.samples.labels[i]] for i in members}
        if len(labels) > 1:
            names = printable(shorten([listing.names[i] for i in members], limit=3))
            raise UserError(f"--dedupe: {names} are the same image under {shorten(sorted(labels))}: remove one")
        copies |= set(sorted(members, key=listing.names.__getitem__)[1:])
    kept = [i for i in range(len(listing.names)) if i not in copies]
    return listing.subset(kept), sorted(listing.names[i] for i in copies)


def _with_ties(listing: Listing, args: argparse.Namespace) -> tuple[Listing, Tied | None]:
    """With the groups that ``--group-duplicates`` makes, which then also stand in a column."""
    if args.group_duplicates == "none":
        return listing, None
    near_distance = args.near_distance if args.group_duplicates == "near" else -1
    tied = tie_duplicates(listing.samples, listing.names, near_distance=near_distance, workers=args.workers)
    groups = tied.samples.groups
    if groups is None or groups == listing.samples.groups:
        return listing, tied
    return listing.grouped(groups, column=True), tied


def _find_leakage(listing: Listing, tied: Tied | None, division: Division, args: argparse.Namespace) -> Leakage:
    """Of duplicates that are tied the groups tell, so that no picture is looked at twice."""
    is_near_tied = args.group_duplicates == "near"
    found = find_leakage(
        listing.samples.files,
        division.part,
        groups=listing.samples.groups,
        identical=[] if tied or args.dedupe else find_identical(listing.samples.files, workers=args.workers),
        near_distance=-1 if is_near_tied else args.near_distance,
        workers=args.workers,
    )
    return replace(found, undecoded=tied.undecoded) if tied and is_near_tied else found


def _require_no_leakage(leakage: Leakage, listing: Listing, division: Division, args: argparse.Namespace) -> None:
    if leakage.shared and not args.allow_leakage:
        groups = leakage.shared[0].why.startswith("group")
        way_out = (
            "use --method stratified"
            if groups
            else "keep copies together with --group-duplicates identical, or one of each with --dedupe"
        )
        found, way_out = leakage.shared, f"{way_out}, or write it as it is with --allow-leakage"
    elif leakage.near and args.strict:
        found = leakage.near
        way_out = f"add --group-duplicates near, remove them, or lower --near-distance (now {args.near_distance})"
    else:
        return
    where = division.name_of_each()
    shown = [
        f"{where[a]} {listing.names[a]} and {where[b]} {listing.names[b]} ({leak.why})"
        for leak in found
        for a, b in [(leak.first, leak.second)]
    ]
    raise UserError(f"nothing written, {len(found)} on two sides: {shorten(shown, limit=3)}; {way_out}")


def _parts(listing: Listing, division: Division) -> dict[str, Listing]:
    """The parts that hold anything."""
    return {
        name: listing.subset(members)
        for k, name in enumerate(division.names)
        if len(members := np.flatnonzero(division.part == k))
    }


def _manifests(listing: Listing, division: Division, *, folds: bool) -> dict[str, Listing]:
    """What each manifest holds, by its path below the output folder."""
    if not folds:
        return {f"{name}.csv": part for name, part in _parts(listing, division).items()}
    manifests = {}
    for k, name in enumerate(division.names):
        manifests[f"{name}/train.csv"] = listing.subset(np.flatnonzero(division.part != k))
        manifests[f"{name}/val.csv"] = listing.subset(np.flatnonzero(division.part == k))
    return manifests


def _report(
    args: argparse.Namespace,
    parts: dict[str, Listing],
    files: list[str],
    leakage: Leakage,
    listing: Listing,
    division: Division,
    dropped: list[str],
) -> dict[str, Any]:
    where = division.name_of_each()
    return {
        "arguments": {name: value for name, value in vars(args).items() if name not in ("force", "workers")},
        "files": files,
        "counts": count_classes(parts),
        "ranges": name_ranges(parts),
        "dropped": dropped,
        "shared": describe_leaks(leakage.shared, listing.names, where),
        "near_duplicates": describe_leaks(leakage.near, listing.names, where),
        "not_compared": leakage.undecoded,
    }


def _require_free(output: Path, args: argparse.Namespace) -> set[str]:
    """The manifests of an older split that ``--force`` replaces; raises UserError where there is one and no force."""
    found = {REPORT, "train.csv", "val.csv", "test.csv"} | {f"fold{k}/train.csv" for k in range(args.folds or 0)}
    there = sorted(name for name in found if (output / name).exists())
    if there and not args.force:
        raise UserError(f"--output {output} already holds {', '.join(there)}: name another folder, or add --force")
    try:
        files = json.loads((output / REPORT).read_text(encoding="utf-8"))["files"]
        old = {name for name in files if _OURS.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError):
        old = set()
    if Path(args.source).resolve() in {(output / name).resolve() for name in found | old}:
        raise UserError(f"--output {output}: {args.source} would be replaced by its own parts; name another folder")
    return old


def _settle(args: argparse.Namespace) -> None:
    """Fills in the fractions that depend on the method; raises UserError for flags that do not go together."""
    first = args.method == "first"
    asked = args.val_fraction is not None or args.test_fraction is not None
    for wrong, message in (
        (first and args.folds is not None, "--folds does not go with --method first"),
        (first and args.val_fraction, "--val-fraction does not go with --method first, which makes train and test"),
        (
            args.group_duplicates == "near" and args.near_distance < 0,
            f"--group-duplicates near and --near-distance {args.near_distance}, which looks for none: leave one out",
        ),
        (
            args.folds is not None and asked,
            "--folds divides all images: split off a test set first, then its train.csv",
        ),
        (args.folds is not None and args.folds < 2, f"--folds {args.folds}: there must be at least 2"),
        (args.seed < 0, f"--seed {args.seed}: it must be at least 0"),
    ):
        if wrong:
            raise UserError(message)
    if args.val_fraction is None:
        args.val_fraction = 0.0 if first else 0.15
    if args.test_fraction is None:
        args.test_fraction = 0.2 if first else 0.15
    held_out = args.val_fraction + args.test_fraction
    if min(args.val_fraction, args.test_fraction) < 0 or not 0 < held_out < 1:
        raise UserError(
            f"--val-fraction {args.val_fraction} and --test-fraction {args.test_fraction}: "
            "neither may be negative, and together they must be above 0 and below 1"
        )


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engine.split",
        description="Divide images into train, validation and test manifests (CSV), or into folds.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="DIR|CSV", help="folder with CLASS/*, or manifest with filename,label")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the manifests and split.json")
    parser.add_argument(
        "--method",
        choices=("stratified", "first"),
        default="stratified",
        help="by chance, class by class (the default); or the first names of each class to test",
    )
    parser.add_argument("--val-fraction", type=float, help="share for validation (default: 0.15; first: 0)")
    parser.add_argument("--test-fraction", type=float, help="share for testing (default: 0.15; first: 0.2)")
    parser.add_argument("--folds", type=int, metavar="K", help="K pairs of train and validation instead")
    parser.add_argument("--seed", type=int, default=42, help="of the division (default: 42)")
    parser.add_argument(
        "--group-duplicates",
        choices=DUPLICATES,
        default="none",
        help=f"{WORDS['group_duplicates']}, by --near-distance (default: none)",
    )
    parser.add_argument("--dedupe", action="store_true", help="of files of the same bytes leave out all but the first")
    parser.add_argument("--allow-leakage", action="store_true", help="write groups or copies on two sides all the same")
    parser.add_argument("--strict", action="store_true", help="refuse near-duplicates on two sides as well")
    parser.add_argument("--force", action="store_true", help="replace an older split in --output")
    add_image_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
