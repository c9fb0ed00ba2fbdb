"""Pictures and persons from the real ComfyUI in this process: its stock nodes and ours, as the executor runs them."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from devtools import environment
from devtools.device import made_on, synchronize
from devtools.environment import Host
from devtools.inprocess import InProcessHost, boot
from hdb_core.files.hypernet import read_header
from hdb_core.recommended import AS_LORA, FROM_PREDICTION, RECOMMENDED, Strengths
from miniature.training import working_dtype

from .settings import NOISE, NodeConfig

if TYPE_CHECKING:
    from hdb_core.lidb import LiDB

SIZE = 128
HYPERNET = environment.BASE / "models" / "hyperdreambooth" / environment.HYPERNET  # a copy of that in weights/
BASIS = environment.ROOT / ".runs" / "basis" / "basis.safetensors"  # python -m miniature.make basis
WIDGETS = frozenset(("prompt", "photo_words", "steps", "resolution", "seed"))  # of Fast Finetune itself
MISSING = "missing"  # instead of the hash of a file
TIMED = 5  # predictions: a single one of milliseconds says more of what else the machine did


@dataclass(frozen=True)
class Sampling:
    """How every picture is sampled. Fixed once, on the base."""

    sampler_name: str = "dpmpp_2m"
    scheduler: str = "karras"
    steps: int = 8
    cfg: float = 3.0


class Models(NamedTuple):
    """What the stock loader returns: ModelPatcher, CLIP, VAE; and the conditioning of the negative prompt, if not by them."""

    model: Any
    clip: Any
    vae: Any
    negative: Any = None


class Made(NamedTuple):
    """A person, and what it cost."""

    lidb: LiDB
    seconds: float
    flops: int


class Studio:
    """A booted host with one checkpoint loaded.

    The UNet samples under autocast where that is faster. Weights and patches stay float32: in bfloat16 weights (the
    host's own --bf16-unet, which computes in float32 on a CPU) a small patch would be rounded away. On a GPU the host
    keeps float16 weights.
    """

    def __init__(self, host: InProcessHost, checkpoint: Path, sampling: Sampling, device: str = "cpu") -> None:
        import comfy.samplers
        import comfy.utils

        for name, known in (
            (sampling.sampler_name, comfy.samplers.KSampler.SAMPLERS),
            (sampling.scheduler, comfy.samplers.KSampler.SCHEDULERS),
        ):
            if name not in known:  # the host would take another one
                raise SystemExit(f"ComfyUI has no {name!r}. It has {', '.join(known)}.")
        comfy.utils.PROGRESS_BAR_ENABLED = False
        self.host, self.sampling, self.device = host, sampling, device
        self.dtype = working_dtype(device)
        self._step_flops: dict[str, int] = {}
        self._hypernets: dict[Path, Any] = {}
        host.folder_paths.add_model_folder_path("checkpoints", str(checkpoint.parent))
        with torch.inference_mode():
            self.base = Models(*host.run("CheckpointLoaderSimple", ckpt_name=checkpoint.name))

    @classmethod
    def open(cls, checkpoint: Path | None, folder: Path, sampling: Sampling, device: str = "cpu") -> Studio:
        """Boots the host that `dev.py` prepared.

        Args:
            checkpoint: the base model; None is the miniature where `dev.py` put it.
            folder: takes whatever the host and its nodes write.
            device: that the host computes on.

        Raises:
            SetupError: no host is there.
            FileNotFoundError: no checkpoint is there.
        """
        prepared = Host.from_environ()
        checkpoint = checkpoint or prepared.base / "models" / "checkpoints" / "hdb_miniature.safetensors"
        if not checkpoint.is_file():
            raise FileNotFoundError(f"No checkpoint {checkpoint}: complete weights/, or name one with --checkpoint.")
        folder.mkdir(parents=True, exist_ok=True)
        logging.getLogger().setLevel(logging.WARNING)
        host = boot(prepared.root, folder, device=device)
        host.folder_paths.add_model_folder_path("lidb_basis", str(prepared.base / "models" / "lidb_basis"))
        return cls(host, checkpoint.resolve(), sampling, device)

    @cached_property
    def made_on(self) -> dict[str, str]:
        """The device, the card, the versions and the dtype behind everything that is made here."""
        weights = str(self.base.model.model.get_dtype()).removeprefix("torch.")
        return made_on(self.device, f"{weights}, bfloat16 autocast" if self.dtype == torch.bfloat16 else weights)

    @torch.inference_mode()
    def pictures(self, models: Models, prompt: str, seed: int, count: int, width: int = SIZE) -> np.ndarray:
        """Samples a prompt as one batch, which a seed makes the same for every model: uint8 (count, 128, width, 3)."""
        positive = self.host.run("CLIPTextEncode", clip=models.clip, text=prompt)[0]
        return self.sampled(models, positive, seed, count, width)

    @torch.inference_mode()
    def sampled(self, models: Models, positive: Any, seed: int, count: int, width: int = SIZE) -> np.ndarray:
        """The same of a positive conditioning."""
        run, sampling = self.host.run, self.sampling
        negative = models.negative or self.negative(models.clip)
        latents = run("EmptyLatentImage", width=width, height=SIZE, batch_size=count)[0]
        with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype == torch.bfloat16):
            samples = run(
                "KSampler", model=models.model, seed=seed, steps=sampling.steps, cfg=sampling.cfg, denoise=1.0,
                sampler_name=sampling.sampler_name, scheduler=sampling.scheduler,
                positive=positive, negative=negative, latent_image=latents,
            )[0]  # fmt: skip
        image = run("VAEDecode", vae=models.vae, samples=samples)[0]
        return (image * 255).round().clamp(0, 255).to(torch.uint8).numpy()

    @torch.inference_mode()
    def negative(self, clip: Any) -> Any:
        """The conditioning of the empty prompt."""
        return self.host.run("CLIPTextEncode", clip=clip, text="")[0]

    @torch.inference_mode()
    def empty(self, basis: Path) -> LiDB:
        """EmptyLiDB in a learned basis."""
        self.host.folder_paths.add_model_folder_path("lidb_basis", str(basis.parent), is_default=True)
        return self.host.run("EmptyLiDB", basis_name=basis.name)[0]

    @torch.inference_mode()
    def predict(self, hypernet: Path, photos: np.ndarray) -> Made:
        """PredictLiDB on photos of a person, uint8 (N, 128, 128, 3).

        The seconds are the median of `TIMED` predictions after a first one, which reads the weights.
        """
        if hypernet not in self._hypernets:
            self.host.folder_paths.add_model_folder_path("hyperdreambooth", str(hypernet.parent), is_default=True)
            # hdb_core.train writes a learned basis into the same folder.
            self.host.folder_paths.add_model_folder_path("lidb_basis", str(hypernet.parent))
            self._hypernets[hypernet] = self.host.run("LoadHyperNet", hypernet_name=hypernet.name)[0]
        inputs = {"hypernet": self._hypernets[hypernet], "image": as_image(photos)}
        predict = partial(self.host.run, "PredictLiDB", **inputs)
        predict()
        flops, seconds = counted_flops(predict), []
        for _ in range(TIMED):
            start = self.now()
            lidb = predict()[0]
            seconds.append(self.now() - start)
        return Made(lidb, median(seconds), flops)

    @torch.inference_mode()
    def finetune(
        self,
        photos: np.ndarray,
        lidb: LiDB | None = None,
        class_pictures: np.ndarray | None = None,
        masks: np.ndarray | None = None,
        **settings: Any,
    ) -> tuple[LiDB, float]:
        """FastFinetune on photos of a person, and its seconds.

        Args:
            photos: uint8 (N, 128, 128, 3).
            lidb: goes on from this person.
            class_pictures: uint8 (N, 128, 128, 3), for a prior_weight above 0.
            masks: uint8 (N, 128, 128), 255 where a photo is learned; None learns all of it.
            **settings: of `settings.NodeConfig`, noise levels by their own names, a basis as a dict of its fields.
        """
        widgets = {name: settings.pop(name) for name in WIDGETS & settings.keys()}
        base = {"model": self.base.model, "clip": self.base.clip, "vae": self.base.vae}
        inputs = {**base, "image": as_image(photos), "lidb": lidb, "options": self._options(settings, class_pictures)}
        inputs["mask"] = None if masks is None else as_image(masks)
        start = self.now()
        made = self.host.run("FastFinetune", **inputs, **widgets)[0]
        return made, self.now() - start

    def now(self) -> float:
        """Seconds of a clock, read when the device has done all that it was told."""
        synchronize(self.device)
        return time.perf_counter()

    def _options(self, settings: Mapping[str, Any], class_pictures: np.ndarray | None) -> Any:
        """What Fast Finetune Options gives, with settings that only benchmarks change."""
        class_images = None if class_pictures is None else as_image(class_pictures)
        own, config = dict(settings), self.host.module("hdb_core.finetuning").FinetuneConfig()
        convolutions = own.pop("convolutions", NodeConfig.convolutions)
        basis = replace(config.basis, **own.pop("basis", {}))
        noise = replace(config.noise, **{name: own.pop(name) for name in NOISE & own.keys()})
        config = replace(config, **own, basis=basis, noise=noise)
        return self.host.module("nodes.host.finetune").FinetuneOptions(config, convolutions, class_images)

    def finetune_step_flops(
        self,
        photos: np.ndarray,
        settings: Mapping[str, Any],
        lidb: LiDB | None = None,
        class_pictures: np.ndarray | None = None,
    ) -> int:
        """Floating-point operations of one step, counted once for each way to train; arguments as for `finetune`."""
        key = json.dumps([{**settings, "steps": None}, str(lidb and lidb.basis)], sort_keys=True)
        if key not in self._step_flops:
            train = partial(self.finetune, photos, lidb, class_pictures)
            # The first run may make the bases, which the others find.
            _, one, two = (counted_flops(partial(train, **{**settings, "steps": n})) for n in (1, 1, 2))
            self._step_flops[key] = two - one
        return self._step_flops[key]

    def strengths(self, strengths: Strengths) -> Any:
        """What Apply Options gives for them, which is of the host's own copy of the pack."""
        model, clip, guidance = strengths
        given = {"strength_model": model, "strength_clip": clip, "person_guidance": guidance}
        return self.host.run("ApplyOptions", **given)[0]

    @torch.inference_mode()
    def apply(self, lidb: LiDB, strengths: Strengths = AS_LORA) -> Models:
        """The base with a person, as the example workflows do it: the negative prompt goes through the base's CLIP.

        `AS_LORA` is a LoRA as it is commonly used, both prompts going through its CLIP.
        """
        inputs = {"model": self.base.model, "clip": self.base.clip, "lidb": lidb}
        model, clip = self.host.run("ApplyLiDBToModel", **inputs, options=self.strengths(strengths))
        return Models(model, clip, self.base.vae, None if strengths == AS_LORA else self.negative(self.base.clip))

    @torch.inference_mode()
    def hooked(self, lidb: LiDB) -> Any:
        """The base's CLIP with a person as a hook, for a part of a picture; the MODEL stays the base's."""
        from comfy_extras.nodes_hooks import SetClipHooks

        inputs = {"model": self.base.model, "clip": self.base.clip, "lidb": lidb, "cfg": self.sampling.cfg}
        (hooks,) = self.host.run("LiDBHook", **inputs)
        return SetClipHooks().apply_hooks(self.base.clip, False, True, hooks)[0]

    @torch.inference_mode()
    def masked(self, clip: Any, text: str, mask: torch.Tensor) -> list[Any]:
        """The conditioning of a prompt for a part of the picture: MASK (1, H, W), 1 where it counts."""
        conditioning = self.host.run("CLIPTextEncode", clip=clip, text=text)[0]
        where = {"mask": mask, "set_cond_area": "default", "strength": 1.0}
        return self.host.run("ConditioningSetMask", conditioning=conditioning, **where)[0]

    @torch.inference_mode()
    def saved(self, lidb: LiDB, name: str) -> tuple[LiDB, Path]:
        """A person after Save LiDB and Load LiDB, and the file, below ``lidb/`` of the output folder."""
        path = Path(self.host.run("SaveLiDB", lidb=lidb, filename_prefix=f"lidb/{name}")[0])
        return self.load(path), path

    @torch.inference_mode()
    def lora_size(self, lidb: LiDB, name: str) -> int:
        """Bytes of a person as an ordinary LoRA file, which is written and deleted."""
        path = Path(self.host.run("SaveLiDBAsLoRA", lidb=lidb, filename_prefix=f"loras/{name}")[0])
        size = path.stat().st_size
        path.unlink()
        return size

    @torch.inference_mode()
    def load(self, path: Path) -> LiDB:
        """A person from a file that `saved` wrote."""
        folder = Path(self.host.folder_paths.get_output_directory(), "lidb")
        return self.host.run("LoadLiDB", lidb_name=path.relative_to(folder).as_posix())[0]


def as_image(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) or (N, H, W) as the host's IMAGE or MASK, float32 in 0..1."""
    return torch.from_numpy(pictures.astype(np.float32) / 255)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_or_missing(path: Path) -> str:
    """The same, or `MISSING` where the file is not on this machine."""
    return file_hash(path) if path.is_file() else MISSING


def recommended_strengths(hypernet: Path) -> Strengths:
    """What a hypernetwork's people are applied with; if its file is missing, those of most."""
    return read_header(hypernet).config.strengths if hypernet.is_file() else RECOMMENDED[FROM_PREDICTION].strengths


def counted_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in ``work``, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
