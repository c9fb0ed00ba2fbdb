"""The stages of a training, each from what the ones before it wrote into the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..adapters import Adapters
from ..basis import layer_basis
from ..errors import HyperNetError
from ..files import basis as basis_file
from ..files import hypernet as hypernet_file
from ..files.atomic import replacing, write_text
from ..hypernet import HyperNet, HyperNetConfig
from ..hypernet.encoder import initialised
from .basis import BasisConfig, held_share, learn_basis
from .beginning import beginning, load_encoder, net_sizes, save_encoder
from .data.faces import PhotoPixels
from .data.latents import encode
from .data.people import EncodedPerson, precompute
from .data.photos import Person
from .encoder_loss import PhotoLoss, PhotoPredictor
from .evaluate import evaluate
from .face_code import codes_of
from .fit import Fitter
from .job import Job
from .loop import TrainingLoop, parts_of
from .person_loss import PersonLoss
from .predicted import FromFaces, PeopleInBase
from .refusals import NOT_FITTED
from .regression import mean_predictor_loss
from .samples import SampleGrid
from .settings import PATHS, flat
from .split import learned_from, require_unseen, split, trained_on

# Learning rates as multiples of the configured one: the shared down side and the straight line from the face code have
# few numbers that everybody uses; the encoder stays as pretrain left it.
RATES = {"net.down_start": 3.0, "net.encoder": 0.0, "net.direct": 3.0}


def run_basis(job: Job) -> None:
    """Learn the basis on one process, and measure how much of unseen people it holds, beside a random one."""
    own, settings = job.settings.basis, job.settings
    if own.learn_from < 1:
        raise HyperNetError("The basis of this run is a random one. Set basis.learn_from, 64 people are enough.")
    if job.accelerator.is_main_process:
        config = BasisConfig(own.down_dim, own.up_dim, prompt=settings.prompt, seed=settings.seed)
        people, kept = (some[: own.learn_from] for some in split(job.everybody, settings.held_out, settings.overfit))
        if not job.run.basis.exists():
            _learn_basis(job, people, config)
        _measure_basis(job, kept, config)
    job.accelerator.wait_for_everyone()


def _learn_basis(job: Job, people: Sequence[Person], config: BasisConfig) -> None:
    denoiser = job.base.denoiser
    with tqdm(total=config.passes * len(people), unit="person") as bar:
        shown = [encode(job.base, person, job.settings.image_size) for person in people]
        bases = learn_basis(denoiser, shown, config, lambda: bar.update() and None)
    noise = f"{config.noise.min_timestep} to {config.noise.max_timestep}"
    info = {"people": str(len(people)), "passes": str(config.passes), "draws": str(config.draws), "noise": noise,
            "prompt": config.prompt, "seed": str(config.seed)}  # fmt: skip
    basis_file.save(denoiser.layout, bases, (config.down_dim, config.up_dim), job.run.basis, info)


def _measure_basis(job: Job, people: Sequence[Person], config: BasisConfig) -> None:
    denoiser, (_, recipe) = job.base.denoiser, basis_file.load(job.run.basis)
    both = []
    for one in (recipe, replace(recipe, learned="")):
        sides = ((layer.name, layer_basis(one, layer)) for layer in denoiser.layout.layers)
        both.append({name: (down.to(denoiser.device), up.to(denoiser.device)) for name, (down, up) in sides})
    shown = [encode(job.base, person, job.settings.image_size) for person in people]
    held, random = held_share(denoiser, shown, both, config)
    job.accelerator.print(f"The basis covers {held:.1%} of the gradients of {len(people)} held-out people, a random one {random:.1%}.")  # fmt: skip
    found = {"unseen_people": len(people), "held": held, "held_by_a_random_basis": random}
    write_text(job.run.basis_shares, json.dumps(found) + "\n")


def run_precompute(job: Job) -> None:
    """Keep the photos of all people as latents, and fit a LiDB to each if the run asks for it."""
    settings, denoiser = job.settings, job.base.denoiser
    job.compute_tokens()
    fitter = None
    if settings.fit.steps:
        adapters = Adapters(job.recipe, denoiser.layout, denoiser.device)
        fitter = Fitter(denoiser, adapters, settings.fit, settings.rank, settings.prompt)
    bar = tqdm(total=len(job.needed), unit="person", disable=not job.accelerator.is_main_process)
    with bar, job.computing():

        def report(people: int) -> None:
            bar.update(min(people * job.share[1], len(job.needed) - bar.n))  # the other processes are about as far

        precompute(job.base, job.needed, job.run.people, settings.image_size, fitter, settings.group, job.share, report)


def run_pretrain(job: Job) -> None:
    """Train the image encoder."""
    run, settings, config = job.run, job.settings, job.settings.pretrain
    if settings.clip_vision:
        raise HyperNetError("The encoder of --clip-vision stays as it is. Leave the stage pretrain out.")
    parts_of(config.people, settings.accumulate, job.accelerator)  # refused before the people are read
    people, _ = split(job.encoded(job.recipe), settings.held_out, settings.overfit)
    pixels = PhotoPixels(job.encoder)
    loss_of = PhotoLoss(job.base.denoiser, people, pixels, settings.class_prompt, config, settings.seed)
    with initialised(settings.seed):
        net = PhotoPredictor(job.encoder, loss_of.text([""]).shape[-1], len(loss_of.components.variance))
    if settings.begin_with:
        load_encoder(net.encoder, Path(settings.begin_with))
    sizes = {
        "encoder": job.encoder.sizes, "portraits": config.portraits, "class prompt": settings.class_prompt,
        "base model": job.base.identity, **learned_from(people, settings.overfit),
    }  # fmt: skip
    loop = TrainingLoop(
        job.accelerator, net, config, run.pretrain_state, run.pretrain_log, settings.accumulate, sizes=sizes
    )

    def save() -> None:
        weights = {n.removeprefix("encoder."): w for n, w in loop.average.items() if n.startswith("encoder.")}
        save_encoder(weights, run.encoder)

    loop.run(loss_of, save)


def run_train(job: Job) -> None:
    """Train the hypernetwork."""
    run, settings, config = job.run, job.settings, job.settings.train
    parts_of(config.people, settings.accumulate, job.accelerator)  # refused before the people are read
    net_config = job.net_config
    people, kept = split(job.encoded(net_config.basis), settings.held_out, settings.overfit)
    job.compute_tokens()
    faces = job.faces([own.person for own in (*people, *kept)], net_config.encoder)
    base = PeopleInBase(job.base.denoiser, people, net_config, faces)
    if config.regression_weight and base.energy is None:
        raise HyperNetError(NOT_FITTED)
    # Another hypernetwork's code is in coordinates of its own, which its map alone knows.
    codes = None if run.begins_with_hypernet() else codes_of(people, settings.net.code)
    net = FromFaces(beginning(job, base, codes))
    sizes = {**net_sizes(net_config), "face code": codes is not None, **learned_from(people, settings.overfit)}
    sizes |= {"base model": job.base.identity, "image encoder": job.vision and job.vision.weights}
    loop = TrainingLoop(job.accelerator, net, config, run.state, run.log, settings.accumulate, RATES, sizes)
    grid = _sample_grid(job, base, kept)

    def save() -> None:
        info = {name: str(value) for name, value in sorted(flat(settings).items()) if name not in PATHS}
        info |= {"made_by": "hdb_core.train", "step": str(loop.step), "trained_on": trained_on(people)}
        hypernet_file.save(averaged(net_config, loop.average), run.file, info)

    def draw_samples() -> None:
        if grid is not None and (loop.step % settings.samples.every == 0 or loop.step == config.steps):
            run.samples.mkdir(exist_ok=True)
            with replacing(run.samples / f"step_{loop.step:06}.png") as temporary:
                grid.draw(averaged(net_config, loop.average)).save(temporary, "PNG")

    loss_of = PersonLoss(base, config, settings.seed, codes, settings.class_prompt)
    loop.run(loss_of, save, draw_samples, _notes(job, base))


def _notes(job: Job, base: PeopleInBase) -> dict[str, float]:
    """The L2 loss that a network must beat to have learned anything of a person."""
    if not job.settings.train.regression_weight or base.energy is None or base.mean is None:
        return {}
    mean = float(mean_predictor_loss(base.mean, base.energy))
    job.accelerator.print(f"Predicting the mean person for everybody has an L2 loss of {mean:.3f}.")
    return {"mean_predictor": mean}


def _sample_grid(job: Job, base: PeopleInBase, kept: Sequence[EncodedPerson]) -> SampleGrid | None:
    settings = job.settings
    if not settings.samples.wanted or not job.accelerator.is_main_process:
        return None
    return SampleGrid(job.base, kept, settings.prompt, base.adapters, base.faces, settings.samples, settings.seed)


def run_evaluate(job: Job) -> None:
    """Write losses on people who were kept from training, by number of photos and of refinements."""
    if not job.accelerator.is_main_process:
        return
    run, settings = job.run, job.settings
    recipe = job.recipe
    if recipe.learned:
        job.accelerator.print(f"In the learned basis {recipe.learned[:12]}.")
    net = FromFaces(hypernet_file.load(run.file, recipe).to(job.accelerator.device))
    if net.net.config.layout != job.base.denoiser.layout:
        raise HyperNetError(
            f"{run.file} was trained for {net.net.config.layout.describe()}, but this run is for "
            f"{job.base.denoiser.layout.describe()}. Put back the file of this run, or delete it: the stage train writes it again."
        )
    everybody = job.encoded(net.net.config.basis)
    _, people = split(everybody, settings.held_out, settings.overfit)
    if not settings.overfit:
        require_unseen(everybody, len(people), hypernet_file.read_header(run.file).info)
    faces = job.faces([own.person for own in people], net.net.config.encoder)
    base = PeopleInBase(job.base.denoiser, people, net.net.config, faces)
    config, rows = settings.evaluate, []
    ways = list(product(range(1, config.photos + 1), range(1, net.net.config.iterations + 1)))
    for photos, k in tqdm(ways):
        losses = evaluate(base, net, config, photos, k, settings.seed)
        rows.append({"photos": photos, "iterations": k, **losses})
    job.accelerator.print("\n".join(map(_in_words, rows)))
    write_text(run.evaluation, "".join(json.dumps(row) + "\n" for row in rows))


def _in_words(row: Mapping[str, Any]) -> str:
    """A line of the evaluation, without what it says of each person."""
    losses = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if isinstance(value, float))
    return f"From photos: {row['photos']}, iterations: {row['iterations']}: {losses}"


def averaged(config: HyperNetConfig, average: Mapping[str, Tensor]) -> HyperNet:
    """A hypernetwork with averaged weights, on their device."""
    made = HyperNet.create(config).to(next(iter(average.values())).device)
    made.load_state_dict({name.removeprefix("net."): weight for name, weight in average.items()})
    return made.eval()


RUN_STAGE = {
    "basis": run_basis,
    "precompute": run_precompute,
    "pretrain": run_pretrain,
    "train": run_train,
    "evaluate": run_evaluate,
}
