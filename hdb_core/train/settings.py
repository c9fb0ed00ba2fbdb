"""Every setting of a training: what ``RUN/config.json`` holds, in sections.

A section stands beside the code that it configures. ``docs/train-config.md`` is made from these docstrings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from ..basis import BasisRecipe
from ..diffusion import NoiseLevels
from ..errors import HDBError, HyperNetError, require
from ..files import container
from ..files import hypernet as hypernet_file
from ..files.fields import as_type
from ..hypernet import EncoderConfig
from ..prompt import CLASS_PROMPT, MOST_CHARACTERS
from .encoder_loss import PretrainConfig
from .evaluate import EvaluateConfig
from .fit import FitConfig
from .person_loss import TrainConfig
from .samples import SampleConfig

PRECISIONS = ("no", "bf16", "fp16")
PREDICTION_TYPES = ("", "epsilon", "v_prediction")
MOST = 1_000_000_000
MOST_BYTES = 10_000  # of a text
# What the file of a hypernetwork may hold, and what takes no absurd time or memory, by a setting's name or its last part.
LIMITS = {
    **hypernet_file.LIMITS,
    "max_iterations": hypernet_file.LIMITS["iterations"],
    "down_dim": container.MAX_DIM,
    "up_dim": container.MAX_DIM,
    "people": 100_000,
    "max_photos": 1000,
    "photos": 1000,
    "samples.steps": 1000,
    "draws": 10_000,
}
LEAST_SIDE = 8  # of a photo, for one place of latents
AT_LEAST_1 = (
    "rank", "group", "accumulate", "samples.steps", "evaluate.draws", "net.width", "net.depth", "net.heads", "net.code",
    "encoder.image_size", "encoder.token_width", "encoder.patch_size", "encoder.heads", "basis.down_dim", "basis.up_dim",
)  # fmt: skip


@dataclass(frozen=True)
class BasisSettings:
    """The frozen bases of all people.

    Attributes:
        seed: seed of the random bases.
        down_dim: a, the dimension of the input side. Lower makes smaller files and less likeness.
        up_dim: b, the dimension of the output side.
        learn_from: learn the basis from the photos of this many people; 64 are enough. 0 takes a random basis.
        file: use the learned basis of another run, ``RUN/basis.safetensors``.
    """

    seed: int = BasisRecipe.seed
    down_dim: int = BasisRecipe.down_dim
    up_dim: int = BasisRecipe.up_dim
    learn_from: int = 0
    file: str = ""


@dataclass(frozen=True)
class EncoderSettings:
    """The image encoder that the stage pretrain trains; not used with ``clip_vision``.

    Attributes:
        image_size: side of the square photos that the encoder reads, pixels.
        token_width: width of the face tokens.
        patch_size: patch of the ViT, pixels; with a stem, that of its first convolution.
        stem: residual convolutions before the ViT, (width, blocks) of each stage; every stage after the first halves
            the map.
        summary: tokens that summarise a photo, at least 1.
        depth: layers of the ViT.
        heads: attention heads of the ViT.
        cut: how the training photos were cut, and photos for the hypernetwork must be cut: face, by ``python -m
            hdb_core.train.photos --cut face``, which sets it, or like FFHQ and CelebA-HQ; centre is not cut to the face.
    """

    image_size: int = EncoderConfig.image_size
    token_width: int = EncoderConfig.token_width
    patch_size: int = EncoderConfig.patch_size
    stem: tuple[tuple[int, int], ...] = EncoderConfig.stem
    summary: int = EncoderConfig.summary
    depth: int = EncoderConfig.depth
    heads: int = EncoderConfig.heads
    cut: str = EncoderConfig.cut


@dataclass(frozen=True)
class NetSettings:
    """The transformer that predicts a person.

    Attributes:
        width: width of the decoder's tokens.
        depth: decoder layers.
        heads: attention heads.
        code: size of the face code, from which every prediction starts.
        predict_down: predict the down side of each person, too, instead of sharing one. It pays where layers are much wider
            than the basis, as in real base models, and makes a file up to three times as large.
    """

    width: int = 256
    depth: int = 3
    heads: int = 4
    code: int = 96
    predict_down: bool = True


@dataclass(frozen=True)
class Settings:
    """The run as a whole.

    Attributes:
        model: base model on this disk, SD 1.x, SD 2.x or SDXL: a .safetensors checkpoint or a diffusers folder. For
            ComfyUI's loader, whatever it can load.
        photos: folder with a sub-folder of face photos for each person, or with single photos.
        prediction_type: epsilon or v_prediction; only an SD 2.x checkpoint file needs it, because it does not say.
        tokenizer: folder of CLIP's vocabulary, if neither the model nor a ComfyUI around it has one.
        text_encoders: files of the text encoders, as for *Load CLIP*, if ``model`` is only a diffusion model. Needs
            ComfyUI's loader (``python -m custom_nodes.PACK.train``).
        clip_type: their type in *Load CLIP* (such as lumina2) or *DualCLIPLoader* (flux).
        vae: file of the VAE, if ``model`` is only a diffusion model.
        clip_vision: transformers folder of a frozen CLIP, SigLIP or DINOv2 image encoder, instead of training one. Try
            it with few people, or with one photo of each.
        begin_with: an image encoder or a whole hypernetwork of another run to go on from, its ``encoder.safetensors`` or
            ``hypernet.safetensors``.
        precomputed: folder of another run whose latents, fitted people and tokens this one shares; missing ones are
            added to it.
        convolutions: adapt the convolutions of the UNet's residual blocks, too. Leave them out for smaller files and
            faster steps.
        image_size: side of the photos for the base model, pixels. Take what the base model was trained at.
        rank: rank of the predicted people. 4 can hold more of a person, in a file four times as large.
        prompt: the prompt of every person, with the rare token.
        class_prompt: the same without the token.
        held_out: share of the people who are not trained on, for evaluate and the sample grids.
        overfit: a check before a long training, in a run folder of its own: train on the first N people only, and
            evaluate on them. It should memorise 16 in a few hundred steps. 0 is no check.
        group: people in each file of precomputed latents; they are fitted together.
        accumulate: split the people of a step into this many parts, if memory is short; the result is the same.
        mixed_precision: bf16, fp16 (older GPUs), or no, which takes twice the memory.
        cpu: compute on the CPU even if there is a GPU.
        seed: seed of everything random.
    """

    model: str = ""
    photos: str = ""
    prediction_type: str = ""
    tokenizer: str = ""
    text_encoders: tuple[str, ...] = ()
    clip_type: str = ""
    vae: str = ""
    clip_vision: str = ""
    begin_with: str = ""
    precomputed: str = ""
    convolutions: bool = True
    image_size: int = 512
    rank: int = 1
    prompt: str = "a [v] face"
    class_prompt: str = CLASS_PROMPT
    held_out: float = 0.02
    overfit: int = 0
    group: int = 32
    accumulate: int = 1
    mixed_precision: str = "bf16"
    cpu: bool = False
    seed: int = 0
    basis: BasisSettings = field(default_factory=BasisSettings)
    fit: FitConfig = field(default_factory=FitConfig)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    net: NetSettings = field(default_factory=NetSettings)
    train: TrainConfig = field(default_factory=TrainConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        values = flat(self)
        for name, value in values.items():
            if not isinstance(value, bool) and isinstance(value, int):
                most = LIMITS.get(name, LIMITS.get(name.rpartition(".")[2], MOST))
                _require(0 <= value <= most, name, f"from 0 to {most:,}", value)
        _require(self.mixed_precision in PRECISIONS, "mixed_precision", " or ".join(PRECISIONS), self.mixed_precision)
        longest = max(len(self.prompt), len(self.class_prompt))
        _require(longest <= MOST_CHARACTERS, "prompts", f"at most {MOST_CHARACTERS:,} characters", longest)
        known = self.prediction_type in PREDICTION_TYPES
        _require(known, "prediction_type", "epsilon, v_prediction or nothing", self.prediction_type)
        for name in AT_LEAST_1:
            _require(values[name] >= 1, name, "at least 1", values[name])
        _require(self.image_size >= LEAST_SIDE, "image_size", f"at least {LEAST_SIDE} pixels", self.image_size)
        heads, width = self.net.heads, self.net.width
        _require(width % heads == 0, "net.width", f"a multiple of net.heads ({heads})", width)
        _require(0 < self.held_out < 1, "held_out", "a share between 0 and 1", self.held_out)
        if self.clip_vision and self.train.augment:
            raise HyperNetError(
                "Photos are augmented for a trained encoder only: the tokens of clip_vision are computed once. Leave "
                "train.augment or clip_vision out."
            )


# Of a machine.
PATHS = (
    "model",
    "photos",
    "tokenizer",
    "text_encoders",
    "vae",
    "clip_vision",
    "begin_with",
    "precomputed",
    "basis.file",
)


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its full name, ``train.steps``, as JSON takes it."""
    found: dict[str, Any] = {}
    for own in fields(settings):
        value, name = getattr(settings, own.name), prefix + own.name
        if isinstance(value, NoiseLevels):
            found[name] = [value.min_timestep, value.max_timestep]
        elif isinstance(value, tuple):
            found[name] = [list(item) if isinstance(item, tuple) else item for item in value]
        elif hasattr(value, "__dataclass_fields__"):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def changed(settings: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The same settings with some others, by their full names.

    Raises:
        HyperNetError: if there is no such setting, or a value is of another type or makes no sense.
    """
    own: dict[str, Any] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        present = getattr(settings, head, None)
        is_section = hasattr(present, "__dataclass_fields__") and not isinstance(present, NoiseLevels)
        if head not in settings.__dataclass_fields__ or is_section != bool(rest):
            raise HyperNetError(f"There is no setting {prefix + name!r:.100}; docs/train-config.md lists all of them.")
        if is_section:
            own.setdefault(head, {})[rest] = value
        else:
            own[head] = _converted(value, present, get_type_hints(type(settings))[head], prefix + name)
    sections = {
        name: changed(getattr(settings, name), value, f"{prefix}{name}.")
        for name, value in own.items()
        if isinstance(value, dict)
    }
    return replace(settings, **{**own, **sections})


def _converted(value: Any, present: Any, wanted: Any, name: str) -> Any:
    """A value of JSON as the annotated type of a setting."""
    try:
        if isinstance(present, NoiseLevels):
            return NoiseLevels(*as_type(_as_list(value), tuple[float, float], name))
        converted = as_type(_as_list(value), wanted, name)
        if isinstance(converted, str):
            _require_text(converted)
        return converted
    except HDBError:
        raise
    except (TypeError, ValueError):
        pass
    kinds = {NoiseLevels: "two numbers such as [0.1, 1.0]", tuple: "a list", str: "a text", bool: "true or false"}
    expected = kinds.get(type(present), "a whole number" if isinstance(present, int) else "a number")
    raise HyperNetError(f"Expected {name}: {expected}, got {value!r:.100}.")


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, tuple) else value


def _require_text(text: str) -> None:
    """Refuse what can be no name of a file, and no prompt.

    Raises:
        ValueError: also if it is no Unicode.
    """
    if "\0" in text or len(text.encode()) > MOST_BYTES:
        raise ValueError(text)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    require(holds, name, expected, got, HyperNetError)
