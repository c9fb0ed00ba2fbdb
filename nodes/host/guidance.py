"""Guidance towards a person: classifier-free guidance whose negative pass knows the person only in part.

Guidance leads from what the negative prompt gives to what the positive one gives. A LoRA changes both alike, so of a
person, in contrast to a prompt, guidance makes no more than what was learned. Where the negative pass lacks a part of
the person, guidance leads to them, too: with ``denoised = negative + cfg · (positive − negative)`` and a change δ by the
person, leaving out the share ``(guidance − 1) / (cfg − 1)`` there makes it ``guidance · δ``. Where more than all is to be left
out, the negative pass turns away from the person. What a low cfg does not reach that way is added to the positive pass;
at a cfg of 1, as of distilled models, there is no other. So it is ``guidance · δ`` at any cfg.
Source of the formula: Ho & Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598; of guiding by a model that
knows less: Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, arXiv 2406.02507.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from ...hdb_core.rows import RowChange, runs

KEY = "hyperdreambooth"
MOST_LEFT_OUT = 2.0  # the negative pass then has as much against the person as the other has of them
log = logging.getLogger(KEY)


def shares(guidance: float, cfg: float) -> tuple[float, float]:
    """How much more of a person than the patches bring the positive and the negative pass have.

    The negative one lacks up to `MOST_LEFT_OUT`; the positive one has what is still missing.
    """
    if cfg <= 1:
        return guidance - 1, 0.0
    left_out = max(0.0, (guidance - 1) / (cfg - 1))
    if left_out <= MOST_LEFT_OUT:
        return 0.0, -left_out
    return (guidance - 1 + MOST_LEFT_OUT) / cfg - MOST_LEFT_OUT, -MOST_LEFT_OUT


def guided(model: ModelPatcher, patches: Mapping[str, LoRAAdapter], guidance: float) -> ModelPatcher:
    """A clone of a MODEL that carries a person, guided towards them.

    What a negative pass lacks follows the patches that the MODEL has when it samples, however they were merged.

    Args:
        model: with the person in its patches.
        patches: of the person, key of a weight (``diffusion_model.….to_q.weight``) → up (out, R) and down (R, in).
        guidance: how much of the person's change is in the picture: 1 as it was learned.
    """
    sampling = _Guidance(patches, guidance)
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sampling.outer_sample)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, sampling.predict_noise)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, sampling.apply_model)
    clone.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, sampling.loaded)
    return clone


class _Guidance:
    """The wrappers: of a whole sampling, during which layers have hooks and factors are on the device; of a step, which
    knows cfg and whose passes are positive; of a pass through the model.

    The model that runs may be another than the one that was wrapped: newer hosts read it anew for some of their clones.
    """

    def __init__(self, patches: Mapping[str, LoRAAdapter], guidance: float) -> None:
        self.patches, self.guidance = patches, guidance
        self._shares, self._pictures = (0.0, 0.0), 0
        self._positive: set[object] = set()
        self._change = RowChange({})
        self._stack = ExitStack()
        self._hooked: nn.Module | None = None

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self._change = RowChange(present(self.patches, executor.class_obj.model_patcher.patches))
        with ExitStack() as self._stack:
            try:
                return executor(*args, **kwargs)
            finally:
                self._change, self._hooked = RowChange({}), None

    def predict_noise(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        self._shares, self._pictures = shares(self.guidance, scale_of(guider)), len(x)
        self._positive = positive_passes(guider.conds)
        try:
            return executor(x, *args, **kwargs)
        finally:
            self._shares = 0.0, 0.0

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
        positive, negative = self._shares
        scales = [positive if one in self._positive else negative for one in transformer_options.get("uuids", ())]
        arguments = (x, t, c_concat, c_crossattn, control, transformer_options)
        if not (any(scales) and self._change.factors):
            return executor(*arguments, **kwargs)
        self._hook(executor.class_obj)
        # A part has all pictures, or fewer in a context window; nodes that tile pictures repeat all parts for each tile.
        each = min(self._pictures, len(x) // len(scales))
        rows = runs(scales, each, len(x) // (each * len(scales)))
        with self._change.acting(rows, len(x)), uncompiled():
            return executor(*arguments, **kwargs)

    def loaded(self, patcher: ModelPatcher, *how: Any) -> None:
        """Say what is lost when the host writes all patches into the weights, which it does to save a checkpoint."""
        _, _, force_patch_weights, *_ = how
        if force_patch_weights:
            log.warning(
                "The model is saved with the person, but without person_guidance, which is not part of the weights. Save "
                "the LiDB instead, or apply it with a person_guidance of 1 and a higher strength_model."
            )

    def _hook(self, model: nn.Module) -> None:
        if self._hooked is not model:
            self._stack.close()
            modules = {key: model.get_submodule(key.removesuffix(".weight")) for key in self._change.factors}
            self._stack.enter_context(self._change.attached(modules))
            self._hooked = model


def present(
    person: Mapping[str, LoRAAdapter], patches: Mapping[str, Sequence[Sequence[Any]]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of a person as they are among a MODEL's patches: with the strengths there, and those of merges since.

    Args:
        person: key of a weight → up and down.
        patches: of the MODEL, key → (strength, adapter, factor of all before it, part of the weight, …) each.
    """
    found = {}
    for key, adapter in person.items():
        strength = 0.0
        for own_strength, value, of_those_before, offset, *_ in patches.get(key, ()):
            strength *= of_those_before if offset is None else 1.0
            weights = getattr(value, "weights", None)
            if weights is not None and weights[0] is adapter.weights[0]:  # newer hosts make adapters anew
                strength += own_strength
        if strength:
            up, down = adapter.weights[:2]
            found[key] = strength * up, down
    return found


def scale_of(guider: Any) -> float:
    """By how much a guider scales what the positive prompt changes, in comparison to its negative prompts."""
    if hasattr(guider, "cfg1"):  # DualCFGGuider
        return guider.cfg1 * guider.cfg2 if guider.nested else guider.cfg1
    return guider.cfg


def positive_passes(conds: Mapping[str, Sequence[dict[str, Any]] | None]) -> set[object]:
    """What the host calls the positive prompt's passes. All others are led away from, whoever asks for them.

    Where prompts have areas, the host makes up negative ones from positive ones under the same name; they get another.
    """
    positive = {cond["uuid"] for cond in conds.get("positive") or ()}
    for name, others in conds.items():
        for cond in others or () if name != "positive" else ():
            if cond["uuid"] in positive:
                cond["uuid"] = uuid.uuid4()
    return positive


def uncompiled() -> AbstractContextManager[None]:
    """Run modules as they are, whether ``torch.compile`` has been applied to them or not: it would miss their hooks."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance and "torch._dynamo" in sys.modules else nullcontext()
