"""What differs between versions of the host. What this pack needs of all of them is in `tests/host/test_needs.py`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management

KERNELS = "comfy_kitchen"  # of newer hosts; autograd cannot follow them
TWINS = ("rope", "adaln")  # below `KERNELS`.backends.eager: the same functions in plain PyTorch


def if_known(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that a function of this host takes.

    For example ``io.Int.Input("rank", **if_known(io.Int.Input, advanced=True))``.
    """
    known = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in known}


@contextmanager
def training() -> Iterator[None]:
    """Let the host compute in ways that autograd can follow; afterwards it is as before.

    Newer hosts have a flag for that. Not all of their models ask it, and those of hosts before 0.18 do not know it, so
    the kernels are replaced as well, in every module of the host that has them by name.
    """
    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        if hasattr(comfy.model_management, "in_training"):
            replace(comfy.model_management, "in_training", True)
        twins = _twins()
        hosts = [module for name, module in sys.modules.items() if name.partition(".")[0] in (KERNELS, "comfy")]
        for module in hosts if twins else ():
            for name, value in list(vars(module).items()):
                if twin := twins.get(id(value)):
                    replace(module, name, twin)
        yield
    finally:
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)


def _twins() -> dict[int, Callable[..., Any]]:
    """Functions in plain PyTorch by the identity of the kernel that they stand in for."""
    found: dict[int, Callable[..., Any]] = {}
    if kernels := sys.modules.get(KERNELS):
        for name in TWINS:
            try:
                plain = importlib.import_module(f"{KERNELS}.backends.eager.{name}")
            except ImportError:  # of an older version
                continue
            named = {n: f for n, f in vars(plain).items() if inspect.isfunction(f) and not n.startswith("_")}
            found |= {id(getattr(kernels, n)): f for n, f in named.items() if hasattr(kernels, n)}
    return found
