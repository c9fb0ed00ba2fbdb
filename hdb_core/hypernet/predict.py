"""Photos of a person in, that person's LiDB out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import HyperNetError
from ..lidb import About, LiDB
from ..prompt import rare_token
from ..recommended import FROM_PREDICTION
from .network import HyperNet


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
    about = About(
        made_from=FROM_PREDICTION,
        prompt=prompt,
        token=rare_token(prompt),
        photos=len(tokens),
        strengths=net.config.strengths,
    )
    return LiDB(net.config.layout, net.config.basis, down[0].float().cpu(), up[0].float().cpu(), about)
