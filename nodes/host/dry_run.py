"""Tiny passes forward and back through a model: which of its layers a person is trained in.

They run what the training runs, on latents of fixed sizes and a prompt that never changes, so that the layers found
depend on the model alone. Adapted are the layers that read the tokens of the picture, of attention and MLP alike. Every
component of a person takes the same bytes in every layer, so what counts is how far one reaches into the output, which
is the gradient of the output by the up side. On random models the picture's attention and MLP reach several times as far
as the text's. The rule also leaves out some layers that reach as far: the keys and values of cross-attention to text
(Wan), and what refines the text before it meets the picture (Z-Image).
Random weights say nothing about what a trained model's attention looks at, so attention stays in where it reaches less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from ...hdb_core.adapters import attach
from ...hdb_core.errors import LayoutError
from .denoiser import HostDenoiser
from .targets import class_of

PROMPT = "a face"
SIDES = (8, 16)  # latents


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        layers: names of those that read the picture's tokens and get a gradient, in the order of the modules.
        mutates: whether the model changes tensors in place that autograd has saved.
    """

    layers: tuple[str, ...]
    mutates: bool

    def context(self, model: nn.Module) -> AbstractContextManager[None]:
        """What forward and backward passes of the model have to run in."""
        return _mutable(model) if self.mutates else nullcontext()


@contextmanager
def _mutable(model: nn.Module) -> Iterator[None]:
    """Let a model change tensors that autograd has saved; what is known of them is forgotten with their graph."""
    with allow_mutation_on_saved_tensors() as saved:

        def forget(*_: Any) -> None:
            alive = saved.tid_to_weakhandle
            for place in [p for p, tensors in saved.sid_to_tid.items() if not any(t in alive for t in tensors)]:
                del saved.sid_to_tid[place]

        handle = model.diffusion_model.register_forward_pre_hook(forget)
        try:
            yield
        finally:
            handle.remove()


# All clones of a MODEL have one underlying model. What was found goes with it when the host lets go of it.
_OF_MODEL: WeakKeyDictionary[nn.Module, DryRun] = WeakKeyDictionary()


def dry_run(denoiser: HostDenoiser, model: ModelPatcher) -> DryRun:
    """Find the layers of a MODEL that a person can be trained in; the first call runs it.

    Args:
        denoiser: of the model, with all layers that can be patched.
        model: the host's MODEL.

    Raises:
        LayoutError: the model cannot be run with this text, or not be differentiated; says why.
    """
    if model.model not in _OF_MODEL:
        _OF_MODEL[model.model] = _found(denoiser, model)
    return _OF_MODEL[model.model]


def mutates(model: ModelPatcher) -> bool:
    """Whether a dry run has found that a MODEL changes tensors in place that autograd has saved."""
    return model.model in _OF_MODEL and _OF_MODEL[model.model].mutates


def _found(denoiser: HostDenoiser, model: ModelPatcher) -> DryRun:
    sigmas = denoiser.sigmas()
    sigma = sigmas[len(sigmas) // 2 : len(sigmas) // 2 + 1].clone().to(denoiser.device)
    conditioning = denoiser.encode_prompts([PROMPT])
    latents, larger = (_latents(model, side).to(denoiser.device) for side in SIDES)
    with _explained(model, "does not run with this CLIP", "Connect the CLIP and VAE that belong to it"):
        few, many = (_tokens(denoiser, x, sigma, conditioning) for x in (latents, larger))
    names = [name for name in denoiser.modules if few.get(name, 0) < many.get(name, 0)]
    factors = {name: _small(denoiser.modules[name], denoiser.device) for name in names}

    def gradients() -> list[Tensor | None]:
        with attach({name: denoiser.modules[name] for name in names}, factors):
            denoised = denoiser.denoise(latents, sigma, conditioning)
            return list(torch.autograd.grad(denoised.sum(), [up for up, _ in factors.values()], allow_unused=True))

    with _explained(model, "cannot be trained through", "Choose another base model"):
        try:
            mutates, found = False, gradients()
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            with allow_mutation_on_saved_tensors():
                mutates, found = True, gradients()
    live = tuple(name for name, gradient in zip(names, found, strict=True) if gradient is not None)
    if not live:
        raise LayoutError(
            f"No layer of the connected MODEL ({class_of(model)}) gets a gradient, so it cannot be trained. Choose another one."
        )
    return DryRun(live, mutates)


def _latents(model: ModelPatcher, side: int) -> Tensor:
    """Noise (1, C, side, side), with one frame between them for a video model."""
    form = model.model.latent_format
    shape = (1, form.latent_channels, *(1,) * (form.latent_dimensions - 2), side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _tokens(denoiser: HostDenoiser, latents: Tensor, sigma: Tensor, conditioning: Any) -> dict[str, int]:
    """How many tokens the layers read whose inputs are (B, tokens, ·); others read noise levels or lists of tokens."""
    seen: dict[str, int] = {}

    def watch(name: str) -> Any:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].ndim > 2:
                seen[name] = inputs[0].shape[1:-1].numel()

        return look

    with ExitStack() as stack, torch.no_grad():
        for name, module in denoiser.modules.items():
            stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        denoiser.denoise(latents, sigma, conditioning)
    return seen


def _small(module: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors of rank 1 that change nothing, with a gradient."""
    shapes = ((module.out_features, 1), (1, module.in_features))
    up, down = (torch.zeros(shape, device=device, requires_grad=True) for shape in shapes)
    return up, down


@contextmanager
def _explained(model: ModelPatcher, what: str, then: str) -> Iterator[None]:
    try:
        yield
    except LayoutError:
        raise
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        NotImplementedError,
        AssertionError,
    ) as error:
        raise LayoutError(
            f"The connected MODEL ({class_of(model)}) {what}: {str(error).strip()[:300]}. {then}."
        ) from error
