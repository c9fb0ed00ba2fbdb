"""The fast fine-tune inside the host: photos and models in, a person out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...hdb_core.finetuning import FinetuneConfig, FinetuneResult, finetune, report, require_inputs
from ...hdb_core.layout import layout_of
from ...hdb_core.lidb import LiDB
from .bases import adapters_of
from .differentiable import differentiable, layout_to_train
from .kept import of_model
from .memory import free_memory, step_cost
from .photos import Photos, encode, native_resolution
from .pictures import SamplePictures
from .progress import FinetuneDisplay, captioned, trained_at
from .targets import class_of, has_clip_layers, target_modules


@dataclass(frozen=True)
class FinetuneOptions:
    """The value on a FINETUNE_OPTIONS wire.

    Attributes:
        config: of which Fast Finetune replaces what its own widgets say.
        convolutions: train those of the UNet's residual blocks, too.
        class_images: IMAGE (M, H, W, 3) of the class, for `prior_weight`; None takes the model's own answers.
        sample_every: show a picture of the person every so many steps; 0 shows none.
    """

    config: FinetuneConfig = field(default_factory=FinetuneConfig)
    convolutions: bool = True
    class_images: Tensor | None = None
    sample_every: int = 0


def finetune_in_host(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    photos: Photos,
    config: FinetuneConfig,
    init: LiDB | None,
    convolutions: bool,
    node_id: str | None,
    sample_every: int = 0,
) -> FinetuneResult:
    """Fast fine-tune on the host's MODEL, CLIP and VAE, which are the same afterwards; see `hdb_core.finetuning`.

    Args:
        convolutions: train those of the UNet's residual blocks, too; those of `init` are trained in any case.
        sample_every: see `FinetuneOptions`.

    Raises:
        HDBError: inputs that cannot be used, before heavy work; or training diverged.
    """
    convolutions = convolutions or (init is not None and init.layout.has_convolutions)
    known = init.layout if init is not None and not has_clip_layers(model) else None
    layout = layout_of(*target_modules(model, clip, convolutions, known))
    compression = vae.spacial_compression_encode()
    pixels, mask, class_pixels = photos.prepare(native_resolution(model, layout.family), compression)
    require_inputs(config, layout, len(pixels), init, mask)
    layout = known or layout_to_train(model, clip, layout)
    adapters = adapters_of(model, config.basis if init is None else init.basis, layout)
    latents = encode(model, vae, pixels)
    keeps_class = config.prior_weight > 0
    prior_latents = encode(model, vae, class_pixels) if keeps_class and class_pixels is not None else None
    samples = config.batch_size * (2 if keeps_class else 1)
    rank = config.rank if init is None else max(config.rank, init.rank)
    cost = step_cost(model, clip, adapters, replace(config, rank=rank), latents)
    memory = cost.bytes(samples, latents) + adapters.num_bytes
    captions = config.captions(len(pixels))
    prompts = [*captions, config.class_prompt, *([config.prompt] if sample_every else [])]
    notes = (
        []
        if node_id is None
        else [captioned(captions), trained_at(*pixels.shape[-2:], photos.resolution), *photos.notes()]
    )
    display = FinetuneDisplay(node_id, class_of(model), notes)
    with display.shown(), differentiable(model, clip, memory, layout.has_convolutions, prompts, layout) as denoiser:
        adapters, latents = adapters.to(denoiser.device), latents.to(denoiser.device)
        if sample_every:
            display.pictures = SamplePictures(denoiser, model, vae, latents, config.prompt, config.seed, sample_every)
        result = finetune(
            denoiser,
            latents,
            config,
            mask=mask,
            prior_latents=prior_latents,
            init=init,
            adapters=adapters,
            callback=display,
            memory=cost.plan(latents, free_memory(denoiser.device), compression),
        )
        display.say(report(result, config))
    return replace(result, lidb=of_model(result.lidb, class_of(model)))
