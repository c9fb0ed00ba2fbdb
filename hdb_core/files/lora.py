"""A person as an ordinary LoRA file: some 50 times larger than a LiDB.

SD 1.x, SD 2.x and SDXL have the names that kohya's trainer gives, other families the host's own paths, which today's
LoRAs for them have, too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..basis import BasisRecipe, is_drawable
from ..card import made, picture_of
from ..errors import LiDBFileError
from ..layout import FAMILIES, HOST_PREFIX, Layer, Layout
from ..lidb import LiDB, expand_layer, is_finite, truncate
from .atomic import creating

_ONE_ENCODER = {"unet": "lora_unet", "text_encoder": "lora_te"}
PREFIXES = {
    "sd1": _ONE_ENCODER,
    "sd2": _ONE_ENCODER,
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
# A LiDB says of what size its layers are, and here no model is connected that has them. Of the largest models of today,
# a person of rank 50 takes half of these.
MAX_BYTES = 2_000_000_000  # at rank 50 or above: the work goes by the layers more than by the rank
MOST_LOST = 0.01  # of a person's norm, by rounding
METADATA = ("made_from", "prompt", "token", "photos", "steps", "model", "name")  # of `lidb.About`
# What kohya's trainer calls the base models, and what the model specification does.
BASE_MODELS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
ARCHITECTURES = {"sd1": "stable-diffusion-v1/lora", "sdxl": "stable-diffusion-xl-v1-base/lora"}


def save(lidb: LiDB, path: str | os.PathLike[str], title: str = "") -> int:
    """Write a person atomically to a new LoRA file in float16; the number of bytes.

    Args:
        lidb: the person.
        path: where; the folder must exist.
        title: of a person without a name; see `metadata`.

    Raises:
        FileExistsError: if the file is there.
        OSError: if it cannot be written.
        LiDBFileError: as `state_dict` does.
    """
    data = _in_order(safetensors.torch.save(state_dict(lidb), metadata(lidb, title)))
    with creating(Path(path)) as temporary:
        temporary.write_bytes(data)  # whose errors are the system's
    return len(data)


def metadata(lidb: LiDB, title: str = "") -> dict[str, str]:
    """What the file says about itself: in the fields that other programs read, and in those of `METADATA`.

    The trigger word, the base model, the name and the picture are where browsers of LoRA files look for them. A thumbnail
    that is no picture, in somebody else's LiDB, is left out.
    Source: the fields ``ss_…`` of kohya's sd-scripts, and ModelSpec 1.0.0, https://github.com/Stability-AI/ModelSpec.

    Args:
        lidb: the person.
        title: of the file, for a person without a name.
    """
    about, family = lidb.about, lidb.layout.family
    thumbnail = "" if picture_of(about) is None else f"data:image/jpeg;base64,{about.thumbnail}"
    texts = {f"lidb_{name}": str(getattr(about, name)) for name in METADATA} | {
        "ss_output_name": about.name or title,
        "ss_base_model_version": BASE_MODELS.get(family, family.lower()),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lidb.rank),
        "ss_network_alpha": str(float(lidb.rank)),
        "ss_num_train_images": str(about.photos),
        "ss_tag_frequency": json.dumps({f"1_{about.token}": {about.token: about.photos}}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES.get(family, ""),
        "modelspec.implementation": "diffusers",
        "modelspec.title": about.name or title,
        "modelspec.description": made(about),
        "modelspec.trigger_phrase": about.token,
        "modelspec.usage_hint": f"Prompt: {about.prompt}",
        "modelspec.category": "Person",
        "modelspec.thumbnail": thumbnail,
    }
    return {name: text.encode("utf-8", "replace").decode() for name, text in texts.items() if text}


def state_dict(lidb: LiDB) -> dict[str, Tensor]:
    """The tensors of the file: up (out, R), down (R, in) float16, alpha = R.

    Those of a convolution are kernels: up (out, R, 1, 1), down (R, in, k, k).

    Raises:
        LiDBFileError: if a layer has no name in such files, the file would be larger than any model's, or float16 does not
            hold the person.
    """
    if not is_finite(lidb):
        raise LiDBFileError("This LiDB holds NaN or infinity. Make the person again with a lower learning rate.")
    names = _keys(lidb.layout)
    _require_sizes(lidb)
    found: dict[str, Tensor] = {}
    whole = lost = 0.0
    # Truncation to its own rank leaves the person as it is and balances the factors: both stay in float16's range.
    balanced = truncate(lidb, lidb.rank)
    for index, (layer, key) in enumerate(names.items()):
        factors = expand_layer(balanced, index)
        up, down = (factor.half().contiguous() for factor in factors)
        for exact, rounded in zip(factors, (up, down), strict=True):
            whole += float(exact.double().square().sum())
            lost += float((exact.double() - rounded).square().sum())
        if size := layer.kernel_size:
            up, down = up[..., None, None], down.unflatten(1, (-1, size, size))
        found |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        found[f"{key}.alpha"] = torch.tensor(float(lidb.rank))
    if not lost <= MOST_LOST**2 * whole:
        raise LiDBFileError(
            "This person is too strong or too weak for the float16 numbers of a LoRA file. Make them again with another "
            "learning rate, or keep them with Save LiDB, which has no such limit."
        )
    return found


def _require_sizes(lidb: LiDB) -> None:
    layers = lidb.layout.layers
    size = 2 * max(lidb.rank, BasisRecipe().max_rank) * sum(layer.in_features + layer.out_features for layer in layers)
    if size > MAX_BYTES or not is_drawable(lidb.basis, layers):
        raise LiDBFileError(
            f"The {len(layers):,} layers of this LiDB are larger than those of any known model, too large for a LoRA file. "
            "Make the person again with the base model that you use."
        )


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted, which otherwise has another order each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _keys(layout: Layout) -> dict[Layer, str]:
    """The name of each layer in such files."""
    prefixes, found = PREFIXES.get(layout.family, {}), {}
    for layer in layout.layers:
        if layer.name.startswith(HOST_PREFIX):
            found[layer] = layer.name
            continue
        component, _, name = layer.name.partition(".")
        found[layer] = f"{prefixes.get(component)}_{name.replace('.', '_')}"
        if component not in prefixes or not name:
            raise LiDBFileError(
                f"Expected a LiDB of {', '.join(FAMILIES.values())}, got the layer {layer.name!r} of {layout.family!r}, which "
                "has no name in LoRA files. Make the person again with such a checkpoint."
            )
    if len(set(found.values())) < len(layout.layers):
        raise LiDBFileError("Two layers of this LiDB have the same name in LoRA files. Make the person again.")
    return found
