"""Photos to person."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io, ui

from ..hdb_core.errors import HDBError
from ..hdb_core.files import lidb as lidb_file
from ..hdb_core.finetuning import FinetuneConfig, FinetuneDiverged
from ..hdb_core.lidb import LiDB
from .host.finetune import FinetuneOptions, finetune_in_host
from .host.output import save_to_output
from .host.photos import Photos
from .plot import loss_image
from .types import CATEGORY, FINETUNE_OPTIONS, LIDB

DEFAULTS = FinetuneConfig()


class FastFinetune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastFinetune",
            display_name="Fast Finetune (LiDB)",
            category=CATEGORY,
            description="Learns a person from one or several photos into a LiDB of about 100 KB. MODEL and CLIP stay as they are.",
            inputs=[
                io.Model.Input("model", tooltip="The base model: SD 1.x, SD 2.x or SDXL. It is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint. It is not changed."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input(
                    "image", tooltip="A photo of the person, cropped to the face, or a batch of photos of one person."
                ),
                io.String.Input(
                    "prompt",
                    default=DEFAULTS.prompt,
                    tooltip="Names the person with a rare token, such as [v]. Use the token in your prompts.",
                ),
                io.String.Input(
                    "photo_words",
                    default=DEFAULTS.photo_words,
                    multiline=True,
                    placeholder="smiling, in a red shirt, at the beach",
                    tooltip="Captions: expression, clothes and background in the photo. What is named does not become part of the person. For several photos, one line each.",
                ),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.steps,
                    min=0,
                    max=10000,
                    tooltip="Training steps. 0 is automatic: few after Predict LiDB, more without a hypernetwork, most from several photos.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    tooltip="Train at about resolution × resolution pixels. 0: the photo's size, at most 512 (SD 1.x), 768 (SD 2.x) or 1024 (SDXL).",
                ),
                io.Int.Input(
                    "seed",
                    default=DEFAULTS.seed,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,  # a new seed each time would train again for every picture
                    tooltip="Seed of the noise. The same seed gives the same person on the same machine.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Only the marked part of the photo is learned, for example the face without the background.",
                ),
                LIDB.Input("lidb", optional=True, tooltip="Start from this person, for example from Predict LiDB."),
                FINETUNE_OPTIONS.Input(
                    "options", optional=True, tooltip="From Fast Finetune Options. Without it, the defaults there."
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
        prompt: str,
        photo_words: str,
        steps: int,
        resolution: int,
        seed: int,
        mask: io.Mask.Type | None = None,
        lidb: LiDB | None = None,
        options: FinetuneOptions | None = None,
    ) -> io.NodeOutput:
        options = options or FinetuneOptions()
        config = replace(options.config, prompt=prompt, photo_words=photo_words, steps=steps, seed=seed)
        photos = Photos(image, mask, options.class_images, resolution)
        try:
            result = finetune_in_host(
                model, clip, vae, photos, config, lidb, options.convolutions, cls.hidden.unique_id
            )
        except FinetuneDiverged as error:
            raise kept(error) from None
        plot = loss_image(result.losses)
        return io.NodeOutput(result.lidb, plot, ui=ui.PreviewImage(plot, cls=cls))


class FastFinetuneOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastFinetuneOptions",
            display_name="Fast Finetune Options",
            category=CATEGORY,
            description="Further settings of Fast Finetune. Its defaults are what Fast Finetune uses without this node.",
            inputs=[
                io.Int.Input(
                    "rank",
                    default=DEFAULTS.rank,
                    min=1,
                    max=DEFAULTS.basis.max_rank,
                    tooltip="Rank of the LiDB; a connected lidb of a higher rank keeps its own. More follows the photo more closely and the prompt less.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=DEFAULTS.learning_rate,
                    min=1e-6,
                    max=1.0,
                    step=1e-4,
                    round=1e-6,
                    tooltip="Learning rate of Adam. Lower it for many steps, or if training diverges.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=DEFAULTS.batch_size,
                    min=1,
                    max=64,
                    tooltip="Noise levels per step. More are steadier, slower and take more memory.",
                ),
                io.Boolean.Input(
                    "convolutions",
                    default=True,
                    tooltip="Train the UNet's convolutions besides its attention: more likeness, and more of whatever else the photo shows.",
                ),
                io.Boolean.Input(
                    "train_text_encoder",
                    default=DEFAULTS.train_text_encoder,
                    tooltip="Train the text encoder together with the UNet: slower, and hardly better.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=DEFAULTS.prior_weight,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Weight of DreamBooth's prior preservation loss, which keeps other faces as they were. Above 0 it needs class_images.",
                ),
                io.String.Input(
                    "class_prompt",
                    default=DEFAULTS.class_prompt,
                    tooltip="The prompt without the token, for prior_weight.",
                ),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="Pictures that the base model makes of class_prompt, for prior_weight.",
                ),
            ],
            outputs=[FINETUNE_OPTIONS.Output(display_name="options", tooltip="Connect Fast Finetune.")],
        )

    @classmethod
    def execute(
        cls, convolutions: bool, class_images: io.Image.Type | None = None, **settings: float | str
    ) -> io.NodeOutput:
        return io.NodeOutput(FinetuneOptions(FinetuneConfig(**settings), convolutions, class_images))


def kept(error: FinetuneDiverged) -> FinetuneDiverged:
    """The same error after its last good state was saved, saying where, or why not."""
    if not error.losses:
        return error
    try:
        path = save_to_output("lidb/diverged", lambda path: lidb_file.save(error.lidb, path, new=True))
        message = f"{error} The state before that step is kept in {path.name}; Load LiDB reads it."
    except (HDBError, OSError) as unsaved:
        message = f"{error} The state before that step could not be kept: {unsaved}"
    return FinetuneDiverged(message, error.lidb, error.losses, error.step)
