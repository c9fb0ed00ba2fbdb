"""The hypernetwork: photos of a person in, that person's LiDB out.

Image encoder → face tokens, once a photo → a transformer decoder over one token per adapted layer. The token carries the
layer's present factors; the read-out of each layer gives their change. Repeating this refines: ``θ_k = θ_{k−1} + Δ``.
``θ_0`` is linear in a face code: what of a person is linear in the face tokens, each part of it as large as any other. The diffusion loss teaches a straight line from there what it hardly teaches the decoder, the small shapes of a face.

All people share one down side, which starts as `lidb.start_down` and may be learned with the rest; only the up side is
predicted. No two predictions then give the same ``delta_weight``, so people are comparable number by number.

Shape symbols: B people, N photos of each, T tokens a photo, K numbers of the face code, L layers, R rank, a and b the
basis dimensions.
Source: HyperDreamBooth, arXiv 2307.06949, section 4.2.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..basis import BasisRecipe
from ..errors import HyperNetError
from ..layout import Layout
from ..lidb import start_down
from .encoder import EncoderConfig, PhotoEncoder, initialised

_FIRST_STEP = 0.02  # of the read-out: small predictions at first, but no dead gradient anywhere


@dataclass(frozen=True)
class HyperNetConfig:
    """Everything that decides the shapes of a hypernetwork.

    Attributes:
        layout: the layers that it predicts.
        basis: of the predicted people.
        encoder: of the photos.
        width: of the decoder's tokens.
        depth: decoder layers.
        heads: attention heads.
        rank: of the predicted people.
        iterations: k, used unless another one is asked for; the most that training draws.
        prompt: that the people are trained for, with the rare token.
        code: K, at least 1.
    """

    layout: Layout
    basis: BasisRecipe = field(default_factory=BasisRecipe)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    width: int = 256
    depth: int = 3
    heads: int = 4
    rank: int = 1
    iterations: int = 2
    prompt: str = "a [v] face"
    code: int = 96

    @property
    def num_outputs(self) -> int:
        """Numbers predicted a layer."""
        return self.rank * self.basis.up_dim

    def __post_init__(self) -> None:
        if self.code < 1 or self.rank < 1 or self.iterations < 1:
            raise HyperNetError("Expected a code, a rank and iterations of at least 1. Train the hypernetwork again.")
        if self.heads < 1 or self.depth < 1 or self.width % self.heads:
            raise HyperNetError(
                f"Expected a decoder layer or more and a width that the heads divide, got {self.depth}, {self.width} and "
                f"{self.heads}."
            )

    def fields(self) -> dict[str, Any]:
        """The sizes as JSON takes them, without layout and basis, which the file's space holds."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layout", "basis")}
        return own | {"encoder": asdict(self.encoder)}


class HyperNet(nn.Module):
    """Predicts factors from face tokens; see the module.

    Attributes:
        down_start: [L, R, a], the down side where every prediction starts; learned once for all people.
        scale: [L], the usual size of a layer's numbers, which the predictions are measured in.
        code_mean, code_map: [S], [S, K], of the face code; given by `set_code`, not trained.
        code_center, code_spread: [K], mean and standard deviation of the codes of the photos it was trained on; a spread
            of 0 is unknown.
        direct: [L, K, outputs], from the face code to θ_0.
    """

    scale: Tensor
    code_mean: Tensor
    code_map: Tensor
    code_center: Tensor
    code_spread: Tensor
    encoder: Any

    def __init__(self, config: HyperNetConfig) -> None:
        super().__init__()
        self.config = config
        count, width = len(config.layout.layers), config.width
        self.encoder = PhotoEncoder(config.encoder) if config.encoder.kind == "vit" else None
        self.face_in = nn.Sequential(
            nn.LayerNorm(config.encoder.token_width), nn.Linear(config.encoder.token_width, width)
        )
        self.weights_in = nn.Linear(config.num_outputs, width)
        self.position = nn.Parameter(0.5 * torch.randn(count, width))
        layer = nn.TransformerDecoderLayer(
            width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, config.depth, norm=nn.LayerNorm(width))
        self.readout = nn.Parameter(_FIRST_STEP * torch.randn(count, width, config.num_outputs) / width**0.5)
        self.offset = nn.Parameter(torch.zeros(count, config.num_outputs))
        self.down_start = nn.Parameter(start_down(config.basis, config.layout, config.rank))
        self.register_buffer("scale", torch.full((count,), 0.3))
        seen = config.encoder.token_width * config.encoder.num_summed
        self.register_buffer("code_mean", torch.zeros(seen))
        self.register_buffer("code_map", torch.zeros(seen, config.code))
        self.register_buffer("code_center", torch.zeros(config.code))
        self.register_buffer("code_spread", torch.zeros(config.code))
        self.direct = nn.Parameter(torch.zeros(count, config.code, config.num_outputs))

    @classmethod
    def create(cls, config: HyperNetConfig, seed: int = 0) -> HyperNet:
        """An untrained hypernetwork; the global generator is left as it was."""
        with initialised(seed):
            return cls(config)

    @torch.no_grad()
    def set_scale(self, energy: Tensor) -> None:
        """Measure predictions in the usual size of a layer's numbers, given the mean ‖ΔW‖² (L,) of fitted people.

        Nothing changes where nobody was fitted.
        """
        if not bool(energy.any()):
            return
        self.scale.copy_((energy / (self.config.rank * self.config.basis.up_dim)).sqrt().clamp(min=1e-4))

    @torch.no_grad()
    def set_code(self, mean: Tensor, to_code: Tensor, summed: Tensor) -> None:
        """The face code is (`summed` − mean [S]) @ to_code [S, K]; its statistics are those of N photos, summed (N, S)."""
        self.code_mean.copy_(mean)
        self.code_map.copy_(to_code)
        codes = (summed.to(mean) - mean) @ to_code
        self.code_center.copy_(codes.mean(0))
        self.code_spread.copy_(codes.std(0, correction=0))

    def code(self, tokens: Tensor) -> Tensor:
        """The face code (B, K) of face tokens (B, T, D)."""
        return (self.summed(tokens) - self.code_mean) @ self.code_map

    def summed(self, tokens: Tensor) -> Tensor:
        """What the face code is linear in, (B, S): the photos' summaries side by side, or the mean of all tokens."""
        return tokens.unflatten(1, (-1, self.config.encoder.num_summed)).mean(1).flatten(1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Face tokens (N, T, D) of preprocessed photos (N, 3, image_size, image_size), with the encoder of the file.

        Raises:
            HyperNetError: if the file has none, because the user loads it.
        """
        if self.encoder is None:
            raise HyperNetError(
                f"This hypernetwork reads photos through a CLIP_VISION ({self.config.encoder.name or 'see its file'}). "
                "Connect Load CLIP Vision to Load HyperNet."
            )
        return self.encoder(pixels)

    def forward(
        self, tokens: Tensor, iterations: int | None = None, code: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Factors of B people.

        Args:
            tokens: (B, T, D) face tokens; those of several photos of one person stand side by side.
            iterations: k; None is the configured one.
            code: (B, K) where it is known; None predicts it from the tokens.

        Returns:
            down (B, L, R, a), up (B, L, b, R), float32, differentiable.
        """
        return self.factors(self.refinements(tokens, iterations, code)[-1])

    def refinements(self, tokens: Tensor, iterations: int | None = None, code: Tensor | None = None) -> list[Tensor]:
        """θ_1 … θ_k, each (B, L, outputs) in units of `scale`, of which `factors` makes people."""
        faces = self.face_in(tokens)
        code = self.code(tokens) if code is None else code
        theta = torch.einsum("bk,lko->blo", code.to(self.direct), self.direct)
        states = []
        for _ in range(iterations or self.config.iterations):
            hidden = self.decoder(self.position + self.weights_in(theta), faces)
            theta = theta + torch.einsum("blw,lwo->blo", hidden, self.readout.to(hidden)) + self.offset
            states.append(theta)
        return states

    def factors(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """θ (B, L, outputs) as down (B, L, R, a) and up (B, L, b, R), float32."""
        up = (theta.float() * self.scale[:, None]).unflatten(-1, (self.config.basis.up_dim, self.config.rank))
        return self.down_start.expand(len(theta), -1, -1, -1), up
