"""How a recipe describes the heads of a model: ``heads: {NAME: {column: ..., classes: ..., when: ...}}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.errors import UserError

MAIN_COLUMN = "label"


@dataclass(frozen=True)
class HeadSpec:
    """One head, as it is described.

    Attributes:
        column: of the manifest, ``label`` or ``label_*``; in a folder ``label`` is the name of the class folder. None:
            the column ``label_NAME`` of the head's own name where the images have one, else ``label``.
        classes: which values of the column make each class; an image with any other has no label here. None: each value
            is a class.
        hidden: units of a hidden layer with ReLU; None: there is none.
        drop: probability of dropping a unit of that layer, or a feature where there is none.
        when: (head, class): the head is trained and scored on images whose label there is that class, and no others.
        weight: factor of its loss in the sum.
    """

    column: str | None = None
    classes: Mapping[str, tuple[str, ...]] | None = None
    hidden: int | None = None
    drop: float = 0.0
    when: tuple[str, str] | None = None
    weight: float = 1.0


def read_head_specs(values: Any, source: str = "heads") -> dict[str, HeadSpec]:
    """The heads by name, in order. Raises UserError that names ``source``, the head and the key."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: expected a mapping of heads, such as `subtype: {{column: label_subtype}}`")
    specs = {}
    for name, given in values.items():
        where = f"{source}: {name}"
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name) or hasattr(nn.ModuleDict(), name):
            raise UserError(f"{where}: not a name for a head; take letters, digits and _, and no name that torch uses")
        specs[name] = _spec(given, where)
    _require_conditions(specs, source)
    return specs


def plain_specs(specs: Mapping[str, HeadSpec]) -> dict[str, dict[str, Any]]:
    """What ``read_head_specs`` reads, with every key, in plain values for YAML."""
    return {
        name: {
            "column": spec.column,
            "classes": None if spec.classes is None else {key: list(values) for key, values in spec.classes.items()},
            "hidden": spec.hidden,
            "drop": spec.drop,
            "when": None if spec.when is None else dict([spec.when]),
            "weight": spec.weight,
        }
        for name, spec in specs.items()
    }


def _spec(given: Any, where: str) -> HeadSpec:
    known = tuple(HeadSpec.__dataclass_fields__)
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise UserError(f"{where}: {given!r} must be a mapping with keys of {', '.join(known)}")
    given = {key: value for key, value in given.items() if value is not None}
    column, classes, when = given.get("column"), given.get("classes"), given.get("when")
    hidden, drop, weight = given.get("hidden"), given.get("drop", 0.0), given.get("weight", 1.0)
    if column is not None and not re.fullmatch(rf"{MAIN_COLUMN}(_.+)?", str(column)):
        raise UserError(f"{where}: column {column!r} must be label or label_NAME")
    if classes is not None:
        if not isinstance(classes, Mapping) or len(classes) < 2:
            raise UserError(
                f"{where}: classes must be a mapping of at least two, such as {{benign: [a], malignant: [b]}}"
            )
        classes = {
            str(key): tuple(map(str, values)) if isinstance(values, list | tuple) else (str(values),)
            for key, values in classes.items()
        }
        values = [value for merged in classes.values() for value in merged]
        if len(set(values)) < len(values):
            raise UserError(f"{where}: classes name a value twice; leave it in one")
    if when is not None:
        if not isinstance(when, Mapping) or len(when) != 1:
            raise UserError(f"{where}: when must be one head and its class, such as {{diagnosis: malignant}}")
        ((parent, label),) = when.items()
        when = str(parent), str(label)
    if hidden is not None and not (_is_number(hidden) and hidden == int(hidden) and hidden >= 1):
        raise UserError(f"{where}: hidden {hidden!r} must be a whole number of at least 1")
    if not (_is_number(drop) and 0 <= drop < 1):
        raise UserError(f"{where}: drop {drop!r} must be at least 0 and below 1")
    if not (_is_number(weight) and 0 < weight < float("inf")):
        raise UserError(f"{where}: weight {weight!r} must be a number above 0")
    return HeadSpec(column, classes, None if hidden is None else int(hidden), float(drop), when, float(weight))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_conditions(specs: Mapping[str, HeadSpec], source: str) -> None:
    """Conditions point to heads that stand before, so that there is no circle."""
    before: list[str] = []
    for name, spec in specs.items():
        if spec.when is not None and spec.when[0] not in before:
            heads = ", ".join(before) or "none"
            raise UserError(f"{source}: {name}: when: {spec.when[0]} is no head that stands before it (those: {heads})")
        before.append(name)
