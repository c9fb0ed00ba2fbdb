"""A person as ordinary LoRA patches of the host: on clones of MODEL and CLIP with guidance, or as a hook."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from comfy.hooks import HookGroup, WeightHook
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy.weight_adapter import LoRAAdapter

from ...hdb_core.card import as_line
from ...hdb_core.errors import LayoutError
from ...hdb_core.layout import host_keys, layout_of, require_layers
from ...hdb_core.lidb import LiDB, expand
from ...hdb_core.recommended import Strengths
from .bases import adapters_of
from .guidance import KEY, guided
from .targets import target_modules

TWO_PEOPLE = "09 two saved people side by side"  # the template
Target = TypeVar("Target", ModelPatcher, CLIP)


def apply_lidb(model: ModelPatcher, clip: CLIP, lidb: LiDB, strengths: Strengths) -> tuple[ModelPatcher, CLIP]:
    """Clones of MODEL and CLIP that carry a LiDB as ordinary LoRA patches of the host.

    A side with strength 0 gets no patch. With a guidance other than 1 the MODEL is `guided`.

    Raises:
        LayoutError: the LiDB was made for other layers, or the host took fewer patches than the LiDB has layers.
    """
    person = _patches(model, clip, lidb)
    clip = patched(clip, person.text, strengths.clip)
    carrying = patched(model, person.unet, strengths.model)
    if strengths.model == 0:
        return carrying, clip
    carrying.set_attachments(KEY, (*tokens_on(model), lidb.about.token))
    return (carrying if strengths.guidance == 1 else guided(carrying, person.unet, strengths.guidance)), clip


def tokens_on(model: ModelPatcher) -> tuple[str, ...]:
    """The tokens of the persons that a MODEL carries already."""
    return model.get_attachment(KEY) or ()


def mixture(model: ModelPatcher, lidb: LiDB) -> str:
    """What is to be said before a person is applied to a MODEL that carries another one; "" if it does not."""
    if not (there := tokens_on(model)):
        return ""
    same = f", all of them called {as_line(lidb.about.token)}" if set(there) == {lidb.about.token} else ""
    return (
        f"The faces become a mixture of {len(there) + 1} people{same}. For two people in one picture use LiDB Hook, as the "
        f"template {TWO_PEOPLE!r} does."
    )


def hook_of(model: ModelPatcher, clip: CLIP, lidb: LiDB, strengths: Strengths, cfg: float) -> HookGroup:
    """A LiDB as hooks for the positive prompt alone.

    The negative pass then has nothing of the person, which is guidance by `cfg`. The strength on the MODEL is what makes
    as much of the person in the picture as `strengths` with its own guidance.

    Raises:
        LayoutError: the LiDB was made for other layers, or the host does not know one of them.
    """
    person = _patches(model, clip, lidb)
    # Hooks drop unknown keys without a word; patches count them.
    patched(model, person.unet, 1.0)
    patched(clip, person.text, 1.0)
    hook = WeightHook(strengths.model * strengths.guidance / max(cfg, 1.0), strengths.clip)
    hook.weights, hook.weights_clip, hook.need_weight_init = person.unet, person.text, False
    group = HookGroup()
    group.add(hook)
    return group


class _Patches(NamedTuple):
    """A person's patches for a MODEL and for a CLIP, by the host's weight key."""

    unet: dict[str, LoRAAdapter]
    text: dict[str, LoRAAdapter]


def _patches(model: ModelPatcher, clip: CLIP, lidb: LiDB) -> _Patches:
    modules, family = target_modules(model, clip, lidb.layout.has_convolutions)
    whole = layout_of(modules, family)
    require_layers(lidb.layout, whole)
    keys = host_keys(whole)  # the layers of a person who has only some do not say how many blocks a level has
    patches = {
        keys[name]: LoRAAdapter(set(), (up, down, None, None, None, None))
        for name, (up, down) in expand(lidb, adapters_of(model, lidb.basis, lidb.layout)).items()
        if up.any() and down.any()  # a text encoder that was not trained is no work for the host
    }
    unet = {key: patch for key, patch in patches.items() if key.startswith("diffusion_model.")}
    return _Patches(unet, {key: patch for key, patch in patches.items() if key not in unet})


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
