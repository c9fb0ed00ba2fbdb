"""A person as a value, Lightweight DreamBooth (LiDB), and its algebra on the core.

The change of a layer's weight is ``delta_weight = up_aux · up · down · down_aux`` with frozen orthonormal
``up_aux`` (out, b) and ``down_aux`` (a, in), and trained ``up`` (b, R) and ``down`` (R, a). In the paper's letters
(which run opposite to LoRA's) ``A`` is the side that reads the input and ``B`` the side that writes the output:
A_aux = down_aux, A_train = down, B_train = up, B_aux = up_aux.

Because the bases are orthonormal, all geometry lives in the core ``up · down`` (b, a): inner products, norms,
cosines, truncation and sums of the full matrices are exact on it.

Shape symbols: L layers, R rank, a and b the basis dimensions.
Source: HyperDreamBooth, arXiv 2307.06949, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import Adapters
from .basis import BasisRecipe, layer_basis
from .errors import LiDBError
from .layout import Layout, require_layers
from .recommended import FROM_PHOTO, RECOMMENDED, Strengths

MAX_COUNT = 1_000_000_000  # of photos and steps, so that a file is believed


@dataclass(frozen=True)
class About:
    """What a LiDB says about itself.

    Attributes:
        made_from: what the person was made from, a key of `recommended.RECOMMENDED`; decides how they are applied.
        prompt: that means the person, with the token.
        token: what means the person in a prompt, ``[v]``.
        photos: how many the person was made from.
        steps: of the fast fine-tune, all of them; 0 is a prediction alone.
        strengths: that the person is to be applied with.
        model: the host's class of the base model; a note, since the layout decides what a person fits.
        name: of the person, as the user calls them.
        thumbnail: a small picture, JPEG in base64; see `card`.
    """

    made_from: str = FROM_PHOTO
    prompt: str = "a [v] face"
    token: str = "[v]"
    photos: int = 1
    steps: int = 0
    strengths: Strengths = RECOMMENDED[FROM_PHOTO].strengths
    model: str = ""
    name: str = ""
    thumbnail: str = ""


@dataclass(frozen=True, eq=False)
class LiDB:
    """A person: low-rank changes of the attention layers of one model.

    Where a layer is narrower than the basis (a' < a or b' < b), the surplus coordinates are set to zero.

    Attributes:
        layout: the adapted layers.
        basis: recipe of the frozen bases.
        down: [L, R, a] float32.
        up: [L, b, R] float32.
        about: how it was made and how it wants to be used.

    Raises:
        LiDBError: if the shapes do not belong together.
    """

    layout: Layout
    basis: BasisRecipe
    down: Tensor
    up: Tensor
    about: About = field(default_factory=About)

    def __post_init__(self) -> None:
        _check_shapes(self)
        narrow = [self.basis.dims(layer) for layer in self.layout.layers]
        if any(dims != (self.basis.down_dim, self.basis.up_dim) for dims in narrow):
            device = self.down.device
            a_dims, b_dims = torch.tensor(narrow, device=device).unbind(1)
            down_live = torch.arange(self.basis.down_dim, device=device) < a_dims[:, None]
            up_live = torch.arange(self.basis.up_dim, device=device) < b_dims[:, None]
            object.__setattr__(self, "down", self.down * down_live[:, None, :])
            object.__setattr__(self, "up", self.up * up_live[:, :, None])

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[1]

    @property
    def num_values(self) -> int:
        """How many numbers make this person."""
        return self.down.numel() + self.up.numel()

    def get_ram_usage(self) -> int:
        """Bytes; ComfyUI's cache asks for it."""
        return sum(t.numel() * t.element_size() for t in (self.down, self.up))


class Factors(NamedTuple):
    """Bare factors: down (..., L, R, a), up (..., L, b, R); leading dimensions are the people of a batch."""

    down: Tensor
    up: Tensor


def expand(lidb: LiDB, adapters: Adapters | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """The low-rank factors in the layers' own dimensions, as any LoRA has them.

    Args:
        lidb: the person.
        adapters: of its recipe and layout; None makes them, at seconds for a full-size model.

    Returns:
        Layer name → (up (out, R), down (R, in)); ``delta_weight = up @ down``.

    Raises:
        LiDBError: the adapters are of another recipe or layout.
    """
    adapters = adapters or Adapters(lidb.basis, lidb.layout, lidb.down.device)
    if (adapters.recipe, adapters.layout) != (lidb.basis, lidb.layout):
        raise LiDBError(
            f"The adapters are of another basis or model ({adapters.recipe.describe()}, {adapters.layout.describe()}) than the "
            f"LiDB ({lidb.basis.describe()}, {lidb.layout.describe()}). Make Adapters(lidb.basis, lidb.layout)."
        )
    return adapters.expand(lidb.down.to(adapters.device), lidb.up.to(adapters.device))


def expand_layer(lidb: LiDB, index: int) -> tuple[Tensor, Tensor]:
    """`expand` of layer number `index` alone, whose bases are made and let go of."""
    down_aux, up_aux = layer_basis(lidb.basis, lidb.layout.layers[index])
    down, up = lidb.down[index, :, : len(down_aux)], lidb.up[index, : up_aux.shape[1]]
    return up_aux @ up, down @ down_aux


def start_down(basis: BasisRecipe, layout: Layout, rank: int) -> Tensor:
    """The down side that all people share: row k is the k-th unit vector, so it reads the k-th row of ``down_aux``.

    Returns:
        [L, rank, a] float32 with orthonormal rows (zero rows where a layer is narrower than the rank).
    """
    live = torch.tensor([basis.dims(layer)[0] for layer in layout.layers])[:, None, None]
    return torch.eye(rank, basis.down_dim) * (torch.arange(basis.down_dim) < live)


def nobody(layout: Layout, basis: BasisRecipe) -> LiDB:
    """A person of rank 1 that changes nothing; a fine-tune that goes on from there is a cold start in its basis."""
    up = torch.zeros(len(layout.layers), basis.up_dim, 1)
    return LiDB(layout, basis, start_down(basis, layout, 1), up)


def delta_weight(lidb: LiDB, index: int) -> Tensor:
    """The full change (out, in) of layer number `index`; differentiable. Only for export and tests: it is large."""
    up, down = expand_layer(lidb, index)
    return up @ down


def core(lidb: LiDB) -> Tensor:
    """The cores [L, b, a], in which distances and angles equal those of the full matrices."""
    return lidb.up @ lidb.down


def inner(lidb_a: LiDB, lidb_b: LiDB) -> Tensor:
    """⟨ΔW_a, ΔW_b⟩ per layer [L], at the cost of the factors.

    Raises:
        LiDBError: if the two are of different layouts or bases.
    """
    require_same_space([lidb_a, lidb_b])
    return factors_inner(Factors(lidb_a.down, lidb_a.up), Factors(lidb_b.down, lidb_b.up))


def factors_inner(one: Factors, other: Factors) -> Tensor:
    """⟨ΔW, ΔW'⟩ (..., L) of bare factors in one basis, differentiable; the ranks may differ."""
    return ((one.up.mT @ other.up) * (one.down @ other.down.mT)).sum((-2, -1))


def norm(lidb: LiDB) -> Tensor:
    """The Frobenius norm of all changes together, a scalar."""
    return inner(lidb, lidb).sum().clamp(min=0).sqrt()


def cosine(lidb_a: LiDB, lidb_b: LiDB) -> Tensor:
    """The cosine between two persons over all layers together, a scalar; 0 if one of them is zero."""
    lidb_a, lidb_b = _exact(lidb_a), _exact(lidb_b)
    product = inner(lidb_a, lidb_b).sum()
    return (product / (norm(lidb_a) * norm(lidb_b)).clamp(min=torch.finfo(product.dtype).tiny)).float()


def cosines(lidb_a: LiDB, lidb_b: LiDB) -> dict[str, float]:
    """The cosine between two persons in each block of the model (`Layer.block`) that both of them change.

    Raises:
        LiDBError: if the two are of different layouts or bases.
    """
    lidb_a, lidb_b = _exact(lidb_a), _exact(lidb_b)
    blocks: dict[str, list[int]] = {}
    for number, layer in enumerate(lidb_a.layout.layers):
        blocks.setdefault(layer.block, []).append(number)
    product, square_a, square_b = (inner(*pair) for pair in ((lidb_a, lidb_b), (lidb_a,) * 2, (lidb_b,) * 2))
    sums = {
        name: tuple(float(own[rows].sum()) for own in (product, square_a, square_b))
        for name, rows in sorted(blocks.items())
    }
    return {name: both / (a**0.5 * b**0.5) for name, (both, a, b) in sums.items() if a > 0 and b > 0}


def _exact(lidb: LiDB) -> LiDB:
    """The person in float64, which holds the square of every number that float32 does."""
    return replace(lidb, down=lidb.down.double(), up=lidb.up.double())


def is_finite(lidb: LiDB) -> bool:
    """Whether the changes of all layers are, not only their factors."""
    sides = ((lidb.down, 2), (lidb.up, 1))
    down, up = (torch.linalg.vector_norm(side, dim=dim, dtype=torch.float64) for side, dim in sides)
    return bool((down * up < torch.finfo(torch.float32).max).all())  # False for NaN


def truncate(lidb: LiDB, rank: int) -> LiDB:
    """The best approximation of at most this rank, layer by layer, in canonical form.

    Canonical: both factors of a component have the same norm, components run from large to small, and the largest
    entry of a down row is positive. A rank at or above the present one changes the form and not the person.

    Args:
        lidb: any LiDB.
        rank: at least 1.

    Raises:
        LiDBError: if the rank is below 1.
    """
    if rank < 1:
        raise LiDBError(f"Expected a rank of at least 1, got {rank}.")
    q_up, r_up = torch.linalg.qr(lidb.up.double())
    q_down, r_down = torch.linalg.qr(lidb.down.double().mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    root = s[:, :rank].sqrt()
    up = (q_up @ u[..., :rank]) * root[:, None, :]
    down = (vh[:, :rank] @ q_down.mT) * root[..., None]
    largest = down.gather(-1, down.abs().argmax(-1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(down)
    return LiDB(lidb.layout, lidb.basis, (down * sign).to(lidb.down), (up * sign.mT).to(lidb.up), lidb.about)


def strongest(lidb: LiDB, count: int) -> LiDB:
    """The best approximation of so many components in all layers together, in canonical form (see `truncate`).

    A layer that a person changes much keeps more of them than one that it hardly changes.

    Args:
        lidb: any LiDB.
        count: at least 1.

    Raises:
        LiDBError: if the count is below 1.
    """
    if count < 1:
        raise LiDBError(f"Expected at least 1 component, got {count}.")
    whole = truncate(lidb, lidb.rank)
    size = whole.down.norm(dim=2) * whole.up.norm(dim=1)  # (L, R), falling along R
    kept = torch.zeros(size.numel(), dtype=torch.bool)
    kept[size.flatten().argsort(descending=True, stable=True)[:count].cpu()] = True
    kept = kept.view_as(size).to(size.device)
    rank = max(1, int(kept.sum(1).max()))
    down, up = (whole.down * kept[..., None])[:, :rank], (whole.up * kept[:, None])[..., :rank]
    return LiDB(lidb.layout, lidb.basis, down, up, lidb.about)


def extend(lidb: LiDB, layout: Layout) -> LiDB:
    """The same person with convolutions, which it leaves as they are.

    Args:
        lidb: any LiDB.
        layout: has all of its layers, and none more but convolutions.

    Raises:
        LayoutError: if it is another model's.
    """
    require_layers(lidb.layout, layout)
    require_layers(layout.without_convolutions(), lidb.layout, "The connected MODEL")
    if lidb.layout == layout:
        return lidb
    places = {layer: i for i, layer in enumerate(layout.layers)}
    kept = torch.tensor([places[layer] for layer in lidb.layout.layers])
    down = start_down(lidb.basis, layout, lidb.rank).index_copy(0, kept, lidb.down)
    up = lidb.up.new_zeros(len(layout.layers), *lidb.up.shape[1:]).index_copy(0, kept, lidb.up)
    return LiDB(layout, lidb.basis, down, up, lidb.about)


def aligned(lidbs: Sequence[LiDB]) -> list[LiDB]:
    """Persons of one model and basis with the layers of the one with most: some have convolutions, others not.

    Raises:
        LiDBError: if they do not belong together.
    """
    largest = max((lidb.layout for lidb in lidbs), key=lambda layout: len(layout.layers))
    found = [extend(lidb, largest) if lidb.layout == largest.without_convolutions() else lidb for lidb in lidbs]
    require_same_space(found)
    return found


def weighted_sum(lidbs: Sequence[LiDB], weights: Sequence[float], rank: int | None = None) -> LiDB:
    """Σ weight · person, exact unless a rank is given.

    Args:
        lidbs: one or more persons of one model and basis; the sum has the layers of the one with most.
        weights: one number each.
        rank: truncate the sum to this rank.

    Raises:
        LiDBError: if the persons do not belong together or the numbers of weights differ.
    """
    if not lidbs or len(lidbs) != len(weights):
        raise LiDBError(f"Expected one weight for each person, got {len(lidbs)} people and {len(weights)} weights.")
    lidbs = aligned(lidbs)
    first = lidbs[0]
    down = torch.cat([lidb.down for lidb in lidbs], dim=1)
    up = torch.cat([lidb.up * weight for lidb, weight in zip(lidbs, weights, strict=True)], dim=2)
    total = LiDB(first.layout, first.basis, down, up, first.about)
    limit = min(total.rank if rank is None else rank, first.basis.max_rank)
    return total if total.rank <= limit else truncate(total, limit)


def blend(lidb_a: LiDB, lidb_b: LiDB, share: float) -> LiDB:
    """``(1 − share) · a + share · b``, to be applied with strengths blended alike.

    The rest of `About` is that of the person with the larger share, but for name and thumbnail, which are neither's.

    Raises:
        LiDBError: if the two do not belong together.
    """
    both = weighted_sum([lidb_a, lidb_b], [1 - share, share])
    pairs = zip(lidb_a.about.strengths, lidb_b.about.strengths, strict=True)
    strengths = Strengths(*((1 - share) * a + share * b for a, b in pairs))
    larger = lidb_b.about if share > 0.5 else lidb_a.about
    return replace(both, about=replace(larger, strengths=strengths, name="", thumbnail=""))


def require_same_space(lidbs: Sequence[LiDB]) -> None:
    """Check that all persons adapt the same layers in the same basis.

    Raises:
        LiDBError: in plain words, if not.
    """
    first = lidbs[0]
    for other in lidbs[1:]:
        if other.layout != first.layout:
            raise LiDBError(
                f"Two LiDBs were made for different models ({first.layout.describe()}; {other.layout.describe()}). "
                "Combine only people who were made with the same checkpoint family."
            )
        if other.basis != first.basis:
            raise LiDBError(
                f"Two LiDBs use different bases ({first.basis.describe()}; {other.basis.describe()}). "
                "Combine only people in the same basis, such as those of one hypernetwork, or those that Fast Finetune learned "
                "without one."
            )


def _check_shapes(lidb: LiDB) -> None:
    count, a, b = len(lidb.layout.layers), lidb.basis.down_dim, lidb.basis.up_dim
    down, up = tuple(lidb.down.shape), tuple(lidb.up.shape)
    rank = down[1] if len(down) == 3 else 0
    if rank < 1 or down != (count, rank, a) or up != (count, b, rank):
        raise LiDBError(
            f"Expected down ({count}, rank, {a}) and up ({count}, {b}, rank) with rank ≥ 1, got {down} and {up}."
        )
