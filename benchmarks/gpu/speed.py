"""Seconds of a training step, of a sampling step and of a person, against the floor and what else there is.

The models have random weights, which changes no time. ``dev.py bench speed`` runs the same on a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from devtools.device import synchronize
from devtools.environment import ROOT, Host
from devtools.inprocess import InProcessHost

from ..common.studio import counted_flops
from ..common.watch import Watch
from .models import SIZES, Models, bare_steps, fitted_people, opened, random_models, size_of, watched_plan
from .part import Part, interleaved
from .peers import diffusers_step

ROUNDS = 4
ROWS = ("step", "sampling", "batch", "person", "flat")
RANK = 4
PEERS = {"diffusers + peft, attention": RANK, "full DreamBooth": None}  # with diffusers; rank of the LoRA
GUIDANCE = 2.5


class Clock:
    """Seconds: of the wall on a card; on a CPU those that this process computed, since others may use it, too."""

    def __init__(self, device: str) -> None:
        self.device, self.of_process = device, torch.device(device).type == "cpu"

    def __call__(self) -> float:
        synchronize(self.device)
        return time.process_time() if self.of_process else time.perf_counter()

    def of(self, work: Callable[[], Any]) -> float:
        """Seconds of some work."""
        start = self()
        work()
        return self() - start


def with_lora_training(host: InProcessHost) -> None:
    """Loads the host's TrainLoraNode, which is among its extra nodes."""
    path = Path(Host.from_environ().root) / "comfy_extras" / "nodes_train.py"
    asyncio.run(sys.modules["nodes"].load_custom_node(str(path), module_parent="comfy_extras"))


class Measured:
    """What is timed, of one family at one size.

    Args:
        device: that is measured.
        host: with `with_lora_training`.
        models: of the family.
        pixels: of a side.
        steps: of a run whose steps are timed; the first does not count.
        batch: noise levels of a step; TrainLoraNode always has 1.
    """

    def __init__(
        self, device: str, host: InProcessHost, models: Models, pixels: int, steps: int = 4, batch: int = 1
    ) -> None:
        self.clock, self.host, self.models = Clock(device), host, models
        self.pixels, self.count, self.batch, self.side = pixels, steps, batch, pixels // 8
        self.image = torch.rand(1, pixels, pixels, 3)
        self.positive, self.negative = (
            host.run("CLIPTextEncode", clip=models.clip, text=text)[0] for text in ("a [v] face", "")
        )
        self.lidb = self.finetune(1)

    def reported(self, work: Callable[[], Any]) -> list[float]:
        """Seconds of each step of a node, by its progress bar, whose first step has all that comes before it."""
        import comfy.utils

        times = [self.clock()]
        comfy.utils.set_progress_bar_global_hook(lambda *_, **__: times.append(self.clock()))
        try:
            work()
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
        return [after - before for before, after in itertools.pairwise(times)]

    def finetune(self, steps: int, convolutions: bool = True, recompute: bool = False) -> Any:
        """A person by FastFinetune."""
        options = self.host.run("FastFinetuneOptions", batch_size=self.batch, convolutions=convolutions, rank=RANK)[0]
        with watched_plan(self.host, recompute):
            return self.host.run(
                "FastFinetune",
                **self.models._asdict(),
                image=self.image,
                steps=steps,
                resolution=self.pixels,
                options=options,
            )[0]

    def train_lora(self, steps: int, checkpointing: bool) -> Any:
        """The host's own training; every input is a list, and one LATENT alone fails in ComfyUI 0.3.75."""
        latent = {"samples": torch.randn(1, 4, self.side, self.side)}
        schema = self.host.nodes["TrainLoraNode"].GET_SCHEMA()
        defaults = {i.id: [i.default] for i in schema.inputs if getattr(i, "default", None) is not None}
        given = {"model": [self.models.model], "latents": [latent, latent], "positive": [self.positive], "rank": [RANK]}
        return self.host.run(
            "TrainLoraNode", **{**defaults, **given, "steps": [steps], "gradient_checkpointing": [checkpointing]}
        )

    def sample(self, model: Any, steps: int) -> Any:
        """A picture's latents."""
        latent = {"samples": torch.zeros(1, 4, self.side, self.side)}
        return self.host.run(
            "KSampler", model=model, seed=0, steps=steps, cfg=7.0, denoise=1.0, sampler_name="euler",
            scheduler="normal", positive=self.positive, negative=self.negative, latent_image=latent,
        )  # fmt: skip

    def person(self, guidance: float) -> Any:
        """The MODEL with a person."""
        options = self.host.run("ApplyOptions", strength_model=0.5, strength_clip=0.5, person_guidance=guidance)[0]
        models = {"model": self.models.model, "clip": self.models.clip}
        return self.host.run("ApplyLiDBToModel", **models, lidb=self.lidb, options=options)[0]

    def stock_lora(self) -> Any:
        """The MODEL with a LoRA of the same rank on the same layers, by the host's own loader."""
        import comfy.sd
        import comfy.utils

        path = self.host.run("SaveLiDBAsLoRA", lidb=self.lidb, filename_prefix="speed")[0]
        state = comfy.utils.load_torch_file(path, safe_load=True)
        return comfy.sd.load_lora_for_models(self.models.model, self.models.clip, state, 0.5, 0.5)[0]

    def bare(self, index: int, batch: int) -> list[float]:
        """Of a forward pass (0), or of forward and backward through activations (1)."""
        with bare_steps(self.host, self.models, self.pixels, batch) as steps:
            steps[index]()
            return [self.clock.of(steps[index]) for _ in range(self.count - 1)]

    def peer(self, rank: int | None) -> list[float]:
        """Of a step of one of `PEERS`."""
        with diffusers_step(self.host, self.models, self.pixels, self.batch, rank) as step:
            step()
            return [self.clock.of(step) for _ in range(self.count - 1)]

    def trainings(self) -> dict[str, Callable[[int], Any]]:
        """Name → a training of so many steps."""
        return {
            "FastFinetune, with convolutions": self.finetune,
            "FastFinetune, attention": partial(self.finetune, convolutions=False),
            "FastFinetune, checkpointing": partial(self.finetune, recompute=True),
            "TrainLoraNode": partial(self.train_lora, checkpointing=True),
            "TrainLoraNode, no checkpointing": partial(self.train_lora, checkpointing=False),
        }

    def step(self) -> dict[str, Callable[[], list[float]]]:
        """Name → what measures seconds of training steps."""
        bare = {
            "floor": partial(self.bare, 1, self.batch),
            "forward": partial(self.bare, 0, self.batch),
        }
        own = {
            name: lambda train=train: self.reported(partial(train, self.count))[1:]
            for name, train in self.trainings().items()
        }
        return bare | own | {name: partial(self.peer, rank) for name, rank in PEERS.items()}

    def sampling(self) -> dict[str, Callable[[], list[float]]]:
        """Name → what measures seconds of sampling steps; loading and the first step do not count."""
        return {
            name: lambda model=model: self.reported(partial(self.sample, model, self.count + 2))[2:]
            for name, model in self.applied_models().items()
        }

    def applied_models(self) -> dict[str, Any]:
        """What is sampled with."""
        return {
            "base": self.models.model,
            "person with guidance": self.person(GUIDANCE),
            "person": self.person(1.0),
            "stock LoRA": self.stock_lora(),
        }

    def batched(self, counts: Sequence[int]) -> dict[str, Callable[[], list[float]]]:
        """Name → what measures seconds of a step, for each of its people or samples."""

        def fit(count: int) -> list[float]:
            with fitted_people(self.host, self.models, self.pixels, count) as people:
                short, long = (self.clock.of(partial(people, steps)) for steps in (1, 1 + self.count))
                return [(long - short) / self.count / count]

        works: dict[str, Callable[[], list[float]]] = {}
        for count in counts:
            works[f"fit, {count} people"] = partial(fit, count)
            works[f"floor, {count} samples"] = lambda n=count: [value / n for value in self.bare(1, n)]
        return works

    def stages(self, steps: int) -> dict[str, float]:
        """Seconds of each stage from a photo to a file and a first sampling step with the person."""
        found, clock = {}, self.clock
        found["fine-tune"] = clock.of(lambda: setattr(self, "lidb", self.finetune(steps)))
        found["save"] = clock.of(lambda: self.host.run("SaveLiDB", lidb=self.lidb, filename_prefix="lidb/speed"))
        found["apply"] = clock.of(lambda: setattr(self, "applied", self.person(GUIDANCE)))
        found["first sampling step"] = clock.of(lambda: self.sample(self.applied, 1))
        return found | {"all": sum(found.values())}

    def costs(self, rows: Sequence[str]) -> dict[str, dict[str, float]]:
        """Name → operations of a step and the most memory beside the weights, of `step` and `sampling` if in rows."""
        found: dict[str, dict[str, float]] = {}

        def note(name: str, short: Callable[[], Any], long: Callable[[], Any]) -> None:
            counts = []
            for work in (short, long):
                with Watch() as watch:
                    work()
                counts.append(watch.operations)
            found[name] = {"operations": counts[1] - counts[0], "peak_mb": watch.peak / 2**20}

        if "step" in rows:
            with bare_steps(self.host, self.models, self.pixels, self.batch) as (forward, step):
                for name, work in (("step, forward", forward), ("step, floor", step)):
                    note(name, lambda: None, work)
                    found[name]["gflop"] = counted_flops(work) / 1e9
            for name, train in self.trainings().items():
                note(f"step, {name}", partial(train, 1), partial(train, 2))
            for name, rank in PEERS.items():
                with (
                    suppress(MemoryError),
                    diffusers_step(self.host, self.models, self.pixels, self.batch, rank) as step,
                ):
                    note(f"step, {name}", lambda: None, step)
        if "sampling" in rows:
            for name, model in self.applied_models().items():
                self.sample(model, 1)
                note(f"sampling, {name}", partial(self.sample, model, 2), partial(self.sample, model, 3))
        return found


def held(device: str) -> float:
    """MiB that this process holds: on a card of its memory, on a CPU of the machine's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def flat(measured: Measured, device: str, people: int) -> dict[str, Any]:
    """Whether time and memory stay the same over so many people, each trained, applied and sampled with guidance."""
    seconds, memory = [], []
    for _ in range(people):
        seconds.append(measured.stages(2)["all"])
        memory.append(held(device))
    tenth = max(1, people // 10)
    first = slice(tenth, 2 * tenth) if people > 2 else slice(0, 1)  # the first ones warm up
    return {
        "people": people,
        "seconds_first": median(seconds[first]), "seconds_last": median(seconds[-tenth:]),
        "mb_first": median(memory[first]), "mb_last": median(memory[-tenth:]),
    }  # fmt: skip


def measure(part: Part, measured: Measured, label: str, row: str, rounds: int, until: float, people: int) -> None:
    """One of `ROWS`."""
    named: Mapping[str, Callable[[], list[float]]]
    if row == "person":
        for which in ("first", "second"):
            part.add(f"{label}, person, {which}", **measured.stages(12))
        return
    if row == "flat":
        part.add(f"{label}, flat", **flat(measured, part.device, people))
        return
    counts = (1, 2) if part.toy else (1, 4, 16) if part.device == "cpu" else (1, 4, 16, 32)
    named = {"step": measured.step, "sampling": measured.sampling, "batch": partial(measured.batched, counts)}[row]()
    interleaved(part, {f"{label}, {row}, {name}": work for name, work in named.items()}, rounds, until)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which models and rows."""
    parser.add_argument("--families", nargs="+", choices=tuple(SIZES), default=["sd15", "sdxl"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["step", "sampling"])
    parser.add_argument("--batch", type=int, help="noise levels of a training step (default: 4 on a card, 1 on a CPU)")


@torch.inference_mode()
def main() -> None:
    part, options = Part.from_arguments(__doc__, add_options)
    host = opened(ROOT / ".runs" / "gpu_speed", part.device)
    with_lora_training(host)
    cpu = part.device == "cpu"
    tasks = [(family, row) for family in options.families for row in options.rows]
    start, measured, known = part.left, None, ""
    for index, (family, row) in enumerate(tasks):
        pixels, batch = size_of(family, part.toy), options.batch or (1 if cpu else 4)
        label = f"{family}, {pixels} px"
        with part.attempt(label):
            if measured is None or known != family:
                measured, known = None, family
                steps = 3 if part.toy else 5
                measured = Measured(part.device, host, random_models(family, part.toy), pixels, steps, batch)
            until = start * (1 - (index + 1) / len(tasks))
            measure(part, measured, label, row, 1 if part.toy else ROUNDS, until, 3 if part.toy else 30)


if __name__ == "__main__":
    main()
