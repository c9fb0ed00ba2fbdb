"""A second device on a machine that has only one: all memory is the CPU's, and remembers where it claims to be."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
# These write into a tensor from another place, read one by indices from another place, or only look at both.
ACROSS = {"copy_", "__getitem__", "__setitem__", "__set__", "to", "_has_compatible_shallow_copy_type"}


class SecondDevice(TorchFunctionMode):
    """While it is active, ``device`` can be moved to and allocated on, and mixing it with the CPU raises as on a GPU.

    It sees the calls of torch's functions, not what those written in Python do inside.

    Args:
        device: of a kind that this machine does not have.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._there: dict[int, StorageWeakRef] = {}  # the weak reference keeps the key from being used again
        self._submit = ThreadPoolExecutor.submit

    def __enter__(self) -> Any:
        """Torch's modes are of one thread; this one is of those of thread pools as well."""
        ThreadPoolExecutor.submit = lambda pool, work, *args: self._submit(pool, self._within, work, *args)
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        ThreadPoolExecutor.submit = self._submit
        super().__exit__(*raised)

    def _within(self, work: Any, *args: Any) -> Any:
        super().__enter__()
        try:
            return work(*args)
        finally:
            super().__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return self.place(args[0])
        given = tensors_of((args, kwargs))
        if name not in ACROSS:
            self._require_one_place(name, given)
        place = self._wanted(name, args, kwargs) or self._common_place(given[:1] if name in ACROSS else given)
        args, kwargs = tree_map(self._as_cpu, (args, kwargs))
        if name in ("to", "cpu") and place != self.place(given[0]):
            func, kwargs = Tensor.to, kwargs | {"copy": True}  # on the one real device a move would be no copy
            args = args if name == "to" else (*args, CPU)
        if name == "numpy" and place != CPU:
            raise TypeError(f"can't convert {place} tensor to numpy")
        result = func(*args, **kwargs)
        if place == self.device:
            own = {storage(tensor)._cdata for tensor in given}
            for tensor in tensors_of(result):
                if storage(tensor)._cdata not in own:
                    self._there[storage(tensor)._cdata] = StorageWeakRef(storage(tensor))
        return result

    def __len__(self) -> int:
        """How many pieces of memory have been there."""
        return len(self._there)

    def place(self, tensor: Tensor) -> torch.device:
        """Where a tensor claims to be; only inside of a call, where this mode is off."""
        return self.device if storage(tensor)._cdata in self._there else tensor.device

    def _wanted(self, name: str, args: tuple, kwargs: dict[str, Any]) -> torch.device | None:
        """Where a call asks its result to be."""
        if name == "cpu":
            return CPU
        positional = args[1:] if name in ("to", "type_as") else ()
        for value in (kwargs.get("device"), kwargs.get("other"), *positional):
            if isinstance(value, Tensor):
                return self.place(value)
            if isinstance(value, torch.device | str):
                return torch.device(value)
        return None

    def _as_cpu(self, value: Any) -> Any:
        is_device = isinstance(value, torch.device) and value.type == self.device.type
        return CPU if is_device or (isinstance(value, str) and value == self.device.type) else value

    def _common_place(self, tensors: Sequence[Tensor]) -> torch.device:
        return self.device if any(self.place(tensor) == self.device for tensor in tensors) else CPU

    def _require_one_place(self, name: str, tensors: Sequence[Tensor]) -> None:
        # A number without dimensions on the CPU goes with everything.
        if len({self.place(tensor) for tensor in tensors if tensor.ndim or self.place(tensor) != CPU}) > 1:
            found = ", ".join(f"{tuple(tensor.shape)} on {self.place(tensor)}" for tensor in tensors)
            raise RuntimeError(f"Expected all tensors of {name} to be on the same device, found {found}.")


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
