"""A vision transformer whose weights have fixed names.

They are those that `transformers` 5 gives its ViT, whose names have changed between versions: a hypernetwork's file must
be readable with whichever version the host has.
Source: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_INITIAL_STD = 0.02
_NORM_EPS = 1e-12


class ViT(nn.Module):
    """Tokens of a square picture, one for each patch behind one for all.

    Args:
        channels: of the picture.
        image_size: its side, a multiple of `patch_size`.
        patch_size: side of a patch.
        width: of a token.
        depth: number of layers.
        heads: of the attention, a divisor of `width`.
    """

    def __init__(self, channels: int, image_size: int, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embeddings = _Embeddings(channels, (image_size // patch_size) ** 2, patch_size, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.layernorm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens (N, 1 + patches, width) of pixels (N, channels, image_size, image_size)."""
        tokens = self.embeddings(pixels)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.layernorm(tokens)


class _Embeddings(nn.Module):
    def __init__(self, channels: int, patches: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(channels, width, patch_size, patch_size)})
        self.position_embeddings = nn.Parameter(torch.empty(1, patches + 1, width))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](pixels).flatten(2).mT
        return torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.position_embeddings


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, eps=_NORM_EPS) for _ in range(2))
        self.attention = _Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.layernorm_before(tokens))
        return tokens + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.layernorm_after(tokens))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (
            projection(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=_INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, _Embeddings):
        nn.init.trunc_normal_(module.position_embeddings, std=_INITIAL_STD)
        nn.init.trunc_normal_(module.cls_token, std=_INITIAL_STD)
