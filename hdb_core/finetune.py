"""The fast fine-tune: LiDB factors of UNet and text encoder trained jointly on one photo or several.

The loop knows nothing of its host. A `Denoiser` brings the frozen model; the factors act through output-side hooks
(`adapters`), so no base weight ever gets a gradient.
Source: HyperDreamBooth, arXiv 2307.06949, section 4.3 (rank-relaxed fast fine-tuning); DreamBooth, arXiv 2208.12242
(class-prior preservation).

The defaults were chosen on people of the miniature, from nothing and from a prediction alike: the most identity on
prompts that contradict the photo, with the edits about as good as the base's. They count on `photo_words`: without, so
much freedom learns the photo's clothes and background as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import attach
from .basis import BasisRecipe, bases_of
from .errors import FinetuneDiverged, FinetuneError
from .layout import Layout
from .lidb import LiDB, expand_factors, extend, start_down
from .prompt import CLASS_PROMPT, caption, rare_token

# A power of two: exact in float32 and bfloat16, and keeps float16 gradients above underflow.
GRAD_SCALE = 1024.0
# A model that predicts nothing has a native-target error of about 1, so a loss of about the sum of the batch's weights;
# ten times that is no training noise.
_EXPLODED_LOSS = 10.0
_GOLDEN_RATIO = (5**0.5 - 1) / 2
# Enough on going on from a prediction: more steps bring more identity, and from here on cost more edits.
STEPS_FROM_A_PREDICTION = 12
# From nothing, for a person who is applied with `lidb.GUIDED`, which keeps the edits that more steps cost.
STEPS_IF_GUIDED = 56
# From nothing, on three photos or more, each with words of its own: what only one of them shows is hardly learned.
STEPS_FROM_SEVERAL_PHOTOS = 100
# How noise levels count. native: by the error of what the model predicts, which for ε says little about a person where
# there is much noise. v: by the error of v, whatever the model predicts; the levels that decide on colours and shapes
# then have their part. Source of v: Salimans & Ho, Progressive Distillation, arXiv 2202.00512 (their SNR + 1 weighting).
WEIGHTINGS = ("native", "v")


class Denoiser(Protocol):
    """The frozen model, as the host side provides it. All calls run with autograd on and the adapters attached."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Layer name → module, from `layout.find_targets`."""

    @property
    def layout(self) -> Layout:
        """`layout.layout_of` the same modules."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        """Conditioning for len(prompts) samples, differentiable with respect to the text layers' adapters.

        Prompts repeat: encode each distinct one once and repeat its rows.
        """

    def sigmas(self) -> Tensor:
        """The schedule table (T,), ascending, float32."""

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noisy latents (B, C, h, w) at `sigma` (B,); no argument is changed."""

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """The prediction of the clean latents (B, C, h, w), float32, in model space, differentiable."""

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,): turns the squared error of clean latents into that of the model's native target.

        1/σ² for ε and flow models, (σ² + σ_d²)/(σ² σ_d²) for v and EDM models, 1 for x0 models.
        """


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one fine-tune.

    Attributes:
        steps: optimiser steps.
        rank: of the result, or that of the given LiDB if it is higher; columns beyond the given LiDB's rank start with
            no effect (relaxed rank).
        learning_rate: of the up side (Adam).
        freeze_down: keep the down side at its start; from a cold start it is then shared by all people.
        down_lr_scale: rate of a down side that is not frozen, relative to `learning_rate`.
        final_lr_scale: the rates fall linearly to this part of themselves.
        max_grad_norm: clip the gradient to this norm, or None.
        batch_size: (noise, timestep) pairs per step.
        weighting: of the noise levels, one of `WEIGHTINGS`.
        min_timestep: lower end of the noise levels, as a fraction of the schedule.
        max_timestep: upper end. Where there is nearly nothing but noise, a photo teaches its colours and its background
            rather than a face.
        prompt: what the person is called, with the rare token.
        photo_words: what the photos show besides the person, a line for each photo or one for all. What is named does
            not become part of the person.
        class_prompt: describes the class, without the token.
        prior_weight: of the class-prior preservation loss; 0 turns it off.
        train_text_encoder: whether the text layers are trained too. On the miniature that costs half as much as the
            UNet and brings a point or two of identity; those of a given LiDB act in any case.
        basis: of a cold start; a given LiDB brings its own.
        seed: of noise and timesteps.

    Raises:
        FinetuneError: if a setting makes no sense.
    """

    steps: int = 24
    rank: int = 4
    learning_rate: float = 0.03
    freeze_down: bool = False
    down_lr_scale: float = 0.1
    final_lr_scale: float = 1.0
    max_grad_norm: float | None = None
    batch_size: int = 4
    weighting: str = "v"
    min_timestep: float = 0.0
    max_timestep: float = 0.8
    prompt: str = "a [v] face"
    photo_words: str = ""
    class_prompt: str = CLASS_PROMPT
    prior_weight: float = 0.0
    train_text_encoder: bool = False
    basis: BasisRecipe = field(default_factory=BasisRecipe)
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", "at least 1", self.steps)
        _require(1 <= self.rank <= self.basis.max_rank, "rank", f"1 to {self.basis.max_rank}", self.rank)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _require(0 < self.learning_rate < math.inf, "learning_rate", "a positive number", self.learning_rate)
        for name in ("down_lr_scale", "final_lr_scale", "prior_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, "0 or a positive number", value)
        clip = self.max_grad_norm
        _require(clip is None or 0 < clip < math.inf, "max_grad_norm", "a positive number or none", clip)
        require_noise_levels(self.weighting, self.min_timestep, self.max_timestep)
        _require(bool(self.prompt.strip()), "prompt", "some words such as 'a [v] face'", self.prompt)
        needs_class = self.prior_weight > 0
        _require(not needs_class or bool(self.class_prompt.strip()), "class_prompt", "some words", self.class_prompt)

    @property
    def token(self) -> str:
        """What means the person in the prompt: ``[v]``."""
        return rare_token(self.prompt, self.class_prompt)


class FinetuneProgress(NamedTuple):
    """What the callback gets after every step."""

    step: int  # finished steps, from 1
    total: int
    loss: float
    seconds: float  # since the start

    @property
    def remaining_seconds(self) -> float:
        """Estimated from the steps so far."""
        return self.seconds / self.step * (self.total - self.step)


@dataclass(frozen=True)
class FinetuneResult:
    """A trained person, float32 on the CPU, and the loss of every step."""

    lidb: LiDB
    losses: tuple[float, ...]
    seconds: float


class Batch(NamedTuple):
    """The (noise, timestep) pairs of one step."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    sigma: Tensor  # (B,)
    mask: Tensor  # (B, 1, h, w), mean 1 for every sample
    weight: Tensor  # (B,), sums to 1 over the photo's samples and to prior_weight over those of the class


def finetune(
    denoiser: Denoiser,
    latents: Tensor,
    config: FinetuneConfig,
    *,
    mask: Tensor | None = None,
    prior_latents: Tensor | None = None,
    init: LiDB | None = None,
    callback: Callable[[FinetuneProgress], None] | None = None,
    samples_at_once: int | None = None,
) -> FinetuneResult:
    """Train a person's LiDB on photos. Same arguments, same result on the same machine.

    Args:
        denoiser: the frozen model.
        latents: (N, C, h, w) photos of one person in the model's latent space.
        config: settings.
        mask: the region that counts, (H, W) or (N, H, W) or (N, 1, H, W) in [0, 1], at any resolution.
        prior_latents: (M, C, h, w) pictures of the class, needed if `config.prior_weight` is above 0.
        init: start exactly from this person; its basis is kept.
        callback: called after every step; whatever it raises ends the training with the model as it was.
        samples_at_once: a step passes no more through the model together, to save memory; None is all of them. But for
            rounding the result is the same.

    Returns:
        The person, of rank `config.rank` or that of `init` if it is higher, its losses and the time.

    Raises:
        FinetuneError: if the inputs make no sense.
        LayoutError: if `init` was made for another model.
        FinetuneDiverged: if the loss or its gradient is not finite or explodes; carries the last good person.
    """
    # The host runs nodes in inference mode, in which autograd is off and new tensors can never be trained.
    with torch.inference_mode(False), torch.enable_grad():
        factors = TrainableFactors(denoiser.layout, config, latents.device, init)
        sampler = BatchSampler(denoiser.sigmas(), latents, config, mask, prior_latents)
        return _train(denoiser, factors, sampler, config, callback, samples_at_once)


def require_noise_levels(weighting: str, min_timestep: float, max_timestep: float) -> None:
    """Checks how a training draws noise levels.

    Raises:
        FinetuneError: no such weighting, or no part of the schedule is between the two fractions.
    """
    _require(weighting in WEIGHTINGS, "weighting", " or ".join(WEIGHTINGS), weighting)
    span = (min_timestep, max_timestep)
    _require(0 <= min_timestep < max_timestep <= 1, "min_timestep, max_timestep", "0 ≤ min < max ≤ 1", span)


def between(sigmas: Tensor, min_timestep: float, max_timestep: float) -> Tensor:
    """The noise levels of a schedule table (T,) between two fractions of it, at least one."""
    return sigmas[math.floor(min_timestep * len(sigmas)) : math.ceil(max_timestep * len(sigmas))]


def weighted(denoiser: Denoiser, batch: Batch, weighting: str) -> Batch:
    """A batch whose noise levels count as a weighting of `WEIGHTINGS` says."""
    if weighting == "native":
        return batch
    return batch._replace(weight=batch.weight * (1 + batch.sigma**-2) / denoiser.loss_weight(batch.sigma))


def diffusion_loss(denoiser: Denoiser, batch: Batch, conditioning: Any) -> Tensor:
    """The weighted error of the model's native target, a scalar."""
    return weighted_mean(squared_error(denoiser, batch, conditioning), batch)


def squared_error(denoiser: Denoiser, batch: Batch, conditioning: Any) -> Tensor:
    """Of the model's native target, at every place: (B, C, h, w) float32, without the batch's mask and weights."""
    noisy = denoiser.add_noise(batch.latents, batch.noise, batch.sigma)
    denoised = denoiser.denoise(noisy, batch.sigma, conditioning)
    return denoiser.loss_weight(batch.sigma)[:, None, None, None] * (denoised.float() - batch.latents).square()


def weighted_mean(error: Tensor, batch: Batch) -> Tensor:
    """The scalar of an error (B, C, h, w) under the batch's mask and weights."""
    return weighted_errors(error, batch).sum()


def weighted_errors(error: Tensor, batch: Batch) -> Tensor:
    """What each sample adds to `weighted_mean`, (B,)."""
    return batch.weight * (error * batch.mask).mean((1, 2, 3))


def backward(losses: Iterable[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """Fill the gradients of float32 parameters from the sum of losses whose model may compute in float16; that sum."""
    seen = []
    for loss in losses:
        (loss * GRAD_SCALE).backward()
        seen.append(loss.detach())
    for gradient in (p.grad for p in parameters if p.grad is not None):
        gradient.div_(GRAD_SCALE)
    return torch.stack(seen).sum()


class TrainableFactors(nn.Module):
    """The factors of one person as parameters, with their bases on the training device.

    A cold start has ``up = 0`` and the shared `start_down`. A warm start is exactly the given person, each component
    rescaled (by powers of two, so without rounding) to a down side of about unit norm, which makes one learning rate
    fit every start; further columns start as in a cold start.
    """

    def __init__(self, layout: Layout, config: FinetuneConfig, device: torch.device, init: LiDB | None = None) -> None:
        super().__init__()
        recipe = config.basis if init is None else init.basis
        down, up = start_factors(recipe, layout, config.rank, init)
        self.layout, self.recipe = layout, recipe
        self.down = nn.Parameter(down.to(device), requires_grad=not config.freeze_down)
        self.up = nn.Parameter(up.to(device))
        self.bases = bases_of(recipe, layout, device)
        self.info = _describe(config, init)

    def forward(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name → (up (out, R), down (R, in)), differentiable."""
        return expand_factors(self.bases, self.down, self.up)

    def snapshot(self) -> LiDB:
        """The present state as a person on the CPU."""
        down, up = (p.detach().clone().cpu() for p in (self.down, self.up))
        return LiDB(self.layout, self.recipe, down, up, self.info)


def start_factors(basis: BasisRecipe, layout: Layout, rank: int, init: LiDB | None = None) -> tuple[Tensor, Tensor]:
    """The factors before the first step: down [L, R, a], up [L, b, R], float32 on the CPU; see `TrainableFactors`.

    R is `rank`, or the rank of `init` if it is higher.

    Raises:
        FinetuneError: if the rank does not fit into the basis.
        LayoutError: if `init` was made for another model, or for layers that `layout` lacks.
    """
    rank = rank if init is None else max(rank, init.rank)
    down = start_down(basis, layout, rank)
    up = torch.zeros(len(layout.layers), basis.up_dim, rank)
    if init is None:
        return down, up
    init = extend(init, layout)
    if rank > basis.max_rank:
        raise FinetuneError(f"Expected a rank of at most {basis.max_rank} (basis of the connected LIDB), got {rank}.")
    init_down, init_up = (t.detach().clone().float().cpu() for t in (init.down, init.up))
    length = init_down.norm(dim=-1, keepdim=True)
    scale = torch.where(length > 0, length, 1.0).log2().round().exp2()
    # A component that reads nothing has no effect, and could get none while its down side is frozen: a cold start again.
    down[:, : init.rank] = torch.where(length > 0, init_down / scale, down[:, : init.rank])
    up[:, :, : init.rank] = init_up * (scale * (length > 0)).mT
    return down, up


class BatchSampler:
    """Draws the (noise, timestep) pairs of every step from a local generator.

    Photos take turns. Timesteps are stratified: a batch covers the range evenly, and the golden ratio moves the grid
    on from step to step, so that a short training sees all noise levels.
    """

    def __init__(
        self,
        sigmas: Tensor,
        latents: Tensor,
        config: FinetuneConfig,
        mask: Tensor | None = None,
        prior_latents: Tensor | None = None,
    ) -> None:
        _check_latents("photo", latents)
        self.latents = latents.detach().clone().float()
        self.mask = latent_mask(mask, latents)
        self.prior = _checked_prior(prior_latents, latents, config)
        levels = between(sigmas, config.min_timestep, config.max_timestep)
        self.sigmas = levels.detach().clone().to(latents.device, torch.float32)
        self.size, self.prior_weight = config.batch_size, config.prior_weight
        self.captions, self.class_prompt = photo_captions(config, len(latents)), config.class_prompt
        # On the CPU, so that a seed means the same on every device.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.offset = torch.rand((), generator=self.generator).item()

    def prompts(self, step: int) -> list[str]:
        """What the samples of a step are to be captioned with."""
        own = [self.captions[turn] for turn in self._turns(step, len(self.latents))]
        return own if self.prior is None else own + [self.class_prompt] * self.size

    def draw(self, step: int) -> Batch:
        """The batch of a step, counted from 0; steps must be drawn in order."""
        weight = torch.full((self.size,), 1 / self.size, device=self.latents.device)
        batch = self._draw(step, self.latents, self.mask, weight)
        if self.prior is None:
            return batch
        prior = self._draw(step, self.prior, torch.ones_like(self.prior[:, :1]), weight * self.prior_weight)
        return Batch(*(torch.cat(pair) for pair in zip(batch, prior, strict=True)))

    def _turns(self, step: int, count: int) -> Tensor:
        return (step * self.size + torch.arange(self.size)) % count

    def _draw(self, step: int, latents: Tensor, mask: Tensor, weight: Tensor) -> Batch:
        turn = self._turns(step, len(latents))
        picked = latents[turn.to(latents.device)]
        noise = torch.randn(picked.shape, generator=self.generator).to(picked)
        # The permutation keeps several photos from always meeting the same noise levels.
        strata = torch.randperm(self.size, generator=self.generator)
        fraction = (strata + (self.offset + step * _GOLDEN_RATIO) % 1) / self.size
        index = (fraction * len(self.sigmas)).long().clamp(max=len(self.sigmas) - 1)
        return Batch(picked, noise, self.sigmas[index.to(self.sigmas.device)], mask[turn.to(mask.device)], weight)


def photo_captions(config: FinetuneConfig, count: int) -> list[str]:
    """The captions of so many photos.

    Raises:
        FinetuneError: if `photo_words` has neither one line nor one for each photo.
    """
    lines = [line.strip() for line in config.photo_words.rstrip().splitlines()] or [""]
    if len(lines) not in (1, count):
        raise FinetuneError(
            f"Expected one line of photo_words or one for each of the {count} photos, got {len(lines)}. "
            "Give every photo its line, or describe what all of them show in one."
        )
    return [caption(config.prompt, words) for words in (lines * count if len(lines) == 1 else lines)]


def latent_mask(mask: Tensor | None, latents: Tensor) -> Tensor:
    """A mask at the size of the latents, scaled to mean 1 for every photo so that the loss keeps its size.

    Args:
        mask: (H, W), (N, H, W) or (N, 1, H, W) in [0, 1] with N = 1 or the number of photos; None counts everything.
        latents: (N, C, h, w).

    Returns:
        (N, 1, h, w) float32.

    Raises:
        FinetuneError: if the mask is empty, not finite, or of another number of photos.
    """
    if mask is None:
        return torch.ones_like(latents[:, :1], dtype=torch.float32)
    mask = mask.detach().clone().to(latents.device, torch.float32)
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    if len(mask) not in (1, len(latents)):
        raise FinetuneError(
            f"Expected one MASK or one for each of the {len(latents)} photos, got {len(mask)}. "
            "Connect a matching MASK or none."
        )
    small = functional.interpolate(mask, latents.shape[-2:], mode="area").clamp(0, 1).expand(len(latents), -1, -1, -1)
    mean = small.mean((1, 2, 3), keepdim=True)
    if not bool(((mean > 0) & mean.isfinite()).all()):
        raise FinetuneError(
            "Expected a MASK that marks some of the photo, got an empty one. Paint over the face, or connect no MASK."
        )
    return small / mean


def _train(
    denoiser: Denoiser,
    factors: TrainableFactors,
    sampler: BatchSampler,
    config: FinetuneConfig,
    callback: Callable[[FinetuneProgress], None] | None,
    samples_at_once: int | None,
) -> FinetuneResult:
    optimizer = _optimizer(factors, config)
    losses: list[float] = []
    good, start = factors.snapshot(), time.perf_counter()
    live: dict[str, tuple[Tensor, Tensor]] = {}
    with attach(denoiser.modules, live):
        live.update(factors())
        encode = denoiser.encode_prompts if config.train_text_encoder else _encode_once(denoiser)
        for step in range(config.steps):
            prompts, batch = sampler.prompts(step), weighted(denoiser, sampler.draw(step), config.weighting)
            parts = _losses(denoiser, batch, prompts, samples_at_once, encode, lambda: live.update(factors()))
            loss, of_nothing, grad_norm = _backward(parts, batch, factors, config)
            relative = loss / of_nothing
            if step == 0:
                limit = _EXPLODED_LOSS * max(1.0, relative)
            if relative > limit or not math.isfinite(loss):
                raise _diverged(good, losses, step, config, f"its loss is {loss:.3g}")
            good = factors.snapshot()
            losses.append(loss)
            if not math.isfinite(grad_norm):
                raise _diverged(good, losses, step, config, "its gradient is not finite")
            _set_rates(optimizer, config, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if callback is not None:
                callback(FinetuneProgress(step + 1, config.steps, loss, time.perf_counter() - start))
    return FinetuneResult(factors.snapshot(), tuple(losses), time.perf_counter() - start)


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
    samples_at_once: int | None,
    encode: Callable[[Sequence[str]], Any],
    expand_again: Callable[[], None],
) -> Iterator[Tensor]:
    """The loss of a batch, part after part; each has a graph of its own from the factors on."""
    size = samples_at_once or len(prompts)
    for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        expand_again()
        yield diffusion_loss(denoiser, Batch(*(tensor[part] for tensor in batch)), encode(prompts[part]))


def _backward(
    losses: Iterable[Tensor], batch: Batch, factors: TrainableFactors, config: FinetuneConfig
) -> tuple[float, float, float]:
    """Fill the gradients. The loss, that of a model that predicts nothing, and the gradient norm leave the device
    together."""
    parameters = [p for p in factors.parameters() if p.requires_grad]
    loss = backward(losses, parameters)
    norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
    loss_value, of_nothing, norm_value = torch.stack([loss, batch.weight.sum(), norm]).tolist()
    return loss_value, of_nothing, norm_value


def _optimizer(factors: TrainableFactors, config: FinetuneConfig) -> torch.optim.Optimizer:
    scales = {factors.up: 1.0, factors.down: config.down_lr_scale}
    groups = [{"params": [p], "scale": scale} for p, scale in scales.items() if p.requires_grad]
    return torch.optim.Adam(groups, config.learning_rate)


def _set_rates(optimizer: torch.optim.Optimizer, config: FinetuneConfig, step: int) -> None:
    fall = (1 - config.final_lr_scale) * step / max(config.steps - 1, 1)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * group["scale"] * (1 - fall)


def _diverged(good: LiDB, losses: list[float], step: int, config: FinetuneConfig, what: str) -> FinetuneDiverged:
    return FinetuneDiverged(
        f"Fast fine-tuning diverged at step {step + 1} of {config.steps}: {what}. Lower the learning rate (now "
        f"{config.learning_rate:g}) or the rank ({config.rank}), and check that the photo and the model are sound.",
        lidb=good,
        losses=tuple(losses),
        step=step + 1,
    )


def _describe(config: FinetuneConfig, init: LiDB | None) -> dict[str, str]:
    return {
        "made_by": "fast fine-tune",
        "started_from": "nothing" if init is None else init.info.get("made_by", "a LiDB"),
        "prompt": config.prompt,
        "class_prompt": config.class_prompt,
        "token": config.token,
        "steps": str(config.steps),
        "seed": str(config.seed),
    }


def _checked_prior(prior: Tensor | None, latents: Tensor, config: FinetuneConfig) -> Tensor | None:
    if config.prior_weight == 0:
        return None
    if prior is None:
        raise FinetuneError(
            f"Class-prior preservation (prior_weight {config.prior_weight:g}) needs pictures of the class, got none. "
            "Give some, or set prior_weight to 0."
        )
    _check_latents("class picture", prior)
    if prior.shape[1:] != latents.shape[1:]:
        raise FinetuneError(
            f"Expected class pictures of the photo's latent size {tuple(latents.shape[1:])}, "
            f"got {tuple(prior.shape[1:])}. Give them the photo's width and height."
        )
    return prior.detach().clone().to(latents.device, torch.float32)


def _check_latents(what: str, latents: Tensor) -> None:
    if latents.ndim != 4 or latents.numel() == 0:
        raise FinetuneError(f"Expected at least one {what} as latents (N, C, h, w), got shape {tuple(latents.shape)}.")
    if not bool(latents.isfinite().all()):
        raise FinetuneError(f"The latents of a {what} hold NaN or infinity. Check the picture and the VAE.")


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise FinetuneError(f"Expected {name}: {expected}, got {got!r}.")
