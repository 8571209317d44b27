"""Which images of a source count, and what their names say of them."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from engine.data.samples import Samples, shorten, sort_class_names
from engine.errors import UserError

Value = TypeVar("Value")


@dataclass
class Selection:
    """What of a source counts; by default all of it. One is good for reading one source, since it keeps count.

    Attributes:
        classes: those whose images count; none named: all.
        exclude: patterns of file names, such as ``*_mask*.png`` (``fnmatch``, upper and lower case told apart), whose
            files do not.
        label_regex: takes the label of an image in a folder from its name below the folder, with "/", in place of the
            class folder: what its first group matches.
        group_regex: takes from it likewise what a split must not tear apart, such as a patient.
        left_out: how many files the patterns have left out so far.

    Raises:
        UserError: a regular expression that is none.
    """

    classes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    label_regex: str | None = None
    group_regex: str | None = None
    left_out: int = field(default=0, init=False)
    _unmatched: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._unmatched = set(self.exclude)
        for flag, pattern in (("--label-regex", self.label_regex), ("--group-regex", self.group_regex)):
            if pattern is not None:
                compiled(pattern, flag)

    @property
    def remarks(self) -> list[str]:
        """What has been left out so far."""
        return [f"{self.left_out} files left out by --exclude"] if self.exclude else []

    @property
    def warnings(self) -> list[str]:
        """A line for each pattern that has left no file out so far."""
        return [f"--exclude {pattern} matches no file name" for pattern in self.exclude if pattern in self._unmatched]

    def kept(self, files: Sequence[str]) -> list[str]:
        """The files that no pattern leaves out."""
        if not self.exclude:
            return list(files)
        kept = []
        for file in files:
            name = file.rpartition(os.sep)[2]
            matching = [pattern for pattern, regex in self._patterns.items() if regex.match(name)]
            self._unmatched -= set(matching)
            if not matching:
                kept.append(file)
        self.left_out += len(files) - len(kept)
        return kept

    def of_known(self, found: Mapping[str, Value], source: object, *, partly: bool = False) -> dict[str, Value]:
        """Of the classes that were ``found`` those that count.

        Raises UserError at one that is not among them, unless ``source`` need not hold all (``partly``).
        """
        if not self.classes:
            return dict(found)
        for name in self.classes:
            if name not in found and not partly:
                raise UserError(f"--classes {name}: {source} has no class of that name (it has {shorten(found)})")
        return {name: own for name, own in found.items() if name in self.classes}

    def of_samples(self, samples: Samples, source: object) -> Samples:
        """The part of a manifest or of arrays that counts, under the names of the classes that do.

        Raises UserError at an unknown class, at a single one, at ``label_regex``, and where no image is left.
        """
        if self.label_regex is not None:
            raise UserError(f"--label-regex goes with a folder of images, and {source} has labels itself; leave it out")
        if not self.classes and not self.exclude:
            return samples
        class_names = sort_class_names(self.of_known(dict.fromkeys(samples.class_names), source))
        if len(class_names) < 2:
            raise UserError(f"--classes {class_names[0]}: classification needs at least two; name another one")
        new_label = np.array([class_names.index(n) if n in class_names else -1 for n in samples.class_names])
        labels = new_label[samples.labels]
        kept = set(self.kept(samples.files))
        chosen = [i for i, file in enumerate(samples.files) if labels[i] >= 0 and file in kept]
        if not chosen:
            raise UserError(f"{source}: --classes and --exclude leave no image of one of its sets")
        return replace(samples.subset(chosen), labels=labels[chosen], class_names=class_names)

    def groups_of(self, names: Sequence[str], own: Sequence[str] | None) -> Sequence[str] | None:
        """What ``group_regex`` takes from each name; without one the groups that a manifest has of its ``own``.

        Raises UserError where there would be both, or a name tells none.
        """
        if self.group_regex is None:
            return own
        if own is not None:
            raise UserError("--group-regex: the manifest has a column group itself; leave one of the two out")
        return first_groups(self.group_regex, names, "--group-regex")

    def require_each_class(self, train: Samples, source: object) -> None:
        """Raises UserError where ``exclude`` has left out the last image of a class to train on."""
        empty = [train.class_names[label] for label in np.flatnonzero(train.class_counts() == 0)]
        if self.exclude and empty:
            raise UserError(
                f"{source}: class {empty[0]!r} holds no image to train on but what --exclude leaves out: "
                "leave the class out by --classes, or name another pattern"
            )

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {pattern: re.compile(fnmatch.translate(pattern)) for pattern in self.exclude}


def compiled(pattern: str, flag: str) -> re.Pattern[str]:
    """Raises UserError that names ``flag``: it is no regular expression, or has no group."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{flag} {pattern!r} is not a regular expression: {error}") from error
    if regex.groups < 1:
        raise UserError(rf"{flag} {pattern!r} has no group in parentheses, such as 'patient(\d+)_'")
    return regex


def first_groups(pattern: str, names: Sequence[str], flag: str) -> list[str]:
    """What the first group of a regular expression, searched for in each name, matches.

    Raises UserError that names ``flag``: as ``compiled``, or a name in which nothing matches.
    """
    regex = compiled(pattern, flag)
    matches = [regex.search(name) for name in names]
    found = [(match[1] or "") if match else "" for match in matches]
    require_all(found, names, f"{flag} {pattern!r}: no match")
    return found


def require_all(found: Sequence[str], names: Sequence[str], what: str) -> None:
    """Raises UserError that begins with ``what`` where one of ``found`` is empty."""
    without = [name for name, text in zip(names, found, strict=True) if not text]
    if without:
        raise UserError(f"{what} for {len(without)} of {len(names)} files: {shorten(without, limit=3)}")
