"""Seconds of a training step and of a sampling step of SD 1.5 and SDXL: the floor, ours, the host's own LoRA training.

A step is the difference between a long run of a node and a short one, so that loading and encoding do not count.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from devtools.environment import ROOT, Host
from devtools.inprocess import InProcessHost

from ..common.studio import counted_flops
from .models import Models, bare_training_step, opened, random_models, size_of
from .part import Part, interleaved

ROUNDS = 4


def with_lora_training(host: InProcessHost) -> None:
    """Loads the host's TrainLoraNode, which is among its extra nodes."""
    path = Path(Host.from_environ().root) / "comfy_extras" / "nodes_train.py"
    asyncio.run(sys.modules["nodes"].load_custom_node(str(path), module_parent="comfy_extras"))


def per_step(part: Part, work: Callable[[int], Any], short: int, long: int) -> float:
    """Seconds of one step of some work of so many steps."""
    first = part.timed(lambda: work(short))
    return (part.timed(lambda: work(long)) - first) / (long - short)


class Measured:
    """What is timed, of one family at its own size."""

    def __init__(self, part: Part, host: InProcessHost, models: Models, pixels: int) -> None:
        self.part, self.host, self.models, self.pixels = part, host, models, pixels
        self.image = torch.rand(1, pixels, pixels, 3)
        self.side = pixels // 8
        self.few = (1, 2) if part.toy else (1, 5)
        self.floor_steps = 1 if part.toy else 5
        self.positive, self.negative = (
            host.run("CLIPTextEncode", clip=models.clip, text=text)[0] for text in ("a [v] face", "")
        )
        self.lidb = self.finetune(1, 1)

    def finetune(self, batch: int, steps: int) -> Any:
        """A person by FastFinetune."""
        models, options = self.models._asdict(), self.host.run("FastFinetuneOptions", batch_size=batch)[0]
        return self.host.run(
            "FastFinetune", **models, image=self.image, steps=steps, resolution=self.pixels, options=options
        )[0]

    def floor(self, batch: int) -> float:
        """Seconds of forward and backward through activations."""
        with bare_training_step(self.host, self.models, self.pixels, batch) as step:
            step()
            return self.part.timed(lambda: [step() for _ in range(self.floor_steps)]) / self.floor_steps

    def flops(self, batch: int) -> int:
        """Of `floor`'s step."""
        with bare_training_step(self.host, self.models, self.pixels, batch) as step:
            return counted_flops(step)

    def train_lora(self, checkpointing: bool, steps: int) -> Any:
        """The host's own training; every input is a list, and one LATENT alone fails in ComfyUI 0.3.75."""
        latent = {"samples": torch.randn(1, 4, self.side, self.side)}
        schema = self.host.nodes["TrainLoraNode"].GET_SCHEMA()
        defaults = {i.id: [i.default] for i in schema.inputs if getattr(i, "default", None) is not None}
        given = {"model": [self.models.model], "latents": [latent, latent], "positive": [self.positive]}
        return self.host.run(
            "TrainLoraNode", **{**defaults, **given, "steps": [steps], "gradient_checkpointing": [checkpointing]}
        )

    def lora_step(self, checkpointing: bool) -> float:
        """Seconds of a step of `train_lora`; a first training warms up."""
        train = partial(self.train_lora, checkpointing)
        train(1)
        return per_step(self.part, train, *self.few)

    def sample(self, model: Any, steps: int) -> Any:
        """A picture's latents."""
        latent = {"samples": torch.zeros(1, 4, self.side, self.side)}
        return self.host.run(
            "KSampler", model=model, seed=0, steps=steps, cfg=7.0, denoise=1.0, sampler_name="euler",
            scheduler="normal", positive=self.positive, negative=self.negative, latent_image=latent,
        )  # fmt: skip

    def sampling(self, model: Any) -> float:
        """Seconds of a sampling step; a first picture loads the model."""
        self.sample(model, 1)
        return per_step(self.part, partial(self.sample, model), *((1, 2) if self.part.toy else (2, 10)))

    def person(self, guidance: float) -> Any:
        """The MODEL with a person."""
        options = self.host.run("ApplyOptions", strength_model=0.5, strength_clip=0.5, person_guidance=guidance)[0]
        models = {"model": self.models.model, "clip": self.models.clip}
        return self.host.run("ApplyLiDBToModel", **models, lidb=self.lidb, options=options)[0]

    def works(self) -> dict[str, Callable[[], float]]:
        """Name → what measures seconds of a step."""
        models = {"base": self.models.model, "person": self.person(1.0), "person with guidance": self.person(2.5)}
        return {  # those first that matter most, should the time not be enough for all
            "floor, batch 4": partial(self.floor, 4),
            "FastFinetune, batch 4": partial(per_step, self.part, partial(self.finetune, 4), *self.few),
            **{f"sampling, {name}": partial(self.sampling, model) for name, model in models.items()},
            "TrainLoraNode, batch 1": partial(self.lora_step, True),
            "TrainLoraNode, batch 1, no checkpointing": partial(self.lora_step, False),
            "floor, batch 1": partial(self.floor, 1),
            "FastFinetune, batch 1": partial(per_step, self.part, partial(self.finetune, 1), *self.few),
        }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    part = Part.from_arguments(__doc__)
    host = opened(ROOT / ".runs" / "gpu_speed", part.device)
    with_lora_training(host)
    start = part.left
    for family, share in (("sd15", 0.5), ("sdxl", 0.0)):
        with part.attempt(family):
            pixels = size_of(family, part.toy)
            measured = Measured(part, host, random_models(family, part.toy), pixels)
            works = {f"{family}, {pixels} px, {name}": work for name, work in measured.works().items()}
            with part.attempt(f"{family}, operations"):
                part.add(f"{family}, {pixels} px, floor, batch 1, one step", tflop=measured.flops(1) / 1e12)
            interleaved(part, works, 1 if part.toy else ROUNDS, share * start)


if __name__ == "__main__":
    main()
