"""Guidance towards a person: classifier-free guidance whose negative pass knows the person only in part.

Guidance leads from what the negative prompt gives to what the positive one gives. A LoRA changes both alike, so of a
person, in contrast to a prompt, guidance makes no more than what was learned. Where the negative pass lacks a part of
the person, guidance leads to them, too: with ``denoised = negative + cfg · (positive − negative)`` and a change δ by the
person, leaving out the share ``(guidance − 1) / (cfg − 1)`` there makes it ``guidance · δ``, at any cfg. Where more
than all is to be left out, the negative pass turns away from the person.
Source of the formula: Ho & Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598; of guiding by a model that
knows less: Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, arXiv 2406.02507.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...hdb_core.adapters import Factors, attach

KEY = "hyperdreambooth"
MOST_LEFT_OUT = 2.0  # the negative pass then has as much against the person as the other has of them
_NEGATIVE = 1  # in the host's cond_or_uncond


def left_out(guidance: float, cfg: float) -> float:
    """The share of a person that the negative pass lacks, up to `MOST_LEFT_OUT`; 0 where there is no guidance."""
    return 0.0 if cfg <= 1 else min(MOST_LEFT_OUT, max(0.0, (guidance - 1) / (cfg - 1)))


def guided(
    model: ModelPatcher, paths: Mapping[str, str], factors: Mapping[str, Factors], guidance: float
) -> ModelPatcher:
    """A clone of a MODEL that carries a person, guided towards them.

    Args:
        model: with the person in its patches.
        paths: of its adapted layers, below the host's model: ``diffusion_model.….to_q``.
        factors: of the person, for each of them, as they are in the patches: (up (out, R), down (R, in)).
        guidance: how much of the person's change guidance makes: 1 as it was learned, at most 2 · cfg − 1.
    """
    sampling = _Guidance(paths, factors, guidance)
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, sampling.predict_noise)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, sampling.apply_model)
    return clone


class _Guidance:
    """The two wrappers: the outer one knows cfg, the inner one which samples are negative, and the model that runs.

    That may be another than the one that was wrapped: newer hosts read it anew for some of their clones.
    """

    def __init__(self, paths: Mapping[str, str], factors: Mapping[str, Factors], guidance: float) -> None:
        self.paths, self.guidance = paths, guidance
        self.left_out, self.pictures = 0.0, 0
        self.factors_on: Callable[[torch.device], dict[str, Factors]] = cache(
            lambda device: {name: (up.to(device), down.to(device)) for name, (up, down) in factors.items()}
        )

    def predict_noise(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.left_out, self.pictures = left_out(self.guidance, executor.class_obj.cfg), len(x)
        try:
            return executor(x, *args, **kwargs)
        finally:
            self.left_out = 0.0

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None,
        c_crossattn: Tensor | None,
        control: Any,
        transformer_options: Mapping[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        parts: Sequence[int] = transformer_options.get("cond_or_uncond", ())
        arguments = (x, t, c_concat, c_crossattn, control, transformer_options)
        if not self.left_out or _NEGATIVE not in parts:
            return executor(*arguments, **kwargs)
        taken = torch.tensor([-self.left_out if part == _NEGATIVE else 0.0 for part in parts], device=x.device)
        # A part has all pictures, or fewer in a context window; nodes that tile pictures repeat all parts for each tile.
        same = min(self.pictures, len(x) // len(parts))
        taken = taken.repeat_interleave(same).repeat(len(x) // (same * len(parts)))[:, None, None]
        factors = {name: (up * taken, down) for name, (up, down) in self.factors_on(x.device).items()}
        modules = {name: executor.class_obj.get_submodule(path) for name, path in self.paths.items()}
        with attach(modules, factors), uncompiled():
            return executor(*arguments, **kwargs)


def uncompiled() -> AbstractContextManager[None]:
    """Run modules as they are, whether ``torch.compile`` has been applied to them or not: it would miss their hooks."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance and "torch._dynamo" in sys.modules else nullcontext()
