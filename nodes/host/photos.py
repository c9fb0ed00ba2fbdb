"""A person's photos and their mask at one size, and as latents of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...hdb_core.errors import FinetuneError
from ...hdb_core.faces import leaves_out_the_middle
from ...hdb_core.finetuning.batches import checked_mask
from ...hdb_core.images import as_rgb, resize_to_cover
from .faces import seen_in
from .lists import masks_of, of_each, pictures_of

MIN_SIDE = 64  # pixels: a smaller face has nothing to learn from, and 8 latents a side are the least a UNet takes
NATIVE_RESOLUTION = {"sd1": 512, "sd2": 768}
LARGE_RESOLUTION = 1024  # of all other families
LEVELS = {"sd1": 4, "sd2": 4, "sdxl": 3}  # of the family's UNet
SAME_ASPECT = 1.05  # photos whose aspects differ by more are cut to squares


@dataclass(frozen=True)
class Photos:
    """A person's photos as a fine-tune takes them.

    Attributes:
        pictures: (3, H, W) each, of any sizes.
        masks: (H, W) of each, or None.
        class_images: IMAGE (M, H, W, 3), or None.
        resolution: to train at; 0 takes the photos' own size, at most what the model was made for.
    """

    pictures: list[Tensor]
    masks: list[Tensor] | None = None
    class_images: Tensor | None = None
    resolution: int = 0

    @classmethod
    def of(
        cls,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None,
        class_images: Tensor | None,
        resolution: int,
    ) -> Photos:
        """The photos of lists of IMAGE (N, H, W, 1, 3 or 4) and MASK (N, H, W).

        Raises:
            FinetuneError: one of them cannot be used.
        """
        pictures = pictures_of(images, FinetuneError)
        own = of_each(masks_of(masks, FinetuneError), len(pictures), FinetuneError) or None
        return cls(pictures, own, class_images, resolution)

    def prepare(self, native: int, multiple: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Checked and cut to one size: pixels (N, 3, h, w), mask (N, 1, h, w), class pixels (M, 3, h, w).

        Args:
            native: side of the squares that the model was made for, pixels.
            multiple: see `photo_size`.

        Raises:
            FinetuneError: one of them cannot be used; the message says why.
        """
        size = photo_size(*common_size(self.pictures), self.resolution, native, multiple)
        pixels = torch.cat([resize_to_cover(picture[None], size) for picture in self.pictures])
        mask = None
        if self.masks is not None:
            pairs = zip(self.pictures, self.masks, strict=True)
            mask = torch.cat([resize_to_cover(mask_of(picture[None], own), size) for picture, own in pairs])
        others = None if self.class_images is None else resize_to_cover(as_rgb(self.class_images, FinetuneError), size)
        return pixels, mask, others

    def notes(self) -> list[str]:
        """What is to be said about them, a line each: how large the face is, and a mask that leaves it out."""
        inverted = [leaves_out_the_middle(mask) for mask in self.masks or ()]
        said = (
            ["the mask leaves out the middle of the photo: put Invert Mask before this node"] if any(inverted) else []
        )
        return said + seen_in(self.pictures)


def native_resolution(model: ModelPatcher, family: str) -> int:
    """Side of the pictures that a model was made for, in pixels.

    A UNet with fewer levels than its family's halves the picture so much less often, and was made for one that much smaller.
    """
    usual = LEVELS.get(family, 0)
    levels = len(model.model.model_config.unet_config.get("channel_mult", ())) or usual
    return NATIVE_RESOLUTION.get(family, LARGE_RESOLUTION) >> max(0, usual - levels)


def common_size(pictures: Sequence[Tensor]) -> tuple[int, int]:
    """(height, width) that stands for photos (3, H, W): of their median area; square if their aspects differ."""
    areas = sorted(picture.shape[1] * picture.shape[2] for picture in pictures)
    area, aspects = areas[len(areas) // 2], [picture.shape[2] / picture.shape[1] for picture in pictures]
    for picture in pictures if max(aspects) <= SAME_ASPECT * min(aspects) else ():
        if picture.shape[1] * picture.shape[2] == area:
            return picture.shape[1], picture.shape[2]
    return round(area**0.5), round(area**0.5)


def photo_size(height: int, width: int, resolution: int, native: int, multiple: int) -> tuple[int, int]:
    """The size of a photo for the fine-tune: its aspect, about ``resolution`` × ``resolution`` pixels.

    Args:
        height: of the photo.
        width: of the photo.
        resolution: 0 keeps the photo's own size, at most the model's usual one.
        native: the model's usual one.
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
    wanted = resolution**2 if resolution else min(area, native**2)
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


def is_empty(vae: VAE | None) -> bool:
    """Whether this is what the host gives for a checkpoint without a VAE."""
    return vae is None or getattr(vae, "first_stage_model", vae) is None


def encode(model: ModelPatcher, vae: VAE, pixels: Tensor) -> Tensor:
    """Model-space latents (B, C, h, w) float32 of RGB pixels (B, 3, H, W) in 0..1; (B, C, 1, h, w) of a video model.

    Raises:
        FinetuneError: the VAE is empty, or belongs to another model family.
    """
    if is_empty(vae):
        raise FinetuneError(
            "The checkpoint that the VAE comes from has none. Connect Load VAE with one for this model."
        )
    form = model.model.latent_format
    # One by one: the VAE of a video model takes several for the frames of one.
    latents = torch.cat([vae.encode(photo.movedim(0, -1)[None]) for photo in pixels])
    if form.latent_dimensions == 3 and latents.ndim == 4:
        latents = latents.unsqueeze(2)
    if latents.ndim != form.latent_dimensions + 2 or latents.shape[1] != form.latent_channels:
        raise FinetuneError(
            f"The MODEL takes latents of {form.latent_channels} channels, the VAE makes {tuple(latents.shape[1:])}. "
            "Connect the VAE that belongs to the checkpoint."
        )
    return model.model.process_latent_in(latents).float()
