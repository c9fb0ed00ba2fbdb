"""The hypernetwork: photos of a person in, that person's LiDB out.

Image encoder → face tokens, once a photo → a transformer decoder over one token per adapted layer. The token carries the
layer's present factors; the read-out of each layer gives their change. Repeating this refines: ``θ_k = θ_{k−1} + Δ``.
``θ_0`` is linear in a face code: what of a person is linear in the face tokens, each part of it as large as any other. The diffusion loss teaches a straight line from there what it hardly teaches the decoder, the small shapes of a face.

The down side starts as `lidb.start_down` and is learned for all people together. The up side is predicted for each
person, and with `HyperNetConfig.predict_down` the person's change of the down side, too.

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
from ..recommended import FROM_PREDICTION, PREDICTED_BY_TOKEN, RECOMMENDED, Strengths
from .encoder import MOST_OPERATIONS, EncoderConfig, PhotoEncoder, initialised, layer_operations

SEEN = 128  # directions in which the looks of photos are compared
FEWEST_SEEN = 2 * SEEN  # photos
_FIRST_STEP = 0.02  # of the read-out: small predictions at first, but no dead gradient anywhere


@dataclass(frozen=True)
class HyperNetConfig:
    """Everything that decides the shapes of a hypernetwork, and how its people are used.

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
        predict_down: predict the down side of each person, too, instead of sharing it.
        by_token: whether the class prompt was kept in its training, so that the token alone means the person.
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
    predict_down: bool = False
    by_token: bool = False

    @property
    def num_outputs(self) -> int:
        """Numbers predicted a layer."""
        return self.rank * (self.basis.up_dim + (self.basis.down_dim if self.predict_down else 0))

    @property
    def strengths(self) -> Strengths:
        """What its people are applied with."""
        return PREDICTED_BY_TOKEN if self.by_token else RECOMMENDED[FROM_PREDICTION].strengths

    def __post_init__(self) -> None:
        if self.code < 1 or self.rank < 1 or self.iterations < 1:
            raise HyperNetError("Expected a code, a rank and iterations of at least 1. Train the hypernetwork again.")
        if min(self.heads, self.depth, self.width) < 1 or self.width % self.heads:
            raise HyperNetError(
                f"Expected a decoder layer or more and a width of at least 1 that the heads divide, got {self.depth}, "
                f"{self.width} and {self.heads}."
            )
        layers = len(self.layout.layers)
        seen = (layers, self.encoder.tokens_of_photo)
        one = sum(layer_operations(layers, tokens, self.width, self.heads) for tokens in seen)
        if (operations := self.iterations * self.depth * one) > MOST_OPERATIONS:
            raise HyperNetError(
                f"Expected a decoder that takes at most {MOST_OPERATIONS:,} operations a photo, got {operations:,} with "
                f"{self.iterations} iterations. Make depth, iterations or the tokens of a photo fewer."
            )

    def fields(self) -> dict[str, Any]:
        """The sizes as JSON takes them, without layout and basis, which the file's space holds."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layout", "basis")}
        return own | {"encoder": asdict(self.encoder)}


class HyperNet(nn.Module):
    """Predicts factors from face tokens; see the module.

    Attributes:
        down_start: [L, R, a], the down side where every prediction starts; learned once for all people.
        scale: [L], the usual size of a layer's numbers, which the predictions of the up side are measured in.
        code_mean, code_map: [S], [S, K], of the face code; given by `set_code`, not trained.
        seen_mean, seen_map, seen_limit: [2 C], [2 C, `SEEN`], [], how the photos it was trained on look; given by
            `set_seen`, not trained. A limit of 0 is unknown.
        direct: [L, K, outputs], from the face code to θ_0.
    """

    scale: Tensor
    code_mean: Tensor
    code_map: Tensor
    seen_mean: Tensor
    seen_map: Tensor
    seen_limit: Tensor
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
        looks = 2 * config.encoder.num_features
        self.register_buffer("seen_mean", torch.zeros(looks))
        self.register_buffer("seen_map", torch.zeros(looks, SEEN))
        self.register_buffer("seen_limit", torch.zeros(()))
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
    def set_code(self, mean: Tensor, to_code: Tensor) -> None:
        """The face code is (`summed` − mean [S]) @ to_code [S, K]."""
        self.code_mean.copy_(mean)
        self.code_map.copy_(to_code)

    @torch.no_grad()
    def set_seen(self, looks: Tensor) -> None:
        """Keep how N photos look, (N, 2 C) of `look`, so that `unlike` knows others; too few of them leave it unknown.

        The limit is what a hundredth of the photos exceed that the statistics were not made from: a fifth of them, kept
        apart. The statistics themselves are then those of all.
        """
        count = len(looks) * 4 // 5
        if count < FEWEST_SEEN:
            return
        apart = _distance(looks[count:].double(), *_whitening(looks[:count].double()))
        mean, to_white = _whitening(looks.double())
        self.seen_mean.copy_(mean)
        self.seen_map[:, : to_white.shape[1]].copy_(to_white)
        self.seen_limit.copy_(apart.quantile(0.99))

    def look(self, given: Tensor) -> Tensor:
        """How N photos look, (N, 2 C): mean and deviation, over their places, of the encoder's first features.

        Args:
            given: preprocessed photos (N, 3, image_size, image_size), or behind ``clip_vision`` their tokens (N, T, D).
        """
        features = given if self.encoder is None else self.encoder.features(given)
        return torch.cat([features.mean(1), features.std(1)], 1)

    def unlike(self, given: Tensor) -> Tensor | None:
        """How unlike the photos of the training N photos are, (N,): about one in a hundred of those exceeds 1.

        On the miniature (``python -m miniature.unlike``, docs/photo.md) it exceeds 1 for a few of a hundred photos of people
        it has not seen, for nearly all photographs, noise and pencil sketches, for most faces at half size or cut off, and
        for few that are off centre. None: the file does not know.
        """
        if not bool(self.seen_limit > 0):
            return None
        return _distance(self.look(given), self.seen_mean, self.seen_map) / self.seen_limit

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
        rank, b = self.config.rank, self.config.basis.up_dim
        theta = theta.float()
        up = (theta[..., : b * rank] * self.scale[:, None]).unflatten(-1, (b, rank))
        down = self.down_start.expand(len(theta), -1, -1, -1)
        if self.config.predict_down:
            down = down + theta[..., b * rank :].unflatten(-1, (rank, -1))
        return down, up


def _whitening(looks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] of N looks (N, F), and the map [F, `SEEN` at most] to their largest directions, each at deviation 1."""
    mean, spread = looks.mean(0), looks.std(0) + 1e-6
    _, sizes, directions = torch.linalg.svd((looks - mean) / spread, full_matrices=False)
    sizes, directions = sizes[:SEEN] / len(looks) ** 0.5, directions[:SEEN]
    return mean, directions.T / sizes / spread[:, None]


def _distance(looks: Tensor, mean: Tensor, to_white: Tensor) -> Tensor:
    return ((looks - mean) @ to_white).square().sum(1)
