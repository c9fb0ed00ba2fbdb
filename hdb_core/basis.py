"""The frozen orthonormal bases of a LiDB, and the recipe that makes them again anywhere.

Every layer has two: ``down_aux`` (a, in) with orthonormal rows and ``up_aux`` (out, b) with orthonormal columns.

Random ones are never stored. Normals come from NumPy's ``RandomState``, whose values NumPy has frozen, seeded by the
layer's name. QR is not bit-identical across libraries, so a file carries the hash of the *recipe* and a few
projections of the basis it was made with: last-bit differences pass, another basis does not.

Learned ones (`training.basis`) have a file of their own (`basis_file`); its recipe is the hash of that file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import BasisError
from .layout import Layer, Layout

STREAM = "numpy.RandomState.standard_normal/sha256/qr"
PROBE_TOLERANCE = 1e-5
_NUM_PROBED_LAYERS = 4
MAX_DRAWN = 300_000_000_000  # operations that making a model's random bases takes; the largest of today takes a fifth


@dataclass(frozen=True)
class BasisRecipe:
    """What decides a basis.

    Attributes:
        seed: any integer.
        down_dim: a, the dimension of the input side; layers with fewer inputs use all of them.
        up_dim: b, the dimension of the output side; layers with fewer outputs use all of them.
        version: of the construction in this module.
        learned: hash of the file of a learned basis; empty is a random one.
        bases: of a learned basis whose file was read, layer name → (down_aux, up_aux) as `layer_basis` returns them. Recipes
            are equal with and without.
    """

    seed: int = 0
    down_dim: int = 100
    up_dim: int = 50
    version: int = 1
    learned: str = ""
    bases: Mapping[str, tuple[Tensor, Tensor]] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.version != 1:
            raise BasisError(f"Expected a basis of version 1, got {self.version}. Update this node pack.")
        if self.down_dim < 1 or self.up_dim < 1:
            raise BasisError(f"Expected basis dimensions of at least 1, got {self.down_dim} × {self.up_dim}.")
        if not re.fullmatch("([0-9a-f]{64})?", self.learned):
            raise BasisError(f"Expected the hash of a learned basis, got {self.learned:.80}.")

    def describe(self) -> str:
        """A few words for messages."""
        if self.learned:
            return f"the learned basis {self.learned[:12]}…"
        return f"a random basis of {self.down_dim} × {self.up_dim} with seed {self.seed}"

    @property
    def max_rank(self) -> int:
        """The highest rank that a LiDB in this basis can have."""
        return min(self.down_dim, self.up_dim)

    def fields(self) -> dict[str, Any]:
        """As JSON takes it. Of a random basis, what there was before there were learned ones: its hash stays the same."""
        names = ("seed", "down_dim", "up_dim", "version", *(["learned"] if self.learned else []))
        return {name: getattr(self, name) for name in names}

    def read(self, learned: BasisRecipe | None) -> BasisRecipe:
        """The same recipe with the bases of `learned`, if that is the learned basis it names."""
        return self if learned is None or learned != self else learned

    def hash(self, layout: Layout) -> str:
        """SHA-256 over the stream, the recipe and the layers' names and sizes, as hex digits."""
        return hashlib.sha256(json.dumps([STREAM, self.fields(), layout.hash]).encode()).hexdigest()

    def dims(self, layer: Layer) -> tuple[int, int]:
        """(a', b'): the dimensions of a layer's bases, cut to its sizes."""
        return min(self.down_dim, layer.in_features), min(self.up_dim, layer.out_features)


def layer_basis(recipe: BasisRecipe, layer: Layer) -> tuple[Tensor, Tensor]:
    """The two bases of a layer, computed on the CPU.

    Returns:
        down_aux (a', in) float32 with orthonormal rows, up_aux (out, b') float32 with orthonormal columns.

    Raises:
        BasisError: the basis is a learned one whose file was not read, or that has no such layer.

    Source: HyperDreamBooth, arXiv 2307.06949, section 4.1 (random orthogonal auxiliary layers).
    """
    if recipe.learned:
        return _learned(recipe, layer)
    a, b = recipe.dims(layer)
    # A node runs in inference mode, whose tensors could never take part in training.
    with torch.inference_mode(False):
        down = orthonormal_columns(recipe.seed, layer.name, "down", layer.in_features, a)
        up = orthonormal_columns(recipe.seed, layer.name, "up", layer.out_features, b)
        return down.mT.contiguous(), up


def probe(recipe: BasisRecipe, layout: Layout) -> list[float]:
    """A few projections that identify a basis: a fixed vector seen by some layers, both sides, two numbers each."""
    values: list[float] = []
    for layer in probed(recipe, layout):
        down_aux, up_aux = layer_basis(recipe, layer)
        for rows in (down_aux[:2], up_aux.T[:2]):
            values += (rows.double() @ _probe_vector(rows.shape[1])).tolist()
    return values


def drawing_cost(recipe: BasisRecipe, layers: Iterable[Layer]) -> int:
    """How many operations it takes to make the random bases of some layers orthonormal."""
    dims = ((layer, *recipe.dims(layer)) for layer in layers)
    return sum(layer.in_features * a**2 + layer.out_features * b**2 for layer, a, b in dims)


def is_drawable(recipe: BasisRecipe, layers: Iterable[Layer]) -> bool:
    """Whether the bases of some layers are made in a time, and a memory, that a model of their size is worth."""
    return bool(recipe.learned) or drawing_cost(recipe, layers) <= MAX_DRAWN


def probed(recipe: BasisRecipe, layout: Layout) -> list[Layer]:
    """The smallest layers, which take the least time."""
    return sorted(layout.layers, key=lambda layer: _numbers(recipe, layer))[:_NUM_PROBED_LAYERS]


def _numbers(recipe: BasisRecipe, layer: Layer) -> int:
    a, b = recipe.dims(layer)
    return a * layer.in_features + b * layer.out_features


def same_basis(probe_a: list[float], probe_b: list[float]) -> bool:
    """Whether two probes come from the same basis, up to last-bit differences of QR."""
    return len(probe_a) == len(probe_b) and bool(np.allclose(probe_a, probe_b, rtol=0, atol=PROBE_TOLERANCE))


def _learned(recipe: BasisRecipe, layer: Layer) -> tuple[Tensor, Tensor]:
    if recipe.bases is None:
        raise BasisError(
            f"This needs the learned basis {recipe.learned[:12]}…, which is not there. Put its file, which came with the "
            "hypernetwork or the person, into models/lidb_basis."
        )
    a, b = recipe.dims(layer)
    down_aux, up_aux = recipe.bases.get(layer.name, (torch.empty(0, 0), torch.empty(0, 0)))
    if down_aux.shape != (a, layer.in_features) or up_aux.shape != (layer.out_features, b):
        raise BasisError(
            f"The learned basis {recipe.learned[:12]}… is of another model: it does not fit the layer {layer.name}. "
            "Use one that was learned for this base model."
        )
    return down_aux, up_aux


def _probe_vector(size: int) -> Tensor:
    vector = (torch.arange(size, dtype=torch.float64) * 37 % 101) - 50
    return vector / vector.norm()


def orthonormal_columns(seed: int, name: str, side: str, size: int, dim: int) -> Tensor:
    """(size, dim) float32 with orthonormal columns, random and frozen, computed in float64.

    They are the Q of a QR factorisation whose R has a positive diagonal, which makes it unique. From the Cholesky
    factor of the Gram matrix it comes many times faster than from Householder's reflections; a second round keeps it
    exact where a nearly square matrix is badly conditioned.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{side}".encode()).digest()
    normals = np.random.RandomState(np.frombuffer(digest, "<u4")).standard_normal((size, dim))
    columns = torch.from_numpy(normals)
    for _ in range(1 if size >= 2 * dim else 2):
        root = torch.linalg.cholesky(columns.mT @ columns)
        columns = torch.linalg.solve_triangular(root, columns.mT, upper=False).mT
    return columns.float()
