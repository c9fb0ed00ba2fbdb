"""What comes on sockets and in widgets from whoever sends a prompt over HTTP, who can write anything there."""

from __future__ import annotations

from functools import wraps
from inspect import signature
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...hdb_core.errors import HDBError
from ...hdb_core.lidb import LiDB
from ...hdb_core.recommended import Strengths
from .finetune import FinetuneOptions
from .hypernets import HostHyperNet

# Wires with objects of the host, which other packs may replace by their own, and what is surely none of them.
_OF_HOST = {"MODEL", "CLIP", "VAE", "CLIP_VISION"}
_JSON = (str, bool, int, float, list, dict)
_CLASSES = {
    "IMAGE": Tensor,
    "MASK": Tensor,
    "LIDB": LiDB,
    "HYPERNET": HostHyperNet,
    "FINETUNE_OPTIONS": FinetuneOptions,
    "APPLY_OPTIONS": Strengths,
}
_NOT_OF_HOST = (*_JSON, *_CLASSES.values())
_NUMBERS = {"INT": int, "FLOAT": float}
_WIDGETS = {"STRING": str, "INT": Integral, "FLOAT": Real}  # some nodes give anything to them, or nothing
_SAID_ELSEWHERE = {"CLIP", "IMAGE"}  # where null is what a checkpoint or a loader may give
_NULL = str(None)  # what the host makes of null in a text


class SocketError(HDBError, ValueError):
    """A node got something that its input cannot take."""


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The same node, which first refuses what is no object of an input's type, no number, or a number beyond its limits.

    A text that is null is the input's default.
    """
    execute: Any = node.execute

    @wraps(execute.__func__)
    def checked_execute(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> io.NodeOutput:
        schema, given = cls.define_schema(), {**signature(execute).bind_partial(*args).arguments, **inputs}
        if unknown := sorted(inputs.keys() - {one.id for one in schema.inputs}):  # the host passes on what is wired
            raise SocketError(
                f"{schema.display_name} has no input {unknown[0]:.60}. Update this pack, or remove the node and add it anew."
            )
        for one in schema.inputs:
            if (values := given.get(one.id)) is not None and schema.is_input_list:
                given[one.id] = [_taken(schema, one, value) for value in values]
            elif one.id in given:
                given[one.id] = _taken(schema, one, values)
        return execute.__func__(cls, **given)

    node.execute = classmethod(checked_execute)  # type: ignore[method-assign, assignment]
    return node


def _taken(schema: io.Schema, one: Any, value: Any) -> Any:
    """A value of an input as the node takes it."""
    kind = one.get_io_type()
    if kind == "STRING" and str(value) == _NULL:
        return one.default
    if value is None:
        fits = one.optional or kind in _SAID_ELSEWHERE or kind not in _OF_HOST | (_CLASSES | _WIDGETS).keys()
    elif kind in _OF_HOST:
        fits = not isinstance(value, _NOT_OF_HOST)
    else:
        fits = isinstance(value, (_CLASSES | _WIDGETS).get(kind, object))
    if not fits:
        got = repr(value) if isinstance(value, _JSON) else "null" if value is None else type(value).__name__
        raise SocketError(
            f"{schema.display_name} got {got:.60} for {one.id}. Connect an output of the type {kind} to it."
        )
    if kind == "STRING" and value is not None and not _is_text(value):
        raise SocketError(f"{schema.display_name} got text that is not valid Unicode for {one.id}. Type it again.")
    if kind in _NUMBERS and value is not None:
        if not one.min <= value <= one.max:  # NaN, too; the host compares only what is typed
            raise SocketError(f"{schema.display_name} got {value} for {one.id}. Give it {one.min} to {one.max}.")
        return _NUMBERS[kind](value)  # other nodes give numpy's numbers
    return value


def _is_text(value: str) -> bool:
    """Whether a file can hold it: JSON can bring one half of a character that is written as two."""
    try:
        value.encode()
    except UnicodeError:
        return False
    return True
