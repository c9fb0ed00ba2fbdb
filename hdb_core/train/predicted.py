"""People predicted from their photos, each in a sample of the frozen base model: what loss and evaluation share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..adapters import Adapters, attach
from ..diffusion import Batch, Denoiser, answers, squared_error, towards
from ..hypernet import HyperNet, HyperNetConfig
from ..lidb import Factors, start_down
from ..prompt import caption
from .data.faces import Faces
from .data.people import EncodedPerson, are_fitted, stacked
from .data.photos import in_threads
from .regression import layer_energy
from .turns import Turn

CHUNK = 256  # people at once, where something is computed of everybody
PhotoOf = tuple[int, int]  # a person's number and the photo's


class FromFaces(nn.Module):
    """The hypernetwork from photos to factors in one call, which is what DDP wraps."""

    def __init__(self, net: HyperNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, faces: Tensor, iterations: int | None = None, code: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Factors of B people from pixels (B, N, 3, H, W), or from the tokens (B, N, T, D) of a frozen encoder."""
        photos = faces.flatten(0, 1)
        tokens = photos if self.net.encoder is None else self.net.encode(photos)
        return self.net(tokens.unflatten(0, faces.shape[:2]).flatten(1, 2), iterations, code)


class PeopleInBase:
    """A set of people, and the base model that draws them with predicted factors.

    Args:
        denoiser: the frozen model; encodes each prompt for its own sample.
        people: everybody.
        net: whose layers, basis and prompt count.
        faces: what the hypernetwork reads of the photos.

    Attributes:
        adapters: the bases, on the model's device.
        down: (L, R, a), the shared down side of fitted people.
        energy: (L,), the mean ‖ΔW‖² of fitted people; None if there are none.
        mean: (1, …), the mean person of fitted ones; None if there are none.
        counts: how many photos each person has.
    """

    def __init__(self, denoiser: Denoiser, people: Sequence[EncodedPerson], net: HyperNetConfig, faces: Faces) -> None:
        self.denoiser, self.people, self.net, self.faces = denoiser, people, net, faces
        self.device = denoiser.sigmas().device
        self.adapters = Adapters(net.basis, net.layout, self.device)
        up = people[0].up
        self.down = start_down(net.basis, net.layout, 1 if up is None else up.shape[-1]).to(self.device)
        self.energy: Tensor | None = None
        self.mean: Factors | None = None
        if are_fitted(people):
            self.energy, self.mean = self._statistics()
        self.counts = [len(person.latents) for person in people]

    def _statistics(self) -> tuple[Tensor, Factors]:
        """Energy and mean of everybody, of a few people at a time."""
        energy, up = torch.zeros(()), torch.zeros(())
        for first in range(0, len(self.people), CHUNK):
            some = stacked(self.people[first : first + CHUNK], self.down)
            share = len(some.up) / len(self.people)
            energy, up = (
                energy.to(self.device) + share * layer_energy(some),
                up.to(self.device) + share * some.up.mean(0),
            )
        return energy, Factors(self.down[None], up[None])

    def read_faces(self, turns: Sequence[Turn], seeds: Tensor | None = None) -> Tensor:
        """What the hypernetwork reads of the seen photos, (B, N, …), augmented if there are seeds (B, N)."""
        photos = [(self.people[turn.person].person, i) for turn in turns for i in turn.seen]
        faces = self.faces.read(photos, None if seeds is None else seeds.flatten().tolist())
        return faces.to(self.device).unflatten(0, (len(turns), -1))

    def latents(self, photos: Sequence[PhotoOf]) -> Tensor:
        """(B, C, h, w) float32 of some photos."""
        return torch.stack([self.people[person].latents[i].float() for person, i in photos]).to(self.device)

    def masks(self, photos: Sequence[PhotoOf], rest: float) -> Tensor:
        """(B, 1, h, w) of mean 1, how much each place of some photos counts.

        Args:
            photos: which.
            rest: how much what a mask leaves out counts, where its white counts 1.
        """

        def region(photo: PhotoOf) -> Tensor:
            person, number = self.people[photo[0]], photo[1]
            return person.person.photos[number].region(*person.latents.shape[-2:])

        masks = torch.stack(in_threads(region, photos)).to(self.device)
        masks = masks.maximum(rest * masks.amax((1, 2, 3), keepdim=True))
        return masks / masks.mean((1, 2, 3), keepdim=True)

    def squared_error(self, factors: Factors, batch: Batch, photos: Sequence[PhotoOf]) -> Tensor:
        """(B, C, h, w) of a batch of photos whose samples carry these factors."""
        with attach(self.denoiser.modules, self.adapters.expand(*factors)):
            text = self.denoiser.encode_prompts(self._captions(self.net.prompt, photos))
            return squared_error(self.denoiser, batch, text)

    def moved_error(self, factors: Factors, batch: Batch, photos: Sequence[PhotoOf], class_prompt: str) -> Tensor:
        """(B, C, h, w), how far samples that carry these factors leave the base model's own answer to a class prompt.

        Args:
            factors: of a person in each sample.
            batch: of photos.
            photos: whose words follow the prompt.
            class_prompt: without the token.
        """
        captions = self._captions(class_prompt, photos)
        own = answers(self.denoiser, batch, captions, self.denoiser.encode_prompts, len(captions))
        with attach(self.denoiser.modules, self.adapters.expand(*factors)):
            text = self.denoiser.encode_prompts(captions)
            return squared_error(self.denoiser, towards(self.denoiser, batch, own), text)

    def _captions(self, prompt: str, photos: Sequence[PhotoOf]) -> list[str]:
        return [caption(prompt, self.people[person].person.photos[i].words) for person, i in photos]
