"""A single-file SD 1.x, SD 2.x or SDXL checkpoint as diffusers modules; nothing is downloaded.

Names are translated by diffusers' own converters. Their callers in diffusers fetch the sizes from the internet; here the
sizes are read off the tensors, so that smaller models of the same make load as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...errors import LayoutError
from ...files.reading import GARBLED, garbled_as, reason, regular
from ...prompt import CLASS_PROMPT
from .local import quantised, quantised_weights

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_CLIP_XL, _OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_SIZES = "label_emb.0.0.weight"  # of SDXL's UNet, which reads pooled text and sizes
_LATENT_FACTOR, _LATENT_FACTOR_XL = 0.18215, 0.13025
_SIZE_WIDTH = 256  # that SDXL encodes each size in
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_HEAD_WIDTH = 64  # of CLIP, SD 2.x and SDXL; SD 1.x has 8 heads of any width
KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_READ_OF_OPEN_CLIP = 23  # layers of OpenCLIP-H that SD 2.x reads; files converted from diffusers have no more
_MOST_LAYERS = 48  # of a text encoder, or blocks of a UNet; the largest of these families has 32
_MOST_DEPTH = 100  # transformer blocks on the way down; SDXL has 24
_TOKENIZERS = ("tokenizer", "comfy/sd1_tokenizer", ".comfyui/ComfyUI/comfy/sd1_tokenizer")
GIVE_TOKENIZER = (
    "Add --set tokenizer=FOLDER, a folder with CLIP's vocab.json and merges.txt: comfy/sd1_tokenizer of a ComfyUI, or "
    "the tokenizer folder of a diffusers model."
)

Tensors = Mapping[str, Tensor]


class TextEncoder(NamedTuple):
    """A text encoder with its tokenizer."""

    model: Any  # CLIPTextModel or CLIPTextModelWithProjection
    tokenizer: Any  # CLIPTokenizer


class Parts(NamedTuple):
    """What diffusers has of a base model."""

    unet: Any  # UNet2DConditionModel
    texts: tuple[TextEncoder, ...]
    vae: Any  # AutoencoderKL or AutoencoderTiny
    scheduler: Any  # DDPMScheduler


def read_single_file(
    path: Path, dtype: torch.dtype, tokenizer: Path | None = None, prediction_type: str | None = None
) -> Parts:
    """Read a ``.safetensors`` checkpoint.

    Args:
        path: of the file.
        dtype: of UNet and text encoders; the VAE is float32, because a full one overflows in float16.
        tokenizer: folder of CLIP's vocabulary; None looks for it, see `find_tokenizer`.
        prediction_type: "epsilon" or "v_prediction"; None is what the file says, epsilon if nothing. Those of SD
            2.x cannot say it.

    Raises:
        FileNotFoundError: if no tokenizer is found.
        LayoutError: if the file is no SD 1.x, SD 2.x or SDXL checkpoint, its weights are quantised, or it is not known what
            it predicts.
    """
    from diffusers import DDPMScheduler

    stored = _read(path)
    if name := quantised({name: KINDS.get(tensor.dtype, "") for name, tensor in stored.items()}):
        raise quantised_weights(path, name)
    checkpoint = {name: t.to(torch.float32 if name.startswith(_VAE) else dtype) for name, t in stored.items()}
    is_open_clip = bool(_below(checkpoint, _OPEN_CLIP))
    if prediction_type is None and is_open_clip:
        raise LayoutError(
            f"{path} is an SD 2.x checkpoint, and such a file does not say what it predicts. Add --prediction-type "
            "epsilon (the 512 px base models) or --prediction-type v_prediction (the 768 px models)."
        )
    if strange := [name for name in ("edm_mean", "edm_vpred.sigma_max") if name in checkpoint]:
        raise _unknown("noise schedule", f"{strange[0]} says that it is EDM's")
    if prediction_type is None and "v_pred" in checkpoint:
        prediction_type = "v_prediction"
    scheduler = DDPMScheduler(
        **_SCHEDULE, prediction_type=prediction_type or "epsilon", rescale_betas_zero_snr="ztsnr" in checkpoint
    )
    vocabulary = tokenizer or find_tokenizer(path)
    texts = [TextEncoder(text_encoder_of(checkpoint), load_tokenizer(vocabulary))]
    if is_open_clip:
        texts[0].tokenizer.pad_token = "!"  # token 0, as OpenCLIP pads
    elif _is_xl(checkpoint):
        texts.append(TextEncoder(second_text_encoder_of(checkpoint), load_tokenizer(vocabulary)))
        texts[1].tokenizer.pad_token = "!"
    return Parts(unet_of(checkpoint), tuple(texts), vae_of(checkpoint), scheduler)


def find_tokenizer(path: Path) -> Path:
    """CLIP's vocabulary, in a diffusers folder or a ComfyUI that holds the model file or this package.

    Raises:
        FileNotFoundError: if there is none.
    """
    for parent in (*path.resolve().parents, *Path(__file__).resolve().parents):
        if folders := [parent / name for name in _TOKENIZERS if _is_tokenizer(parent / name)]:
            return folders[0]
    raise FileNotFoundError(f"A single file holds no tokenizer, and there is none around {path}. {GIVE_TOKENIZER}")


def load_tokenizer(folder: Path) -> Any:
    """The CLIPTokenizer of a folder.

    Raises:
        FileNotFoundError: if it has none.
        LayoutError: if it is damaged or of another kind.
    """
    from transformers import CLIPTokenizer

    if not _is_tokenizer(folder):
        raise FileNotFoundError(f"{folder} holds no tokenizer. {GIVE_TOKENIZER}")
    with garbled_as(lambda why: LayoutError(f"The tokenizer in {folder} is damaged ({why}). {GIVE_TOKENIZER}")):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer(CLASS_PROMPT)  # a vocabulary of another kind loads, too
        return tokenizer


def unet_of(checkpoint: Tensors) -> Any:
    """The UNet2DConditionModel of a checkpoint.

    Raises:
        LayoutError: if there is none of the known form.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with _known("UNet"):
        config = _unet_config(_below(checkpoint, _UNET))
        if config["in_channels"] != 4:
            raise _unknown("UNet", f"it takes {config['in_channels']} channels, as those for inpainting do")
        state = convert_ldm_unet_checkpoint(checkpoint, config)
        with _no_weights():
            unet = UNet2DConditionModel(**config)
        return _filled(unet, state, "UNet")


def text_encoder_of(checkpoint: Tensors) -> Any:
    """The CLIPTextModel of a checkpoint, of SDXL the first; of SD 2.x without its last layer, which is not read there.

    Raises:
        LayoutError: if there is none of the known form.
    """
    from transformers import CLIPTextModel

    with _known("text encoder"):
        for prefix in (_CLIP, _CLIP_XL):
            if _below(checkpoint, prefix):
                return _text_encoder(CLIPTextModel, checkpoint, prefix)
        layers = _count(_below(checkpoint, _OPEN_CLIP), r".*resblocks\.(\d+)\.")
        return _text_encoder(CLIPTextModel, checkpoint, _OPEN_CLIP, unread=int(layers != _READ_OF_OPEN_CLIP))


def second_text_encoder_of(checkpoint: Tensors) -> Any:
    """The CLIPTextModelWithProjection of an SDXL checkpoint, OpenCLIP-G.

    Raises:
        LayoutError: if there is none of the known form.
    """
    from transformers import CLIPTextModelWithProjection

    with _known("text encoder"):
        return _text_encoder(CLIPTextModelWithProjection, checkpoint, _OPEN_CLIP_XL)


def _text_encoder(kind: Any, checkpoint: Tensors, prefix: str, unread: int = 0) -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
    from transformers import CLIPTextConfig

    is_open_clip = prefix in (_OPEN_CLIP, _OPEN_CLIP_XL)
    try:
        sizes = _text_sizes(_below(checkpoint, prefix))
    except StopIteration as error:
        wanted = "OpenCLIP-G" if prefix == _OPEN_CLIP_XL else "CLIP-L or OpenCLIP-H"
        raise _unknown("text encoder", f"{wanted} is not there") from error
    if is_open_clip:
        sizes |= {"num_hidden_layers": sizes["num_hidden_layers"] - unread, "hidden_act": "gelu"}
    with _no_weights():
        model = kind(CLIPTextConfig(**sizes))
    if is_open_clip:
        state = convert_open_clip_checkpoint(model, checkpoint, prefix)
    else:
        state = convert_ldm_clip_checkpoint(checkpoint)
    # Newer versions of transformers have one level of names less, in some models.
    nested = any(name.startswith("text_model.") for name in model.state_dict())
    if not nested:
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    return _filled(model, state, "text encoder")


def vae_of(checkpoint: Tensors) -> Any:
    """The AutoencoderKL of a checkpoint, or its AutoencoderTiny where it holds a TAESD.

    Raises:
        LayoutError: if there is none of the known form.
    """
    own, factor = _below(checkpoint, _VAE), _LATENT_FACTOR_XL if _is_xl(checkpoint) else _LATENT_FACTOR
    with _known("VAE"):
        return _tiny_vae(own, factor) if "taesd_encoder.0.weight" in own else _kl_vae(own, checkpoint, factor)


def _tiny_vae(own: Tensors, factor: float) -> Any:
    from diffusers import AutoencoderTiny

    if float(own.get("vae_shift", 0)):
        raise _unknown("VAE", f"its latents are shifted by {float(own['vae_shift'])}")
    state = {}
    for name, tensor in own.items():
        if match := re.fullmatch(r"taesd_(encoder|decoder)\.(\d+)\.(.*)", name):
            # The decoder counts a clamp as its first layer, which diffusers does not.
            state[f"{match[1]}.layers.{int(match[2]) - (match[1] == 'decoder')}.{match[3]}"] = tensor
    with _no_weights():
        vae = AutoencoderTiny(scaling_factor=factor / float(own.get("vae_scale", 1)))
    return _filled(vae, state, "VAE")


def _kl_vae(own: Tensors, checkpoint: Tensors, factor: float) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = _count(own, r"encoder\.down\.(\d+)\.")
    config: dict[str, Any] = {
        "block_out_channels": [len(own[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(own, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": own["decoder.conv_in.weight"].shape[1],
        "scaling_factor": factor,
    }
    with _no_weights():
        vae = AutoencoderKL(**config)
    state = convert_ldm_vae_checkpoint(checkpoint, config)
    return _filled(vae, state, "VAE")


def _unet_config(own: Tensors) -> dict[str, Any]:
    """The arguments of UNet2DConditionModel, from tensors with the original names."""
    num_blocks = _count(own, r"input_blocks\.(\d+)\.")
    # A level is its residual blocks and the downsampling after them; the convolution in front counts as block 0.
    stride = next((i for i in range(1, num_blocks) if f"input_blocks.{i}.0.op.weight" in own), max(1, num_blocks))
    firsts = range(1, num_blocks, stride)
    channels = [len(own[f"input_blocks.{i}.0.in_layers.2.weight"]) for i in firsts]
    attends = [f"input_blocks.{i}.1.proj_in.weight" in own for i in firsts]
    middle = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    is_linear = own["middle_block.1.proj_in.weight"].ndim == 2  # of SD 2.x and SDXL
    depths = [_count(own, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in firsts]
    if (stride - 1) * sum(depths) > _MOST_DEPTH:
        raise ValueError(f"it has {(stride - 1) * sum(depths)} transformer blocks on the way down")
    added = {}
    if _SIZES in own:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _SIZE_WIDTH,
            "projection_class_embeddings_input_dim": own[_SIZES].shape[1],
        }
    return {
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": stride - 1,
        "in_channels": own["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(own["out.2.weight"]),
        "cross_attention_dim": own[middle].shape[1],
        "attention_head_dim": [width // _HEAD_WIDTH for width in channels] if is_linear else 8,  # diffusers: heads
        "use_linear_projection": is_linear,
        "transformer_layers_per_block": [max(1, depth) for depth in depths],
        **added,
    }


def _text_sizes(own: Tensors) -> dict[str, Any]:
    """The sizes of CLIPTextConfig, from tensors named as in either CLIP."""
    vocabulary, width = next(w.shape for n, w in own.items() if n.endswith("token_embedding.weight"))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": next(len(w) for n, w in own.items() if n.endswith(("fc1.weight", "c_fc.weight"))),
        "num_hidden_layers": _count(own, r".*(?:layers|resblocks)\.(\d+)\."),
        "num_attention_heads": width // _HEAD_WIDTH,
    }


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(regular(path))
    except (OSError, *GARBLED) as error:
        raise LayoutError(
            f"{path} cannot be read as a .safetensors checkpoint ({reason(error)}). Give --model such a file, or a diffusers folder."
        ) from error


def _is_xl(checkpoint: Tensors) -> bool:
    return _UNET + _SIZES in checkpoint


def _is_tokenizer(folder: Path) -> bool:
    return any((folder / vocabulary).is_file() for vocabulary in ("vocab.json", "tokenizer.json"))


def _below(checkpoint: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in checkpoint.items() if name.startswith(prefix)}


def _count(names: Tensors, pattern: str) -> int:
    """How many numbers a pattern finds at the start of the names; the highest could be any.

    Raises:
        ValueError: they are so many that building the layers would take long.
    """
    found = len({int(match[1]) for name in names if (match := re.match(pattern, name))})
    if found > _MOST_LAYERS:
        raise ValueError(f"it has {found} layers")
    return found


def _no_weights() -> Any:
    # Weights that are replaced at once need neither time nor the global generator.
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


@contextmanager
def _known(part: str) -> Iterator[None]:
    """Turns what tensors of another form raise, here and in diffusers, into one sentence.

    Raises:
        LayoutError: see `_unknown`.
    """
    try:
        yield
    except LayoutError:
        raise
    except (ArithmeticError, *GARBLED) as error:
        why = f"{error} is not there" if isinstance(error, KeyError) else reason(error)
        raise _unknown(part, why) from error


def _filled(module: Any, state: Tensors, part: str) -> Any:
    try:
        missing = module.load_state_dict(state, strict=False, assign=True).missing_keys
    except RuntimeError as error:
        raise _unknown(part, str(error)) from error
    if missing:
        raise _unknown(part, f"{len(missing)} of its tensors are not there, the first is {missing[0]}")
    return module


def _unknown(part: str, reason: str) -> LayoutError:
    return LayoutError(
        f"Training knows SD 1.x, SD 2.x and SDXL checkpoints; the {part} of this one is of another form ({reason}). "
        "Give --model a checkpoint of these, or a diffusers folder."
    )
