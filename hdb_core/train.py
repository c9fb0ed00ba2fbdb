"""Train a hypernetwork for a base model of your own: ``python -m hdb_core.train STAGE …``.

On several processes: ``accelerate launch -m`` or ``torchrun --nproc-per-node N -m`` in place of ``python -m``.

Stages; all go on where they were stopped, but the first and the last, which take minutes and begin anew:

* ``basis``: the directions of weight changes that people differ in, from some of them; without it, a random basis; one
  that is there already is only measured;
* ``precompute``: the photos of all people as latents, and a LiDB fitted to each; behind a frozen image encoder
  (``--clip-vision``), also the tokens of the photos;
* ``pretrain``: the image encoder, unless it is a frozen one; may be left out;
* ``train``: the hypernetwork, on what the others wrote;
* ``evaluate``: on people who were kept from training.

Needs ``accelerate``, ``diffusers`` and ``transformers``. Nothing is downloaded: --model is on disk, a diffusers
folder or a single-file checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from . import basis_file, hypernet_file
from .basis import BasisRecipe, bases_of
from .errors import HDBError, HyperNetError
from .hypernet import EncoderConfig, HyperNet, HyperNetConfig, initialised
from .layout import Layout
from .prompt import CLASS_PROMPT
from .training.base_model import BaseModel, load_base_model
from .training.basis import BasisConfig, Photos, held_share, learn_basis
from .training.code import MOST_PHOTOS, codes_of, fit_code
from .training.faces import AUGMENTATIONS, Faces, PhotoPixels
from .training.fit import FitConfig
from .training.loop import FromFaces, PersonLoss, TrainConfig
from .training.losses import mean_predictor_loss
from .training.people import FittedPerson, encode, precompute, read_people, regions, stacked
from .training.photos import Person, find_people
from .training.pretrain import PhotoLoss, PhotoPredictor
from .training.samples import SampleConfig, SampleGrid
from .training.tokens import PhotoTokens, precompute_tokens
from .training.trainer import Trainer, differing, parts_of
from .training.vision import load_vision_encoder

_PATHS = (
    "model",
    "photos",
    "folder",
    "begin_with",
    "clip_vision",
    "encoder",
    "tokenizer",
    "basis",
    "precomputed",
)  # of a machine, in no file
_OF_THE_STAGE = ("draws", "min_timestep", "max_timestep")  # what is best for one is not for another
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Someone = TypeVar("Someone")
Config = TypeVar("Config", BasisConfig, FitConfig, TrainConfig)


class Run:
    """A folder with everything of one training; what `precompute` wrote may be in another, for several of them."""

    def __init__(self, folder: Path, precomputed: Path | None = None) -> None:
        self.folder, read = folder, precomputed or folder
        self.people, self.tokens = read / "people", read / "tokens"
        self.state, self.log, self.samples = folder / "state.pt", folder / "log.csv", folder / "samples"
        self.encoder, self.file = folder / "encoder.safetensors", folder / "hypernet.safetensors"
        self.basis = folder / "basis.safetensors"

    @staticmethod
    def of(args: argparse.Namespace) -> Run:
        return Run(args.folder, args.precomputed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.encoder and (args.begin_with or args.clip_vision):
        parser.error("--encoder is for a trained ViT that starts anew: --begin-with and --clip-vision bring their own.")
    if args.code and args.encoder_rate and not args.clip_vision:
        parser.error("--code needs --encoder-rate 0: the code is found once, in the tokens of the encoder as it is.")
    if args.augment and args.clip_vision:
        parser.error("--augment is for a trained ViT: the tokens of --clip-vision are computed once for every photo.")
    # Processes wait for the one with the most to do, which may take longer than collectives otherwise may.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu, kwargs_handlers=[patience])
    try:
        accelerator.print(f"{args.stage}, processes: {accelerator.num_processes}")
        dtype = _DTYPES[accelerator.mixed_precision]
        base = load_base_model(
            args.model, accelerator.device, dtype, args.tokenizer, args.prediction_type, args.convolutions
        )
        args.folder.mkdir(parents=True, exist_ok=True)
        _STAGES[args.stage](args, accelerator, base)
    except (HDBError, FileNotFoundError) as error:
        sys.stderr.write(f"{error}\n")  # of whichever process
        return 1
    finally:
        accelerator.end_training()
    return 0


def _basis(args: argparse.Namespace, accelerator: Accelerator, base: BaseModel) -> None:
    """One process learns it; how much it holds of people who are kept from training is measured beside a random one."""
    if not accelerator.is_main_process:
        return
    run, denoiser = Run.of(args), base.denoiser
    config = _given(BasisConfig, args)
    people, kept = held_out(find_people(args.photos), args)
    people, kept = people[: args.basis_people], kept[: args.basis_people]
    if not run.basis.exists():
        with tqdm(total=config.passes * len(people), unit="person") as bar:
            shown = [_photos_of(base, person, args.image_size) for person in people]
            bases = learn_basis(denoiser, shown, config, lambda: bar.update() and None)
        info = {**{name: str(value) for name, value in asdict(config).items()}, "people": str(len(people))}
        basis_file.save(denoiser.layout, bases, (config.down_dim, config.up_dim), run.basis, info)
    _, recipe = basis_file.load(run.basis)
    both = [bases_of(one, denoiser.layout, denoiser.device) for one in (recipe, replace(recipe, learned=""))]
    shares = held_share(denoiser, [_photos_of(base, person, args.image_size) for person in kept], both, config)
    found = {"unseen_people": len(kept), **dict(zip(("held", "held_by_a_random_basis"), shares, strict=True))}
    accelerator.print(
        f"Of what {len(kept)} unseen people ask for, the basis holds {shares[0]:.1%}, a random one {shares[1]:.1%}."
    )
    (run.folder / "basis.json").write_text(json.dumps(found) + "\n")


def _photos_of(base: BaseModel, person: Person, image_size: int) -> Photos:
    latents = encode(base, person, image_size)
    return Photos(latents, [photo.words for photo in person.photos], regions(person, latents))


def _precompute(args: argparse.Namespace, accelerator: Accelerator, base: BaseModel) -> None:
    rank = args.rank if args.fit_steps else 1  # zeros of people who are not fitted are kept in the least space
    config = _given(FitConfig, args, basis=_recipe(args), steps=args.fit_steps, learning_rate=args.fit_rate, rank=rank)
    _faces(args, accelerator)
    people, size = _some(args), args.image_size
    with tqdm(total=len(people), unit="person", disable=not accelerator.is_main_process) as bar:
        share = (accelerator.process_index, accelerator.num_processes)
        precompute(base, people, Run.of(args).people, config, size, args.group, share,
                   lambda done, _: bar.update(done - bar.n))  # fmt: skip


def _pretrain(args: argparse.Namespace, accelerator: Accelerator, base: BaseModel) -> None:
    if args.clip_vision is not None:
        raise HyperNetError("The encoder of --clip-vision stays as it is. Leave the stage pretrain out.")
    run, encoder = Run.of(args), _vit(args)
    config = TrainConfig(
        steps=args.pretrain_steps, people=args.pretrain_people, learning_rate=args.pretrain_rate, encoder_rate=1.0, seed=args.seed
    )  # fmt: skip
    people, _ = held_out(_fitted(args, run, _recipe(args)), args)
    loss_of = PhotoLoss(base.denoiser, people, PhotoPixels(encoder), args.class_prompt, config, args.portraits)
    with initialised(config.seed):
        net = PhotoPredictor(encoder, loss_of.text([""]).shape[-1], len(loss_of.components.variance))
    if args.encoder:
        _load_encoder(net.encoder, args.encoder)
    sizes = {
        "encoder": encoder.sizes, "portraits": args.portraits, "class prompt": args.class_prompt,
        **_learned_from(args, people),
    }  # fmt: skip
    trainer = Trainer(
        accelerator, net, config, run.folder / "pretrain.pt", run.folder / "pretrain.csv", args.accumulate, sizes=sizes
    )

    def save() -> None:
        weights = {n.removeprefix("encoder."): w for n, w in trainer.average.items() if n.startswith("encoder.")}
        partial = run.encoder.with_suffix(".partial")
        save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, partial)
        os.replace(partial, run.encoder)

    trainer.run(loss_of, save)


def _train(args: argparse.Namespace, accelerator: Accelerator, base: BaseModel) -> None:
    run, config = Run.of(args), _given(TrainConfig, args)
    parts_of(config.people, args.accumulate, accelerator)  # refused before the people are read
    people, kept = held_out(_fitted(args, run, _recipe(args)), args)
    faces, encoder = _faces(args, accelerator)
    # Another hypernetwork's code is in coordinates of its own, which its map alone knows.
    codes = codes_of(people, args.code) if args.code and args.begin_with is None else None
    loss_of = PersonLoss(base.denoiser, people, _net_config(args, base, encoder), config, faces, codes)
    if config.regression_weight and not bool(loss_of.energy.any()):
        raise HyperNetError(
            "Nobody was fitted in this basis, so there is nobody to regress onto. Give --regression-weight 0, or run "
            "precompute in a new --folder with --fit-steps above 0 and the same basis."
        )
    net = FromFaces(HyperNet.create(loss_of.net, config.seed))
    net.net.set_scale(loss_of.energy)
    if args.begin_with is not None:
        net.net.load_state_dict(_beginning(args.begin_with, loss_of.net).state_dict())
    elif net.net.encoder is not None and (args.encoder or run.encoder.exists()):
        _load_encoder(net.net.encoder, args.encoder or run.encoder)
    elif net.net.encoder is not None and not config.encoder_rate and not run.state.exists():
        raise HyperNetError(
            "The image encoder has learned nothing yet, and stays as it is. Run pretrain first, give --encoder a file "
            "with one, or train it here: --code 0 --encoder-rate 0.2."
        )
    if codes is not None and not run.state.exists():
        _learn_code(net.net.to(accelerator.device), people, faces, codes)
    rates = {"net.down_start": config.down_rate, "net.encoder": config.encoder_rate, "net.direct": config.direct_rate}
    sizes = {**net_sizes(loss_of.net), "face code": codes is not None, **_learned_from(args, people)}
    trainer = Trainer(accelerator, net, config, run.state, run.log, args.accumulate, rates, sizes)
    notes = {}
    if config.regression_weight:
        notes["mean_predictor"] = float(mean_predictor_loss(stacked(people, loss_of.down), loss_of.energy))
        accelerator.print(f"Predicting the mean person costs {notes['mean_predictor']:.3f} of the regression.")
    sampling = SampleConfig(**{f.name: getattr(args, f"sample_{f.name}") for f in fields(SampleConfig)})
    grid = SampleGrid(base, kept, args.prompt, loss_of.bases, faces, sampling, config.seed) if sampling.wanted else None

    def save() -> None:
        info = {
            name: str(value) for name, value in sorted({**vars(args), **asdict(config)}.items()) if name not in _PATHS
        }
        info |= {"made_by": "hdb_core.train", "step": str(trainer.step), "trained_on": trained_on(people)}
        hypernet_file.save(_averaged(net.net.config, trainer.average), run.file, info)

    def draw_samples() -> None:
        if grid is not None and trainer.step % sampling.every == 0:
            run.samples.mkdir(exist_ok=True)
            grid.draw(_averaged(net.net.config, trainer.average)).save(run.samples / f"step_{trainer.step:06}.png")

    trainer.run(loss_of, save, draw_samples, notes)


@torch.no_grad()
def _learn_code(net: HyperNet, people: Sequence[FittedPerson], faces: Faces, codes: Tensor) -> None:
    """The map to the face code, from what everybody's last photo tells."""
    some, seen = people[:MOST_PHOTOS], []
    for first in range(0, len(some), 64):
        read = faces.read([(p.person, len(p.latents) - 1) for p in some[first : first + 64]]).to(net.code_mean.device)
        tokens = read if net.encoder is None else net.encode(read)
        seen.append(net.summed(tokens).float().cpu())
    net.set_code(*fit_code(torch.cat(seen), codes[: len(some)]))


def _evaluate(args: argparse.Namespace, accelerator: Accelerator, base: BaseModel) -> None:
    """Losses on held-out people, by number of photos and of refinements."""
    run = Run.of(args)
    _recipe(args)  # a learned basis has to be known before anything in it is read
    net = FromFaces(hypernet_file.load(run.file).to(accelerator.device))
    everybody = _fitted(args, run, net.net.config.basis)
    _, people = held_out(everybody, args)
    if not args.overfit:
        _require_unseen(everybody, len(people), hypernet_file.read_header(run.file).info)
    encoder = net.net.config.encoder
    frozen = encoder.kind == "clip_vision"
    faces = PhotoTokens(run.tokens, [p.person for p in people], encoder) if frozen else PhotoPixels(encoder)
    # Whatever was trained with: the same noise, and a loss that counts.
    batches = {"people": TrainConfig.people, "regression_weight": 1.0}
    loss_of = PersonLoss(base.denoiser, people, net.net.config, _given(TrainConfig, args, **batches), faces)
    combinations = [(photos, k) for photos in range(1, args.max_photos + 1) for k in range(1, args.max_iterations + 1)]
    rows = [{"photos": p, "iterations": k, **loss_of.evaluate(net, p, k, args.seed)} for p, k in combinations]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    accelerator.print(text, end="")
    if accelerator.is_main_process:
        (run.folder / "evaluation.json").write_text(text)


def held_out(people: Sequence[Someone], args: argparse.Namespace) -> tuple[list[Someone], list[Someone]]:
    """Those to train on, and those kept for ``evaluate``: the last ones, at least one; with --overfit, the same."""
    if args.overfit:
        first = list(people[: args.overfit])
        return first, first
    count = max(1, round(args.held_out * len(people)))
    if count >= len(people):
        raise HyperNetError(
            f"{len(people)} people are too few: at least two are needed, one of them kept from training."
        )
    return list(people[:-count]), list(people[-count:])


def trained_on(people: Sequence[FittedPerson]) -> str:
    """Who is learned from: how many, and a checksum of their names and numbers of photos."""
    who = [(own.person.name, len(own.person.photos)) for own in people]
    return f"{len(people)} {hashlib.sha256(json.dumps(who).encode()).hexdigest()[:16]}"


def _require_unseen(everybody: Sequence[FittedPerson], judged: int, info: Mapping[str, str]) -> None:
    """Check that a hypernetwork was trained on the first of some people, and not on the last ones, who are judged.

    Raises:
        HyperNetError: if it was trained on others, or on some of those.
    """
    who = info.get("trained_on")
    if who is None:  # a file of before this was noted
        return
    count = int(who.split()[0])
    if count > len(everybody) - judged or trained_on(everybody[:count]) != who:
        raise HyperNetError(
            f"The hypernetwork may have been trained on some of the last {judged} of these {len(everybody)} people. Give "
            "--photos as it was in train, and no larger --held-out."
        )


def _learned_from(args: argparse.Namespace, people: Sequence[FittedPerson]) -> dict[str, Any]:
    """What the components of the photos depend on; a check is never taken for the beginning of the training itself."""
    masks = sum(photo.mask is not None for own in people for photo in own.person.photos)
    check = {"overfit": args.overfit} if args.overfit else {}
    return {"set of people": trained_on(people), "number of masks": masks, **check}


def _some(args: argparse.Namespace) -> list[Person]:
    """Everybody to precompute; with --overfit, as many whole groups as that takes, so that others can follow later."""
    people = find_people(args.photos)
    return people[: -(-args.overfit // args.group) * args.group] if args.overfit else people


def _fitted(args: argparse.Namespace, run: Run, basis: BasisRecipe) -> list[FittedPerson]:
    return list(read_people(run.people, find_people(args.photos), basis))


def _faces(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Faces, EncoderConfig]:
    """What the hypernetwork reads of everybody's photos, missing tokens computed now, and the encoder."""
    if args.clip_vision is None:
        config = _vit(args)
        return PhotoPixels(config, args.augment), config
    encoder = load_vision_encoder(args.clip_vision, accelerator.device)
    people, folder = _some(args), Run.of(args).tokens
    share = (accelerator.process_index, accelerator.num_processes)
    precompute_tokens(encoder, people, folder, args.group, share)
    accelerator.wait_for_everyone()
    return PhotoTokens(folder, people, encoder.config), encoder.config


def _vit(args: argparse.Namespace) -> EncoderConfig:
    stem = tuple((int(w), int(n)) for w, n in (stage.split("x") for stage in args.stem))
    return EncoderConfig(
        image_size=args.encoder_size, token_width=args.encoder_width, patch_size=args.patch_size, stem=stem,
        summary=args.summary, depth=args.encoder_depth,
    )  # fmt: skip


def _given(config: type[Config], args: argparse.Namespace, **others: Any) -> Config:
    """The settings of a stage: others, the options of their names, or, where none was given, its own defaults."""
    options = {f.name: getattr(args, f.name, None) for f in fields(config)}
    return config(**{**{name: value for name, value in options.items() if value is not None}, **others})


def net_sizes(config: HyperNetConfig) -> dict[str, Any]:
    """What two hypernetworks must share for the weights of one to go on in the other."""
    sizes = {name: value for name, value in config.fields().items() if name != "iterations"}
    return {
        **sizes,
        "encoder": config.encoder.sizes,
        "layout": config.layout.hash,
        "basis": config.basis.fields(),
    }


def _load_encoder(encoder: Module, path: Path) -> None:
    """What `pretrain` wrote, or the encoder of a hypernetwork's file.

    Raises:
        HyperNetError: if it is damaged, or of another size.
    """
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise HyperNetError(f"{path} is damaged or no safetensors file ({error}). Make or copy it again.") from error
    inside = {name.removeprefix("encoder."): w for name, w in weights.items() if name.startswith("encoder.")}
    try:
        encoder.load_state_dict(inside or weights)
    except RuntimeError as error:
        raise HyperNetError(
            f"{path} is an image encoder of other sizes. Give the options that it was pretrained with, or move it away."
        ) from error


def _beginning(path: Path, config: HyperNetConfig) -> HyperNet:
    """The hypernetwork that a training begins with.

    Raises:
        HyperNetError: if its sizes, layers or basis are others than those of the training.
    """
    net = hypernet_file.load(path)
    if different := differing(net_sizes(config), net_sizes(net.config)):
        raise HyperNetError(
            f"{path} differs from the hypernetwork to be trained in: {', '.join(different)}. "
            "Give the options that it was trained with."
        )
    return net


def _net_config(args: argparse.Namespace, base: BaseModel, encoder: EncoderConfig) -> HyperNetConfig:
    return HyperNetConfig(
        base.denoiser.layout, _recipe(args), encoder, width=args.width, depth=args.depth, rank=args.rank,
        iterations=args.max_iterations, free_down=args.free_down, prompt=args.prompt, code=args.code,
    )  # fmt: skip


def _recipe(args: argparse.Namespace) -> BasisRecipe:
    """The basis of --basis, or what `basis` wrote into the folder, or a random one."""
    path = args.basis or Run.of(args).basis
    if args.basis is not None or path.exists():
        return basis_file.load(path)[1]
    return BasisRecipe(args.basis_seed, args.down_dim, args.up_dim)


def _averaged(config: HyperNetConfig, average: dict[str, Tensor]) -> HyperNet:
    """A hypernetwork with averaged weights, on their device."""
    averaged = HyperNet.create(config).to(next(iter(average.values())).device)
    averaged.load_state_dict({name.removeprefix("net."): weight for name, weight in average.items()})
    return averaged.eval()


_STAGES = {"basis": _basis, "precompute": _precompute, "pretrain": _pretrain, "train": _train, "evaluate": _evaluate}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hdb_core.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("stage", choices=tuple(_STAGES))
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder or .safetensors checkpoint")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of CLIP's vocabulary, if --model has none and no ComfyUI is around it"
    )
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction"), help="of an SD 2.x checkpoint file")
    parser.add_argument("--photos", type=Path, required=True, help="a sub-folder of face photos for each person")
    parser.add_argument("--folder", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument(
        "--clip-vision",
        type=Path,
        help="transformers folder of a frozen CLIP, SigLIP or DINOv2 image encoder, instead of a trained ViT",
    )
    parser.add_argument(
        "--begin-with", type=Path, help="a hypernetwork's file that `train` begins with, instead of anew"
    )
    parser.add_argument(
        "--encoder",
        type=Path,
        help="what `pretrain` wrote into another folder, or a hypernetwork's file, of whatever base model, whose encoder "
        "`train` begins with, or another `pretrain` goes on with",
    )
    parser.add_argument(
        "--precomputed", type=Path, help="where `precompute` writes to and all others read, if not in --folder"
    )
    parser.add_argument("--basis", type=Path, help="what `basis` wrote, if it was not into --folder")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    parser.add_argument("--mixed-precision", choices=tuple(_DTYPES), default="bf16")
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="parts that each process's people of a step are taken in, to save memory",
    )
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the people kept for evaluate")
    parser.add_argument(
        "--overfit",
        type=int,
        default=0,
        metavar="N",
        help="train on the first N people alone and evaluate by the same: a check before a long training, in a --folder "
        "of its own",
    )
    fit, basis, encoder, basic = FitConfig(), BasisRecipe(), EncoderConfig(), HyperNetConfig(Layout("sd1", ()))
    numbers = {
        "basis_people": 64, "group": 32, "fit_steps": 0, "fit_rate": fit.learning_rate, "image_size": 512, "basis_seed": basis.seed,
        "down_dim": basis.down_dim, "up_dim": basis.up_dim, "encoder_size": encoder.image_size,
        "encoder_width": encoder.token_width, "encoder_depth": encoder.depth, "patch_size": encoder.patch_size,
        "summary": encoder.summary,
        "pretrain_steps": 2000, "pretrain_people": 64, "pretrain_rate": 1e-3,
        "width": basic.width, "depth": basic.depth, "rank": basic.rank, "code": 96,
        **{f.name: f.default for f in fields(TrainConfig) if f.name != "same_photo"},
        **{f"sample_{f.name}": f.default for f in fields(SampleConfig)},
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=None if name in _OF_THE_STAGE else default,
            help="default: the stage's own" if name in _OF_THE_STAGE else "default: %(default)s",
        )
    parser.add_argument("--prompt", default=basic.prompt, help="of everybody, with a rare token; default: %(default)s")
    parser.add_argument("--class-prompt", default=CLASS_PROMPT, help="the same without it; default: %(default)s")
    stem = [f"{width}x{blocks}" for width, blocks in encoder.stem]
    parser.add_argument("--stem", nargs="*", default=stem, metavar="WIDTHxBLOCKS", help=f"default: {' '.join(stem)}")
    parser.add_argument(
        "--convolutions", action="store_true", help="adapt those of the UNet's residual blocks, besides its attention"
    )
    parser.add_argument("--free-down", action="store_true", help="predict the down side too")
    parser.add_argument(
        "--portraits",
        action="store_true",
        help="everybody's first photo is of one kind (passport photo): pretrain predicts it, and sees the others",
    )
    parser.add_argument(
        "--augment",
        nargs="*",
        choices=AUGMENTATIONS,
        default=(),
        help="change the photos that `train` predicts from at random (needs torchvision)",
    )
    parser.add_argument("--same-photo", action="store_true", help="denoise the photo that a person was predicted from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
