"""What a piece of work costs apart from time: operations that a device is given, and the most memory held at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Counts while it is active.

    Attributes:
        operations: that compute something; a view is none.
        peak: bytes of the most memory that was allocated since the start and held at once, on any device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.peak = self._held = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_pointer(tensor) for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(result) if _pointer(tensor) not in given]
        if made or func._schema.is_mutable:
            self.operations += 1
        for tensor in made:
            self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return

        def gone(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self._held -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._held += size
        self.peak = max(self.peak, self._held)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
