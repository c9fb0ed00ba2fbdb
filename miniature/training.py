"""What the trainings of the miniature share: bf16 weights with float32 masters, an EMA, checkpoints that resume."""

import math
import time
from pathlib import Path

import torch
from torch import nn

from hdb_core.files.atomic import replacing

LOG_EVERY = 25
ENDS = ("embedding", "conv_in", "conv_out")  # first and last layers, which Muon's recipe leaves to AdamW


class Trainer:
    """Steps a bf16 model through float32 master weights, keeps their EMA, logs and checkpoints.

    Args:
        model: float32 on entry, on the device to train on; becomes bfloat16 in place and stays so.
        folder: receives ``state.pt`` (atomically replaced) and ``log.csv``.
        steps: length of the cosine schedule, after which the rate is zero.
        rate: peak learning rate, reached after ``warmup`` steps.
        muon: step matrices and kernels with Muon (its updates scaled to the size of AdamW's), the rest with AdamW.
        adam_scale: AdamW's rate as a share of ``rate``.
        adam_only: parts of the names of what Muon leaves to AdamW.
    """

    def __init__(self, model: nn.Module, folder: Path, *, steps: int, rate: float, warmup: int = 200, ema: float = 0.9995,
                 muon: bool = False, adam_scale: float = 1.0, adam_only: tuple[str, ...] = ENDS) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.steps, self.rate, self.warmup, self.decay = folder, steps, rate, warmup, ema
        self.adam_scale = adam_scale
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.masters = [p.detach().clone(memory_format=torch.contiguous_format).float() for _, p in named]
        self.average = [m.clone() for m in self.masters]
        self.optimizers = self._optimizers(muon, adam_only)
        model.to(torch.bfloat16)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device = self.params[0].device
        self._losses: list[torch.Tensor] = []
        self.step_count, self._saved, self._started = 0, time.time(), time.time()
        if (folder / "state.pt").exists():
            self._restore(torch.load(folder / "state.pt", map_location=self.device, weights_only=True))

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
        self.step_count = state["step"]
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        torch._foreach_copy_(self.params, self.masters)

    def learning_rate(self) -> float:
        """The rate of the coming step: linear warm-up, then a cosine to zero."""
        fraction = torch.tensor(min(1.0, self.step_count / self.steps))
        return (
            self.rate
            * min(1.0, (self.step_count + 1) / self.warmup)
            * float(0.5 * (1 + torch.cos(torch.pi * fraction)))
        )

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
        for optimizer, scale in zip(self.optimizers, (self.adam_scale, 1.0), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = scale * self.learning_rate()
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
        if time.time() - self._saved > 180 or self.step_count >= self.steps:
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
        mean = self._mean_loss()
        with open(self.folder / "log.csv", "a") as log:
            log.write(f"{self.step_count},{mean:.5f},{self.learning_rate():.2e},{time.time() - self._started:.0f}\n")
        self._losses = []

    def save(self) -> None:
        """Writes ``state.pt``; a kill at any moment leaves the old or the new one.

        Raises:
            RuntimeError: A loss since the last log was not finite; nothing is written.
        """
        if self._losses:
            self._mean_loss()
        state = {"masters": self.masters, "average": self.average, "names": self.names,
                 "optimizers": [o.state_dict() for o in self.optimizers], "step": self.step_count}  # fmt: skip
        with replacing(self.folder / "state.pt") as partial:
            torch.save(state, partial)
        self._saved = time.time()


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on a device; to a GPU through pinned memory, so that the copy waits for nothing."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def load_average(folder: Path) -> dict[str, torch.Tensor]:
    """The averaged float32 weights of a run, by parameter name."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    return dict(zip(state["names"], state["average"], strict=True))
