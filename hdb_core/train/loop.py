"""The loop of a training: steps, an average of the weights, a log, and a state to go on from, on any number of processes."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import HyperNetError
from ..files.atomic import write_text
from ..files.reading import GARBLED, opened
from . import state as state_file
from .ahead import read_ahead

SAVE_EVERY = 180  # seconds
LOG_EVERY = 10  # steps
EMA_DECAY = 0.998
MOST_RATE = 1000.0  # a learning rate
MOST_SKIPPED = 50  # steps in a row; a scale of the losses that began too high is halved by each


@dataclass(frozen=True)
class LoopConfig:
    """How a module is optimised.

    Attributes:
        steps: optimiser steps; the rate falls to zero over them as a cosine.
        people: people in a step, over all processes.
        learning_rate: peak learning rate of AdamW. Lower it if the training diverges.
        warmup: steps until the peak of the learning rate.
        weight_decay: weight decay of AdamW.
        max_grad_norm: gradients are clipped to this norm.

    Raises:
        HyperNetError: if a setting makes no sense.
    """

    steps: int = 3000
    people: int = 32
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.people < 1 or not 0 < self.learning_rate <= MOST_RATE:
            raise HyperNetError(
                f"Expected steps of at least 0, people of at least 1 and a learning_rate above 0, at most {MOST_RATE:g}, got "
                f"{self.steps}, {self.people} and {self.learning_rate}."
            )
        if self.weight_decay < 0 or self.max_grad_norm <= 0:
            raise HyperNetError(
                "Expected a weight_decay of at least 0 and a max_grad_norm above 0, got "
                f"{self.weight_decay} and {self.max_grad_norm}."
            )

    def rate(self, step: int, progress: float | None = None) -> float:
        """The learning rate of a step, counted from 0.

        Args:
            step: which.
            progress: share of the training that is done, if its length is not counted in steps.
        """
        done = step / self.steps if progress is None else min(1.0, progress)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup)) * cosine


class LossOf(Protocol):
    """What is trained."""

    def read(self, step: int, part: slice) -> Any:
        """What a part of the global batch of a step, counted from 0, needs of the disk; called in another thread."""

    def __call__(self, net: nn.Module, step: int, part: slice, read: Any) -> dict[str, Tensor]:
        """Scalars of that part, given what was read; ``loss`` goes down."""


class TrainingLoop:
    """Steps a module with AdamW.

    Args:
        accelerator: of all processes.
        net: the module, from here on on the accelerator's device.
        config: settings.
        state: file to go on from, written every few minutes; a kill leaves the old or the new one.
        log: CSV file of mean losses.
        accumulate: parts that each process's people of a step are taken in.
        rates: beginnings of parameter names with their rate, as a multiple of the configured one; 0 does not train.
        sizes: what must be the same to go on from a state, as JSON takes it; kept in it.
        progress: share of the training that is done, from 0 to its end at 1, such as by a clock, on one process; None
            counts the configured steps.

    Attributes:
        average: the averaged weights by name.
        step: the next one.

    Raises:
        HyperNetError: if the people of a step cannot be shared out evenly, or the state is of a training with other sizes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        net: nn.Module,
        config: LoopConfig,
        state: Path,
        log: Path,
        accumulate: int = 1,
        rates: Mapping[str, float] | None = None,
        sizes: Mapping[str, Any] | None = None,
        progress: Callable[[], float] | None = None,
    ) -> None:
        self.accelerator, self.config, self.state, self.log = accelerator, config, state, log
        self._progress = progress
        self.parts = parts_of(config.people, accumulate, accelerator)
        self._net, self._sizes = net, dict(sizes or {})
        optimizer: Any = torch.optim.AdamW(_groups(net, rates or {}), config.learning_rate, (0.9, 0.99), weight_decay=config.weight_decay)  # fmt: skip
        self._skipped = 0
        self.average = {name: weight.clone() for name, weight in net.state_dict().items()}
        self.step = self._resume(optimizer)
        self.net, self.optimizer = accelerator.prepare(net, optimizer)
        self.average = {name: weight.to(accelerator.device) for name, weight in self.average.items()}

    def run(
        self,
        loss_of: LossOf,
        save: Callable[[], None],
        after: Callable[[], None] | None = None,
        notes: Mapping[str, float] | None = None,
    ) -> None:
        """Train to the end.

        Args:
            loss_of: what is trained.
            save: called on the main process after every state that is written, the last one even if a training that
                was stopped behind it only has this left to do.
            after: called on the main process after every step.
            notes: further columns of the log.

        Raises:
            HyperNetError: if the gradients are no longer finite; the last state that was written is of before that.
        """
        is_main, saved = self.accelerator.is_main_process, time.monotonic()
        first, began = self.step, saved
        logged: list[dict[str, Tensor]] = []
        total = None if self._progress else self.config.steps
        bar = tqdm(total=total, initial=self.step, unit="step", disable=not is_main)
        steps = count(self.step) if self._progress else range(self.step, self.config.steps)
        ahead = read_ahead(lambda turn: loss_of.read(*turn), ((step, part) for step in steps for part in self.parts))
        at_end = self._at_end()
        with closing(ahead), bar:  # before anything is said of an error
            while not at_end:
                logged.append(self._advance(loss_of, ahead))
                bar.update()
                at_end = self._at_end()
                if self.step % LOG_EVERY == 0 and not at_end:
                    bar.set_postfix(self._log(logged, notes or {}))
                    logged = []
                if is_main and self._progress is None and self.step == first + LOG_EVERY < self.config.steps:
                    bar.write(self._estimate((time.monotonic() - began) / LOG_EVERY))
                if is_main and time.monotonic() - saved > SAVE_EVERY:
                    self._save()
                    save()
                    saved = time.monotonic()
                if is_main and after is not None:
                    after()
        if is_main:
            self._save()
            save()
        if logged:  # last: by this row, the training is finished
            self._log(logged, notes or {})
        self.accelerator.wait_for_everyone()

    def _at_end(self) -> bool:
        return self.step >= self.config.steps if self._progress is None else self._progress() >= 1

    def _rate(self, step: int) -> float:
        return self.config.rate(step) if self._progress is None else self.config.rate(step, self._progress())

    def _advance(self, loss_of: LossOf, ahead: Iterator[Any]) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self._rate(self.step)
        losses = backward(self.accelerator, loss_of, self.net, islice(ahead, len(self.parts)), len(self.parts))
        self._require_finite(self.accelerator.clip_grad_norm_(self.net.parameters(), self.config.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, weight in self._net.state_dict().items():
                self.average[name].lerp_(weight.to(self.average[name]), 1 - decay)
        self.step += 1
        return {name: self.accelerator.reduce(value, "mean") for name, value in losses.items()}

    def _log(self, losses: Sequence[Mapping[str, Tensor]], notes: Mapping[str, float]) -> dict[str, str]:
        """Write a row of mean losses; the same for the progress bar."""
        row = {name: float(torch.stack([own[name] for own in losses]).mean()) for name in losses[-1]}
        if self.accelerator.is_main_process:
            _append(self.log, {"step": self.step, "rate": self._rate(self.step - 1), **notes, **row})
        return {name: f"{value:.4f}" for name, value in row.items()}

    def _estimate(self, seconds: float) -> str:
        left = self.config.steps - self.step
        return f"A step takes {seconds:.2f} s: {timedelta(seconds=round(left * seconds))} for the {left} that are left."

    def _require_finite(self, norm: Tensor) -> None:
        """Refuse gradients that would destroy the weights; under float16 the scaler leaves such steps out by itself."""
        self._skipped = 0 if bool(norm.isfinite()) else self._skipped + 1
        if self._skipped > (0 if self.accelerator.scaler is None else MOST_SKIPPED):
            raise HyperNetError(
                f"The gradients of step {self.step + 1} are not finite: the training diverged. Lower learning_rate, or "
                f"take --mixed-precision no. {self.state}, if it exists, is from before that step."
            )

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Load what `_save` wrote, if anything; the next step."""
        if not self.state.exists():
            return 0
        return state_file.restore(self.state, self._net, optimizer, self.average, self._sizes)

    def _save(self) -> None:
        state_file.write(self.state, self._net, self.optimizer, self.average, self.step, self._sizes)


def parts_of(people: int, accumulate: int, accelerator: Accelerator) -> list[slice]:
    """This process's people of the global batch, in as many parts as gradients are accumulated over.

    Raises:
        HyperNetError: if they cannot be shared out evenly.
    """
    rank, count = accelerator.process_index, accelerator.num_processes
    if accumulate < 1 or people % (count * accumulate):
        raise HyperNetError(
            f"{people} people a step must be a multiple of {count} processes times --accumulate {accumulate}, which is "
            "at least 1. Change one of them."
        )
    return [slice(rank + part * count, None, count * accumulate) for part in range(accumulate)]


def backward(
    accelerator: Accelerator,
    loss_of: LossOf,
    net: nn.Module,
    parts: Iterable[tuple[tuple[int, slice], Any]],
    count: int,
) -> dict[str, Tensor]:
    """Add up the gradients of a step's parts, which are of one size; returns the mean losses.

    Args:
        accelerator: of all processes.
        loss_of: what is trained.
        net: the module.
        parts: the step and the part, with what was read of it.
        count: how many.
    """
    losses: list[dict[str, Tensor]] = []
    for (step, part), read in parts:
        is_last = len(losses) + 1 == count  # processes exchange their gradients once
        with nullcontext() if is_last else accelerator.no_sync(net):
            with accelerator.autocast():
                losses.append(loss_of(net, step, part, read))
            accelerator.backward(losses[-1]["loss"] / count)
    return {name: torch.stack([own[name].detach() for own in losses]).mean() for name in losses[0]}


def logged_step(log: Path) -> int:
    """The step of a log's last row; 0 if there is none.

    Raises:
        HyperNetError: if it is no log.
    """
    return max((step for step, _ in _rows(log)), default=0)


def _groups(net: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parameters that are trained, by their rate; those of rate 0 get no gradients, which saves their cost."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        scale = next((scale for start, scale in rates.items() if name.startswith(start)), 1.0)
        if scale == 0:
            parameter.requires_grad_(False)
        else:
            groups.setdefault(scale, []).append(parameter)
    return [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]


def _rows(log: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """The rows of a CSV file, if there is one, and their steps."""
    if not log.exists():
        return []
    try:
        with io.TextIOWrapper(opened(log), encoding="utf-8", newline="") as file:
            rows: list[tuple[int, Mapping[str, Any]]] = [
                (int(row["step"]), row) for row in csv.DictReader(file, strict=True)
            ]
        if any(None in row for _, row in rows):
            raise ValueError("a row is too long")
        return rows
    except (OSError, csv.Error, *GARBLED) as error:
        raise HyperNetError(
            f"{log} is damaged ({error!s:.100}). Delete it; the training goes on without it."
        ) from error


def _append(log: Path, row: Mapping[str, float]) -> None:
    """Add a row to a CSV file, in place of those of the same step or later ones, which a kill has undone."""
    rows = [*(old for step, old in _rows(log) if step < row["step"]), row]
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(column for known in rows for column in known))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(log, text.getvalue())
