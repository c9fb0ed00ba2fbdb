"""Photo to person."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hdb_core import lidb_file
from ..hdb_core.errors import FinetuneDiverged, HDBError
from ..hdb_core.finetune import STEPS_FROM_A_PREDICTION, FinetuneConfig
from ..hdb_core.lidb import LiDB
from .host.folders import save_to_output
from .host.training import Photos, finetune_in_host
from .plot import loss_image
from .types import CATEGORY, LIDB

DEFAULTS = FinetuneConfig()


class FastFinetune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastFinetune",
            display_name="Fast Finetune (LiDB)",
            category=CATEGORY,
            description="Learns a person from one photo, or several, into a LiDB of some 100 KB. MODEL and CLIP stay as they are.",
            inputs=[
                io.Model.Input("model", tooltip="The base model: SD 1.x, SD 2.x or SDXL. It is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint. It is not changed."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint; encodes the photo once."),
                io.Image.Input(
                    "image",
                    tooltip="One photo of the person, cropped to the face; a batch of photos of one person works too.",
                ),
                io.String.Input(
                    "prompt",
                    default=DEFAULTS.prompt,
                    tooltip="Names the person with a rare token, such as [v], that will mean them in your prompts.",
                ),
                io.String.Input(
                    "photo_words",
                    default=DEFAULTS.photo_words,
                    multiline=True,
                    placeholder="smiling, in a red shirt, at the beach",
                    tooltip="What the photo shows besides the person: smiling, in a red shirt, at the beach. Name expression, clothes and background: what is named does not become part of the person. Of several photos, a line each, in their order.",
                ),
                io.String.Input(
                    "class_prompt",
                    default=DEFAULTS.class_prompt,
                    tooltip="The same words without the token. Used for class_images.",
                ),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.steps,
                    min=1,
                    max=10000,
                    tooltip=f"Training steps; {STEPS_FROM_A_PREDICTION} are enough on going on from a predicted lidb. More steps follow the photo more closely and leave less freedom to the prompt.",
                ),
                io.Int.Input(
                    "rank",
                    default=DEFAULTS.rank,
                    min=1,
                    max=DEFAULTS.basis.max_rank,
                    tooltip="Rank of the LiDB; a lidb of a higher rank keeps its own. More follows the photo more closely and leaves less freedom to the prompt.",
                ),
                io.Boolean.Input(
                    "freeze_down",
                    default=DEFAULTS.freeze_down,
                    tooltip="Train only the up side: less of the person, and less of the photo's clothes and background where no photo_words name them.",
                ),
                io.Boolean.Input(
                    "convolutions",
                    default=True,
                    tooltip="Train the UNet's convolutions besides its attention: they draw the shapes of a face, and of everything else in the photo, so name that in photo_words.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=DEFAULTS.learning_rate,
                    min=1e-6,
                    max=1.0,
                    step=1e-4,
                    round=1e-6,
                    tooltip="Step size (Adam). Lower it for many steps, or if training diverges.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=DEFAULTS.batch_size,
                    min=1,
                    max=64,
                    tooltip="Noise levels per step. More are steadier, slower and take more memory.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    tooltip="The photo is resized to about resolution × resolution pixels, keeping its aspect. 0: the photo's size, at most 512 (SD 1.x), 768 (SD 2.x) or 1024 (SDXL).",
                ),
                io.Boolean.Input(
                    "train_text_encoder",
                    default=DEFAULTS.train_text_encoder,
                    tooltip="Train the text encoder together with the UNet: slower, and hardly better. What a lidb has there stays in any case.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=DEFAULTS.prior_weight,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Keeps other faces as they were while the person is learned. Above 0 it needs class_images.",
                ),
                io.Int.Input(
                    "seed",
                    default=DEFAULTS.seed,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,  # a new seed each time would train again for every picture
                    tooltip="Of noise and noise levels. The same seed gives the same person on the same machine.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Only the marked part of the photo is learned, for example the face without the background.",
                ),
                LIDB.Input("lidb", optional=True, tooltip="Continue from this LiDB instead of from nothing."),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="Pictures that the base model makes of class_prompt, for prior_weight.",
                ),
            ],
            outputs=[
                LIDB.Output(display_name="lidb", tooltip="The person. Connect Apply LiDB to Model and Save LiDB."),
                io.Image.Output(display_name="loss plot", tooltip="The loss of every step."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        vae: io.Vae.Type,
        image: io.Image.Type,
        resolution: int,
        convolutions: bool,
        mask: io.Mask.Type | None = None,
        lidb: LiDB | None = None,
        class_images: io.Image.Type | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        config = FinetuneConfig(**settings)
        photos = Photos(image, mask, class_images, resolution)
        try:
            result = finetune_in_host(model, clip, vae, photos, config, lidb, convolutions, cls.hidden.unique_id)
        except FinetuneDiverged as error:
            raise kept(error) from None
        plot = loss_image(result.losses)
        return io.NodeOutput(result.lidb, plot, ui=ui.PreviewImage(plot, cls=cls))


def kept(error: FinetuneDiverged) -> FinetuneDiverged:
    """The same error after its last good state was saved, saying where, or why not."""
    if not error.losses:
        return error
    try:
        path = save_to_output("lidb/diverged", lambda path: lidb_file.save(error.lidb, path))
        message = f"{error} The state before that step is kept in {path.name}; Load LiDB reads it."
    except (HDBError, OSError) as unsaved:
        message = f"{error} The state before that step could not be kept: {unsaved}"
    return FinetuneDiverged(message, error.lidb, error.losses, error.step)
