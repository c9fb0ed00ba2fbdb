"""Textual Inversion inside the host's model: only the embeddings of the rare token are learned.

Source: Gal et al., An Image is Worth One Word, arXiv 2208.01618. The rare token is several tokens to CLIP, each with an
embedding of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hdb_core.prompt import rare_token

from .reference import Checkpoint, ReferenceConfig, train
from .studio import Studio


@dataclass(frozen=True)
class TextualInversionConfig(ReferenceConfig):
    """Settings of one training; the rate was chosen on dev people among 1e-4, 3e-4 and 1e-3.

    Attributes:
        initializer: the word whose embedding the training starts from, one token to CLIP.
    """

    rate: float = 3e-4
    checkpoints: tuple[int, ...] = (100, 300)
    initializer: str = "face"


def textual_inversion(
    studio: Studio, photo: np.ndarray, config: TextualInversionConfig, seed: int
) -> Generator[Checkpoint]:
    """Trains the embeddings of the prompt's rare token; see `reference.train`.

    While the generator waits, these tokens mean the person wherever the host encodes text.

    Args:
        photo: uint8 (128, 128, 3).
        seed: of noise and timesteps.
    """
    clip = studio.base.clip
    tokens = token_ids(clip, rare_token(config.prompt, config.class_prompt))
    (initializer,) = token_ids(clip, config.initializer)
    return train(studio, photo, config, seed, lambda: learned_embeddings(embeddings(clip), tokens, initializer))


def embeddings(clip: Any) -> nn.Module:
    """The module that turns CLIP-L's tokens into vectors."""
    return clip.cond_stage_model.clip_l.transformer.get_input_embeddings()


def token_ids(clip: Any, text: str) -> list[int]:
    """CLIP-L's tokens of a text, without begin, end and padding."""
    special = set(clip.cond_stage_model.clip_l.special_tokens.values())
    return [token for token, *_ in clip.tokenize(text)["l"][0] if token not in special]


@contextmanager
def learned_embeddings(module: nn.Module, tokens: Sequence[int], initializer: int) -> Iterator[list[nn.Parameter]]:
    """Trainable vectors in place of the embeddings of some tokens; the module itself is not changed.

    Args:
        module: tokens (B, T) to vectors (B, T, D).
        tokens: whose vectors are learned.
        initializer: the token whose vector they start from.
    """
    with torch.no_grad():
        start = module(torch.tensor([[initializer]], device=module.weight.device))[0, 0].float()
    learned = {token: nn.Parameter(start.clone()) for token in tokens}

    def replace(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for token, vector in learned.items():
            output = torch.where((arguments[0] == token)[..., None], vector.to(output), output)
        return output

    handle = module.register_forward_hook(replace)
    try:
        yield list(learned.values())
    finally:
        handle.remove()
