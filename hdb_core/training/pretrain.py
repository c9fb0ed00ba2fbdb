"""The image encoder learns to see who is on a photo, before the hypernetwork is trained behind it.

From one photo of a person, and the words of another, it predicts that other photo, so that it must keep what stays and
forget what the words say. What it predicts are the principal components of the latents, the small ones counting as much
as the large: as plain numbers, colours and outlines are nearly all of a photo, and the shapes of a face nearly nothing.
The diffusion loss teaches the same, but with the noise of single draws and a pass of the base model in every sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import HyperNetError
from ..finetune import Denoiser
from ..hypernet import EncoderConfig, PhotoEncoder
from ..prompt import caption
from .code import MOST_PHOTOS, Components, shown_of
from .faces import Faces
from .loop import TrainConfig, Turn, turns_of
from .people import FittedPerson


class PhotoPredictor(nn.Module):
    """A photo's components from the pixels of another photo of the person, and from its own words.

    Args:
        encoder: what is trained for later, with a summary; the rest is thrown away.
        text_width: of the text states.
        components: K.

    Raises:
        HyperNetError: if the encoder has no summary.
    """

    def __init__(self, encoder: EncoderConfig, text_width: int, components: int) -> None:
        super().__init__()
        if encoder.summary < 1:
            raise HyperNetError("The encoder is pretrained on its summary. Set --summary to 1 or more.")
        self.encoder = PhotoEncoder(encoder)
        self.text_in = nn.Linear(text_width, encoder.token_width)
        self.hidden = nn.Linear((encoder.summary + 1) * encoder.token_width, 2 * encoder.token_width)
        self.out = nn.Linear(2 * encoder.token_width, components)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Components (B, K) for pixels (B, 3, image_size, image_size) and text states (B, text_width)."""
        seen = torch.cat([self.encoder(pixels).flatten(1), self.text_in(text)], 1)
        return self.out(functional.silu(self.hidden(seen)))


class PhotoLoss:
    """The error of the predicted components, for `trainer.Trainer`.

    Args:
        denoiser: whose text encoder reads the words.
        people: everybody.
        faces: pixels of their photos.
        class_prompt: begins every caption: no person is known yet.
        config: of the draws; ``people`` a step, of which each is seen on one photo and predicted on another.
        portraits: what is predicted is always the first photo, and seen are the others. If all first photos are of one
            kind, nothing but the face is left to predict, down to its fine shapes, which the unknown position, tilt and
            expression of any photo blur.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        people: Sequence[FittedPerson],
        faces: Faces,
        class_prompt: str,
        config: TrainConfig,
        portraits: bool = False,
    ) -> None:
        self.denoiser, self.people, self.faces, self.config = denoiser, people, faces, config
        self.portraits = portraits
        self.class_prompt = class_prompt
        self.counts = [len(person.latents) for person in people]
        self.device = denoiser.sigmas().device
        self._text: dict[str, Tensor] = {}
        shown = [shown_of(p, n) for p in people[:MOST_PHOTOS] for n in range(1 if portraits else len(p.latents))]
        self.components = Components.of(torch.stack(shown[:MOST_PHOTOS]).to(self.device))

    def __call__(self, net: nn.Module, step: int, part: slice = slice(None)) -> dict[str, Tensor]:
        """``loss`` alone, of a part of the people of a step."""
        turns = turns_of(step, self.counts, self.config)[0][part]
        if self.portraits:
            turns = [self._of_portrait(turn) for turn in turns]
        pixels = self.faces.read([(self.people[turn.person].person, turn.seen[0]) for turn in turns])
        shown = [(self.people[turn.person], turn.denoised[0]) for turn in turns]
        latents = torch.stack([shown_of(*photo) for photo in shown]).to(self.device)
        text = self.text([caption(self.class_prompt, p.person.photos[number].words) for p, number in shown])
        return {"loss": self.components.loss(net(pixels.to(self.device), text).float(), latents)}

    def _of_portrait(self, turn: Turn) -> Turn:
        """The same with the first photo to be predicted, and another one seen if there is any."""
        seen = turn.seen[0] or turn.denoised[0]
        return turn._replace(seen=[seen], denoised=[0])

    def text(self, captions: Sequence[str]) -> Tensor:
        """The state (B, text_width) of the last token, which has seen the whole caption; each is computed once."""
        if missing := list(dict.fromkeys(c for c in captions if c not in self._text)):
            with torch.no_grad():
                states = self.denoiser.encode_prompts(missing)[:, -1].float()
            self._text |= dict(zip(missing, states, strict=True))
        return torch.stack([self._text[c] for c in captions])
