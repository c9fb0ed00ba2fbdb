"""Says before a run what it will do: its stages, people, photos and disk."""

from __future__ import annotations

from collections.abc import Sequence

from ..hypernet import HyperNet
from .job import Job

_LATENT_SHARE = 8  # the side of the photos in pixels, of the latents
_LATENT_CHANNELS = 4
_STATE_BYTES = 16  # a weight: itself, its average and Adam's two moments, float32


def describe_plan(job: Job, stages: Sequence[str]) -> str:
    """A few lines about the stages of a run."""
    settings, people = job.settings, job.needed
    photos = sum(len(person.photos) for person in people)
    judged = settings.overfit or max(1, round(settings.held_out * len(people)))
    kept = f"{judged} of them trained on and evaluated" if settings.overfit else f"{judged} of them kept for evaluate"
    steps = {
        "pretrain": f"{settings.pretrain.steps:,} steps of {settings.pretrain.people} people",
        "train": f"{settings.train.steps:,} steps of {settings.train.people} people",
        "precompute": f"each person fitted in {settings.fit.steps} steps" if settings.fit.steps else "",
    }
    parts = [f"{stage} ({steps[stage]})" if steps.get(stage) else stage for stage in stages]
    return (
        f"{job.run.folder}: {len(people):,} people, {photos:,} photos, {kept}; {job.base.denoiser.layout.describe()}.\n"
        f"Stages: {', '.join(parts)}. Disk: about {disk_bytes(job, photos) / 1e6:,.0f} MB. A stopped run goes on with "
        f"python -m hdb_core.train {job.run.folder}"
    )


def disk_bytes(job: Job, photos: int) -> int:
    """What the files of a run will take, in bytes, without samples."""
    settings, net = job.settings, job.net_config
    values = _LATENT_CHANNELS * (settings.image_size // _LATENT_SHARE) ** 2
    tokens = net.encoder.num_tokens * net.encoder.token_width if net.encoder.kind == "clip_vision" else 0
    fitted = 4 * len(net.layout.layers) * net.basis.up_dim * settings.rank * len(job.needed)
    weights = sum(weight.numel() for weight in HyperNet.create(net).parameters())
    return 2 * photos * (values + tokens) + (fitted if settings.fit.steps else 0) + (_STATE_BYTES + 2) * weights
