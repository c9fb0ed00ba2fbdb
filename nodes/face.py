"""A photograph to a face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..hdb_core.errors import FaceError
from ..hdb_core.faces import ORDERS
from ..hdb_core.images import as_rgb
from .host.compat import if_known
from .host.faces import crop_faces, paste_faces
from .host.lists import only, pictures_of
from .host.progress import preview, send_text
from .types import BOUNDING_BOX, CATEGORY, box_input


class CropToFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CropToFace",
            display_name="Crop to Face (portrait from a photo)",
            category=CATEGORY,
            description="Finds the face in a photo and cuts a square around it, as photos for a hypernetwork are cut. Shows what it found.",
            **if_known(io.Schema, search_aliases=["face detection", "find face", "portrait", "crop photo"]),
            is_input_list=True,
            inputs=[
                io.Image.Input("image", tooltip="One photo or several: a batch, or a list of photos of any size."),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=ORDERS[0],
                    tooltip="How several faces in a photo are numbered, from 0.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=99,
                    tooltip="Which of several faces. The preview shows their numbers.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Extra space on each side, as a share of the square: 0.1 is a tenth. Leave it at 0 for a hypernetwork.",
                ),
                box_input("bboxes", "Faces that another node has found, instead of looking for them here."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Marks the face, instead of looking for it: the MASK of Load Image, painted in the Mask Editor. An empty one changes nothing.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="face", is_output_list=True, tooltip="A square photo of the face."),
                io.Mask.Output(
                    display_name="face mask",
                    is_output_list=True,
                    tooltip="Where the face is in the square. For Paste Face, or for the mask of Fast Finetune, which then learns the face without the hair. Optional.",
                ),
                BOUNDING_BOX.Output(
                    display_name="box",
                    is_output_list=True,
                    tooltip="Where the square lies in the photo, to paste a picture back.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: Sequence[io.Image.Type],
        bboxes: Sequence[Any] | None = None,
        mask: Sequence[io.Mask.Type] | None = None,
        **widgets: Sequence[Any],
    ) -> io.NodeOutput:
        cuts = crop_faces(pictures_of(image, FaceError), bboxes, mask, **only(widgets, FaceError))
        send_text("\n".join(cut.text for cut in cuts), cls.hidden.unique_id)
        return io.NodeOutput(
            [cut.pixels.movedim(0, -1)[None] for cut in cuts],
            [cut.mask[None] for cut in cuts],
            [cut.box for cut in cuts],
            ui=preview([cut.shown for cut in cuts], cls),
        )


class PasteFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PasteFace",
            display_name="Paste Face",
            category=CATEGORY,
            description="Puts a newly sampled face back into the photo that Crop to Face cut it from.",
            **if_known(io.Schema, search_aliases=["uncrop face", "composite face", "face detailer", "inpaint person"]),
            inputs=[
                io.Image.Input("image", tooltip="The photo that Crop to Face was given."),
                io.Image.Input("face", tooltip="The new face, of any size. Each face of a batch makes a picture."),
                box_input("box", "From Crop to Face: where its square lies in the photo.", optional=False),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the new face shows, for example the face mask of Crop to Face. Without one: all of the square.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The photo with the new face.")],
        )

    @classmethod
    def execute(
        cls, image: io.Image.Type, face: io.Image.Type, box: Any, mask: io.Mask.Type | None = None
    ) -> io.NodeOutput:
        pasted = paste_faces(as_rgb(image, FaceError), as_rgb(face, FaceError), box, mask)
        return io.NodeOutput(pasted.movedim(1, -1))
