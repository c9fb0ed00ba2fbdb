"""The custom types of the pack's sockets."""

from comfy_api.latest import io

CATEGORY = "HyperDreamBooth"

LIDB = io.Custom("LIDB")
HYPERNET = io.Custom("HYPERNET")
FINETUNE_OPTIONS = io.Custom("FINETUNE_OPTIONS")
APPLY_OPTIONS = io.Custom("APPLY_OPTIONS")
BOUNDING_BOX = getattr(io, "BoundingBox", None) or io.Custom("BOUNDING_BOX")  # hosts before 0.4 lack it


def box_input(name: str, tooltip: str, optional: bool = True) -> io.Input:
    """A socket for boxes; the core type has a widget of its own unless it is told not to."""
    forced = {"force_input": True} if hasattr(io, "BoundingBox") else {}
    return BOUNDING_BOX.Input(name, optional=optional, tooltip=tooltip, **forced)
