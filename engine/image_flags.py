"""The flags that ``engine.split`` and ``engine.verify`` have in common, with each other and with a training run."""

from __future__ import annotations

import argparse

from engine.data.leakage import HASH_BITS, NEAR_DISTANCE
from engine.data.selection import Selection

WORDS = {
    "classes": "take the images of these classes only",
    "exclude": "leave out the files whose names match one of these patterns, such as '*_mask*.png'",
    "label_regex": (
        "take the label of an image in a folder from its name, such as 'class(.)[.]png', not from its class folder"
    ),
    "group_regex": r"take the group, which no two sets may share, from the name of an image, such as 'patient(\d+)_'",
    "group_duplicates": (
        "keep on one side where images are divided: identical, files of the same bytes; near, also pictures that are "
        "nearly the same"
    ),
}
"""What is said of the flags that a training run has as well, by their names in `engine.config.Config`."""


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="DIR", help="folder that names in a CSV start from; its own without it")
    parser.add_argument("--allow-links", action="store_true", help="accept links to images outside of DIR")
    parser.add_argument("--classes", metavar="NAME", nargs="+", default=(), help=WORDS["classes"])
    parser.add_argument("--exclude", metavar="PATTERN", nargs="+", default=(), help=WORDS["exclude"])
    parser.add_argument("--label-regex", metavar="REGEX", help=WORDS["label_regex"])
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--group-column",
        metavar="NAME",
        help="column of a CSV that names the group, such as a patient; by default group, where it has one",
    )
    group.add_argument("--group-regex", metavar="REGEX", help=WORDS["group_regex"])
    parser.add_argument(
        "--near-distance",
        metavar="BITS",
        type=_distance,
        default=NEAR_DISTANCE,
        help=f"of {HASH_BITS}, in which near-duplicates may differ; -1 looks for none (default: {NEAR_DISTANCE})",
    )
    parser.add_argument(
        "-j", "--workers", metavar="N", type=_threads, default=4, help="threads that read images (default: 4)"
    )


def make_selection(args: argparse.Namespace) -> Selection:
    """What of a source counts, as the flags say; fresh for one reading."""
    return Selection(tuple(args.classes), tuple(args.exclude), args.label_regex, args.group_regex)


def _distance(text: str) -> int:
    return _between(text, -1, HASH_BITS)


def _threads(text: str) -> int:
    return _between(text, 1, 1024)


def _between(text: str, lowest: int, highest: int) -> int:
    try:
        if lowest <= int(text) <= highest:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {lowest} to {highest}")
