"""How much pictures are alike to the user's CLIP_VISION."""

from __future__ import annotations

from comfy.clip_vision import ClipVisionModel
from torch import Tensor
from torch.nn import functional


def similarities(clip_vision: ClipVisionModel, photos: Tensor, pictures: Tensor) -> list[float]:
    """The cosine of each picture's embedding to the mean one of the photos; both (N, 3, H, W) in 0..1."""
    reference, own = _embeddings(clip_vision, photos).mean(0, keepdim=True), _embeddings(clip_vision, pictures)
    return functional.cosine_similarity(reference, own).tolist()


def _embeddings(clip_vision: ClipVisionModel, pixels: Tensor) -> Tensor:
    """Of length 1, (N, D). SigLIP gives one for each part of the picture, of which the mean is taken."""
    found = clip_vision.encode_image(pixels.movedim(1, -1))["image_embeds"].float()
    return functional.normalize(found.mean(1) if found.ndim == 3 else found, dim=-1)
