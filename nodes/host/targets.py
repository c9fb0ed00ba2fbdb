"""Which layers of a MODEL and a CLIP a LiDB adapts, and the patches that carry one on clones of both."""

from __future__ import annotations

from typing import TypeVar

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy.weight_adapter import LoRAAdapter
from torch import nn

from ...hdb_core.errors import LayoutError
from ...hdb_core.layout import Layout, find_targets, host_keys, layout_of, require_layers
from ...hdb_core.lidb import LiDB, Strengths, expand
from .guidance import guided

Target = TypeVar("Target", ModelPatcher, CLIP)
FAMILY_BY_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
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
            f"LiDB works on SD 1.x, SD 2.x and SDXL, but the connected MODEL is {type(model.model.model_config).__name__}. "
            "Connect the MODEL of such a checkpoint."
        )
    return family


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


def apply_lidb(model: ModelPatcher, clip: CLIP, lidb: LiDB, strengths: Strengths) -> tuple[ModelPatcher, CLIP]:
    """Clones of MODEL and CLIP that carry a LiDB as ordinary LoRA patches of the host.

    A side with strength 0 is returned as it came. With a guidance other than 1 the MODEL is `guided`.

    Raises:
        LayoutError: the LiDB was made for other layers, or the host took fewer patches than the LiDB has layers.
    """
    modules, family = target_modules(model, clip, lidb.layout.has_convolutions)
    require_layers(lidb.layout, layout_of(modules, family))
    keys = host_keys(lidb.layout)
    factors = expand(lidb)
    patches = {
        keys[name]: LoRAAdapter(set(), (up, down, None, None, None, None))
        for name, (up, down) in factors.items()
        if up.any() and down.any()  # a text encoder that was not trained is no work for the host
    }
    unet = {key: patch for key, patch in patches.items() if key.startswith("diffusion_model.")}
    text = {key: patch for key, patch in patches.items() if key not in unet}
    model, clip = patched(model, unet, strengths.model), patched(clip, text, strengths.clip)
    if strengths.guidance != 1 and strengths.model != 0:
        own = {name: (strengths.model * up, down) for name, (up, down) in factors.items() if keys[name] in unet}
        paths = {name: keys[name].removesuffix(".weight") for name in own}
        model = guided(model, paths, own, strengths.guidance)
    return model, clip


def patched(target: Target, patches: dict[str, LoRAAdapter], strength: float) -> Target:
    """A clone of a MODEL or CLIP with patches; the host skips unknown keys silently, so they are counted here."""
    if strength == 0:
        return target
    clone = target.clone()
    accepted = clone.add_patches(patches, strength)
    if len(accepted) != len(patches):
        missing = sorted(set(patches) - set(accepted))
        raise LayoutError(
            f"ComfyUI took {len(accepted)} of {len(patches)} layers of this LiDB; the first it does not know is "
            f"{missing[0]}. Connect the MODEL and CLIP of an unmodified checkpoint."
        )
    return clone
