"""A person on clones of MODEL and CLIP: ordinary LoRA patches of the host, and guidance."""

from __future__ import annotations

from typing import TypeVar

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy.weight_adapter import LoRAAdapter

from ...hdb_core.errors import LayoutError
from ...hdb_core.layout import host_keys, layout_of, require_layers
from ...hdb_core.lidb import LiDB, expand
from ...hdb_core.recommended import Strengths
from .bases import adapters_of
from .guidance import guided
from .targets import target_modules

Target = TypeVar("Target", ModelPatcher, CLIP)


def apply_lidb(model: ModelPatcher, clip: CLIP, lidb: LiDB, strengths: Strengths) -> tuple[ModelPatcher, CLIP]:
    """Clones of MODEL and CLIP that carry a LiDB as ordinary LoRA patches of the host.

    A side with strength 0 gets no patch. With a guidance other than 1 the MODEL is `guided`.

    Raises:
        LayoutError: the LiDB was made for other layers, or the host took fewer patches than the LiDB has layers.
    """
    modules, family = target_modules(model, clip, lidb.layout.has_convolutions)
    require_layers(lidb.layout, layout_of(modules, family))
    keys = host_keys(lidb.layout)
    factors = expand(lidb, adapters_of(model, lidb.basis, lidb.layout))
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
    clone = target.clone()
    if strength == 0:
        return clone
    accepted = clone.add_patches(patches, strength)
    if len(accepted) != len(patches):
        missing = sorted(set(patches) - set(accepted))
        raise LayoutError(
            f"ComfyUI took {len(accepted)} of {len(patches)} layers of this LiDB; the first it does not know is "
            f"{missing[0]}. Connect the MODEL and CLIP of an unmodified checkpoint."
        )
    return clone
