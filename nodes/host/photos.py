"""A person's photos and their mask at one size, and as latents of the model."""

from __future__ import annotations

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...hdb_core.errors import FinetuneError
from ...hdb_core.finetuning.batches import checked_mask
from ...hdb_core.images import as_rgb, resize_to_cover

MIN_SIDE = 64  # pixels: a smaller face has nothing to learn from, and 8 latents a side are the least a UNet takes
NATIVE_RESOLUTION = {"sd1": 512, "sd2": 768, "sdxl": 1024}


@dataclass(frozen=True)
class Photos:
    """What the user connects: IMAGE (N, H, W, 3), MASK (N or 1, H, W), IMAGE of the class, and the size to train at."""

    image: Tensor
    mask: Tensor | None = None
    class_images: Tensor | None = None
    resolution: int = 0

    def prepare(self, family: str, multiple: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Checked and cut to one size: pixels (N, 3, h, w), mask (N or 1, 1, h, w), class pixels (M, 3, h, w).

        Raises:
            FinetuneError: one of them cannot be used; the message says why.
        """
        pixels = as_rgb(self.image, FinetuneError)
        size = photo_size(*pixels.shape[-2:], self.resolution, family, multiple)
        mask = None if self.mask is None else resize_to_cover(mask_of(pixels, self.mask), size)
        others = None if self.class_images is None else resize_to_cover(as_rgb(self.class_images, FinetuneError), size)
        return resize_to_cover(pixels, size), mask, others


def photo_size(height: int, width: int, resolution: int, family: str, multiple: int) -> tuple[int, int]:
    """The size of a photo for the fine-tune: its aspect, about ``resolution`` × ``resolution`` pixels.

    Args:
        height: of the photo.
        width: of the photo.
        resolution: 0 keeps the photo's own size, at most the model family's usual one.
        family: of the model.
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


def mask_of(photos: Tensor, mask: Tensor) -> Tensor:
    """MASK (B, H, W) of photos (N, 3, H, W), as (B, 1, H, W).

    Raises:
        FinetuneError: it cannot be used (`checked_mask`), or is of another size.
    """
    mask = checked_mask(mask, len(photos))
    if mask.shape[-2:] != photos.shape[-2:]:
        raise FinetuneError(
            f"The photo has {photos.shape[-1]} × {photos.shape[-2]} pixels, the mask {mask.shape[-1]} × {mask.shape[-2]}. "
            "Connect the MASK output of the node that loads the photo, or connect no MASK."
        )
    return mask


def encode(model: ModelPatcher, vae: VAE, pixels: Tensor) -> Tensor:
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
