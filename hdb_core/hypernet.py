"""The hypernetwork: photos of a person in, that person's LiDB out.

Image encoder → face tokens, once a photo → a transformer decoder over one token per adapted layer. The token carries the
layer's present factors; the read-out of each layer gives their change. Repeating this refines: ``θ_k = θ_{k−1} + Δ``.
``θ_0`` is 0, or linear in a face code: what of a person is linear in the face tokens, each part of it as large as any
other. The diffusion loss teaches a straight line from there what it hardly teaches the decoder, the small shapes of a face.

All people share one down side, which starts as `lidb.start_down` and may be learned with the rest; only the up side is
predicted. No two predictions then give the same ``delta_weight``, so people are comparable number by number.

Shape symbols: B people, N photos of each, T tokens a photo, K numbers of the face code, L layers, R rank, a and b the
basis dimensions.
Source: HyperDreamBooth, arXiv 2307.06949, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .basis import BasisRecipe
from .errors import HyperNetError
from .images import resize_to_cover
from .layout import Layout
from .lidb import LiDB, start_down
from .prompt import rare_token
from .vit import ViT

_MIN_SIDE = 16  # pixels
_SUMMED_WIDTH = 32  # of each place in a summary
_FIRST_STEP = 0.02  # of the read-out: small predictions at first, but no dead gradient anywhere


@dataclass(frozen=True)
class EncoderConfig:
    """The image encoder and what it is given.

    Attributes:
        kind: ``vit``, trained with the hypernetwork and stored in its file, or ``clip_vision``, which the user loads.
        image_size: side of the square that photos are cut to, pixels.
        token_width: D of the face tokens.
        patch_size: of ``vit``, pixels; with a stem, of its first convolution.
        stem: of ``vit``: residual convolutions before it, as (width, blocks) of each stage; every stage after the first
            halves the map, and the ViT gets a token for each place of the last one. Empty: it sees the patches themselves.
        summary: tokens that ``vit`` sums a photo up in, and that are all the hypernetwork then sees of it; 0 gives it the
            token of every place instead.
        depth: layers of ``vit``.
        heads: attention heads of ``vit``.
        mean: of the pixels (0..1), by channel.
        std: of the pixels, by channel.
        name: of the checkpoint behind ``clip_vision``, for the message when another one is connected.
        num_tokens: T of ``clip_vision``.
    """

    kind: str = "vit"
    image_size: int = 128
    token_width: int = 256
    patch_size: int = 4
    stem: tuple[tuple[int, int], ...] = ((64, 1), (128, 2), (256, 1))
    summary: int = 2
    depth: int = 2
    heads: int = 4
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    name: str = ""
    num_tokens: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("vit", "clip_vision"):
            raise HyperNetError(f"Expected an encoder of kind vit or clip_vision, got {self.kind!r}. Update this pack.")

    @property
    def sizes(self) -> dict[str, Any]:
        """What two encoders must share to be one, as fields; not the name, for the same may lie in another folder."""
        return asdict(replace(self, name=""))

    @property
    def num_summed(self) -> int:
        """Tokens that a photo is summed up in: the summary of ``vit``, or 1, the mean of all tokens."""
        return max(1, self.summary) if self.kind == "vit" else 1


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
        free_down: predict the down side too, instead of sharing it.
        prompt: that the people are trained for, with the rare token.
        code: K; 0 starts from nothing.
    """

    layout: Layout
    basis: BasisRecipe = field(default_factory=BasisRecipe)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    width: int = 256
    depth: int = 3
    heads: int = 4
    rank: int = 1
    iterations: int = 2
    free_down: bool = False
    prompt: str = "a [v] face"
    code: int = 0

    @property
    def num_outputs(self) -> int:
        """Numbers predicted a layer."""
        return self.rank * (self.basis.up_dim + (self.basis.down_dim if self.free_down else 0))

    def fields(self) -> dict[str, Any]:
        """The sizes as JSON takes them, without layout and basis, which the file's space holds."""
        return {k: v for k, v in asdict(self).items() if k not in ("layout", "basis")}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], layout: Layout, basis: BasisRecipe) -> HyperNetConfig:
        """The opposite of `fields`.

        Raises:
            KeyError, TypeError, ValueError: if a field is missing or unknown.
        """
        rest = dict(fields)
        encoder = dict(rest.pop("encoder"))
        colors: Any = {name: tuple(float(v) for v in encoder.pop(name)) for name in ("mean", "std")}
        stem = tuple((int(width), int(blocks)) for width, blocks in encoder.pop("stem"))
        return cls(layout=layout, basis=basis, encoder=EncoderConfig(**encoder, **colors, stem=stem), **rest)


def preprocess(images: Tensor, encoder: EncoderConfig) -> Tensor:
    """Photos as the encoder takes them: the central square, resized (antialiased bicubic) and normalised.

    Args:
        images: (N, H, W, 3 or 4) in 0..1, as ComfyUI's IMAGE; any size from 16 pixels a side.
        encoder: whose size, mean and std count.

    Returns:
        (N, 3, image_size, image_size) float32.

    Raises:
        HyperNetError: if there is no photo, or its shape or values are unusable.
    """
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or len(images) == 0 or min(images.shape[1:3]) < _MIN_SIDE:
        raise HyperNetError(
            f"Expected photos (batch, height, width, 3) of at least {_MIN_SIDE} pixels a side, got "
            f"{tuple(images.shape)}. Connect the IMAGE output of Load Image with a photo of the face."
        )
    if not bool(images.isfinite().all()):
        raise HyperNetError("The photo contains NaN or infinite values. Check the node that makes it.")
    square = resize_to_cover(images[..., :3].movedim(-1, 1), (encoder.image_size, encoder.image_size))
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    return (square - mean) / std


@contextmanager
def initialised(seed: int) -> Iterator[None]:
    """Modules made here get their weights from a seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, where modules are made
        yield


class PhotoEncoder(nn.Module):
    """A ViT, behind convolutions if the configuration has a stem, and before an MLP if it has a summary.

    Convolutions find where things are with far fewer photos than a ViT on bare patches; an MLP over all places at once
    then learns distances between them with far fewer photos than attention.
    Source: Xiao et al., Early Convolutions Help Transformers See Better, arXiv 2106.14881.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels, stride = 3, config.patch_size
        for width, blocks in config.stem:
            first = not stages
            kernel, padding, step = (config.patch_size, 0, config.patch_size) if first else (3, 1, 2)
            stages += [
                nn.Conv2d(channels, width, kernel, step, padding),
                *(ResidualBlock(width) for _ in range(blocks)),
            ]
            channels, stride = width, stride if first else 2 * stride
        self.stem = nn.Sequential(*stages)
        size, patch = (config.image_size // stride, 1) if stages else (config.image_size, config.patch_size)
        self.vit = ViT(channels, size, patch, config.token_width, config.depth, config.heads)
        self.tokens_of = config.summary, config.token_width
        width, places = config.summary * config.token_width, (config.image_size // stride) ** 2 + 1
        self.summary = nn.Sequential(
            nn.LayerNorm(config.token_width),
            nn.Linear(config.token_width, _SUMMED_WIDTH),
            nn.Flatten(),
            nn.Linear(places * _SUMMED_WIDTH, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        ) if config.summary else None  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens (N, T, token_width) of pixels (N, 3, image_size, image_size)."""
        tokens = self.vit(self.stem(pixels))
        return tokens if self.summary is None else self.summary(tokens).unflatten(1, self.tokens_of)


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions beside an identity: (N, C, h, w) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(functional.silu(self.conv1(self.norm(x))))


class HyperNet(nn.Module):
    """Predicts factors from face tokens; see the module.

    Attributes:
        down_start: [L, R, a], the down side where every prediction starts; learned once for all people.
        scale: [L], the usual size of a layer's numbers, which the predictions are measured in.
        code_mean, code_map: [S], [S, K], of the face code; given by `set_code`, not trained.
        direct: [L, K, outputs], from the face code to θ_0.
    """

    scale: Tensor
    code_mean: Tensor
    code_map: Tensor
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
        if config.code:
            seen = config.encoder.token_width * config.encoder.num_summed
            self.register_buffer("code_mean", torch.zeros(seen))
            self.register_buffer("code_map", torch.zeros(seen, config.code))
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
        theta = tokens.new_zeros(len(tokens), *self.offset.shape)
        if self.config.code:
            if code is None:
                code = (self.summed(tokens) - self.code_mean) @ self.code_map
            theta = theta + torch.einsum("bk,lko->blo", code.to(self.direct), self.direct)
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
        up = (theta[..., : rank * b] * self.scale[:, None]).unflatten(-1, (b, rank))
        down = self.down_start.expand(len(theta), -1, -1, -1)
        if self.config.free_down:
            down = down + theta[..., rank * b :].unflatten(-1, (rank, -1))
        return down, up


def predict(net: HyperNet, tokens: Tensor, iterations: int | None = None) -> LiDB:
    """One person from the face tokens (N, T, D) of N photos of them, on the CPU.

    Raises:
        HyperNetError: if the tokens are not those the hypernetwork was trained on, or the prediction is not finite.
    """
    expected = net.config.encoder.token_width
    if tokens.ndim != 3 or tokens.shape[-1] != expected:
        raise HyperNetError(
            f"Expected face tokens of width {expected}, got {tuple(tokens.shape)}. "
            f"Connect the CLIP_VISION that the hypernetwork was trained with ({net.config.encoder.name or 'its own'})."
        )
    with torch.no_grad():
        down, up = net(tokens.flatten(0, 1)[None], iterations)
    if not bool(down.isfinite().all() and up.isfinite().all()):
        raise HyperNetError("The hypernetwork predicted NaN or infinity. Its file may be damaged; load it again.")
    prompt = net.config.prompt
    info = {
        "made_by": "hypernetwork",
        "prompt": prompt,
        "token": rare_token(prompt),
        "photos": str(len(tokens)),
        "iterations": str(iterations or net.config.iterations),
    }
    return LiDB(net.config.layout, net.config.basis, down[0].float().cpu(), up[0].float().cpu(), info)
