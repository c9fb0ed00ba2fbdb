"""A hypernetwork in the host: read at first use, moved between devices by the host's memory management."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import comfy.model_management
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...hdb_core.errors import HyperNetError
from ...hdb_core.files import hypernet as hypernet_file
from ...hdb_core.hypernet import HyperNetConfig, predict, preprocess
from ...hdb_core.lidb import LiDB
from .folders import learned_basis, require_digest


class HostHyperNet:
    """The value on a HYPERNET wire.

    Args:
        path: its file; only the header is read here.
        clip_vision: the user's image encoder, for a hypernetwork that was trained with one.

    Raises:
        HyperNetFileError: the file cannot be used.
        HyperNetError: it needs a CLIP_VISION and there is none.
    """

    def __init__(self, path: Path, clip_vision: ClipVisionModel | None) -> None:
        self.path, self.clip_vision = path, clip_vision
        header = hypernet_file.read_header(path)
        self.config: HyperNetConfig = header.config
        self._digest = header.fields["checksum"]
        self._patcher: ModelPatcher | None = None
        encoder = self.config.encoder
        if encoder.kind == "clip_vision" and clip_vision is None:
            raise HyperNetError(
                f"{path.name!r} reads photos through the image encoder {encoder.name!r}, but clip_vision is not connected. "
                "Connect Load CLIP Vision with that model."
            )

    def predict(self, pictures: Sequence[Tensor]) -> tuple[LiDB, list[str]]:
        """The person on photos (3, H, W) in 0..1 of any sizes, and what is to be said about the photos, a line each.

        Raises:
            HyperNetFileError: the file is damaged.
            HyperNetError: the photos or the connected CLIP_VISION cannot be used.
        """
        images = [picture.movedim(0, -1)[None] for picture in pictures]
        pixels = torch.cat([preprocess(image, self.config.encoder) for image in images])
        net = self._loaded().model
        device = next(net.parameters()).device  # with --novram the host leaves it where it was
        if self.config.encoder.kind == "vit":
            given = pixels.to(device)
            tokens = net.encode(given)
        else:
            given = tokens = torch.cat([self._clip_tokens(image) for image in images]).to(device)
        return predict(net, tokens), _unlike(net.unlike(given))

    def _loaded(self) -> ModelPatcher:
        if self._patcher is None:
            net = hypernet_file.load(self.path, learned_basis(self.config.basis))
            require_digest(hypernet_file.KIND, self.path, self._digest)
            device, rest = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
            self._patcher = ModelPatcher(net, load_device=device, offload_device=rest)
        comfy.model_management.load_models_gpu([self._patcher], force_full_load=True)
        return self._patcher

    def _clip_tokens(self, image: Tensor) -> Tensor:
        encoder = self.config.encoder
        tokens = self.clip_vision.encode_image(image)["penultimate_hidden_states"].float()
        expected = (encoder.num_tokens, encoder.token_width)
        if tuple(tokens.shape[1:]) != expected:
            raise HyperNetError(
                f"{self.path.name!r} was trained with {encoder.name!r}, which gives {expected[0]} tokens of width "
                f"{expected[1]}, but the connected CLIP_VISION gives {tokens.shape[1]} of width {tokens.shape[2]}. "
                "Connect the model that it was trained with."
            )
        return tokens


def _unlike(measured: Tensor | None) -> list[str]:
    """What is said of photos that are unlike those of the training; `HyperNet.unlike` of each."""
    if measured is None or not bool((measured > 1).any()):
        return []
    which = [str(number) for number, value in enumerate(measured.tolist(), 1) if value > 1]
    photos = (
        "this photo is"
        if len(measured) == 1
        else f"of these photos, {', '.join(which)} {'is' if len(which) == 1 else 'are'}"
    )
    return [f"{photos} unlike those that this hypernetwork was trained on: the person may come out as somebody else"]
