"""Memory of a fine-tune of SD 1.5 and SDXL: what FastFinetune plans, and what it takes.

With ``--cap-gb`` the card is as small as that for the host and for torch alike. On a card that is that small, its driver
and the desktop take some more.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from devtools.environment import ROOT
from devtools.inprocess import InProcessHost

from .models import Models, opened, random_models, watched_plan
from .part import Part

GB = 2**30
STEPS = 2


def cap(gigabytes: float) -> None:
    """Makes the card as small as that, before the host looks at it."""
    look, (_, total) = torch.cuda.mem_get_info, torch.cuda.mem_get_info()
    size = min(total, int(gigabytes * GB))
    torch.cuda.set_per_process_memory_fraction(size / total)

    def small(device: Any = None) -> tuple[int, int]:
        free, _ = look(device)
        return min(free, size - torch.cuda.memory_reserved(device)), size

    torch.cuda.mem_get_info = small


def measured(part: Part, host: InProcessHost, models: Models, pixels: int, batch: int) -> dict[str, Any]:
    """A short fine-tune: planned and measured bytes of its training, in GB, and of the whole node."""
    cuda = part.device != "cpu"
    before: dict[str, float] = {}

    def start() -> None:
        if cuda:
            before["node"] = torch.cuda.max_memory_allocated() / GB
            torch.cuda.reset_peak_memory_stats()
            before["loaded"] = torch.cuda.memory_allocated() / GB

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    image = torch.rand(1, pixels, pixels, 3)
    with watched_plan(host) as plan, torch.inference_mode():
        plan["start"] = start
        seconds = part.timed(
            lambda: host.run(
                "FastFinetune", model=models.model, clip=models.clip, vae=models.vae, image=image, steps=STEPS,
                resolution=pixels, options=host.run("FastFinetuneOptions", batch_size=batch)[0],
            )
        )  # fmt: skip
    found = {name: plan[name] for name in ("at_once", "recompute")}
    found |= {"seconds": seconds, "planned_gb": plan["bytes"] / GB}
    if cuda:
        peak = torch.cuda.max_memory_allocated() / GB
        found |= {
            "taken_gb": peak - before["loaded"],
            "loaded_gb": before["loaded"],
            "peak_gb": max(peak, before["node"]),
        }
    return found


def tried(sizes: tuple[int, ...], capped: bool, toy: bool) -> list[tuple[int, int]]:
    """Pixels and batch of each fine-tune; the difference of two batches is what a sample keeps."""
    batches = (4,) if capped else (1, 4)
    return [(64, 1)] if toy else [(pixels, batch) for pixels in sizes for batch in batches]


def clean() -> None:
    """Gives back what a failed run may hold."""
    import comfy.model_management as management

    management.unload_all_models()
    gc.collect()
    management.soft_empty_cache()


def main() -> None:
    part, options = Part.from_arguments(
        __doc__, lambda parser: parser.add_argument("--cap-gb", type=float, default=0.0, help="as small a card as that")
    )
    gigabytes = options.cap_gb
    if gigabytes and part.device != "cpu":
        cap(gigabytes)
    host = opened(ROOT / ".runs" / "gpu_memory", part.device)
    label = f"at {gigabytes:g} GB, " if gigabytes else ""
    for family, sizes in (("sd15", (512, 1024)), ("sdxl", (1024, 512))):
        models = None
        with part.attempt(f"{label}{family}"):
            models = random_models(family, part.toy)
        for pixels, batch in tried(sizes, bool(gigabytes), part.toy) if models else ():
            what = f"{label}{family}, {pixels} px, batch {batch}"
            with part.attempt(what):
                part.add(what, **measured(part, host, models, pixels, batch))
            if "failed" in part.rows[-1]:
                clean()
        del models
        clean()


if __name__ == "__main__":
    main()
