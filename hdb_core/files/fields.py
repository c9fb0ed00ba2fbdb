"""JSON fields as dataclasses: every value is checked for its type before anything is made of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")
MOST_ITEMS = 4096  # of a list


def read_dataclass(cls: type[Made], fields: Any, **given: Any) -> Made:
    """An instance of a dataclass or named tuple from JSON.

    Args:
        cls: with annotations of str, int, float, bool, tuples of these, or other such classes.
        fields: an object with exactly the fields of `cls`, or some of them where `cls` has defaults; a list for a named
            tuple.
        given: fields that are not in the JSON.

    Raises:
        TypeError: if a field has another type.
        ValueError: if a field is unknown, missing, or no finite number, or `cls` refuses its values.
    """
    kind: Any = cls
    types = _types(kind)
    if issubclass(cls, tuple):
        if not isinstance(fields, list) or len(fields) != len(types):
            raise TypeError(f"{cls.__name__}: expected a list of {len(types)} values")
        return cls(
            *(as_type(value, wanted, cls.__name__) for value, wanted in zip(fields, types.values(), strict=True))
        )
    if not isinstance(fields, Mapping):
        raise TypeError(f"{cls.__name__}: expected an object, got {type(fields).__name__}")
    if unknown := set(fields) - (set(types) - set(given)):
        raise ValueError(f"unknown field {min(map(str, unknown))[:40]!r}")
    made = {name: as_type(value, types[name], name) for name, value in fields.items()}
    if missing := _required(kind) - set(made) - set(given):
        raise ValueError(f"missing field {min(missing)!r}")
    return cls(**made, **given)


def whole_number(value: Any, low: int, high: int, name: str) -> int:
    """A whole number between two limits, both included.

    Raises:
        TypeError: if it is something else.
        ValueError: if it is outside of the limits.
    """
    number = int(as_type(value, int, name))
    if not low <= number <= high:
        raise ValueError(f"{name} is not between {low:,} and {high:,}")
    return number


@cache
def _types(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _required(cls: Any) -> set[str]:
    none = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(cls) if f.default is none and f.default_factory is none}


def as_type(value: Any, wanted: Any, name: str) -> Any:
    """A value of JSON as an annotated type; lists become tuples.

    Raises:
        TypeError, ValueError: if it is of another type, or no finite number.
    """
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is Union or (origin is not None and NoneType in arguments):
        if value is None and NoneType in arguments:
            return None
        return as_type(value, next(a for a in arguments if a is not NoneType), name)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
        if len(value) > MOST_ITEMS:
            raise ValueError(f"{name}: a list of {len(value):,} items")
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        return tuple(as_type(item, kind, name) for item, kind in zip(value, kinds, strict=True))
    if dataclasses.is_dataclass(wanted) or (isinstance(wanted, type) and issubclass(wanted, tuple)):
        kind: Any = wanted
        return read_dataclass(kind, value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53:
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{name}: expected {wanted.__name__}, got {type(value).__name__}")
    if isinstance(value, str):
        value.encode()  # ValueError for half a character, which nothing could write
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: not a finite number")
    return value
