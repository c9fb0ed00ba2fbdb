"""Draws pictures of held-out people while a hypernetwork is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..adapters import Adapters, Factors, attach
from ..diffusion import Denoiser, euler
from ..hypernet import HyperNet
from ..prompt import caption
from .base.model import BaseModel
from .data.faces import Faces
from .data.people import EncodedPerson
from .predicted import FromFaces

_LABEL_HEIGHT, _MARGIN = 28, 4  # pixels
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class SampleConfig:
    """Sample grids during training and at its end, ``RUN/samples/step_000500.png`` and so on.

    Attributes:
        every: steps of training between two grids; 0 makes none.
        people: people in a grid, of those who are not trained on.
        steps: steps of the sampler.
        guidance: cfg of the sampler; 1 is no guidance.
        words: words after the prompt, in the second half of the grid.
    """

    every: int = 500
    people: int = 4
    steps: int = 20
    guidance: float = 4.0
    words: str = "at the beach"

    @property
    def wanted(self) -> bool:
        """Whether there are grids at all."""
        return self.every > 0 and self.people > 0


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    prompts: Sequence[str],
    adapters: Mapping[str, Factors],
    steps: int,
    guidance: float,
) -> Tensor:
    """Latents by `diffusion.euler`.

    Args:
        denoiser: the frozen model; encodes each prompt for its own sample.
        noise: (B, C, …) of unit variance.
        prompts: B texts.
        adapters: layer name → (up (B, out, R), down (B, R, in)) of each sample's person; may be empty.
        steps: calls of the model, from the schedule's highest noise level down.
        guidance: 1 is none; otherwise samples without words run in the same batch, with the same people.

    Returns:
        (B, C, …) float32, without noise.
    """
    table = denoiser.sigmas()
    index = torch.linspace(len(table) - 1, 0, steps + 1)[:-1].round().long().to(table.device)
    copies = 1 if guidance == 1 else 2
    texts = [*prompts, *[""] * ((copies - 1) * len(prompts))]
    repeated = {name: (up.repeat(copies, 1, 1), down.repeat(copies, 1, 1)) for name, (up, down) in adapters.items()}
    with attach(denoiser.modules, repeated):
        conditioning = denoiser.encode_prompts(texts)

        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            both = latents.repeat(copies, *[1] * (latents.ndim - 1))
            denoised = denoiser.denoise(both, sigma.repeat(len(texts)), conditioning)
            if copies == 1:
                return denoised
            prompted, unprompted = denoised.chunk(2)
            return unprompted + guidance * (prompted - unprompted)

        return euler(denoiser, noise, table[index], denoise)


class SampleGrid:
    """A row for each person: the photo, then for each prompt a picture of the base model and one with the predicted person.

    The noise of a row is always the same, so rows and grids can be compared.

    Args:
        base: the frozen model.
        people: not trained on, at least one.
        prompt: with the rare token.
        adapters: the bases of the people, on the model's device.
        faces: what the hypernetwork reads of the photos.
        config: settings.
        seed: of the noise.
    """

    def __init__(
        self,
        base: BaseModel,
        people: Sequence[EncodedPerson],
        prompt: str,
        adapters: Adapters,
        faces: Faces,
        config: SampleConfig,
        seed: int = 0,
    ) -> None:
        self.base, self.people, self.adapters, self.config = base, people[: config.people], adapters, config
        self.prompts = [prompt, caption(prompt, config.words)]
        shape = (len(self.people), *people[0].latents.shape[1:])
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(base.denoiser.device)
        self._faces = faces.read([(own.person, 0) for own in self.people])[:, None].to(base.denoiser.device)

    @torch.no_grad()
    def draw(self, net: HyperNet) -> Image.Image:
        """The grid, with people as a hypernetwork on the model's device predicts them from their first photo."""
        factors = self.adapters.expand(*FromFaces(net)(self._faces))
        columns = {}
        for prompt, without in zip(self.prompts, self._of_base_model, strict=True):
            columns[f"base model:\n{prompt}"] = without
            columns[f"predicted:\n{prompt}"] = self._pictures(prompt, factors)
        photos = self._photos(self._of_base_model[0].shape[1])
        return sheet({"photo": photos, **columns})

    @cached_property
    def _of_base_model(self) -> list[Tensor]:
        return [self._pictures(prompt, {}) for prompt in self.prompts]

    def _pictures(self, prompt: str, factors: Mapping[str, Factors]) -> Tensor:
        prompts = [prompt] * len(self.people)
        latents = sample(self.base.denoiser, self.noise, prompts, factors, self.config.steps, self.config.guidance)
        # A full VAE needs much memory.
        return torch.cat([self.base.decode(own[None]) for own in latents]).movedim(1, -1).cpu()

    def _photos(self, size: int) -> Tensor:
        return torch.stack([person.person.photos[0].pixels(size) for person in self.people])


def sheet(columns: Mapping[str, Tensor]) -> Image.Image:
    """Pictures side by side, a row for each.

    Args:
        columns: label of two lines at most → (N, H, W, 3) in 0..1; all of one shape.
    """
    count, height, width, _ = next(iter(columns.values())).shape
    image = Image.new("RGB", (len(columns) * (width + _MARGIN), _LABEL_HEIGHT + count * (height + _MARGIN)), _PAPER)
    for i, (text, pictures) in enumerate(columns.items()):
        label = Image.new("RGB", (width, _LABEL_HEIGHT), _PAPER)
        ImageDraw.Draw(label).text((0, 1), text, _INK, ImageFont.load_default(10))
        image.paste(label, (i * (width + _MARGIN), 0))
        for j, picture in enumerate((pictures * 255).round().to(torch.uint8)):
            position = (i * (width + _MARGIN), _LABEL_HEIGHT + j * (height + _MARGIN))
            image.paste(Image.fromarray(np.asarray(picture)), position)
    return image
