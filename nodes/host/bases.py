"""The bases of persons, made once for each loaded model: for a full-size one that takes seconds."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from comfy.model_patcher import ModelPatcher
from torch import nn

from ...hdb_core.adapters import Adapters
from ...hdb_core.basis import BasisRecipe
from ...hdb_core.layout import Layout

# All clones of a MODEL have one underlying model. The bases go with it when the host lets go of it.
_OF_MODEL: WeakKeyDictionary[nn.Module, dict[tuple[BasisRecipe, Layout], Adapters]] = WeakKeyDictionary()


def adapters_of(model: ModelPatcher, recipe: BasisRecipe, layout: Layout) -> Adapters:
    """The adapters of persons of one recipe and layout on a model, on the CPU; the first call makes them.

    Raises:
        BasisError: the basis is a learned one whose file was not read.
    """
    own = _OF_MODEL.setdefault(model.model, {})
    if (recipe, layout) not in own:
        own[recipe, layout] = Adapters(recipe, layout)
    return own[recipe, layout]
