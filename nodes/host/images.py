"""IMAGE and MASK at the border: checks, the size that training uses, model-space latents."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE

from ...hdb_core.errors import FinetuneError

MIN_SIDE = 64  # pixels: a smaller face has nothing to learn from, and 8 latents a side are the least a UNet takes
NATIVE_RESOLUTION = {"sd1": 512, "sd2": 768, "sdxl": 1024}


def photo_size(height: int, width: int, resolution: int, family: str, multiple: int) -> tuple[int, int]:
    """Size of a photo for training: its aspect, about ``resolution`` × ``resolution`` pixels.

    Args:
        resolution: 0 keeps the photo's own size, at most the model family's usual one.
        multiple: both sides are rounded to a multiple of this.

    Raises:
        FinetuneError: a side is shorter than 64 pixels before or after resizing.
    """
    if min(height, width) < MIN_SIDE:
        raise FinetuneError(
            f"The photo is {width} × {height} pixels, but each side must have at least {MIN_SIDE}. "
            "Connect a larger photo of the face to image."
        )
    area = height * width
    wanted = resolution**2 if resolution else min(area, NATIVE_RESOLUTION[family] ** 2)
    scale = (wanted / area) ** 0.5
    size = tuple(round(side * scale / multiple) * multiple for side in (height, width))
    if min(size) < MIN_SIDE:
        raise FinetuneError(
            f"A photo of {width} × {height} pixels becomes {size[1]} × {size[0]} for training, but each side must "
            f"keep at least {MIN_SIDE}. Crop the photo to the face, or raise resolution."
        )
    return size


def checked_photos(image: torch.Tensor | None) -> torch.Tensor:
    """IMAGE (B, H, W, 1..4) as float RGB (B, 3, H, W) in 0..1.

    Raises:
        FinetuneError: no photo, a wrong shape, or values that are not finite.
    """
    if image is None or image.numel() == 0:
        raise FinetuneError("There is no photo: image is empty. Connect Load Image with the person's photo to it.")
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise FinetuneError(
            f"image must be (batch, height, width, 3), got {tuple(image.shape)}. Connect the IMAGE output of Load Image."
        )
    if not torch.isfinite(image).all():
        raise FinetuneError("The photo contains NaN or infinite values. Check the node that makes it.")
    pixels = image.movedim(-1, 1).float()
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3]


def encode(model: ModelPatcher, vae: VAE, pixels: torch.Tensor) -> torch.Tensor:
    """Model-space latents (B, C, h, w) float32 of RGB pixels (B, 3, H, W) in 0..1.

    Raises:
        FinetuneError: the VAE belongs to another model family.
    """
    latents = vae.encode(pixels.movedim(1, -1))
    channels = model.model.latent_format.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise FinetuneError(
            f"The MODEL takes latents of {channels} channels, the VAE makes {tuple(latents.shape[1:])}. "
            "Connect the VAE that belongs to the checkpoint."
        )
    return model.model.process_latent_in(latents).float()


def checked_mask(mask: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
    """MASK (B, H, W) as (B, 1, H, W), of the size of the photos (N, 3, H, W).

    Raises:
        FinetuneError: nothing is marked, or the mask is of another size or for another number of photos.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    if len(mask) not in (1, len(photos)):
        raise FinetuneError(
            f"There are {len(photos)} photos and {len(mask)} masks. Connect one MASK for all, one for each, or none."
        )
    if not (mask > 0).flatten(1).any(1).all():
        raise FinetuneError("The mask is empty. Paint the face in the Mask Editor of Load Image, or connect no MASK.")
    if mask.shape[-2:] != photos.shape[-2:]:
        raise FinetuneError(
            f"The photo has {photos.shape[-1]} × {photos.shape[-2]} pixels, the mask {mask.shape[-1]} × {mask.shape[-2]}. "
            "Connect the MASK output of the node that loads the photo, or connect no MASK."
        )
    return mask
