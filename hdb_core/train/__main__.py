"""Train a hypernetwork for a base model of your own.

``python -m hdb_core.train RUN --model MODEL --photos PHOTOS`` makes ``RUN/hypernet.safetensors``, and ``python -m
hdb_core.train RUN`` goes on where it was stopped. On several processes: ``accelerate launch -m`` or ``torchrun
--nproc-per-node N -m`` in place of ``python -m``.

Stages: *basis* (only with ``basis.learn_from``) learns the bases from people; *precompute* keeps the photos as latents;
*pretrain* trains the image encoder (not with --clip-vision); *train* trains the hypernetwork; *evaluate* measures it on
people who were kept from training.

Needs ``accelerate``, ``diffusers`` and ``transformers``. Nothing is downloaded. All settings are in ``RUN/config.json``;
docs/train-config.md explains each, and ``--set`` changes any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from ..errors import HDBError, HyperNetError
from .base.denoiser import load_base_model
from .base.model import BaseModel
from .describe import purposes
from .heartbeat import GO_ON, Heartbeat, address, lost_another
from .job import Job
from .plan import describe_plan
from .refusals import refuse_early
from .run import STAGES, Run
from .settings import PRECISIONS, PREDICTION_TYPES, Settings, flat
from .stages import RUN_STAGE

# Processes wait for the one that learns a basis, draws samples or has the most people left; for a dead one they wait
# only as long as `heartbeat` says.
PATIENCE = timedelta(hours=2)
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OPTIONS = {
    "model": "model", "photos": "photos", "steps": "train.steps", "people": "train.people", "image-size": "image_size",
    "rank": "rank", "accumulate": "accumulate", "mixed-precision": "mixed_precision", "overfit": "overfit",
    "clip-vision": "clip_vision", "prediction-type": "prediction_type", "convolutions": "convolutions", "cpu": "cpu",
}  # fmt: skip
_CHOICES = {"mixed_precision": PRECISIONS, "prediction_type": PREDICTION_TYPES[1:]}


COMMAND = "python -m hdb_core.train"
# Loads the frozen base model of some settings on a device, UNet and text encoders in a dtype; valid within the context.
Loader = Callable[[Settings, torch.device, torch.dtype], AbstractContextManager[BaseModel]]


def by_diffusers(settings: Settings, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[BaseModel]:
    """The `Loader` of checkpoints and diffusers folders.

    Raises:
        HyperNetError: the model is of several files, which ComfyUI's loader reads.
    """
    if settings.text_encoders or settings.vae:
        raise HyperNetError(
            "A model of several files is loaded by ComfyUI: python -m custom_nodes.PACK.train, see docs/train.md. Otherwise "
            "leave text_encoders and vae out."
        )
    tokenizer = Path(settings.tokenizer) if settings.tokenizer else None
    return nullcontext(
        load_base_model(
            Path(settings.model), device, dtype, tokenizer, settings.prediction_type or None, settings.convolutions
        )
    )


def main(arguments: Sequence[str] | None = None, load: Loader = by_diffusers, command: str = COMMAND) -> int:
    """Run the stages of a training; the exit code.

    Args:
        arguments: of the command line; None is those of this process.
        load: loads the base model.
        command: by which this is called.
    """
    args = parser().parse_args(arguments)
    accelerator = None
    try:
        run = Run.open(args.run, given(args))
        with run.locked() if _is_first() else nullcontext():
            accelerator = _accelerator(run.settings)
            with _signs_of_life(accelerator):
                _run_stages(run, accelerator, load, command, args.stage)
    except (HDBError, OSError) as error:
        sys.stderr.write(f"{error}\n")  # of whichever process
        return 1
    except RuntimeError as error:
        if not lost_another(error):
            raise
        reason, _, _ = str(error).partition("\n")
        sys.stderr.write(f"Another process has ended, so this one ends, too ({reason}). {GO_ON}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. The same command goes on.\n")
        return 130  # as a shell gives it
    finally:
        if accelerator is not None:
            accelerator.end_training()
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line; what an option is for is said once, where the setting is."""
    made = argparse.ArgumentParser(prog="hdb_core.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("run", type=Path, metavar="RUN", help="folder for everything that is made")
    texts, defaults = purposes(Settings()), flat(Settings())
    for option, name in _OPTIONS.items():
        default = defaults[name]
        about = texts[name] + ("" if default == "" else f" Default: {default}")
        kind: dict[str, Any] = {
            "type": type(default),
            "choices": _CHOICES.get(name),
            "metavar": None if name in _CHOICES else option.upper(),
        }
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        made.add_argument(f"--{option}", dest=name, help=about.replace("%", "%%"), default=None, **kind)
    made.add_argument("--stage", choices=STAGES, help="run this stage alone, on what the ones before it have written")
    made.add_argument("--set", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help="any other setting of RUN/config.json, see docs/train-config.md")  # fmt: skip
    return made


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names, by their full names.

    Raises:
        SystemExit: if ``--set`` is given something else than NAME=VALUE.
    """
    values = {name: getattr(args, name) for name in _OPTIONS.values() if getattr(args, name) is not None}
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals:
            parser().error(f"--set takes NAME=VALUE, got {item!r}")
        try:
            values[name] = json.loads(value)
        except (ValueError, RecursionError):
            values[name] = value  # a text
    return values


def _is_first() -> bool:
    """Whether this is the only process, or the first of those that torchrun or accelerate have started."""
    return os.environ.get("RANK", "0") == "0"


def _accelerator(settings: Settings) -> Accelerator:
    waiting = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(mixed_precision=settings.mixed_precision, cpu=settings.cpu, kwargs_handlers=[waiting])


def _signs_of_life(accelerator: Accelerator) -> AbstractContextManager[object]:
    rank, count = accelerator.process_index, accelerator.num_processes
    return Heartbeat(rank, count, address()) if count > 1 else nullcontext()


def _run_stages(run: Run, accelerator: Accelerator, load: Loader, command: str, only: str | None) -> None:
    with load(run.settings, accelerator.device, _DTYPES[accelerator.mixed_precision]) as base:
        job, stages = Job(run, accelerator, base), [only] if only else run.stages()
        refuse_early(job, stages)
        accelerator.print(describe_plan(job, stages, command))
        if accelerator.is_main_process:
            run.write_settings()
        for stage in stages:
            if not only and run.finished(stage):
                accelerator.print(f"{stage} is finished.")
                continue
            accelerator.print(f"{stage}, processes: {accelerator.num_processes}")
            RUN_STAGE[stage](job)
            accelerator.free_memory()
        if "train" in stages and not run.settings.overfit:
            accelerator.print(f"{run.file} goes into ComfyUI's models/hyperdreambooth, for Load HyperNet.")


if __name__ == "__main__":
    sys.exit(main())
