"""A model as ComfyUI loads it, from one file or several, for the training of a hypernetwork."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn
from utils.extra_config import load_extra_path_config

from ...hdb_core.errors import HyperNetError
from ...hdb_core.files.reading import garbled_as
from ...hdb_core.train.base.denoiser import try_base
from ...hdb_core.train.base.local import identity_of, quantised, quantised_weights
from ...hdb_core.train.base.model import BaseModel, BatchDenoiser
from ...hdb_core.train.base.single_file import KINDS
from ...hdb_core.train.settings import Settings
from .batches import ManyDenoiser
from .differentiable import differentiable
from .photos import encode, is_empty

Parts = tuple[Any, Any, Any]  # MODEL, CLIP, VAE
_UNREAD = "clip_h.transformer.text_model.encoder.layers.23."  # of SD 2.x; files converted from diffusers lack it
# In a text encoder; those that read pictures, too, come without that part.
_OF_WORDS = re.compile(r"^(?!.*vis)(.*\.)?((layers|block|resblocks)\.\d|embed_tokens|token_embedding|shared)\.")
_OWN = (".weight", ".bias")  # what a layer is made of
_DISPENSABLE = (  # the host has values of its own
    "logit_scale", "text_projection.weight", "vae_scale", "vae_shift", "scale_weight", "scale_input", "weight_scale", "input_scale",
)  # fmt: skip


class HostModel:
    """`BaseModel` over the host's MODEL and VAE."""

    def __init__(self, denoiser: BatchDenoiser, model: Any, vae: Any, identity: str) -> None:
        self.denoiser, self.model, self.vae, self.identity = denoiser, model, vae, identity

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Model-space latents (N, C, h, w) float32 of pixels (N, 3, H, W) in 0..1."""
        return encode(self.model, self.vae, pixels).to(self.denoiser.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) float32 in 0..1 of model-space latents (N, C, h, w)."""
        return self.vae.decode(self.model.model.process_latent_out(latents)).movedim(-1, 1).float()


@contextmanager
def opened(model: Any, clip: Any, vae: Any, convolutions: bool, identity: str) -> Iterator[BaseModel]:
    """MODEL, CLIP and VAE of an identity as the base model of a training, valid within the context."""
    with differentiable(model, clip, convolutions=convolutions, prompts=None) as denoiser:
        yield HostModel(ManyDenoiser(denoiser), model, vae, identity)


@contextmanager
def loaded(settings: Settings) -> Iterator[BaseModel]:
    """The base model of a training, valid within the context.

    Raises:
        HyperNetError: a file is missing, damaged or of another kind, or a setting is of diffusers alone.
    """
    if settings.prediction_type or settings.tokenizer:
        raise HyperNetError(
            "ComfyUI knows what a checkpoint predicts and reads. Leave prediction_type and tokenizer out."
        )
    extra = Path(folder_paths.base_path, "extra_model_paths.yaml")
    if extra.is_file():
        load_extra_path_config(str(extra))

    def refusal(why: str) -> HyperNetError:
        return HyperNetError(
            f"ComfyUI cannot load {settings.model} or a file beside it ({why.splitlines()[0]}). Download it again, or give "
            "another model."
        )

    with garbled_as(refusal), torch.inference_mode():
        parts, files = _of_three(settings) if settings.text_encoders or settings.vae else _of_checkpoint(settings)
    with opened(*parts, settings.convolutions, identity_of(files)) as base:
        with garbled_as(
            lambda why: HyperNetError(
                f"A first step of {settings.model} on a tiny picture fails ({why.splitlines()[0]}). Give a text-to-image model, and "
                "the text encoders and the VAE that belong to it."
            )
        ):
            try_base(base)
        yield base


def _of_checkpoint(settings: Settings) -> tuple[Parts, list[Path]]:
    """MODEL, CLIP and VAE of *Load Checkpoint*, and their file."""
    path = _file("checkpoints", settings.model, "model")
    with _missing_weights() as missing:
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(path))
    if model is None or clip is None or is_empty(vae):
        raise HyperNetError(
            f"{path} is no whole checkpoint, with MODEL, CLIP and VAE. Give the others by text_encoders, clip_type and vae."
        )
    for root in (model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model):
        missing.refuse(path, root)
    return (model, clip, vae), [path]


def _of_three(settings: Settings) -> tuple[Parts, list[Path]]:
    """MODEL, CLIP and VAE of *Load Diffusion Model*, *Load CLIP* and *Load VAE*, and their files."""
    diffusion = _file("diffusion_models", settings.model, "model")
    texts = [_file("text_encoders", name, "text_encoders") for name in settings.text_encoders]
    pixels = _file("vae", settings.vae, "vae")
    types = {kind.name.lower(): kind for kind in comfy.sd.CLIPType}
    if settings.clip_type not in types or not texts:
        raise HyperNetError(
            f"Expected text_encoders, and as clip_type one of {', '.join(types)}; got {settings.clip_type!r}. Set them as in "
            "Load CLIP."
        )
    with _missing_weights() as missing:
        with garbled_as(
            lambda why: HyperNetError(
                f"{', '.join(settings.text_encoders)} cannot be loaded as text encoder of the clip_type {settings.clip_type!r} "
                f"({why.splitlines()[0]}). Set text_encoders and clip_type as in Load CLIP."
            )
        ):
            clip = comfy.sd.load_clip(
                list(map(str, texts)), folder_paths.get_folder_paths("embeddings"), types[settings.clip_type]
            )
            if 2 * len(missing.of(clip.cond_stage_model)) > len(clip.cond_stage_model.state_dict()):
                raise ValueError("most of its weights are missing")
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(pixels)))
        vae.throw_exception_if_invalid()
        model = comfy.sd.load_diffusion_model(str(diffusion))
    missing.refuse(", ".join(map(str, texts)), clip.cond_stage_model, _OF_WORDS)
    missing.refuse(diffusion, model.model.diffusion_model)
    missing.refuse(pixels, vae.first_stage_model)
    return (model, clip, vae), [diffusion, *texts, pixels]


class _Missing:
    """The names of weights that files lacked, by module. The host leaves these as the memory happens to be.

    And of quantised weights whose scales the host has passed over: it takes them for the weights themselves.
    """

    def __init__(self) -> None:
        self._names: dict[nn.Module, list[str]] = {}
        self._quantised: dict[nn.Module, str] = {}

    def note(
        self, module: nn.Module, kinds: Mapping[str, str], missing: Sequence[str], unexpected: Sequence[str]
    ) -> None:
        """What a module and those below lack, but for what the host does without, and what it has made nothing of.

        Args:
            kinds: of all tensors by name, see `quantised`.
        """
        self._names[module] = [n for n in missing if not n.endswith(_DISPENSABLE) and not n.startswith(_UNREAD)]
        passed_over = set(unexpected)
        taken = {name.rpartition(".")[0] for name in kinds if name not in passed_over and not name.endswith(_OWN)}
        # Integers with a scale that the host has taken are none of these any more.
        left = {name: kind for name, kind in kinds.items() if name in passed_over or name.endswith(_OWN)}
        self._quantised[module] = quantised({n: "F16" if n.rpartition(".")[0] in taken else k for n, k in left.items()})

    def of(self, root: nn.Module) -> list[str]:
        """What a model lacks, and its parts."""
        return [name for module in root.modules() for name in self._names.get(module, ())]

    def refuse(self, path: Path | str, root: nn.Module, needed: re.Pattern[str] | None = None) -> None:
        """Check that a file had all weights of a model, and that the host reads them if they are quantised.

        Args:
            needed: names of weights that must not be missing; None is all.

        Raises:
            HyperNetError, LayoutError: if not.
        """
        if name := next(filter(None, (self._quantised.get(module) for module in root.modules())), ""):
            raise quantised_weights(path, name)
        if names := [name for name in self.of(root) if needed is None or needed.search(name)]:
            raise HyperNetError(
                f"{path} lacks {len(names)} of the weights that ComfyUI looks for in it, the first is {names[0]}. Download it "
                "again, or give another model."
            )


@contextmanager
def _missing_weights() -> Iterator[_Missing]:
    """Notes what is missing in the files that the host loads within the context."""
    missing, load = _Missing(), nn.Module.load_state_dict

    def noted(module: nn.Module, *args: Any, **options: Any) -> Any:
        tensors = args[0] if args else options["state_dict"]
        kinds = {name: KINDS.get(tensor.dtype, "") for name, tensor in tensors.items()}
        result = load(module, *args, **options)
        missing.note(module, kinds, result.missing_keys, result.unexpected_keys)
        return result

    with patch.object(nn.Module, "load_state_dict", noted):
        yield missing


def _file(folder: str, name: str, setting: str) -> Path:
    """A file by its path, or by its name in one of ComfyUI's folders.

    Raises:
        HyperNetError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    if path := folder_paths.get_full_path(folder, name):
        return Path(path)
    raise HyperNetError(f"There is no {name!r} in models/{folder}. Give {setting} a name there, or a path.")
