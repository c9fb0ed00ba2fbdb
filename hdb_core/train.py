"""Train a hypernetwork for a base model of your own: ``accelerate launch -m hdb_core.train STAGE …``, or ``python -m``.

Stages, each of which goes on where it was stopped:

* ``precompute``: the photos of all people as latents, and a LiDB fitted to each; behind a frozen image encoder
  (``--clip-vision``), also the tokens of the photos;
* ``train``: the hypernetwork, on what ``precompute`` wrote;
* ``evaluate``: on people who were kept from training.

Needs ``accelerate``, ``diffusers`` and ``transformers``. Nothing is downloaded: --model is on disk, a diffusers
folder or a single-file checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from . import hypernet_file
from .basis import BasisRecipe
from .errors import HDBError, HyperNetError
from .hypernet import EncoderConfig, HyperNet, HyperNetConfig
from .layout import Layout
from .training.base_model import BaseModel, load_base_model
from .training.faces import Faces, PhotoPixels
from .training.fit import FitConfig
from .training.loop import FromFaces, PersonLoss, TrainConfig
from .training.losses import mean_predictor_loss
from .training.people import FittedPerson, precompute, read_people, stacked
from .training.photos import find_people
from .training.samples import SampleConfig, SampleGrid
from .training.tokens import PhotoTokens, precompute_tokens
from .training.vision import load_vision_encoder

SAVE_EVERY = 180  # seconds
LOG_EVERY = 10  # steps
EMA_DECAY = 0.998
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """A folder with everything of one training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.people, self.tokens, self.samples = folder / "people", folder / "tokens", folder / "samples"
        self.state, self.log = folder / "state.pt", folder / "log.csv"
        self.file = folder / "hypernet.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
    try:
        dtype = _DTYPES[accelerator.mixed_precision]
        base = load_base_model(args.model, accelerator.device, dtype, args.tokenizer, args.prediction_type)
        {"precompute": _precompute, "train": _train, "evaluate": _evaluate}[args.stage](args, accelerator, base)
    except (HDBError, FileNotFoundError) as error:
        accelerator.print(error, file=sys.stderr)
        return 1
    finally:
        accelerator.end_training()
    return 0


def _precompute(args: argparse.Namespace, accelerator: Accelerator, base: BaseModel) -> None:
    config = FitConfig(basis=_basis(args), prompt=args.prompt, rank=args.rank, steps=args.fit_steps, learning_rate=args.fit_rate)  # fmt: skip
    _faces(args, accelerator)
    people = find_people(args.photos)
    size = args.image_size
    with tqdm(total=len(people), unit="person", disable=not accelerator.is_main_process) as bar:
        share = (accelerator.process_index, accelerator.num_processes)
        precompute(base, people, Run(args.run).people, config, size, args.group, share,
                   lambda done, _: bar.update(done - bar.n))  # fmt: skip
    accelerator.wait_for_everyone()


def _train(args: argparse.Namespace, accelerator: Accelerator, base: BaseModel) -> None:
    run, config = Run(args.run), TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    people, kept = held_out(_fitted(args, run), args.held_out)
    faces, encoder = _faces(args, accelerator)
    _require_same_encoder(run, encoder)
    loss_of = PersonLoss(base.denoiser, people, _net_config(args, base, encoder), config, faces)
    net = FromFaces(HyperNet.create(loss_of.net, config.seed))
    net.net.set_scale(loss_of.energy)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99))  # fmt: skip
    average = {name: weight.clone() for name, weight in net.net.state_dict().items()}
    first = _resume(run, net, optimizer, average)
    wrapped, optimizer = accelerator.prepare(net, optimizer)
    average = {name: weight.to(accelerator.device) for name, weight in average.items()}
    parts = parts_of(config.people, args.accumulate, accelerator)
    baseline = float(mean_predictor_loss(stacked(people, loss_of.down), loss_of.energy))
    accelerator.print(f"{len(people)} people; predicting the mean costs {baseline:.3f} of the regression.")
    sampling = SampleConfig(**{f.name: getattr(args, f"sample_{f.name}") for f in fields(SampleConfig)})
    grid = SampleGrid(base, kept, args.prompt, loss_of.bases, faces, sampling, config.seed) if sampling.wanted else None
    saved, logged = time.monotonic(), []
    steps = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not accelerator.is_main_process)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        losses = backward(accelerator, loss_of, wrapped, step, parts)
        accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in net.net.state_dict().items():
                average[name].lerp_(weight.to(average[name]), 1 - decay)
        logged.append({name: accelerator.reduce(value, "mean") for name, value in losses.items()})
        if (step + 1) % LOG_EVERY == 0 or step + 1 == config.steps:
            row = {name: float(torch.stack([r[name] for r in logged if name in r]).mean()) for name in logged[-1]}
            steps.set_postfix({name: f"{value:.4f}" for name, value in row.items()})
            if accelerator.is_main_process:
                _log(run, {"step": step + 1, "rate": config.rate(step), "mean_predictor": baseline, **row})
            logged = []
        last = step + 1 == config.steps
        if accelerator.is_main_process and (last or time.monotonic() - saved > SAVE_EVERY):
            _save(run, net, optimizer, average, step + 1, args)
            saved = time.monotonic()
        if accelerator.is_main_process and grid is not None and (step + 1) % sampling.every == 0:
            run.samples.mkdir(exist_ok=True)
            grid.draw(_averaged(net, average)).save(run.samples / f"step_{step + 1:06}.png")
    accelerator.wait_for_everyone()


def _evaluate(args: argparse.Namespace, accelerator: Accelerator, base: BaseModel) -> None:
    """Losses on held-out people, by number of photos and of refinements."""
    run = Run(args.run)
    _, people = held_out(_fitted(args, run), args.held_out)
    net = FromFaces(hypernet_file.load(run.file).to(accelerator.device))
    encoder = net.net.config.encoder
    frozen = encoder.kind == "clip_vision"
    faces = PhotoTokens(run.tokens, [p.person for p in people], encoder) if frozen else PhotoPixels(encoder)
    loss_of = PersonLoss(base.denoiser, people, net.net.config, TrainConfig(draws=args.draws), faces)
    combinations = [(photos, k) for photos in range(1, args.max_photos + 1) for k in range(1, args.max_iterations + 1)]
    rows = [{"photos": p, "iterations": k, **loss_of.evaluate(net, p, k, args.seed)} for p, k in combinations]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    accelerator.print(text, end="")
    if accelerator.is_main_process:
        (run.folder / "evaluation.json").write_text(text)


def held_out(people: Sequence[FittedPerson], share: float) -> tuple[list[FittedPerson], list[FittedPerson]]:
    """Those to train on, and those kept for ``evaluate``: the last ones, at least one."""
    count = max(1, round(share * len(people)))
    if count >= len(people):
        raise HyperNetError(
            f"{len(people)} people are too few: at least two are needed, one of them kept from training."
        )
    return list(people[:-count]), list(people[-count:])


def _fitted(args: argparse.Namespace, run: Run) -> list[FittedPerson]:
    return list(read_people(run.people, find_people(args.photos)))


def _faces(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Faces, EncoderConfig]:
    """What the hypernetwork reads of everybody's photos, missing tokens computed now, and the encoder."""
    if args.clip_vision is None:
        config = EncoderConfig(image_size=args.encoder_size, token_width=args.encoder_width, patch_size=args.patch_size, depth=args.encoder_depth)  # fmt: skip
        return PhotoPixels(config), config
    encoder = load_vision_encoder(args.clip_vision, accelerator.device)
    people, folder = find_people(args.photos), Run(args.run).tokens
    share = (accelerator.process_index, accelerator.num_processes)
    precompute_tokens(encoder, people, folder, args.group, share)
    accelerator.wait_for_everyone()
    return PhotoTokens(folder, people, encoder.config), encoder.config


def _require_same_encoder(run: Run, encoder: EncoderConfig) -> None:
    """The encoder of a training that is to go on must be that of its beginning."""
    if not run.file.exists():
        return
    found = hypernet_file.read_header(run.file).config.encoder
    if replace(found, name="") != replace(encoder, name=""):
        raise HyperNetError(
            f"{run.folder} trains a hypernetwork behind the encoder {found.name or found.kind!r} "
            f"({found.image_size} px, width {found.token_width}), not {encoder.name or encoder.kind!r} "
            f"({encoder.image_size} px, width {encoder.token_width}). Give the options that it was begun with, or use "
            "another --run folder."
        )


def _net_config(args: argparse.Namespace, base: BaseModel, encoder: EncoderConfig) -> HyperNetConfig:
    return HyperNetConfig(
        base.denoiser.layout, _basis(args), encoder, width=args.width, depth=args.depth, rank=args.rank,
        iterations=args.max_iterations, free_down=args.free_down, prompt=args.prompt,
    )  # fmt: skip


def _basis(args: argparse.Namespace) -> BasisRecipe:
    return BasisRecipe(args.basis_seed, args.down_dim, args.up_dim)


def parts_of(people: int, accumulate: int, accelerator: Accelerator) -> list[slice]:
    """This process's people of the global batch, in as many parts as gradients are accumulated over.

    Raises:
        HyperNetError: if they cannot be shared out evenly.
    """
    rank, count = accelerator.process_index, accelerator.num_processes
    if accumulate < 1 or people % (count * accumulate):
        raise HyperNetError(
            f"--people {people} must be a multiple of {count} processes times --accumulate {accumulate}, which is at "
            "least 1. Change one of them."
        )
    return [slice(rank + part * count, None, count * accumulate) for part in range(accumulate)]


def backward(
    accelerator: Accelerator, loss_of: PersonLoss, net: torch.nn.Module, step: int, parts: Sequence[slice]
) -> dict[str, Tensor]:
    """Add up the gradients of a step's parts, which are of one size; returns the mean losses."""
    losses = []
    for part in parts:
        is_last = part is parts[-1]  # processes exchange their gradients once
        with nullcontext() if is_last else accelerator.no_sync(net):
            with accelerator.autocast():
                losses.append(loss_of(net, step, part))
            accelerator.backward(losses[-1]["loss"] / len(parts))
    return {name: torch.stack([own[name].detach() for own in losses]).mean() for name in losses[0]}


def _resume(run: Run, net: FromFaces, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> int:
    """Load what `_save` wrote, if anything; the next step."""
    if not run.state.exists():
        return 0
    state = torch.load(run.state, map_location="cpu", weights_only=True)
    net.net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    average.update(state["average"])
    return state["step"]


def _save(
    run: Run, net: FromFaces, optimizer: Any, average: dict[str, Tensor], step: int, args: argparse.Namespace
) -> None:
    """The state to go on from, and the hypernetwork with averaged weights; a kill leaves the old or the new one."""
    partial = run.state.with_suffix(".partial")
    torch.save({"net": net.net.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}, partial)  # fmt: skip
    os.replace(partial, run.state)
    settings = {
        name: str(value)
        for name, value in sorted(vars(args).items())
        if name not in ("model", "photos", "run", "clip_vision", "tokenizer")
    }
    hypernet_file.save(_averaged(net, average), run.file, {**settings, "made_by": "hdb_core.train", "step": str(step)})


def _averaged(net: FromFaces, average: dict[str, Tensor]) -> HyperNet:
    """A hypernetwork with averaged weights, on their device."""
    averaged = HyperNet.create(net.net.config).to(next(iter(average.values())).device)
    averaged.load_state_dict(average)
    return averaged.eval()


def _log(run: Run, row: dict[str, float]) -> None:
    new = not run.log.exists()
    with run.log.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["step", "rate", "loss", "regression", "diffusion", "mean_predictor"])
        if new:
            writer.writeheader()
        writer.writerow(row)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hdb_core.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("stage", choices=("precompute", "train", "evaluate"))
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder or .safetensors checkpoint")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of CLIP's vocabulary, if --model has none and no ComfyUI is around it"
    )
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction"), help="of an SD 2.x checkpoint file")
    parser.add_argument("--photos", type=Path, required=True, help="a sub-folder of face photos for each person")
    parser.add_argument("--run", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument(
        "--clip-vision",
        type=Path,
        help="transformers folder of a frozen CLIP, SigLIP or DINOv2 image encoder, instead of a trained ViT",
    )
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    parser.add_argument("--mixed-precision", choices=tuple(_DTYPES), default="bf16")
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="parts that each process's people of a step are taken in, to save memory",
    )
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the people kept for evaluate")
    fit, basis, encoder, basic = FitConfig(), BasisRecipe(), EncoderConfig(), HyperNetConfig(Layout("sd1", ()))
    numbers = {
        "group": 32, "fit_steps": fit.steps, "fit_rate": fit.learning_rate, "image_size": 512, "basis_seed": basis.seed,
        "down_dim": basis.down_dim, "up_dim": basis.up_dim, "encoder_size": encoder.image_size,
        "encoder_width": encoder.token_width, "encoder_depth": encoder.depth, "patch_size": encoder.patch_size,
        "width": basic.width, "depth": basic.depth, "rank": basic.rank,
        **{f.name: f.default for f in fields(TrainConfig) if f.name != "same_photo"},
        **{f"sample_{f.name}": f.default for f in fields(SampleConfig)},
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help="default: %(default)s"
        )
    parser.add_argument("--prompt", default=basic.prompt, help="of everybody, with a rare token; default: %(default)s")
    parser.add_argument("--free-down", action="store_true", help="predict the down side too")
    parser.add_argument("--same-photo", action="store_true", help="denoise the photo that a person was predicted from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
