"""MODEL and CLIP loaded and made differentiable for the duration of a context; afterwards they are as before."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...hdb_core.errors import FinetuneError
from ...hdb_core.layout import layout_of
from .denoiser import HostDenoiser
from .restore import ordinary_tensors, out_of_place_residuals
from .targets import target_modules


@contextmanager
def differentiable(
    model: ModelPatcher, clip: CLIP, memory_required: int = 0, convolutions: bool = False
) -> Iterator[HostDenoiser]:
    """The frozen model for a fine-tune. No weight changes.

    Parameters, forwards and modes are put back at the end, whatever happens inside.

    Args:
        model: the host's MODEL.
        clip: the host's CLIP.
        memory_required: bytes that the host is asked to keep free beside the weights.
        convolutions: adapt those of the UNet's residual blocks, too.

    Raises:
        FinetuneError: the host cannot give one of them weights that are trained through.
        LayoutError: as `target_modules`.
    """
    patcher, text = ordinary_clone(model), clip.clone()
    text.patcher = ordinary_clone(clip.patcher)
    text.patcher.forced_hooks = None
    text.cond_stage_model = text.patcher.model
    modules, family = target_modules(patcher, text, convolutions)
    # Loading writes patched weights in place, which the host's inference mode allows and ordinary tensors do not.
    comfy.model_management.load_models_gpu(
        [patcher, text.patcher], memory_required=memory_required, force_full_load=True
    )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(ordinary_tensors(patcher.model, text.cond_stage_model))
        stack.enter_context(out_of_place_residuals(text.cond_stage_model))
        stack.callback(text.cond_stage_model.reset_clip_options)
        yield HostDenoiser(patcher, text, modules, layout_of(modules, family))


def ordinary_clone(patcher: ModelPatcher) -> ModelPatcher:
    """A clone whose modules hold the weights that run.

    Newer hosts keep a model's weights in its file until they are used; an ordinary clone of such a one is not of the
    same model, but of another that the host reads anew.

    Raises:
        FinetuneError: the host does not know how to read it again.
    """
    if "disable_dynamic" not in inspect.signature(patcher.clone).parameters:
        return patcher.clone()
    try:
        return patcher.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise FinetuneError(
            f"ComfyUI cannot load this model in a way that can be trained ({error}). Load it with Load Checkpoint, or "
            "start ComfyUI with --disable-dynamic-vram."
        ) from error
