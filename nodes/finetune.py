"""Photos to person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..hdb_core.errors import FinetuneError
from ..hdb_core.finetuning import FinetuneConfig, FinetuneDiverged
from .host.compat import if_known
from .host.finetune import FinetuneOptions, finetune_in_host
from .host.kept import kept
from .host.lists import joined, only
from .host.photos import Photos
from .host.progress import preview
from .plot import loss_image
from .types import CATEGORY, FINETUNE_OPTIONS, LIDB

DEFAULTS = FinetuneConfig()


class FastFinetune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastFinetune",
            display_name="Fast Finetune (train a person, DreamBooth)",
            category=CATEGORY,
            description="Learns a person from one or several photos into a LiDB of about 100 KB. MODEL and CLIP stay as they are.",
            **if_known(io.Schema, search_aliases=["DreamBooth", "train LoRA", "photo to person", "likeness"]),
            is_input_list=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model: Stable Diffusion, Flux, Z-Image, Qwen-Image or another. It is not changed.",
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model. It is not changed."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input(
                    "image",
                    tooltip="A photo of the person, cropped to the face. A batch or a list is several photos of one person.",
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
                    tooltip="Captions: expression, clothes and background in the photo. What is named does not become part of the person. For several photos, one line each, which may be blank, or a list of texts.",
                ),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.steps,
                    min=0,
                    max=10000,
                    tooltip="Training steps. 0 is automatic: until enough of the person is learned, which the node measures.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    tooltip="Train at about resolution × resolution pixels. 0: the photo's size, at most what the model was made for, such as 512 (SD 1.x), 768 (SD 2.x) or 1024 (others).",
                    **if_known(io.Int.Input, advanced=True),
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
                    tooltip="Only the marked part of the photo is learned, for example the face mask of Crop to Face. Without one, the whole photo, which is usually what you want.",
                ),
                LIDB.Input("lidb", optional=True, tooltip="Start from this person, for example from Predict LiDB."),
                FINETUNE_OPTIONS.Input(
                    "options", optional=True, tooltip="From Fast Finetune Options. Without it, the defaults there."
                ),
            ],
            outputs=[
                LIDB.Output(display_name="lidb", tooltip="The person. Connect to Apply LiDB to Model and Save LiDB."),
                io.Image.Output(display_name="loss plot", tooltip="The loss of every step."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: Sequence[io.Image.Type],
        photo_words: Sequence[str],
        mask: Sequence[io.Mask.Type] | None = None,
        **inputs: Sequence[Any],
    ) -> io.NodeOutput:
        one = only(inputs, FinetuneError)
        options, init = one.get("options") or FinetuneOptions(), one.get("lidb")
        own = {name: one[name] for name in ("prompt", "steps", "seed")}
        config = replace(options.config, photo_words=joined(photo_words), **own)
        photos = Photos.of(image, mask, options.class_images, one["resolution"])
        models = one["model"], one["clip"], one["vae"]
        try:
            result = finetune_in_host(
                *models, photos, config, init, options.convolutions, cls.hidden.unique_id, options.sample_every
            )
        except FinetuneDiverged as error:
            raise with_place(error) from None
        plot = loss_image(result.losses)
        return io.NodeOutput(result.lidb, plot, ui=preview(plot, cls))


class FastFinetuneOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastFinetuneOptions",
            display_name="Fast Finetune Options",
            category=CATEGORY,
            description="Further settings of Fast Finetune. Its defaults are what Fast Finetune uses without this node.",
            **if_known(io.Schema, search_aliases=["training settings", "learning rate", "prior preservation"]),
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
                    tooltip="Noise levels per step. More are steadier and slower.",
                ),
                io.Boolean.Input(
                    "convolutions",
                    default=True,
                    tooltip="Train the UNet's convolutions besides its attention: more likeness, and more of whatever else the photo shows.",
                ),
                io.Boolean.Input(
                    "train_text_encoder",
                    default=DEFAULTS.train_text_encoder,
                    tooltip="Train the text encoder together with the UNet. Alone it is slower and hardly better; with prior_weight the token then means the person, and other faces stay.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=DEFAULTS.prior_weight,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Weight of the prior preservation loss, which keeps other faces as they were. 0 is off; above 0 a step takes two and a half times as long.",
                ),
                io.String.Input(
                    "class_prompt",
                    default=DEFAULTS.class_prompt,
                    tooltip="The prompt without the token; change both together. prior_weight keeps its pictures as they were.",
                ),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="Pictures of class_prompt for prior_weight, as in DreamBooth. Without them, the base model's own answers on the photos take their place.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="Show a picture of the prompt every so many steps, in Fast Finetune while it runs. Each takes about as long as a step. 0 is off.",
                ),
            ],
            outputs=[FINETUNE_OPTIONS.Output(display_name="options", tooltip="Connect to Fast Finetune.")],
        )

    @classmethod
    def execute(
        cls,
        convolutions: bool,
        class_images: io.Image.Type | None = None,
        sample_every: int = 0,
        **settings: float | str,
    ) -> io.NodeOutput:
        return io.NodeOutput(FinetuneOptions(FinetuneConfig(**settings), convolutions, class_images, sample_every))


def with_place(error: FinetuneDiverged) -> FinetuneDiverged:
    """The same error after its last good state was saved, saying where, or why not."""
    if not error.losses:
        return error
    message = f"{error} The state before that step {kept(error.lidb, 'diverged')}."
    return FinetuneDiverged(message, error.lidb, error.losses, error.step)
