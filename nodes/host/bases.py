"""The bases of persons, made once for each loaded model: for a full-size one that takes seconds."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from comfy.model_patcher import ModelPatcher
from torch import nn

from ...hdb_core.adapters import Adapters
from ...hdb_core.basis import BasisRecipe, is_drawable
from ...hdb_core.errors import BasisError
from ...hdb_core.layout import Layout

MOST_KEPT = 2  # of a model: people with and without convolutions
# All clones of a MODEL have one underlying model. The bases go with it when the host lets go of it.
_OF_MODEL: WeakKeyDictionary[nn.Module, dict[tuple[BasisRecipe, Layout], Adapters]] = WeakKeyDictionary()


def adapters_of(model: ModelPatcher, recipe: BasisRecipe, layout: Layout) -> Adapters:
    """The adapters of persons of one recipe and layout on a model, on the CPU; the first call makes them.

    Raises:
        BasisError: the basis is a learned one whose file was not read, or a random one that is too large for the model.
    """
    own = _OF_MODEL.setdefault(model.model, {})
    found = own.pop((recipe, layout), None)
    if found is None and not is_drawable(recipe, layout.layers):
        raise BasisError(
            f"The basis of this LiDB has {recipe.down_dim} × {recipe.up_dim} dimensions, and making it for the "
            f"{len(layout.layers)} layers of this model would take very long. Make the person again with "
            "Fast Finetune and no lidb connected."
        )
    while len(own) >= MOST_KEPT:  # before others are made
        del own[next(iter(own))]  # used longest ago
    own[recipe, layout] = found or Adapters(recipe, layout)
    return own[recipe, layout]
