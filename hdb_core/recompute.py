"""Checkpointing: parts of a model that keep their inputs alone, and are computed once more in the backward pass.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from .errors import FinetuneError


def blocks_of(root: nn.Module, forward: Callable[[], object]) -> list[nn.Module]:
    """The innermost blocks of a model: modules of several others that it takes from a list and calls one by one.

    Args:
        root: of the model.
        forward: runs it, so that it shows which of its modules are called, and which are only lists.
    """
    called: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in root.modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    of_a_list = {part for module in root.modules() if module not in called for part in module.children()}
    blocks = {module for module in of_a_list & called if len(called & set(module.modules())) > 2}  # itself, a layer, …
    return [
        m for m in root.modules() if m in blocks and not any(part in blocks for part in m.modules() if part is not m)
    ]


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Compute blocks twice for the duration of the context, which saves the memory of what is inside of them."""
    before = {block: block.__dict__.get("forward") for block in blocks}
    try:
        for block in blocks:
            block.forward = _twice(block.forward)
        yield
    finally:
        for block, forward in before.items():
            block.__dict__.pop("forward")
            if forward is not None:
                block.forward = forward


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))  # the caller may write into its dicts later
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in given]
        # The generators' states need no restoring: a frozen model draws nothing.
        result = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        if versions != [tensor._version for tensor in given]:
            raise FinetuneError(
                "Out of memory, and gradient checkpointing does not work with this model. Lower the resolution."
            )
        return result

    return run
