"""Inputs of nodes that take lists: what belongs together, and what there can be only one of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...hdb_core.errors import HDBError
from ...hdb_core.images import as_rgb


def only(inputs: Mapping[str, Sequence[Any]], error: type[HDBError]) -> dict[str, Any]:
    """The one value of each input.

    Raises:
        HDBError: of the class `error`: one has several.
    """
    for name, values in inputs.items():
        if len(values) != 1:
            raise error(f"{name} got a list of {len(values)}. Only photos may be a list; connect one {name}.")
    return {name: values[0] for name, values in inputs.items()}


def pictures_of(images: Sequence[Tensor | None], error: type[HDBError]) -> list[Tensor]:
    """All photos of a list of IMAGE batches, each (3, H, W) RGB.

    Raises:
        HDBError: of the class `error`: there is none, or one cannot be used.
    """
    return [picture for image in images or (None,) for picture in as_rgb(image, error)]


def masks_of(masks: Sequence[Tensor | None] | None, error: type[HDBError]) -> list[Tensor]:
    """All masks (H, W) float32 of a list of MASK batches; an input that is not connected is none, or null over HTTP.

    Raises:
        HDBError: of the class `error`: one is empty, of another shape, or not finite.
    """
    found: list[Tensor] = []
    for mask in masks or ():
        if mask is None:
            continue
        if mask.ndim < 2 or mask.numel() == 0:
            raise error(
                f"mask must be (batch, height, width), got {tuple(mask.shape)}. Connect the MASK of Load Image."
            )
        if not bool(mask.isfinite().all()):
            raise error("The mask contains NaN or infinite values. Check the node that makes it.")
        found += mask.float().reshape(-1, *mask.shape[-2:])
    return found


def of_each(masks: Sequence[Tensor], photos: int, error: type[HDBError]) -> list[Tensor]:
    """A mask for each of so many photos, or none.

    Raises:
        HDBError: of the class `error`: there is neither one for all nor one for each.
    """
    if len(masks) not in (0, 1, photos):
        raise error(
            f"There are {photos} photos and {len(masks)} masks. Connect one MASK for all, one for each, or none."
        )
    return list(masks) * photos if len(masks) == 1 else list(masks)


def joined(texts: Sequence[str]) -> str:
    """A list of texts as one, a line for each; a single one keeps its lines."""
    return texts[0] if len(texts) == 1 else "\n".join(" ".join(text.split()) for text in texts)
