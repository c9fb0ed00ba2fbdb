"""A step of a fine-tune in the memory that there is: fewer samples at once, then blocks that are computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import FinetuneError
from ..recompute import recomputed

OUT_OF_MEMORY: type[Exception] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
Result = TypeVar("Result")


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is begun with, and what can be done if it does not fit.

    Attributes:
        at_once: a step passes no more samples through the model together; None is all of them.
        recompute: compute `blocks` twice from the start.
        blocks: parts of the model that may be computed once more in the backward pass, from `recompute.blocks_of`.
        what_fits: a sentence for the error of a step that does not fit at all.
    """

    at_once: int | None = None
    recompute: bool = False
    blocks: Sequence[nn.Module] = ()
    what_fits: str = "Lower the resolution, or close other programs that use the GPU."


AMPLE = MemoryPlan()


@contextmanager
def economy(plan: MemoryPlan) -> Iterator[Economy]:
    """What does steps by a plan; the model is as it was at the end of the context."""
    with ExitStack() as stack:
        yield Economy(plan, stack)


class Economy:
    """Does steps by a plan, and more economically from the first on that runs out of memory.

    Args:
        plan: how.
        stack: ends what is done to the model.
    """

    def __init__(self, plan: MemoryPlan, stack: ExitStack) -> None:
        self.plan, self.at_once, self._stack = plan, plan.at_once, stack
        self._recomputes = False
        if plan.recompute:
            self._recompute()

    def run(
        self,
        samples: int,
        losses: Callable[[int], Iterable[Tensor]],
        backward: Callable[[Callable[[], Iterable[Tensor]]], Result],
    ) -> Result:
        """One step, begun again as long as it runs out of memory.

        Args:
            samples: how many it has.
            losses: of so many of them at once.
            backward: what is done with the losses.

        Raises:
            FinetuneError: it does not fit.
        """
        while True:
            at_once = min(samples, self.at_once or samples)
            try:
                return backward(partial(losses, at_once))
            except OUT_OF_MEMORY:
                pass  # what follows waits until the error is gone, which holds all that the step had computed
            self._spare(at_once)

    def _spare(self, at_once: int) -> None:
        if at_once > 1:
            self.at_once = -(-at_once // 2)
        elif self.plan.blocks and not self._recomputes:
            self._recompute()
        else:
            raise FinetuneError(f"Out of memory with a single noise level at a time. {self.plan.what_fits}")

    def _recompute(self) -> None:
        self._stack.enter_context(recomputed(self.plan.blocks))
        self._recomputes = True
