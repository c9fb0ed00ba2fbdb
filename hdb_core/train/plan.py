"""Says before a run what it will do: its stages, people, photos and disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch

from ..hypernet import HyperNet
from .job import Job

_PROBE = 64  # pixels; latents of photos are as many times larger
_STATE_BYTES = 16  # a weight: itself, its average and Adam's two moments, float32


def describe_plan(job: Job, stages: Sequence[str], command: str) -> str:
    """A few lines about the stages of a run, which ``command`` goes on with."""
    settings, people = job.settings, job.needed
    photos = sum(len(person.photos) for person in people)
    judged = settings.overfit or max(1, round(settings.held_out * len(people)))
    kept = f"{judged} of them trained on and evaluated" if settings.overfit else f"{judged} of them kept for evaluate"
    kept += " (stranger needs 2: a larger held_out)" if judged < 2 else ""
    steps = {
        "pretrain": f"{settings.pretrain.steps:,} steps of {settings.pretrain.people} people",
        "train": f"{settings.train.steps:,} steps of {settings.train.people} people",
        "precompute": f"each person fitted in {settings.fit.steps} steps" if settings.fit.steps else "",
    }
    parts = [f"{stage} ({steps[stage]})" if steps.get(stage) else stage for stage in stages]
    free = shutil.disk_usage(job.run.folder).free
    return (
        f"{job.run.folder}: {len(people):,} people, {photos:,} photos, {kept}; {job.base.denoiser.layout.describe()}.\n"
        f"Stages: {', '.join(parts)}. Disk: about {disk_bytes(job, photos) / 1e6:,.0f} MB, "
        f"{free / 1e6:,.0f} MB are free. A stopped run goes on with "
        f"{command} {job.run.folder}"
    )


def disk_bytes(job: Job, photos: int) -> int:
    """What the files of a run will take, in bytes, without samples."""
    settings, net = job.settings, job.net_config
    probe = job.base.encode(torch.zeros(1, 3, _PROBE, _PROBE))
    values = probe.numel() * settings.image_size**2 // _PROBE**2
    tokens = net.encoder.num_tokens * net.encoder.token_width if net.encoder.kind == "clip_vision" else 0
    fitted = 4 * len(net.layout.layers) * net.basis.up_dim * settings.rank * len(job.needed)
    weights = sum(weight.numel() for weight in HyperNet.create(net).parameters())
    return 2 * photos * (values + tokens) + (fitted if settings.fit.steps else 0) + (_STATE_BYTES + 2) * weights
