"""Which layers of the host's MODEL and CLIP a LiDB adapts, and what model they belong to."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import nn

from ...hdb_core.errors import LayoutError
from ...hdb_core.layout import FAMILY_BY_CONTEXT, Layout, find_targets, layout_of, require_layers

TEXT_ENCODERS = ("clip_l", "clip_h", "clip_g")


def family_of(model: ModelPatcher) -> str:
    """``sd1``, ``sd2`` or ``sdxl`` by the width of the text that the UNet reads.

    Raises:
        LayoutError: the MODEL is none of them.
    """
    config = getattr(model.model.model_config, "unet_config", {})
    family = FAMILY_BY_CONTEXT.get(config.get("context_dim"))
    if family is None or "model_channels" not in config:
        raise LayoutError(
            f"LiDB works on SD 1.x, SD 2.x and SDXL, but the connected MODEL is {class_of(model)}. "
            "Connect the MODEL of such a checkpoint."
        )
    return family


def class_of(model: ModelPatcher) -> str:
    """The host's class of a MODEL: ``SD15``, ``SDXL``."""
    return type(model.model.model_config).__name__


def target_modules(
    model: ModelPatcher, clip: CLIP | None, convolutions: bool = False
) -> tuple[dict[str, nn.Module], str]:
    """The adapted layers of a MODEL and a CLIP, by neutral name in canonical order, and their family.

    Args:
        convolutions: those of the UNet's residual blocks, too.

    Raises:
        LayoutError: a MODEL that LiDB does not know, a missing CLIP, or one that does not belong to the MODEL.
    """
    family = family_of(model)
    if clip is None:
        raise LayoutError("There is no CLIP: the checkpoint carries no text encoder. Connect Load CLIP to clip.")
    encoders = {name: getattr(clip.cond_stage_model, name, None) for name in TEXT_ENCODERS}
    encoders = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    expected = {"sd1": {"clip_l"}, "sd2": {"clip_h"}, "sdxl": {"clip_l", "clip_g"}}[family]
    if set(encoders) != expected:
        raise LayoutError(
            f"The connected MODEL needs a CLIP with {' and '.join(sorted(expected))}, but the connected CLIP is "
            f"{type(clip.cond_stage_model).__name__} ({', '.join(encoders) or 'none of them'}). "
            "Connect MODEL and CLIP of the same checkpoint."
        )
    modules = find_targets(
        dict(model.model.diffusion_model.named_modules()),
        {name: dict(encoder.named_modules()) for name, encoder in encoders.items()},
        family,
        convolutions,
    )
    return modules, family


def require_unet(model: ModelPatcher, layout: Layout, maker: str) -> None:
    """Check a MODEL alone against the layers that something was made for.

    Raises:
        LayoutError: it is of another family, or lacks one of them.
    """
    family = family_of(model)
    own = layout_of(find_targets(dict(model.model.diffusion_model.named_modules()), {}, family, True), family)
    text = tuple(layer for layer in layout.layers if layer.is_text)
    require_layers(layout, Layout(own.family, own.layers + text), maker)
