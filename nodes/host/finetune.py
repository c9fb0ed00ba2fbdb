"""The fast fine-tune inside the host: photos and models in, a person out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...hdb_core.finetuning import FinetuneConfig, FinetuneResult, finetune, require_inputs
from ...hdb_core.layout import layout_of
from ...hdb_core.lidb import LiDB
from .bases import adapters_of
from .differentiable import differentiable
from .memory import memory_of, samples_at_once
from .photos import Photos, encode
from .progress import FinetuneDisplay
from .targets import class_of, target_modules


@dataclass(frozen=True)
class FinetuneOptions:
    """The value on a FINETUNE_OPTIONS wire.

    Attributes:
        config: of which Fast Finetune replaces what its own widgets say.
        convolutions: train those of the UNet's residual blocks, too.
        class_images: IMAGE (M, H, W, 3) of the class, for `prior_weight`.
    """

    config: FinetuneConfig = field(default_factory=FinetuneConfig)
    convolutions: bool = True
    class_images: Tensor | None = None


def finetune_in_host(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    photos: Photos,
    config: FinetuneConfig,
    init: LiDB | None,
    convolutions: bool,
    node_id: str | None,
) -> FinetuneResult:
    """Fast fine-tune on the host's MODEL, CLIP and VAE, which are the same afterwards; see `hdb_core.finetuning`.

    Args:
        convolutions: train those of the UNet's residual blocks, too; those of `init` are trained in any case.

    Raises:
        HDBError: inputs that cannot be used, before heavy work; or training diverged.
    """
    convolutions = convolutions or (init is not None and init.layout.has_convolutions)
    layout = layout_of(*target_modules(model, clip, convolutions))
    pixels, mask, class_pixels = photos.prepare(layout.family, vae.spacial_compression_encode())
    require_inputs(config, layout, len(pixels), init, mask, class_pixels)
    adapters = adapters_of(model, config.basis if init is None else init.basis, layout)
    latents = encode(model, vae, pixels)
    prior_latents = encode(model, vae, class_pixels) if config.prior_weight > 0 else None
    samples, of_a_sample = config.batch_size * (1 if prior_latents is None else 2), latents[0, 0].numel()
    memory = memory_of(model, samples * of_a_sample) + adapters.num_bytes
    with differentiable(model, clip, memory, layout.has_convolutions) as denoiser:
        result = finetune(
            denoiser,
            latents.to(denoiser.device),
            config,
            mask=mask,
            prior_latents=prior_latents,
            init=init,
            adapters=adapters.to(denoiser.device),
            callback=FinetuneDisplay(node_id),
            samples_at_once=samples_at_once(model, of_a_sample, denoiser.device),
        )
    about = replace(result.lidb.about, model=class_of(model))
    return replace(result, lidb=replace(result.lidb, about=about))
