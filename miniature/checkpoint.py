"""The miniature's weights: packed for the repository, expanded to the single file that ComfyUI's stock loader reads.

``python -m miniature.checkpoint pack`` writes ``weights/`` from finished trainings; ``expand`` writes the checkpoint,
``diffusers`` the same model as a diffusers folder, which the training of the hypernetwork reads; ``people`` the example
people of the workflows.
Packed matrices are int8 with a float16 scale a row; token rows that no caption uses are left out and come back as zeros.
"""

import argparse
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from hdb_core.files import hypernet as hypernet_file
from hdb_core.files import lidb as lidb_file
from hdb_core.files import lora as lora_file
from hdb_core.files.atomic import replacing
from hdb_core.hypernet import predict, preprocess
from hdb_core.layout import ldm_block

from .packing import pack_tensors, read_packed, unpack_tensors

LATENT_FACTOR = 0.18215  # of the host: model-space latents are the VAE's times this
FORMAT = "hyperdreambooth-miniature"
BASE_FILE, VAE_FILE = "miniature_base.safetensors", "miniature_vae.safetensors"
HYPERNET_FILE, CONTROL_FILE = "miniature_hypernet.safetensors", "miniature_control.safetensors"
PHOTOS = Path(__file__).parent.parent / "example_workflows" / "input"
CLIP_LAYERS = 12
_HEADER = {"format": FORMAT, "version": "1"}
TOKEN_ROWS = "text_encoder.embeddings.token_embedding.rows"
_TOKEN_WEIGHT = "text_encoder.embeddings.token_embedding.weight"
_VOCABULARY = 49408

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
_ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def ldm_name(name: str, layers_per_block: int = 1) -> str:
    """The original Stable Diffusion name of a diffusers UNet parameter: "conv_in.weight" is "input_blocks.0.0.weight"."""
    for ours, theirs in _ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    section, level, kind, index, rest = re.fullmatch(
        r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)",
        name,
    ).groups()
    block = int(level or 0)
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers_per_block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers_per_block + 1) + layers_per_block}.2.{rest}"
    if kind == "resnets":
        module, leaf = rest.split(".", 1)
        rest = f"{_RESNET[module]}.{leaf}"
    return f"{ldm_block(section, block, kind, int(index), layers_per_block)}.{rest}"


def checkpoint_tensors(
    base: dict[str, torch.Tensor], vae: dict[str, torch.Tensor], vae_scale: float
) -> dict[str, torch.Tensor]:
    """The tensors of an SD 1.x checkpoint file.

    Args:
        base: unpacked weights of ``miniature.base``'s ``unet.*`` and ``text_encoder.*``, the token rows with their indices.
        vae: unpacked weights of ``AutoencoderTiny``.
        vae_scale: what raw encoder outputs are divided by, so that the host's factor brings them to unit variance.
    """
    out = {}
    for name, weight in base.items():
        if name.startswith("unet."):
            out["model.diffusion_model." + ldm_name(name.removeprefix("unet."))] = weight
    text = {name.removeprefix("text_encoder."): w for name, w in base.items() if name.startswith("text_encoder.")}
    rows = text.pop(TOKEN_ROWS.removeprefix("text_encoder.")).long()
    tokens = torch.zeros(_VOCABULARY, 768)
    tokens[rows] = text[_TOKEN_WEIGHT.removeprefix("text_encoder.")]
    text[_TOKEN_WEIGHT.removeprefix("text_encoder.")] = tokens
    first = {name: w for name, w in text.items() if name.startswith("encoder.layers.0.")}
    trained = 1 + max(int(name.split(".")[2]) for name in text if name.startswith("encoder.layers."))
    for layer in range(trained, CLIP_LAYERS):
        for name, weight in first.items():
            is_norm_weight = "layer_norm" in name and name.endswith("weight")
            identity = torch.ones_like(weight) if is_norm_weight else torch.zeros_like(weight)
            text[name.replace("layers.0.", f"layers.{layer}.")] = identity
    out |= {f"cond_stage_model.transformer.text_model.{name}": weight for name, weight in text.items()}
    for name, weight in vae.items():
        side, index, leaf = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.*)", name).groups()
        out[f"first_stage_model.taesd_{side}.{int(index) + (side == 'decoder')}.{leaf}"] = weight
    out["first_stage_model.vae_scale"] = torch.tensor(vae_scale)
    out["first_stage_model.vae_shift"] = torch.tensor(0.0)
    return {name: weight.half().contiguous() if weight.ndim else weight for name, weight in out.items()}


def expand(source_dir: Path, target: Path) -> None:
    """Writes the single-file checkpoint for the stock ``CheckpointLoaderSimple``, atomically.

    Args:
        source_dir: the repository's ``weights/``.
        target: the file to make, for example ``models/checkpoints/hdb_miniature.safetensors``.

    Raises:
        FileNotFoundError: A packed file is missing.
    """
    base, _ = read_packed(source_dir / BASE_FILE)
    vae, header = read_packed(source_dir / VAE_FILE)
    rows = base.pop(TOKEN_ROWS)
    tensors = checkpoint_tensors(
        unpack_tensors(base) | {TOKEN_ROWS: rows}, unpack_tensors(vae), float(header["vae_scale"])
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        save_file(tensors, partial, metadata={"format": FORMAT})


def write_diffusers(source_dir: Path, target: Path) -> None:
    """Writes the model as a diffusers folder: unet, text_encoder, tokenizer, vae, scheduler; float32.

    Args:
        source_dir: the repository's ``weights/``.
        target: the folder to make.

    Raises:
        FileNotFoundError: A packed file is missing.
        SetupError: ComfyUI, which carries the tokenizer, is not unpacked.
    """
    from diffusers import DDPMScheduler

    from .base import build_unet
    from .text import build_text_encoder, load_tokenizer
    from .vae import build_vae

    packed, _ = read_packed(source_dir / BASE_FILE)
    rows = packed.pop(TOKEN_ROWS).long()
    base = unpack_tensors(packed)
    vae, header = read_packed(source_dir / VAE_FILE)
    tokens = torch.zeros(_VOCABULARY, base[_TOKEN_WEIGHT].shape[1])
    tokens[rows] = base[_TOKEN_WEIGHT]
    base[_TOKEN_WEIGHT] = tokens
    parts = {"unet": build_unet(), "text_encoder": build_text_encoder(_VOCABULARY), "vae": build_vae()}
    for name in ("unet", "text_encoder"):
        own = {key.removeprefix(f"{name}."): weight for key, weight in base.items() if key.startswith(f"{name}.")}
        parts[name].load_state_dict(own)
    parts["vae"].load_state_dict(unpack_tensors(vae))
    parts["vae"].register_to_config(scaling_factor=LATENT_FACTOR / float(header["vae_scale"]))
    for name, part in parts.items():
        part.save_pretrained(target / name)
    load_tokenizer().save_pretrained(target / "tokenizer")
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDPMScheduler(**schedule, prediction_type="epsilon").save_pretrained(target / "scheduler")


def write_vae(folder: Path, vae: dict[str, torch.Tensor], std: float) -> None:
    """Writes ``miniature_vae.safetensors`` from float32 weights of ``AutoencoderTiny`` and the std of its raw latents."""
    header = _HEADER | {"vae_scale": repr(LATENT_FACTOR * std)}
    with replacing(folder / VAE_FILE) as partial:
        save_file({name: weight.half().contiguous() for name, weight in vae.items()}, partial, metadata=header)


def write_base(folder: Path, base: dict[str, torch.Tensor], rows: torch.Tensor) -> None:
    """Writes ``miniature_base.safetensors``.

    Args:
        folder: where to.
        base: float32 weights of ``miniature.base.Base``.
        rows: the token of each row of its token embedding, int64 (V,).
    """
    with replacing(folder / BASE_FILE) as partial:
        save_file(pack_tensors(base) | {TOKEN_ROWS: rows.to(torch.int32)}, partial, metadata=_HEADER)


@torch.no_grad()
def write_people(hypernet: Path, target: Path, photos: Path = PHOTOS) -> None:
    """Predicts the people that the example workflows load as saved ones, and writes one as an ordinary LoRA.

    Args:
        hypernet: its file.
        target: the host's ``models``; the files go to ``lidb`` and ``loras``.
        photos: ``hdb_person_N.png`` are the people, ``hdb_photo_alone.png`` is the LoRA.
    """
    net = hypernet_file.load(hypernet)
    for folder in ("lidb", "loras"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for path in (*sorted(photos.glob("hdb_person_*.png")), photos / "hdb_photo_alone.png"):
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 255)
        person = predict(net, net.encode(preprocess(pixels[None], net.config.encoder)))
        if path.stem.startswith("hdb_person"):
            lidb_file.save(
                person, target / "lidb" / f"{path.stem}.safetensors", lidb_file.DEFAULT_RANK, lidb_file.COMPACT
            )
        else:
            lora = target / "loras" / "hdb_example_lora.safetensors"
            lora.unlink(missing_ok=True)
            lora_file.save(person, lora)


def _pack(runs: Path, folder: Path) -> None:
    """Takes over what trainings packed; a file whose training is not there stays as it is."""
    places = {
        runs / "vae" / VAE_FILE: VAE_FILE,
        runs / "base" / BASE_FILE: BASE_FILE,
        runs / "control" / CONTROL_FILE: CONTROL_FILE,
        runs / "token" / "hypernet.safetensors": HYPERNET_FILE,
        runs / "hypernet" / HYPERNET_FILE: HYPERNET_FILE,  # of miniature.predictor, which needs no stage token
    }
    for made, name in places.items():
        if made.is_file():
            shutil.copy(made, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "expand", "people", "diffusers"))
    parser.add_argument("--runs", type=Path, default=Path(".runs"))
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent.parent / "weights")
    parser.add_argument("--target", type=Path, help="default: a file or folder of .runs")
    args = parser.parse_args()
    if args.command == "pack":
        _pack(args.runs, args.weights)
    elif args.command == "expand":
        expand(args.weights, args.target or args.runs / "hdb_miniature.safetensors")
    elif args.command == "people":
        models = args.target or args.runs / "models"
        write_people(models / "hyperdreambooth" / "hdb_miniature.safetensors", models)
    else:
        write_diffusers(args.weights, args.target or args.runs / "diffusers")


if __name__ == "__main__":
    main()
