"""SD 1.5 and SDXL with random weights, of the host's own classes, and a toy of each family; nothing is on disk.

Time and memory do not depend on the values of weights; pictures and losses of these models mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from devtools.device import synchronize
from devtools.environment import Host
from devtools.inprocess import InProcessHost, boot

from ..common.studio import counted_flops

SIZES = {"mini": 128, "sd15": 512, "sdxl": 1024}  # pixels that the families were made for
_COMMON: Mapping[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
_SD15: Mapping[str, Any] = {**_COMMON, "context_dim": 768, "num_heads": 8, "use_linear_in_transformer": False}
_SDXL: Mapping[str, Any] = {
    **_COMMON, "context_dim": 2048, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True,
    "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip
_MINIATURE: Mapping[str, Any] = {
    "model_channels": 320, "channel_mult": (1, 1), "num_res_blocks": [1, 1], "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1,
}  # fmt: skip
_FULL: Mapping[str, Mapping[str, Any]] = {
    "mini": {**_SD15, **_MINIATURE},
    "sd15": {
        **_SD15, "model_channels": 320, "channel_mult": (1, 2, 4, 4), "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    },
    "sdxl": {
        **_SDXL, "model_channels": 320, "channel_mult": (1, 2, 4), "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    },
}  # fmt: skip
_TOY: Mapping[str, Any] = {**_MINIATURE, "model_channels": 64}
_KL_VAE: Mapping[str, Any] = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "ch": 128,  # the host takes no other
}  # fmt: skip


class Models(NamedTuple):
    """The host's MODEL, CLIP and VAE."""

    model: Any
    clip: Any
    vae: Any


def opened(folder: Path, device: str) -> InProcessHost:
    """The host that `dev.py` prepared, in this process; its nodes write to `folder`."""
    import logging

    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger().setLevel(logging.WARNING)
    host = boot(Host.from_environ().root, folder, device=device)
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    return host


def size_of(family: str, toy: bool) -> int:
    """Pixels of a side."""
    return 64 if toy else SIZES[family]


@torch.inference_mode()
def random_models(family: str, toy: bool) -> Models:
    """MODEL, CLIP and VAE of one of `SIZES`, held where the host holds what it has just loaded."""
    import comfy.model_management as management
    import comfy.sd
    import comfy.supported_models
    from comfy import sd1_clip, sdxl_clip
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models_base import ClipTarget

    supported, tokenizer, encoder = (
        (comfy.supported_models.SDXL, sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel)
        if family == "sdxl"
        else (comfy.supported_models.SD15, sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel)
    )
    there, home = management.get_torch_device(), management.unet_offload_device()
    draw = randomiser(there)
    dtype = torch.float32 if there.type == "cpu" else torch.float16
    config = supported({**_FULL[family], **(_TOY if toy else {}), "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    base = config.get_model({}, device=home)
    draw(base.diffusion_model)
    few = {f"{name}_model_config": {"num_hidden_layers": 3} for name in ("clip_l", "clip_g")} if toy else {}
    clip = comfy.sd.CLIP(ClipTarget(tokenizer, encoder), model_options=few)
    draw(clip.cond_stage_model)
    vae = AutoencoderKL(ddconfig=dict(_KL_VAE), embed_dim=4).to(torch.float16)
    draw(vae)
    return Models(ModelPatcher(base, there, home), clip, comfy.sd.VAE(sd=vae.state_dict()))


def randomiser(device: torch.device) -> Callable[[nn.Module], None]:
    """A function that gives a module weights that keep activations near unit variance, drawn on `device`."""
    generator = torch.Generator(device).manual_seed(0)

    def weights(name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return torch.ones_like(tensor) if name.endswith("weight") else torch.zeros_like(tensor)
        scale = 1.0 if "embedding" in name else tensor[0].numel() ** -0.5
        return torch.randn(tensor.shape, generator=generator, device=device) * scale

    def draw(module: nn.Module) -> None:
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(weights(name, tensor))

    return draw


# What follows looks into the pack beyond its nodes, and is the only place here that does.


@contextmanager
def watched_plan(host: InProcessHost, recompute: bool = False) -> Iterator[dict[str, Any]]:
    """What FastFinetune plans while this is open: `at_once`, `recompute` and `bytes`, beside weights and bases; `start`
    is called when the training begins. With `recompute`, blocks are computed twice in any case."""
    node, plan = host.module("nodes.host.finetune"), {"start": lambda: None, "recompute": recompute}
    finetune, step_cost = node.finetune, node.step_cost

    def measured(*given: Any) -> Any:
        plan["cost"] = step_cost(*given)
        return plan["cost"]

    def noted(denoiser: Any, latents: Tensor, config: Any, *, memory: Any, **options: Any) -> Any:
        at_once = min(config.batch_size, memory.at_once)
        memory = replace(memory, recompute=memory.recompute or plan["recompute"])
        plan.update(at_once=at_once, recompute=memory.recompute, bytes=plan["cost"].bytes(at_once, latents))
        plan["start"]()
        return finetune(denoiser, latents, config, memory=memory, **options)

    node.finetune, node.step_cost = noted, measured
    try:
        yield plan
    finally:
        node.finetune, node.step_cost = finetune, step_cost


@contextmanager
def bare_steps(
    host: InProcessHost, models: Models, pixels: int, batch: int
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """A forward pass; and forward, and backward through activations alone: below this no training of a frozen base can
    be."""
    differentiable = host.module("nodes.host.differentiable").differentiable
    with torch.inference_mode(), differentiable(models.model, models.clip) as denoiser:
        with torch.no_grad():
            conditioning = denoiser.encode_prompts(["a [v] face"] * batch)
        noisy = torch.randn(batch, 4, pixels // 8, pixels // 8, device=denoiser.device, requires_grad=True)
        sigma = denoiser.sigmas()[torch.linspace(100, 800, batch).long()].to(denoiser.device, copy=True)

        @torch.no_grad()
        def forward() -> None:
            denoiser.denoise(noisy, sigma, conditioning)

        def step() -> None:
            denoiser.denoise(noisy, sigma, conditioning).square().mean().backward()
            noisy.grad = None

        yield forward, step


@contextmanager
def fitted_people(host: InProcessHost, models: Models, pixels: int, count: int) -> Iterator[Callable[[int], Any]]:
    """A function that fits so many people at once, each on a picture of noise, in so many steps, as `precompute` does;
    the text is encoded once."""
    fit, latents_of = host.module("hdb_core.train.fit"), host.module("hdb_core.train.data.latents")
    adapters_of = host.module("nodes.host.bases").adapters_of
    recipe = host.module("hdb_core.basis").BasisRecipe()
    with torch.inference_mode(), host.module("nodes.host.differentiable").differentiable(*models[:2]) as denoiser:
        adapters = adapters_of(models.model, recipe, denoiser.layout).to(denoiser.device)
        with torch.no_grad():
            conditioning = denoiser.encode_prompts(["a [v] face"] * count)
        denoiser.encode_prompts = lambda _: conditioning
        latents = torch.randn(1, 4, pixels // 8, pixels // 8, device=denoiser.device)
        photos = latents_of.EncodedPhotos(latents, [""], torch.ones_like(latents[:, :1]))

        def execute(steps: int) -> Any:
            fitter = fit.Fitter(denoiser, adapters, fit.FitConfig(steps=steps))
            return fitter.fit([photos] * count, torch.Generator().manual_seed(0))

        yield execute


class Training:
    """What is seen of a hypernetwork's training while it runs.

    Attributes:
        photos, latents: how many became latents, and the seconds of it.
        fitted, fit_steps, fits: people who were fitted, the steps of each, and the seconds of it.
        flops: stage → operations of a step, counted on its second one.
    """

    def __init__(self, host: InProcessHost, models: Models, device: str) -> None:
        self.host, self.models, self.device = host, models, device
        self.photos = self.fitted = self.fit_steps = 0
        self.latents = self.fits = 0.0
        self.flops: dict[str, int] = {}
        self._ends: dict[str, list[float]] = {}

    def run(self, arguments: Sequence[str]) -> None:
        """All stages of `hdb_core.train` on the models.

        Raises:
            RuntimeError: if it does not end well; its message is in the log.
        """
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        opened_in_host = self.host.module("nodes.host.train").opened

        def load(settings: Any, *_: Any) -> Any:
            return opened_in_host(*self.models, settings.convolutions, settings.model)

        if self.host.module("hdb_core.train.__main__").main(arguments, load):
            raise RuntimeError("the training ended with an error")

    def steady(self, stage: str) -> tuple[int, float]:
        """How many steps followed the first three, and their seconds."""
        ends = self._ends[stage][2:]
        return len(ends) - 1, ends[-1] - ends[0]

    def timed(self, work: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        """The same function, whose seconds, result and arguments are noted."""

        @wraps(work)
        def execute(*given: Any, **named: Any) -> Any:
            synchronize(self.device)
            start = time.perf_counter()
            found = work(*given, **named)
            synchronize(self.device)
            note(time.perf_counter() - start, found, *given)
            return found

        return execute

    def counted(self, advance: Callable[..., Any]) -> Callable[..., Any]:
        """`TrainingLoop._advance`, noted."""

        @wraps(advance)
        def execute(loop: Any, *given: Any) -> Any:
            stage = "train" if loop.log.stem == "log" else loop.log.stem
            ends = self._ends.setdefault(stage, [])
            found: list[Any] = []
            if len(ends) == 1:
                self.flops[stage] = counted_flops(lambda: found.append(advance(loop, *given)))
            else:
                found.append(advance(loop, *given))
            synchronize(self.device)
            ends.append(time.perf_counter())
            return found[0]

        return execute

    def note_latents(self, seconds: float, _: Any, base: Any, pixels: Tensor) -> None:
        """What `HostModel.encode` took."""
        self.photos, self.latents = self.photos + len(pixels), self.latents + seconds

    def note_fit(self, seconds: float, _: Any, fitter: Any, people: Sequence[Any], *__: Any) -> None:
        """What `Fitter.fit` took."""
        self.fitted, self.fit_steps, self.fits = self.fitted + len(people), fitter.config.steps, self.fits + seconds


@contextmanager
def watched_training(host: InProcessHost, models: Models, device: str) -> Iterator[Training]:
    """A hypernetwork's training on the models, whose stages are timed where they compute."""
    seen = Training(host, models, device)
    replaced = (
        (host.module("nodes.host.train").HostModel, "encode", lambda work: seen.timed(work, seen.note_latents)),
        (host.module("hdb_core.train.fit").Fitter, "fit", lambda work: seen.timed(work, seen.note_fit)),
        (host.module("hdb_core.train.loop").TrainingLoop, "_advance", seen.counted),
    )
    before = [getattr(owner, name) for owner, name, _ in replaced]
    try:
        for owner, name, watch in replaced:
            setattr(owner, name, watch(getattr(owner, name)))
        yield seen
    finally:
        for (owner, name, _), own in zip(replaced, before, strict=True):
            setattr(owner, name, own)
