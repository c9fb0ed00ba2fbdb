"""The trained factors of one person."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapters import Adapters, Factors
from ..basis import BasisRecipe
from ..errors import FinetuneError
from ..layout import Layout
from ..lidb import MAX_COUNT, About, LiDB, extend, start_down
from ..recommended import BY_TOKEN, FROM_PREDICTION, PREDICTED_BY_TOKEN, RECOMMENDED, made_from
from .config import FinetuneConfig


class TrainableFactors(nn.Module):
    """The factors of one person as parameters on the device of their adapters.

    A cold start has ``up = 0`` and the shared `start_down`. A warm start is exactly the given person, each component
    rescaled (by powers of two, so without rounding) to a down side of about unit norm, which makes one learning rate
    fit every start; further columns start as in a cold start.
    """

    def __init__(self, adapters: Adapters, config: FinetuneConfig, init: LiDB | None = None) -> None:
        super().__init__()
        down, up = start_factors(adapters.recipe, adapters.layout, config.rank, init)
        self.adapters = adapters
        self.down = nn.Parameter(down.to(adapters.device), requires_grad=config.down_rate > 0)
        self.up = nn.Parameter(up.to(adapters.device))

    def forward(self) -> dict[str, Factors]:
        """Layer name → (up (out, R), down (R, in)), differentiable."""
        return self.adapters.expand(self.down, self.up)

    def state(self) -> tuple[Tensor, Tensor]:
        """Copies of down and up where they are: nothing waits for the device."""
        return self.down.detach().clone(), self.up.detach().clone()

    def snapshot(self, about: About, state: tuple[Tensor, Tensor] | None = None) -> LiDB:
        """A state, or the present one, as a person on the CPU."""
        down, up = (tensor.cpu() for tensor in state or self.state())
        return LiDB(self.adapters.layout, self.adapters.recipe, down, up, about)


def start_factors(basis: BasisRecipe, layout: Layout, rank: int, init: LiDB | None = None) -> tuple[Tensor, Tensor]:
    """The factors before the first step: down [L, R, a], up [L, b, R], float32 on the CPU; see `TrainableFactors`.

    R is `rank`, or the rank of `init` if it is higher.

    Raises:
        FinetuneError: if the rank does not fit into the basis.
        LayoutError: if `init` was made for another model, or for layers that `layout` lacks.
    """
    rank = rank if init is None else max(rank, init.rank)
    down = start_down(basis, layout, rank)
    up = torch.zeros(len(layout.layers), basis.up_dim, rank)
    if init is None:
        return down, up
    init = extend(init, layout)
    if rank > basis.max_rank:
        raise FinetuneError(f"Expected a rank of at most {basis.max_rank} (basis of the connected LIDB), got {rank}.")
    init_down, init_up = (t.detach().clone().float().cpu() for t in (init.down, init.up))
    length = init_down.norm(dim=-1, keepdim=True)
    scale = torch.where(length > 0, length, 1.0).log2().round().exp2()
    # A component that reads nothing has no effect, and could get none while its down side is frozen: a cold start again.
    down[:, : init.rank] = torch.where(length > 0, init_down / scale, down[:, : init.rank])
    up[:, :, : init.rank] = init_up * (scale * (length > 0)).mT
    return down, up


def source_of(config: FinetuneConfig, photos: int, init: LiDB | None) -> str:
    """What a person is made from, a key of `recommended.RECOMMENDED`."""
    predicted = init is not None and init.about.made_from == FROM_PREDICTION
    return made_from(photos, predicted, bool((config.basis if init is None else init.basis).learned))


def describe(config: FinetuneConfig, photos: int, init: LiDB | None, steps: int) -> About:
    """What is known of a person after so many steps on so many photos, from another one or from none."""
    source = source_of(config, photos, init)
    before = About() if init is None else init.about
    strengths = RECOMMENDED[source].strengths
    if before.strengths in (BY_TOKEN, PREDICTED_BY_TOKEN):
        strengths = before.strengths
    elif config.prior_weight > 0 and config.train_text_encoder:
        strengths = BY_TOKEN
    return replace(
        before,
        made_from=source,
        prompt=config.prompt,
        token=config.token,
        photos=photos,
        steps=min(before.steps + steps, MAX_COUNT),  # more, and they could not be saved
        strengths=strengths,
    )
