"""The image encoder learns to see who is on a photo, before the hypernetwork is trained behind it.

From one photo of a person and the words of another it predicts that other photo's latents, so that it must keep what
stays and forget what the words say. The diffusion loss teaches the same, but with the noise of single draws and a pass
of the base model in every sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..finetune import Denoiser
from ..hypernet import EncoderConfig, PhotoEncoder
from .faces import Faces
from .fit import caption
from .loop import TrainConfig, Turn, turns_of
from .people import FittedPerson

_DEPTH, _HEADS, _PATCH = 2, 4, 2


class PhotoPredictor(nn.Module):
    """A photo's latents from the pixels of another photo of the person, and from its own words.

    Args:
        encoder: what is trained for later; the rest is thrown away.
        text_width: of the text states.
        latents: (C, h, w); h and w are even.
    """

    def __init__(self, encoder: EncoderConfig, text_width: int, latents: tuple[int, int, int]) -> None:
        super().__init__()
        width, (channels, height, breadth) = encoder.token_width, latents
        self.grid = (channels, height // _PATCH, breadth // _PATCH)
        self.encoder = PhotoEncoder(encoder)
        self.face_in, self.text_in = nn.LayerNorm(width), nn.Linear(text_width, width)
        self.places = nn.Parameter(0.5 * torch.randn(self.grid[1] * self.grid[2], width))
        layer = nn.TransformerDecoderLayer(
            width, _HEADS, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, _DEPTH, norm=nn.LayerNorm(width))
        self.out = nn.Linear(width, channels * _PATCH**2)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Latents (B, C, h, w) for pixels (B, 3, image_size, image_size) and text states (B, text_width)."""
        words = self.text_in(text)[:, None]
        seen = torch.cat([self.face_in(self.encoder(pixels)), words], 1)
        patches = self.out(self.decoder(self.places + words, seen))
        channels, height, breadth = self.grid
        return (
            patches.view(-1, height, breadth, _PATCH, _PATCH, channels)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(-1, channels, height * _PATCH, breadth * _PATCH)
        )


class PhotoLoss:
    """The squared error of the predicted latents, for `trainer.Trainer`.

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

    def __call__(self, net: nn.Module, step: int, part: slice = slice(None)) -> dict[str, Tensor]:
        """``loss`` alone, of a part of the people of a step."""
        turns = turns_of(step, self.counts, self.config)[0][part]
        if self.portraits:
            turns = [self._of_portrait(turn) for turn in turns]
        pixels = self.faces.read([(self.people[turn.person].person, turn.seen[0]) for turn in turns])
        shown = [(self.people[turn.person], turn.denoised[0]) for turn in turns]
        latents = torch.stack([person.latents[number].float() for person, number in shown]).to(self.device)
        text = self.text([caption(self.class_prompt, p.person.photos[number].words) for p, number in shown])
        return {"loss": functional.mse_loss(net(pixels.to(self.device), text).float(), latents)}

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
