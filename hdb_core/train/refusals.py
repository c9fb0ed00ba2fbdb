"""What a run refuses before its first long stage, so that no settings are found to be wrong hours later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import HyperNetError
from ..hypernet import HyperNet
from .beginning import NOTHING_LEARNED, load_encoder, matching_hypernet
from .data.groups import group_paths, read_header
from .data.people import IDENTITY
from .encoder_loss import require_summary
from .job import Job
from .loop import parts_of
from .split import split

NOT_FITTED = (
    "No person was fitted for these layers and in this basis, so there is no L2 loss on weights. Set "
    "train.regression_weight to 0, or fit.steps to 40 in another run folder."
)


def refuse_early(job: Job, stages: Sequence[str]) -> None:
    """Check what the stages of a run will need, but for their photos and each other's results.

    Raises:
        HyperNetError: as the stage would that comes to it.
    """
    settings = job.settings
    _require_same_base(job)
    for stage, config in (("pretrain", settings.pretrain), ("train", settings.train)):
        if stage in stages:
            job.run.require_own_result(stage)
            parts_of(config.people, settings.accumulate, job.accelerator)
            split(job.needed, settings.held_out, settings.overfit)
    if "pretrain" in stages and not settings.clip_vision:
        require_summary(job.encoder)
    if settings.begin_with and not job.run.begins_with_hypernet() and {"pretrain", "train"} & set(stages):
        _require_encoder(job)
    if "train" in stages:
        _require_for_train(job)


def _require_same_base(job: Job) -> None:
    for path in group_paths(job.run.people)[:1]:
        if read_header(path)[0].get(IDENTITY) != job.base.identity:
            raise HyperNetError(
                f"{job.run.people} was computed with another base model than {job.settings.model}. Give --model the same "
                "file, wherever it is now, or use another run folder."
            )


def _require_encoder(job: Job) -> None:
    encoder = HyperNet.create(job.net_config).encoder
    if encoder is not None:
        load_encoder(encoder, Path(job.settings.begin_with))


def _require_for_train(job: Job) -> None:
    run, settings = job.run, job.settings
    job.faces([], job.encoder)
    if run.begins_with_hypernet():
        matching_hypernet(Path(settings.begin_with), job.net_config)
    elif "pretrain" not in run.stages() and not settings.begin_with and job.vision is None and not run.state.exists():
        raise HyperNetError(NOTHING_LEARNED)
    # Another run, or this one, may have fitted people before.
    fitted = settings.fit.steps or any(read_header(path)[0].get("fit") for path in group_paths(run.people)[:1])
    if settings.train.regression_weight and not fitted:
        raise HyperNetError(NOT_FITTED)
