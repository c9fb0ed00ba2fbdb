"""The miniature's image encoder and hypernetwork, trained on drawn people as they come: ``python -m miniature.predictor``.

``encoder`` teaches the image encoder who is who, ``hypernet`` trains the hypernetwork behind it, both by the clock and with
the losses of ``hdb_core.train``; only the people are not a folder but `miniature.crowd`'s. The encoder is stepped with
Muon: from where 2,800 steps of AdamW had taken it from a loss of 0.32 to 0.31, as many of Muon took it to 0.21.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from devtools.device import add_option
from hdb_core.basis import BasisRecipe
from hdb_core.diffusion import NoiseLevels
from hdb_core.files import hypernet as hypernet_file
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig
from hdb_core.hypernet.encoder import initialised
from hdb_core.prompt import CLASS_PROMPT
from hdb_core.train.ahead import read_ahead
from hdb_core.train.base.denoiser import load_base_model
from hdb_core.train.beginning import learn_code, load_encoder, save_encoder
from hdb_core.train.data.people import EncodedPerson
from hdb_core.train.encoder_loss import PhotoLoss, PhotoPredictor, PretrainConfig, ShownPhotos
from hdb_core.train.face_code import MOST_PHOTOS, Components, shown_of
from hdb_core.train.loop import LossOf, TrainingLoop
from hdb_core.train.person_loss import PersonLoss, TrainConfig
from hdb_core.train.predicted import FromFaces, PeopleInBase
from hdb_core.train.split import trained_on
from hdb_core.train.stages import RATES, averaged

from .checkpoint import HYPERNET_FILE
from .crowd import PHOTOS, Crowd
from .training import STATE_FILE, Length, Trainer, working_dtype

ENCODER_FILE = "encoder.safetensors"
ADAM_ONLY = ("stem.0.", "embeddings", "text_in", "out.")  # of the encoder's training, which are left to AdamW
GROUPS_A_STEP = 2  # of people, at most, that are taken up
NOISE = NoiseLevels(0.05, 0.95)


@dataclass
class Clock:
    """Share of the training that is done, from its first look on.

    Attributes:
        minutes: of the whole.
        started: the first look, in seconds of the monotonic clock.
    """

    minutes: float
    started: float | None = None

    def __call__(self) -> float:
        if self.started is None:
            self.started = time.monotonic()
        return (time.monotonic() - self.started) / (60 * self.minutes)


class Training:
    """What the two trainings share.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        dtype = working_dtype(args.device)
        precision = "bf16" if dtype == torch.bfloat16 else "no"
        self.accelerator = Accelerator(mixed_precision=precision, cpu=args.device == "cpu")
        self.base = load_base_model(args.model, self.accelerator.device, dtype, convolutions=True)
        encoded = 1 if args.what == "encoder" else PHOTOS
        self.crowd = Crowd(args.crowd, self.base.encode, self.accelerator.device, args.most, encoded)
        args.run.mkdir(parents=True, exist_ok=True)
        self.notes = {"people": 0.0, "waited": 0.0}
        self._wait_for(args.first)

    def _wait_for(self, people: int) -> None:
        """The statistics of people are found from the first of them."""
        start = time.monotonic()
        while len(self.crowd.people) < people:
            if not self.crowd.grow(16):
                time.sleep(0.2)
        self.notes["waited"] += time.monotonic() - start


class OnCrowd:
    """A loss on whoever has been drawn until a step is read, see `hdb_core.train.loop.LossOf`.

    Args:
        training: whose crowd it is.
        loss: of its people.
        take: what the loss needs of new ones.
    """

    def __init__(self, training: Training, loss: LossOf, take: Callable[[list[EncodedPerson]], None]) -> None:
        self.training, self.loss, self.take = training, loss, take

    def read(self, step: int, part: slice) -> Any:
        if new := self.training.crowd.grow(GROUPS_A_STEP):
            self.take(new)
        self.training.notes["people"] = len(self.training.crowd.people)
        return self.loss.read(step, part)

    def __call__(self, net: torch.nn.Module, step: int, part: slice, read: Any) -> dict[str, torch.Tensor]:
        return self.loss(net, step, part, read)


def train_encoder(training: Training) -> None:
    """The image encoder, from one photo of a person to the portrait of them."""
    args, crowd = training.args, training.crowd
    config = PretrainConfig(people=args.batch, portraits=True)
    encoder = EncoderConfig()
    loss = PhotoLoss(training.base.denoiser, crowd.people, crowd.faces(encoder), CLASS_PROMPT, config, args.seed)
    with initialised(args.seed):
        net = PhotoPredictor(encoder, loss.text([""]).shape[-1], len(loss.components.variance))
    device = training.accelerator.device
    net.to(device, memory_format=torch.channels_last)

    def save() -> None:
        known = {n.removeprefix("encoder."): w for n, w in trainer.averages().items() if n.startswith("encoder.")}
        save_encoder({name: weight.half() for name, weight in known.items()}, args.run / ENCODER_FILE)

    for old in (STATE_FILE, "log.csv"):
        (args.run / old).unlink(missing_ok=True)
    trainer = Trainer(
        net, args.run, length=Length(minutes=args.minutes), rate=args.rate, muon=True, adam_only=ADAM_ONLY, save=save
    )
    trainer.notes |= training.notes

    def read(step: int) -> ShownPhotos:
        loss.counts += [len(person.person.photos) for person in crowd.grow(GROUPS_A_STEP)]
        trainer.notes["people"] = len(crowd.people)
        return loss.read(step)

    def predict(pixels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return net(pixels.to(trainer.dtype, memory_format=torch.channels_last), text.to(trainer.dtype))

    # The other ways of attention are slow on a CPU and few tokens.
    with (
        sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext(),
        closing(read_ahead(read, count())) as ahead,
    ):
        for step, shown in ahead:
            trainer.step(loss(predict, step, read=shown)["loss"])
            if not trainer.running:
                break
    trainer.save()


def train_hypernet(training: Training) -> None:
    """The hypernetwork, behind an encoder that stays as it is."""
    args, crowd, denoiser = training.args, training.crowd, training.base.denoiser
    config = TrainConfig(people=args.batch, learning_rate=args.rate, warmup=50, noise=NOISE, max_photos=3,
                         class_weight=args.class_weight)  # fmt: skip
    net_config = HyperNetConfig(denoiser.layout, BasisRecipe(), EncoderConfig(), width=args.width, depth=2, rank=args.rank,
                                iterations=config.max_iterations, predict_down=False,
                                by_token=config.class_weight > 0)  # fmt: skip
    hypernet = HyperNet.create(net_config, args.seed).to(training.accelerator.device)
    base = PeopleInBase(denoiser, crowd.people, net_config, crowd.faces(net_config.encoder))
    components = Components.of(torch.stack([shown_of(person, 0) for person in crowd.people[:MOST_PHOTOS]]))

    def codes_of(people: Sequence[EncodedPerson]) -> torch.Tensor:
        return components.codes(torch.stack([shown_of(person, 0) for person in people]), net_config.code)

    codes = codes_of(crowd.people)
    load_encoder(hypernet.encoder, args.encoder)
    learn_code(hypernet, base, codes.cpu())
    loss = PersonLoss(base, config, args.seed, codes, CLASS_PROMPT)
    net = FromFaces(hypernet)

    def take(new: list[EncodedPerson]) -> None:
        assert loss.codes is not None
        loss.codes = torch.cat([loss.codes, codes_of(new).to(loss.codes)])
        base.counts += [len(person.latents) for person in new]

    loop = training_loop(training, net, config, RATES)

    def save() -> None:
        info = {"made_by": "miniature.predictor", "step": str(loop.step), "trained_on": trained_on(crowd.people)}
        hypernet_file.save(averaged(net_config, loop.average), args.run / HYPERNET_FILE, info)

    loop.run(OnCrowd(training, loss, take), save, notes=training.notes)


def training_loop(training: Training, net: torch.nn.Module, config: PretrainConfig | TrainConfig,
                  rates: dict[str, float] | None = None) -> TrainingLoop:  # fmt: skip
    """A loop that ends by the clock; it begins anew each time, from whatever weights the module has."""
    run = training.args.run
    state = run / "state.safetensors"
    state.unlink(missing_ok=True)
    clock = Clock(training.args.minutes)
    return TrainingLoop(training.accelerator, net, config, state, run / "log.csv", rates=rates, progress=clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encoder", "hypernet"))
    parser.add_argument("--crowd", type=Path, default=Path(".runs/crowd"), help="folder of miniature.crowd")
    parser.add_argument("--model", type=Path, default=Path(".runs/diffusers"), help="of miniature.checkpoint diffusers")
    parser.add_argument("--run", type=Path, required=True, help="folder of what is made")
    parser.add_argument("--minutes", type=float, required=True, help="length of the schedule, by the clock")
    parser.add_argument("--batch", type=int, default=64, help="people in a step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--first", type=int, default=4096, help="people that must be drawn before the first step")
    parser.add_argument("--most", type=int, default=200_000, help="people that are taken up at all")
    parser.add_argument("--encoder", type=Path, help="hypernet: the trained image encoder")
    parser.add_argument("--width", type=int, default=184, help="of the decoder; 184 fits into 20 MB")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--class-weight", type=float, default=1.0, help="of the loss that keeps the class prompt")
    parser.add_argument("--seed", type=int, default=0)
    add_option(parser)
    args = parser.parse_args()
    if args.what == "hypernet" and not args.encoder:
        parser.error("hypernet needs --encoder, the file that encoder has made")
    training = Training(args)
    train_encoder(training) if args.what == "encoder" else train_hypernet(training)


if __name__ == "__main__":
    main()
