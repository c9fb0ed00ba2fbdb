"""What every step of a fine-tune sees: photos, noise, noise levels and captions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..diffusion import Batch
from ..errors import FinetuneError
from .config import FinetuneConfig

_GOLDEN_RATIO = (5**0.5 - 1) / 2


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
        levels = config.noise.of(sigmas)
        self.sigmas = levels.detach().clone().to(latents.device, torch.float32)
        self.size, self.prior_weight = config.batch_size, config.prior_weight
        self.captions, self.class_prompt = config.captions(len(latents)), config.class_prompt
        # On the CPU, so that a seed means the same on every device.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.offset = torch.rand((), generator=self.generator).item()

    def prompts(self, step: int) -> list[str]:
        """What the samples of a step are to be captioned with."""
        own = [self.captions[turn] for turn in self._turns(step, len(self.latents))]
        return own + [self.class_prompt] * self.size if self.prior_weight > 0 else own

    @property
    def keeps_own_answers(self) -> bool:
        """Whether the samples of the class are the photos', with the base model's own answers."""
        return self.prior_weight > 0 and self.prior is None

    def draw(self, step: int) -> Batch:
        """The batch of a step, counted from 0; steps must be drawn in order. Own answers are not in it yet."""
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


def latent_mask(mask: Tensor | None, latents: Tensor) -> Tensor:
    """A mask at the size of the latents, scaled to mean 1 for every photo so that the loss keeps its size.

    Args:
        mask: (H, W), (N, H, W) or (N, 1, H, W) in [0, 1] with N = 1 or the number of photos; None counts everything.
        latents: (N, C, h, w) or (N, C, 1, h, w).

    Returns:
        (N, 1, h, w) or (N, 1, 1, h, w) float32.

    Raises:
        FinetuneError: see `checked_mask`.
    """
    if mask is None:
        return torch.ones_like(latents[:, :1], dtype=torch.float32)
    mask = checked_mask(mask, len(latents)).detach().clone().to(latents.device, torch.float32)
    small = functional.interpolate(mask.clamp(0, 1), latents.shape[-2:], mode="area").expand(len(latents), -1, -1, -1)
    return (small / small.mean((1, 2, 3), keepdim=True)).view_as(latents[:, :1])


def checked_mask(mask: Tensor, photos: int) -> Tensor:
    """A mask of so many photos, (H, W), (N, H, W) or (N, 1, H, W), as (N, 1, H, W).

    Raises:
        FinetuneError: if it marks nothing, is not finite, or of another number of photos.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    if len(mask) not in (1, photos):
        raise FinetuneError(
            f"There are {photos} photos and {len(mask)} masks. Connect one MASK for all, one for each, or none."
        )
    if not bool(mask.isfinite().all()):
        raise FinetuneError("The mask contains NaN or infinite values. Check the node that makes it.")
    if not bool((mask > 0).flatten(1).any(1).all()):
        raise FinetuneError("The mask is empty. Paint the face in the Mask Editor of Load Image, or connect no MASK.")
    return mask


def _checked_prior(prior: Tensor | None, latents: Tensor, config: FinetuneConfig) -> Tensor | None:
    if config.prior_weight == 0 or prior is None:
        return None
    _check_latents("class picture", prior)
    if prior.shape[1:] != latents.shape[1:]:
        raise FinetuneError(
            f"Expected class pictures of the photo's latent size {tuple(latents.shape[1:])}, "
            f"got {tuple(prior.shape[1:])}. Give them the photo's width and height."
        )
    return prior.detach().clone().to(latents.device, torch.float32)


def _check_latents(what: str, latents: Tensor) -> None:
    if latents.ndim not in (4, 5) or latents.numel() == 0:
        raise FinetuneError(
            f"Expected at least one {what} as latents (N, C, h, w) or (N, C, 1, h, w), got shape {tuple(latents.shape)}."
        )
    if not bool(latents.isfinite().all()):
        raise FinetuneError(f"The latents of a {what} hold NaN or infinity. Check the picture and the VAE.")
