"""MODEL and CLIP loaded and made differentiable for the duration of a context; afterwards they are as before."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ...hdb_core.errors import FinetuneError
from ...hdb_core.layout import Layout, layout_of
from .compat import training
from .denoiser import HostDenoiser, encode_prompts
from .dry_run import PROMPT, dry_run
from .restore import ordinary_tensors, out_of_place_residuals
from .targets import has_clip_layers, target_modules


@contextmanager
def differentiable(
    model: ModelPatcher,
    clip: CLIP,
    memory_required: int = 0,
    convolutions: bool = False,
    prompts: Sequence[str] | None = (),
    layout: Layout | None = None,
) -> Iterator[HostDenoiser]:
    """The frozen model for a fine-tune. No weight changes.

    Parameters, forwards and modes are put back at the end, whatever happens inside.

    Args:
        model: the host's MODEL.
        clip: the host's CLIP.
        memory_required: bytes that the host is asked to keep free beside the weights.
        convolutions: adapt those of the UNet's residual blocks, too.
        prompts: that will be encoded; a text encoder that is not trained does so before the model is loaded. None
            keeps it beside the model, for prompts that nobody knows yet.
        layout: of a person to go on with; exactly its layers are adapted.

    Raises:
        FinetuneError: the host cannot give one of them weights that are trained through.
        LayoutError: as `target_modules`.
    """
    target_modules(model, clip, convolutions, layout)
    trained = has_clip_layers(model)
    encoded = {} if trained else encode_prompts(clip, [PROMPT, *(prompts or ())])
    patcher, text = ordinary_clone(model), _ordinary_text(clip) if trained else clip
    modules, family = target_modules(patcher, text, convolutions)
    wanted = [*modules] if layout is None else [layer.name for layer in layout.layers]
    loaded = [patcher, text.patcher] if trained or prompts is None else [patcher]
    # Loading writes patched weights in place, which the host's inference mode allows and ordinary tensors do not.
    comfy.model_management.load_models_gpu(loaded, memory_required=memory_required, force_full_load=True)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(training())
        stack.enter_context(ordinary_tensors(*(one.model for one in loaded)))
        if trained:
            stack.enter_context(out_of_place_residuals(text.cond_stage_model))
            stack.callback(text.cond_stage_model.reset_clip_options)
        else:
            found = dry_run(HostDenoiser(patcher, None, modules, layout_of(modules, family), encoded), model)
            stack.enter_context(found.context(patcher.model))
            wanted = list(found.layers) if layout is None else wanted
        modules = {name: modules[name] for name in wanted}
        encoder = text if trained or prompts is None else None
        yield HostDenoiser(patcher, encoder, modules, layout_of(modules, family), encoded)


def layout_to_train(model: ModelPatcher, clip: CLIP, possible: Layout) -> Layout:
    """Those of a model's possible layers that a person from nothing is trained in.

    Raises:
        LayoutError: the model does not run with this CLIP, or cannot be trained through; says why.
    """
    if has_clip_layers(model):
        return possible
    with differentiable(model, clip) as denoiser:
        return denoiser.layout


def _ordinary_text(clip: CLIP) -> CLIP:
    """A clone of a CLIP whose layers can be trained."""
    text = clip.clone()
    text.patcher = ordinary_clone(clip.patcher)
    text.patcher.forced_hooks = None
    text.cond_stage_model = text.patcher.model
    return text


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
