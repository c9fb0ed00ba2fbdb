"""The fast fine-tune: LiDB factors of UNet and text encoder trained jointly on one photo or several.

The loop knows nothing of its host. A `diffusion.Denoiser` brings the frozen model; the factors act through output-side
hooks (`adapters`), so no base weight ever gets a gradient.
Source: HyperDreamBooth, arXiv 2307.06949, section 4.3 (rank-relaxed fast fine-tuning); DreamBooth, arXiv 2208.12242
(class-prior preservation).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters import Adapters, Factors, attach
from ..diffusion import Batch, Denoiser, LossScale, diffusion_loss
from ..errors import FinetuneError, HDBError
from ..layout import Layout
from ..lidb import About, LiDB
from ..recommended import RECOMMENDED
from .batches import BatchSampler, checked_mask
from .config import FinetuneConfig
from .economy import AMPLE, MemoryPlan, economy
from .factors import TrainableFactors, describe, source_of, start_factors
from .learned import Encode, Learned, Meter, Watch
from .prior import beside_own_answers

# A model that predicts nothing has a native-target error of about 1, so a loss of about the sum of the batch's weights;
# ten times that is no training noise.
_EXPLODED_LOSS = 10.0


class FinetuneDiverged(HDBError, RuntimeError):
    """Training produced NaN, infinity or an exploding loss.

    Attributes:
        lidb: the last state whose loss was sound.
        losses: one finite loss per sound step.
        step: the step (from 1) that failed.
    """

    def __init__(self, message: str, lidb: LiDB, losses: tuple[float, ...], step: int) -> None:
        super().__init__(message)
        self.lidb, self.losses, self.step = lidb, losses, step


class FinetuneProgress(NamedTuple):
    """What the callback gets after every step."""

    step: int  # finished steps, from 1
    total: int  # at most, where steps are automatic, until the last one
    loss: float
    seconds: float  # since the start
    gained: float | None = None  # `Learned.gained` as it was measured last
    enough: float | None = None  # at which automatic steps end
    # Both may be called before the next step.
    person: Callable[[], LiDB] | None = None  # as they are now
    attached: Callable[[], Encode] | None = None  # attaches them as they are now, and gives what encodes prompts

    @property
    def remaining_seconds(self) -> float:
        """Estimated from the steps so far."""
        return self.seconds / self.step * (self.total - self.step)


@dataclass(frozen=True)
class FinetuneResult:
    """A trained person, float32 on the CPU, the loss of every step, and what was learned if it was measured."""

    lidb: LiDB
    losses: tuple[float, ...]
    seconds: float
    learned: Learned | None = None


def finetune(
    denoiser: Denoiser,
    latents: Tensor,
    config: FinetuneConfig,
    *,
    mask: Tensor | None = None,
    prior_latents: Tensor | None = None,
    init: LiDB | None = None,
    adapters: Adapters | None = None,
    callback: Callable[[FinetuneProgress], None] | None = None,
    memory: MemoryPlan = AMPLE,
) -> FinetuneResult:
    """Train a person's LiDB on photos. Same arguments, same result on the same machine.

    Args:
        denoiser: the frozen model.
        latents: (N, C, h, w) photos of one person in the model's latent space; (N, C, 1, h, w) for a video model.
        config: settings.
        mask: the region that counts, (H, W) or (N, H, W) or (N, 1, H, W) in [0, 1], at any resolution.
        prior_latents: (M, C, …) pictures of the class, for `config.prior_weight`.
        init: start exactly from this person; its basis is kept.
        adapters: bases of that basis and the model's layout, on the device of the latents; None makes them.
        callback: called after every step; whatever it raises ends the training with the model as it was.
        memory: how a step is done in the memory that there is. But for rounding the result is the same.

    Returns:
        The person, of rank `config.rank` or that of `init` if it is higher, its losses and the time.

    Raises:
        FinetuneError: if the inputs make no sense, or a step does not fit into memory.
        LayoutError: if `init` was made for another model.
        FinetuneDiverged: if the loss or its gradient is not finite or explodes; carries the last good person.
    """
    # The host runs nodes in inference mode, in which autograd is off and new tensors can never be trained.
    with torch.inference_mode(False), torch.enable_grad():
        enough = None if config.steps else RECOMMENDED[source_of(config, len(latents), init)].enough
        config = replace(config, steps=config.steps or automatic_steps(config, len(latents), init))
        recipe = config.basis if init is None else init.basis
        if adapters is not None and adapters.recipe != recipe:
            raise FinetuneError(
                f"The adapters are of another basis ({adapters.recipe.describe()}) than the person will be "
                f"({recipe.describe()}). Make them of that one."
            )
        factors = TrainableFactors(adapters or Adapters(recipe, denoiser.layout, latents.device), config, init)
        sampler = BatchSampler(denoiser.sigmas(), latents, config, mask, prior_latents)
        about = partial(describe, config, len(latents), init)
        samples = len(sampler.prompts(0))
        meter = partial(Meter, denoiser, latents, config, mask, memory.at_once or samples)
        watch = Watch(meter, samples, config.steps, enough)
        return _train(denoiser, factors, sampler, config, about, callback, memory, watch)


def require_inputs(
    config: FinetuneConfig,
    layout: Layout,
    photos: int,
    init: LiDB | None = None,
    mask: Tensor | None = None,
) -> None:
    """Check what `finetune` would refuse, before a host encodes photos and loads a model for it.

    Args:
        config: settings.
        layout: of the model.
        photos: how many there are.
        init: see `finetune`.
        mask: see `finetune`.

    Raises:
        FinetuneError: if the inputs make no sense.
        LayoutError: if `init` was made for another model.
    """
    config.captions(photos)
    start_factors(config.basis if init is None else init.basis, layout, config.rank, init)
    if mask is not None:
        checked_mask(mask, photos)


def automatic_steps(config: FinetuneConfig, photos: int, init: LiDB | None = None) -> int:
    """The most steps that are recommended on so many photos, from a person to begin with or from none."""
    return RECOMMENDED[source_of(config, photos, init)].most_steps


def _train(
    denoiser: Denoiser,
    factors: TrainableFactors,
    sampler: BatchSampler,
    config: FinetuneConfig,
    about: Callable[[int], About],
    callback: Callable[[FinetuneProgress], None] | None,
    memory: MemoryPlan,
    watch: Watch,
) -> FinetuneResult:
    parameters = [p for p in factors.parameters() if p.requires_grad]
    optimizer, scale = _optimizer(factors, config), LossScale()
    losses: list[float] = []
    good, start = factors.state(), time.perf_counter()
    live: dict[str, Factors] = {}
    with attach(denoiser.modules, live), economy(memory) as steps:
        live.update(factors())
        encode = denoiser.encode_prompts if config.train_text_encoder else _encode_once(denoiser)
        encode_base = _encode_once(denoiser)  # is called while nobody is attached

        def attached() -> Encode:
            with torch.no_grad():
                live.update(factors())
            return encode

        for step in range(config.steps):
            prompts, drawn = sampler.prompts(step), sampler.draw(step)
            if sampler.keeps_own_answers:
                live.clear()
                weight, classes = config.prior_weight, prompts[sampler.size :]
                drawn = beside_own_answers(denoiser, drawn, classes, encode_base, weight, steps.at_once)
            batch = config.noise.weighted(denoiser, drawn)
            parts = partial(_losses, denoiser, batch, prompts, encode, lambda: live.update(factors()))
            # The loss, its gradient's norm and the loss of a model that predicts nothing leave the device together.
            backward = partial(scale.backward, parameters=parameters, beside=[batch.weight.sum()])
            loss, grad_norm, (of_nothing,) = steps.run(len(prompts), parts, backward)
            relative = loss / of_nothing
            if step == 0:
                limit = _EXPLODED_LOSS * max(1.0, relative)
            if relative > limit or not math.isfinite(loss):
                lidb = factors.snapshot(about(max(0, step - 1)), good)
                raise _diverged(lidb, losses, step, config, f"its loss is {loss:.3g}")
            good = factors.state()
            losses.append(loss)
            if not math.isfinite(grad_norm):
                raise _diverged(factors.snapshot(about(step)), losses, step, config, "its gradient is not finite")
            optimizer.step()
            ended = watch.ended(step + 1, attached)
            if callback is not None:
                total, seconds = step + 1 if ended else config.steps, time.perf_counter() - start
                person = partial(_snapshot, factors, about, step + 1)
                callback(FinetuneProgress(step + 1, total, loss, seconds, watch.gained, watch.enough, person, attached))
            if ended:
                break
        learned = watch.learned(attached)
    return FinetuneResult(factors.snapshot(about(len(losses))), tuple(losses), time.perf_counter() - start, learned)


def _snapshot(factors: TrainableFactors, about: Callable[[int], About], steps: int) -> LiDB:
    return factors.snapshot(about(steps))


def _encode_once(denoiser: Denoiser) -> Callable[[Sequence[str]], Any]:
    """Conditioning without a graph: text layers then get no gradient, stay as they are, and so do their outputs."""

    @cache
    def encoded(prompts: tuple[str, ...]) -> Any:
        with torch.no_grad():
            return denoiser.encode_prompts(prompts)

    return lambda prompts: encoded(tuple(prompts))


def _losses(
    denoiser: Denoiser,
    batch: Batch,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], Any],
    expand_again: Callable[[], None],
    at_once: int,
) -> Iterator[Tensor]:
    """The loss of a batch, part after part; each has a graph of its own from the factors on."""
    for first in range(0, len(prompts), at_once):
        part = slice(first, first + at_once)
        expand_again()
        yield diffusion_loss(denoiser, Batch(*(tensor[part] for tensor in batch)), encode(prompts[part]))


def _optimizer(factors: TrainableFactors, config: FinetuneConfig) -> torch.optim.Optimizer:
    rates = {factors.up: config.learning_rate, factors.down: config.learning_rate * config.down_rate}
    groups: list[dict[str, Any]] = [{"params": [p], "lr": rate} for p, rate in rates.items() if p.requires_grad]
    return torch.optim.Adam(groups, fused=factors.up.device.type == "cuda")


def _diverged(good: LiDB, losses: list[float], step: int, config: FinetuneConfig, what: str) -> FinetuneDiverged:
    return FinetuneDiverged(
        f"Fast fine-tuning diverged at step {step + 1} of {config.steps}: {what}. Lower learning_rate (now "
        f"{config.learning_rate:g}) or rank ({config.rank}), and check that the photo and the model are sound.",
        lidb=good,
        losses=tuple(losses),
        step=step + 1,
    )
