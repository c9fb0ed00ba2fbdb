"""A hypernetwork in the host: read at first use, moved between devices by the host's memory management."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...hdb_core.errors import HyperNetError
from ...hdb_core.files import hypernet as hypernet_file
from ...hdb_core.hypernet import HyperNetConfig, predict, preprocess
from ...hdb_core.images import as_rgb
from ...hdb_core.lidb import LiDB
from .folders import learned_basis


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
        self.config: HyperNetConfig = hypernet_file.read_header(path).config
        self._patcher: ModelPatcher | None = None
        encoder = self.config.encoder
        if encoder.kind == "clip_vision" and clip_vision is None:
            raise HyperNetError(
                f"{path.name!r} reads photos through the image encoder {encoder.name!r}, but clip_vision is not connected. "
                "Connect Load CLIP Vision with that model."
            )

    def predict(self, image: Tensor) -> LiDB:
        """The person on photos (N, H, W, 3) in 0..1.

        Raises:
            HyperNetFileError: the file is damaged.
            HyperNetError: the photos or the connected CLIP_VISION cannot be used.
        """
        pixels = preprocess(image, self.config.encoder)
        net = self._loaded().model
        device = next(net.parameters()).device  # with --novram the host leaves it where it was
        if self.config.encoder.kind == "vit":
            tokens = net.encode(pixels.to(device))
        else:
            tokens = self._clip_tokens(image).to(device)
        return predict(net, tokens)

    def _loaded(self) -> ModelPatcher:
        if self._patcher is None:
            net = hypernet_file.load(self.path, learned_basis(self.config.basis))
            device, rest = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
            self._patcher = ModelPatcher(net, load_device=device, offload_device=rest)
        comfy.model_management.load_models_gpu([self._patcher], force_full_load=True)
        return self._patcher

    def _clip_tokens(self, image: Tensor) -> Tensor:
        encoder = self.config.encoder
        tokens = self.clip_vision.encode_image(as_rgb(image, HyperNetError).movedim(1, -1))[
            "penultimate_hidden_states"
        ].float()
        expected = (encoder.num_tokens, encoder.token_width)
        if tuple(tokens.shape[1:]) != expected:
            raise HyperNetError(
                f"{self.path.name!r} was trained with {encoder.name!r}, which gives {expected[0]} tokens of width "
                f"{expected[1]}, but the connected CLIP_VISION gives {tokens.shape[1]} of width {tokens.shape[2]}. "
                "Connect the model that it was trained with."
            )
        return tokens
