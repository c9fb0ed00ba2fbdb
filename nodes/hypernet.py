"""Photo to person without training."""

from __future__ import annotations

import math
from dataclasses import replace

from comfy_api.latest import io

from .host.folders import HYPERNETS, find, names_on, validated
from .host.hypernets import HostHyperNet
from .host.progress import send_text
from .host.targets import class_of, require_unet
from .types import CATEGORY, HYPERNET, LIDB


class LoadHyperNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadHyperNet",
            display_name="Load HyperNet",
            category=CATEGORY,
            description="Loads a network that predicts a person's LiDB from a photo, for one family of base models.",
            inputs=[
                io.Combo.Input(
                    "hypernet_name",
                    options=names_on(HYPERNETS),
                    tooltip="Files in models/hyperdreambooth and the hyperdreambooth paths of extra_model_paths.yaml. Press R to refresh.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Only for a hypernetwork that was trained with a CLIP Vision model; it says so if it needs one.",
                ),
            ],
            outputs=[HYPERNET.Output(display_name="hypernet", tooltip="Connect Predict LiDB.")],
        )

    @classmethod
    def validate_inputs(cls, hypernet_name: str | None = None) -> bool | str:
        return validated(HYPERNETS, hypernet_name)

    @classmethod
    def fingerprint_inputs(
        cls, hypernet_name: str | None = None, clip_vision: io.ClipVision.Type | None = None
    ) -> str | float:
        if hypernet_name is None:
            return math.nan  # a name over a wire is known when the node runs
        stat = find(HYPERNETS, hypernet_name).stat()
        return f"{stat.st_mtime_ns} {stat.st_size}"

    @classmethod
    def execute(cls, hypernet_name: str | None = None, clip_vision: io.ClipVision.Type | None = None) -> io.NodeOutput:
        return io.NodeOutput(HostHyperNet(find(HYPERNETS, hypernet_name), clip_vision))


class PredictLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PredictLiDB",
            display_name="Predict LiDB",
            category=CATEGORY,
            description="Predicts a person's LiDB from one or several photos, without training.",
            inputs=[
                HYPERNET.Input("hypernet", tooltip="From Load HyperNet."),
                io.Image.Input(
                    "image",
                    tooltip="A photo of the person, cropped to the face, or a batch of photos of one person.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model for this person: an error says at once if it does not fit.",
                ),
            ],
            outputs=[
                LIDB.Output(display_name="lidb", tooltip="The person. Connect Apply LiDB to Model, or Fast Finetune."),
                io.String.Output(display_name="prompt", tooltip="A prompt for this person, with the token."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, hypernet: HostHyperNet, image: io.Image.Type, model: io.Model.Type | None = None) -> io.NodeOutput:
        if model is not None:
            require_unet(model, hypernet.config.layout, "This hypernetwork")
        lidb = hypernet.predict(image)
        if model is not None:
            lidb = replace(lidb, about=replace(lidb.about, model=class_of(model)))
        photos = "one photo" if len(image) == 1 else f"{len(image)} photos"
        send_text(f"predicted from {photos}", cls.hidden.unique_id)
        return io.NodeOutput(lidb, lidb.about.prompt)
