"""Sockets that got a value of JSON: whoever sends a prompt over HTTP can write anything in place of a wire."""

from __future__ import annotations

from functools import wraps
from inspect import signature
from typing import Any

from comfy_api.latest import io

from ...hdb_core.errors import HDBError

# Their values are objects of the host or of this pack.
_OBJECTS = {
    "MODEL",
    "CLIP",
    "VAE",
    "CLIP_VISION",
    "IMAGE",
    "MASK",
    "LIDB",
    "HYPERNET",
    "FINETUNE_OPTIONS",
    "APPLY_OPTIONS",
}
_JSON = (str, bool, int, float, list, dict)
_SAID_ELSEWHERE = {"CLIP", "IMAGE"}  # where null is what a checkpoint or a loader may give


class SocketError(HDBError, ValueError):
    """A socket got no object."""


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The same node, which refuses values of JSON on its sockets before it does anything."""
    execute: Any = node.execute

    @wraps(execute.__func__)
    def checked_execute(cls: type[io.ComfyNode], *args: Any, **inputs: Any) -> io.NodeOutput:
        schema, given_all = cls.define_schema(), {**signature(execute).bind_partial(*args).arguments, **inputs}
        for one in schema.inputs:
            kind = one.get_io_type()
            given = given_all.get(one.id) if schema.is_input_list else [given_all.get(one.id)]
            allowed = one.optional or one.id not in given_all or kind in _SAID_ELSEWHERE
            for value in given or () if kind in _OBJECTS else ():
                if isinstance(value, _JSON) or (value is None and not allowed):
                    got = "null" if value is None else repr(value)
                    raise SocketError(
                        f"{schema.display_name} got {got:.60} for {one.id}. Connect an output of the type {kind} to it."
                    )
        return execute.__func__(cls, *args, **inputs)

    node.execute = classmethod(checked_execute)  # type: ignore[method-assign, assignment]
    return node
