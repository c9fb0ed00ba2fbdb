"""The loss of the image encoder, which learns who is on a photo before the hypernetwork is trained behind it.

From one photo of a person, and the words of another, it predicts that other photo, so that it must keep what stays and
forget what the words say. It predicts the principal components of the latents, where the small ones count as much as
the large: as plain numbers, colours and outlines are nearly all of a photo, and the shapes of a face nearly nothing.
The diffusion loss teaches the same, but with the noise of single draws and a pass of the base model in every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import HyperNetError
from ..hypernet import EncoderConfig
from ..hypernet.encoder import PhotoEncoder
from ..prompt import caption
from .base.model import BatchDenoiser
from .data.faces import Faces
from .data.people import EncodedPerson
from .data.photos import in_threads
from .face_code import MOST_PHOTOS, Components, shown_of
from .loop import LoopConfig
from .turns import Turn, turns_of


@dataclass(frozen=True)
class PretrainConfig(LoopConfig):
    """The stage pretrain, which teaches the image encoder who is who.

    Attributes:
        steps: training steps of the image encoder. Patience pays: for thousands of steps it learns little more than
            colours and the width of a face, then one shape after the other. 0 skips the stage.
        people: people in a step, over all processes.
        portraits: set it if everybody's first photo is of one kind, such as a passport photo. The encoder then always
            predicts this photo, which teaches it the fine shapes of faces soonest.
    """

    steps: int = 2000
    people: int = 64
    portraits: bool = False


def require_summary(encoder: EncoderConfig) -> None:
    """Refuse an encoder that cannot be pretrained.

    Raises:
        HyperNetError: if it has no summary.
    """
    if encoder.summary < 1:
        raise HyperNetError("The encoder is pretrained on its summary. Set encoder.summary to 1 or more.")


class PhotoPredictor(nn.Module):
    """A photo's components from the pixels of another photo of the person, and from its own words.

    Args:
        encoder: kept after the training, with a summary; the rest is thrown away.
        text_width: of the text states.
        components: K.

    Raises:
        HyperNetError: if the encoder has no summary.
    """

    def __init__(self, encoder: EncoderConfig, text_width: int, components: int) -> None:
        super().__init__()
        require_summary(encoder)
        self.encoder = PhotoEncoder(encoder)
        self.text_in = nn.Linear(text_width, encoder.token_width)
        self.hidden = nn.Linear((encoder.summary + 1) * encoder.token_width, 2 * encoder.token_width)
        self.out = nn.Linear(2 * encoder.token_width, components)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Components (B, K) for pixels (B, 3, image_size, image_size) and text states (B, text_width)."""
        seen = torch.cat([self.encoder(pixels).flatten(1), self.text_in(text)], 1)
        return self.out(functional.silu(self.hidden(seen)))


class ShownPhotos(NamedTuple):
    """What a part of a step needs of the disk: a photo of each of B people, and another one to be predicted.

    Attributes:
        words: of the predicted one.
        pixels: (B, 3, image_size, image_size) of the seen one.
        latents: (B, C, h, w) of the predicted one.
    """

    words: list[str]
    pixels: Tensor
    latents: Tensor


class PhotoLoss:
    """The error of the predicted components.

    Args:
        denoiser: whose text encoder reads the words.
        people: everybody.
        faces: pixels of their photos.
        class_prompt: begins every caption: no person is known yet.
        config: settings. With portraits nothing but the face is left to predict, down to its fine shapes, which the
            unknown position, tilt and expression of any photo blur.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        denoiser: BatchDenoiser,
        people: Sequence[EncodedPerson],
        faces: Faces,
        class_prompt: str,
        config: PretrainConfig,
        seed: int = 0,
    ) -> None:
        self.denoiser, self.people, self.faces, self.config, self.seed = denoiser, people, faces, config, seed
        self.class_prompt = class_prompt
        self.counts = [len(person.person.photos) for person in people]
        self.device = denoiser.sigmas().device
        self._text: dict[str, Tensor] = {}
        shown = [(p, n) for p in people[:MOST_PHOTOS] for n in range(1 if config.portraits else len(p.latents))]
        latents = in_threads(lambda photo: shown_of(*photo), shown[:MOST_PHOTOS])
        self.components = Components.of(torch.stack(latents).to(self.device))

    def read(self, step: int, part: slice = slice(None)) -> ShownPhotos:
        """What a part of the people of a step, counted from 0, needs."""
        turns = turns_of(step, self.counts, self.config.people, self.seed)[0][part]
        if self.config.portraits:
            turns = [self._of_portrait(turn) for turn in turns]
        pixels = self.faces.read([(self.people[turn.person].person, turn.seen[0]) for turn in turns])
        shown = [(self.people[turn.person], turn.denoised) for turn in turns]
        words = [person.person.photos[number].words for person, number in shown]
        latents = torch.stack(in_threads(lambda photo: shown_of(*photo), shown))
        return ShownPhotos(words, pixels.to(self.device), latents.to(self.device))

    def __call__(
        self, net: nn.Module, step: int, part: slice = slice(None), read: ShownPhotos | None = None
    ) -> dict[str, Tensor]:
        """The scalar ``loss`` of a part of the people of a step; ``read`` is what `read` gives, None reads it now."""
        shown = read or self.read(step, part)
        text = self.text([caption(self.class_prompt, words) for words in shown.words])
        return {"loss": self.components.loss(net(shown.pixels, text).float(), shown.latents)}

    def _of_portrait(self, turn: Turn) -> Turn:
        """The same with the first photo to be predicted, and another one seen if there is any."""
        return turn._replace(seen=[turn.seen[0] or turn.denoised], denoised=0)

    def text(self, captions: Sequence[str]) -> Tensor:
        """The state (B, text_width) of the last token, which has seen the whole caption; each is computed once."""
        if missing := list(dict.fromkeys(c for c in captions if c not in self._text)):
            with torch.no_grad():
                states = self.denoiser.summaries(missing).float()
            self._text |= dict(zip(missing, states, strict=True))
        return torch.stack([self._text[c] for c in captions])
