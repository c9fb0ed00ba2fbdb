"""Photo to person without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from comfy_api.latest import io

from ..hdb_core.errors import HyperNetError
from .host.compat import if_known
from .host.faces import seen_in
from .host.folders import HYPERNETS, fingerprint, names_on, unchanged, validated
from .host.hypernets import HostHyperNet
from .host.lists import only, pictures_of
from .host.progress import send_text
from .host.targets import class_of, require_unet
from .types import CATEGORY, HYPERNET, LIDB


class LoadHyperNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadHyperNet",
            display_name="Load HyperNet (HyperDreamBooth)",
            category=CATEGORY,
            description="Loads a network that predicts a person's LiDB from a photo, for one family of base models.",
            **if_known(io.Schema, search_aliases=["hypernetwork", "person predictor"]),
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
            outputs=[HYPERNET.Output(display_name="hypernet", tooltip="Connect to Predict LiDB.")],
        )

    @classmethod
    def validate_inputs(cls, hypernet_name: str | None = None) -> bool | str:
        return validated(HYPERNETS, hypernet_name)

    @classmethod
    def fingerprint_inputs(
        cls, hypernet_name: str | None = None, clip_vision: io.ClipVision.Type | None = None
    ) -> str | float:
        return fingerprint(HYPERNETS, hypernet_name)

    @classmethod
    def execute(cls, hypernet_name: str | None = None, clip_vision: io.ClipVision.Type | None = None) -> io.NodeOutput:
        with unchanged(HYPERNETS, hypernet_name) as path:
            return io.NodeOutput(HostHyperNet(path, clip_vision))


class PredictLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PredictLiDB",
            display_name="Predict LiDB (person from a photo)",
            category=CATEGORY,
            description="Predicts a person's LiDB from one or several photos, without training.",
            **if_known(io.Schema, search_aliases=["photo to person", "face to LoRA", "identity", "FaceID"]),
            is_input_list=True,
            inputs=[
                HYPERNET.Input("hypernet", tooltip="From Load HyperNet."),
                io.Image.Input(
                    "image",
                    tooltip="A photo of the person, cropped to the face. A batch or a list is several photos of one person.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model for this person: an error says at once if it does not fit.",
                ),
            ],
            outputs=[
                LIDB.Output(
                    display_name="lidb", tooltip="The person. Connect to Apply LiDB to Model or Fast Finetune."
                ),
                io.String.Output(display_name="prompt", tooltip="A prompt for this person, with the token."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: Sequence[io.Image.Type],
        hypernet: Sequence[HostHyperNet],
        model: Sequence[io.Model.Type] | None = None,
    ) -> io.NodeOutput:
        one = only({"hypernet": hypernet, "model": model or [None]}, HyperNetError)
        if one["model"] is not None:
            require_unet(one["model"], one["hypernet"].config.layout, "This hypernetwork")
        pictures = pictures_of(image, HyperNetError)
        lidb, notes = one["hypernet"].predict(pictures)
        if one["model"] is not None:
            lidb = replace(lidb, about=replace(lidb.about, model=class_of(one["model"])))
        photos = "one photo" if len(pictures) == 1 else f"{len(pictures)} photos"
        said = [f"predicted from {photos}", *notes, *seen_in(pictures, one["hypernet"].config.encoder.cut)]
        send_text("\n".join(said), cls.hidden.unique_id)
        return io.NodeOutput(lidb, lidb.about.prompt)
