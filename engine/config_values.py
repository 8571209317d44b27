"""The values of a mapping, such as a recipe, as the fields that they are for want them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from engine.errors import UserError
from engine.head_specs import plain_specs, read_head_specs


def checked_values(of: Iterable[dataclasses.Field[Any]], values: Any, source: str) -> dict[str, Any]:
    """``values`` with every key known and every value of its field's type.

    Raises UserError that names ``source`` and the key.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping of options, such as `epochs: 20`")
    fields = {field.name: field for field in of}
    checked = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(fields)}"
            raise UserError(f"{source}: unknown option {key!r}{hint}")
        checked[key] = _converted(fields[key], value, source)
    return checked


def _converted(field: dataclasses.Field[Any], value: Any, source: str) -> Any:
    if "recipe_only" in field.metadata:
        return plain_specs(read_head_specs(value, f"{source}: {field.name}"))
    argument = field.metadata["argument"]
    if value is None and (field.default is None):
        return None
    if "switch" in argument:
        if isinstance(value, bool):
            return value
        raise UserError(f"{source}: {field.name}: {value!r} must be true or false")
    if "names" in argument:
        if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
            return tuple(value)
        raise UserError(f"{source}: {field.name}: {value!r} must be a list of names")
    if "words" in argument:
        return _word_or_numbers(field.name, value, argument["words"], source)
    if "nargs" in argument:
        return _numbers(field.name, value, argument["nargs"], source, argument.get("type", float))
    wanted = argument.get("type", str)
    # YAML reads 1e-3 as text; a number in place of a text is a mistake
    ok = isinstance(value, wanted) or (wanted is float and isinstance(value, int | str)) or isinstance(value, str)
    try:
        if isinstance(value, bool) or not ok:
            raise ValueError
        converted = wanted(value)
    except ValueError:
        raise UserError(f"{source}: {field.name}: {value!r} must be of type {wanted.__name__}") from None
    if converted not in argument.get("choices", (converted,)):
        raise UserError(f"{source}: {field.name}: {value!r} must be one of {', '.join(argument['choices'])}")
    return converted


def _numbers(
    name: str, values: Any, count: int | str, source: str, number: type[int] | type[float] = float
) -> tuple[float, ...]:
    try:
        if (
            isinstance(values, str)
            or (count != "+" and len(values) != count)
            or any(isinstance(value, bool) for value in values)
        ):
            raise ValueError
        converted = tuple(number(value) for value in values)
        if any(new != float(value) for new, value in zip(converted, values, strict=True)):
            raise ValueError
        return converted
    except (TypeError, ValueError):
        kind = "whole numbers" if number is int else "numbers"
        wanted = kind if count == "+" else f"{count} {kind}"
        raise UserError(f"{source}: {name}: {values!r} must be a list of {wanted}") from None


def _word_or_numbers(name: str, value: Any, words: tuple[str, ...], source: str) -> str | tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) == 1 and values[0] in words:
        word: str = values[0]
        return word
    try:
        return _numbers(name, values, len(values), source)
    except UserError:
        raise UserError(f"{source}: {name}: {value!r} must be one of {', '.join(words)}, or numbers") from None
