"""Which layers of the host's MODEL and CLIP a LiDB adapts, and what model they belong to.

SD 1.x, SD 2.x and SDXL have the layers of `layout.find_targets`. Of every other model they are found by one rule: the
linear layers inside its blocks that the host can patch (`block_linears`), of which a dry run keeps those that read
the picture's tokens and get a gradient (`dry_run`). A file that is there already names its layers: to apply it, nothing is run.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.lora
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import nn

from ...hdb_core.errors import LayoutError
from ...hdb_core.layout import (
    FAMILIES,
    FAMILY_BY_CONTEXT,
    HOST_PREFIX,
    Layout,
    find_targets,
    is_linear,
    layout_of,
    require_layers,
)

TEXT_ENCODERS = ("clip_l", "clip_h", "clip_g")


def family_of(model: ModelPatcher) -> str:
    """``sd1``, ``sd2`` or ``sdxl`` by the width of the text that the UNet reads; of any other model `class_of`."""
    config = getattr(model.model.model_config, "unet_config", {})
    # Stable Video Diffusion and the ×4 upscaler have the text width of SD 2.x.
    other = config.get("use_temporal_attention") or isinstance(model.model.latent_format, comfy.latent_formats.SD_X4)
    family = FAMILY_BY_CONTEXT.get(config.get("context_dim")) if "model_channels" in config and not other else None
    return family or class_of(model)


def class_of(model: ModelPatcher) -> str:
    """The host's class of a MODEL: ``SD15``, ``SDXL``, ``Flux``."""
    return type(model.model.model_config).__name__


def has_clip_layers(model: ModelPatcher) -> bool:
    """Whether a LiDB of this MODEL adapts its CLIP, too; text encoders of other families stay as they are."""
    return family_of(model) in FAMILIES


def target_modules(
    model: ModelPatcher, clip: CLIP | None, convolutions: bool = False, layout: Layout | None = None
) -> tuple[dict[str, nn.Module], str]:
    """The layers of a MODEL and a CLIP that can be adapted, by name in canonical order, and their family.

    Args:
        model: the host's MODEL.
        clip: the host's CLIP.
        convolutions: those of a UNet's residual blocks, too.
        layout: of a file or a person; exactly its layers. Without one, a family that is not in `FAMILIES` has all of
            `block_linears`.

    Raises:
        LayoutError: a missing CLIP, one that does not belong to the MODEL, a MODEL whose layers cannot be adapted, or
            that lacks one of the layout's.
    """
    family = family_of(model)
    if clip is None:
        raise LayoutError("There is no CLIP: the checkpoint carries no text encoder. Connect Load CLIP to clip.")
    modules = _with_text(model, clip, family, convolutions) if family in FAMILIES else block_linears(model)
    if layout is None:
        return modules, family
    require_layers(layout, layout_of(modules, family))
    return {layer.name: modules[layer.name] for layer in layout.layers}, family


def require_unet(model: ModelPatcher, layout: Layout, maker: str) -> None:
    """Check a MODEL alone against the layers that something was made for.

    Raises:
        LayoutError: it is another model, or lacks one of them.
    """
    family = family_of(model)
    own = layout_of(
        find_targets(dict(model.model.diffusion_model.named_modules()), {}, family, True)
        if family in FAMILIES
        else block_linears(model),
        family,
    )
    text = tuple(layer for layer in layout.layers if layer.is_text)
    require_layers(layout, Layout(own.family, own.layers + text), maker)


def block_linears(model: ModelPatcher) -> dict[str, nn.Module]:
    """The linear layers inside the blocks of a model of any family that the host can patch, in its modules' order.

    Returns:
        The host's path ``diffusion_model.…`` → module; its sizes are its attributes, since a quantised weight has others.

    Raises:
        LayoutError: there are none.
    """
    values = comfy.lora.model_lora_keys_unet(model.model, {}).values()
    patchable = {value[0] if isinstance(value, tuple) else value for value in values}
    root = model.model.diffusion_model
    lists = tuple(f"{name}." for name, module in root.named_modules() if isinstance(module, nn.ModuleList))
    found = {
        f"{HOST_PREFIX}{name}": module
        for name, module in root.named_modules()
        if name.startswith(lists) and _is_matrix(module) and f"{HOST_PREFIX}{name}.weight" in patchable
    }
    if not found:
        raise LayoutError(
            f"The connected MODEL is {class_of(model)}, which has no linear layers that ComfyUI can patch. "
            "Connect the MODEL of another checkpoint."
        )
    return found


def _is_matrix(module: nn.Module) -> bool:
    # Layers of many experts have the attributes of one linear layer, and a weight of three dimensions.
    return is_linear(module) and getattr(getattr(module, "weight", None), "ndim", 0) == 2


def _with_text(model: ModelPatcher, clip: CLIP, family: str, convolutions: bool) -> dict[str, nn.Module]:
    encoders = {name: getattr(clip.cond_stage_model, name, None) for name in TEXT_ENCODERS}
    encoders = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    expected = {"sd1": {"clip_l"}, "sd2": {"clip_h"}, "sdxl": {"clip_l", "clip_g"}}[family]
    if set(encoders) != expected:
        raise LayoutError(
            f"The connected MODEL needs a CLIP with {' and '.join(sorted(expected))}, but the connected CLIP is "
            f"{type(clip.cond_stage_model).__name__} ({', '.join(encoders) or 'none of them'}). "
            "Connect MODEL and CLIP of the same checkpoint."
        )
    return find_targets(
        dict(model.model.diffusion_model.named_modules()),
        {name: dict(encoder.named_modules()) for name, encoder in encoders.items()},
        family,
        convolutions,
    )
