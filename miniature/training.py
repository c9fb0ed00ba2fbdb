"""What the trainings of the miniature share: a schedule by steps or by the clock, an EMA, checkpoints that resume."""

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hdb_core.cpu import multiplies_bfloat16
from hdb_core.files.atomic import replacing

LOG_EVERY = 25
SAVE_EVERY = 120  # seconds
STATE_FILE = "state.pt"
ENDS = ("embedding", "conv_in", "conv_out")  # first and last layers, which Muon's recipe leaves to AdamW


@dataclass(frozen=True)
class Length:
    """How long a training is, by one of the two: the rate has fallen to zero at its end.

    Attributes:
        steps: so many.
        minutes: so many of the clock, of all the times together that it ran.
    """

    steps: int = 0
    minutes: float = 0.0

    @staticmethod
    def add_options(parser: argparse.ArgumentParser, steps: int) -> None:
        """Adds ``--steps``, with a default, and ``--minutes``."""
        parser.add_argument("--steps", type=int, default=steps, help="length of the schedule (default: %(default)s)")
        parser.add_argument("--minutes", type=float, default=0.0, help="its length by the clock instead of --steps")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Length":
        """What a command line with `add_options` asks for."""
        return cls(minutes=args.minutes) if args.minutes else cls(steps=args.steps)


class Trainer:
    """Steps a model through float32 master weights, keeps their EMA, logs and checkpoints.

    Args:
        model: float32 on entry, on the device to train on; becomes ``dtype`` in place and stays so.
        folder: receives ``state.pt`` (atomically replaced) and ``log.csv``.
        length: of the schedule, a warm-up and then a cosine to zero.
        rate: peak learning rate.
        warmup: share of the schedule until the peak.
        muon: step matrices and kernels with Muon (its updates scaled to the size of AdamW's), the rest with AdamW.
        adam_scale: AdamW's rate as a share of ``rate``.
        adam_only: parts of the names of what Muon leaves to AdamW.
        save: called after every state that is written.

    Attributes:
        dtype: of the model, `working_dtype`.
        notes: further columns of the log; ``waited`` is the seconds spent within `waiting`.
    """

    def __init__(self, model: nn.Module, folder: Path, *, length: Length, rate: float, warmup: float = 0.05, ema: float = 0.9995,
                 muon: bool = False, adam_scale: float = 1.0, adam_only: tuple[str, ...] = ENDS,
                 save: Callable[[], None] | None = None) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.length, self.rate, self.warmup, self.decay = folder, length, rate, warmup, ema
        self.adam_scale, self._after_save = adam_scale, save
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.masters = [p.detach().clone(memory_format=torch.contiguous_format).float() for _, p in named]
        self.average = [m.clone() for m in self.masters]
        self.optimizers = self._optimizers(muon, adam_only)
        self.device = named[0][1].device
        self.dtype = working_dtype(self.device)
        model.to(self.dtype)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.notes: dict[str, float] = {"waited": 0.0}
        self._losses: list[torch.Tensor] = []
        self.step_count, self._before = 0, 0.0
        self._saved = self._started = time.monotonic()
        if (folder / STATE_FILE).exists():
            self._restore(torch.load(folder / STATE_FILE, map_location=self.device, weights_only=True))

    @property
    def seconds(self) -> float:
        """How long it has trained, all the times that it ran together."""
        return self._before + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, from 0."""
        if self.length.minutes:
            return self.seconds / (60 * self.length.minutes)
        return self.step_count / max(1, self.length.steps)

    @property
    def running(self) -> bool:
        """Whether the schedule is not at its end; a training takes one step at least."""
        return self.progress < 1 or self.step_count == 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what is spent within as time in which no step was taken for want of data."""
        start = time.monotonic()
        yield
        self.notes["waited"] += time.monotonic() - start

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has its averaged weights within."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.average)
        try:
            yield
        finally:
            self._publish()

    def averages(self) -> dict[str, torch.Tensor]:
        """The averaged float32 weights by name, on the CPU."""
        return {name: weight.cpu() for name, weight in zip(self.names, self.average, strict=True)}

    def _optimizers(self, muon: bool, adam_only: tuple[str, ...]) -> list[torch.optim.Optimizer]:
        inner = [muon and m.ndim >= 2 and not any(part in name for part in adam_only)
                 for name, m in zip(self.names, self.masters, strict=True)]  # fmt: skip
        # Muon takes matrices only: a kernel is seen as the matrix (out, in * height * width) over the same memory.
        self._stepped = [m.view(len(m), -1) if is_inner else m for m, is_inner in zip(self.masters, inner, strict=True)]
        rest = [m for m, is_inner in zip(self._stepped, inner, strict=True) if not is_inner]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        ]
        if any(inner):
            matrices = [m for m, is_inner in zip(self._stepped, inner, strict=True) if is_inner]
            optimizers.append(
                torch.optim.Muon(matrices, lr=self.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )
        return optimizers

    def _restore(self, state: dict) -> None:
        for target, source in zip(self.masters + self.average, state["masters"] + state["average"], strict=True):
            target.copy_(source)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step_count, self._before = state["step"], state["seconds"]
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        torch._foreach_copy_(self.params, self.masters)

    def learning_rate(self) -> float:
        """The rate of the coming step: linear warm-up, then a cosine to zero."""
        # Of a step, the middle of its share of the schedule: the first is not at zero and the last not quite at it.
        half = 0.0 if self.length.minutes else 0.5 / max(1, self.length.steps)
        done = min(1.0, self.progress + half)
        return self.rate * min(1.0, done / max(self.warmup, 1e-9)) * 0.5 * (1 + math.cos(math.pi * done))

    def step(self, loss: torch.Tensor) -> None:
        """Back-propagates a scalar loss, steps, and every so often logs and saves.

        Only then is the loss read: reading waits for the device.

        Raises:
            RuntimeError: A loss since the last log was not finite; the last checkpoint is left alone.
        """
        loss.backward()
        for master, param in zip(self._stepped, self.params, strict=True):
            # Contiguous as the master is: the fused AdamW reads raw memory, whatever the strides say.
            master.grad = param.grad.to(torch.float32, memory_format=torch.contiguous_format).reshape(master.shape)
            param.grad = None
        torch.nn.utils.clip_grad_norm_(self._stepped, 1.0)
        rate = self.learning_rate()
        for optimizer, scale in zip(self.optimizers, (self.adam_scale, 1.0), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = scale * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.step_count += 1
            decay = min(self.decay, (1 + self.step_count) / (10 + self.step_count))
            torch._foreach_lerp_(self.average, self.masters, 1 - decay)
        self._publish()
        self._losses.append(loss.detach())
        if self.step_count % LOG_EVERY == 0:
            self._log()
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def _mean_loss(self) -> float:
        """Of the steps since the last log.

        Raises:
            RuntimeError: One of them is not finite.
        """
        losses = torch.stack(self._losses).tolist()
        for step, value in enumerate(losses, self.step_count - len(losses)):
            if not math.isfinite(value):
                raise RuntimeError(
                    f"loss is {value} at step {step}: start again from {self.folder} with a lower --rate"
                )
        return sum(losses) / len(losses)

    def _log(self) -> None:
        row = {"step": self.step_count, "loss": f"{self._mean_loss():.5f}", "rate": f"{self.learning_rate():.2e}",
               "seconds": round(self.seconds), **{name: round(value, 1) for name, value in self.notes.items()}}  # fmt: skip
        path = self.folder / "log.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        self._losses = []

    def save(self) -> None:
        """Writes ``state.pt``; a kill at any moment leaves the old or the new one.

        Raises:
            RuntimeError: A loss since the last log was not finite; nothing is written.
        """
        if self._losses:
            self._log()
        state = {"masters": self.masters, "average": self.average, "names": self.names,
                 "optimizers": [o.state_dict() for o in self.optimizers], "step": self.step_count,
                 "seconds": self.seconds}  # fmt: skip
        with replacing(self.folder / STATE_FILE) as partial:
            torch.save(state, partial)
        if self._after_save:
            self._after_save()
        self._saved = time.monotonic()


def working_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on a GPU and on a CPU that multiplies it, float32 on any other."""
    fast = torch.device(device).type == "cuda" or multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on a device; to a GPU through pinned memory, so that the copy waits for nothing."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def load_average(folder: Path) -> dict[str, torch.Tensor]:
    """The averaged float32 weights of a run, by parameter name."""
    state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
    return dict(zip(state["names"], state["average"], strict=True))
