"""How alike two persons are, and pictures and photos."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..hdb_core.card import as_line
from ..hdb_core.errors import FaceError
from ..hdb_core.images import as_rgb
from ..hdb_core.lidb import LiDB, aligned, cosine, cosines
from .host.compat import if_known
from .host.likeness import similarities
from .host.progress import send_text
from .types import CATEGORY, LIDB


class CompareLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CompareLiDB",
            display_name="Compare LiDB",
            category=CATEGORY,
            description="Says how alike two people of one base model are: the cosine of their changes to the model, overall and in each of its blocks.",
            **if_known(io.Schema, search_aliases=["compare people", "same person", "person distance"]),
            inputs=[
                LIDB.Input("lidb_a", tooltip="One person."),
                LIDB.Input("lidb_b", tooltip="Another person, made with the same base model."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="cosine", tooltip="1: the same direction, 0: nothing in common, below 0: opposite."
                ),
                io.String.Output(display_name="text", tooltip="The cosine overall and in each block."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lidb_a: LiDB, lidb_b: LiDB) -> io.NodeOutput:
        one, other = aligned([lidb_a, lidb_b])
        whole = float(cosine(one, other))
        parts = [f"{as_line(name)}: {value:.2f}" for name, value in cosines(one, other).items()]
        return _shown(cls, whole, "\n".join([f"cosine {whole:.2f}", *parts]))


class SimilarityToPhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SimilarityToPhoto",
            display_name="Similarity to Photo",
            category=CATEGORY,
            description="Says how much pictures are like a photo to a CLIP Vision model. It sees the whole picture, clothes and background as well: a general likeness, not face recognition.",
            **if_known(io.Schema, search_aliases=["likeness", "compare pictures", "person similarity"]),
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="From Load CLIP Vision. Numbers of different models cannot be compared."
                ),
                io.Image.Input("photo", tooltip="The photo. A batch is several photos of one person."),
                io.Image.Input(
                    "pictures",
                    tooltip="The pictures to be compared with it, cut like the photo: Crop to Face before both leaves less of clothes and background.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="similarity", tooltip="The mean of all pictures; 1 is the photo itself."),
                io.String.Output(display_name="text", tooltip="The similarity of each picture."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip_vision: io.ClipVision.Type, photo: io.Image.Type, pictures: io.Image.Type) -> io.NodeOutput:
        found = similarities(clip_vision, as_rgb(photo, FaceError), as_rgb(pictures, FaceError))
        mean, each = sum(found) / len(found), ", ".join(f"{value:.2f}" for value in found)
        said = f"similarity {mean:.2f}" + (f" (pictures: {each})" if len(found) > 1 else "")
        return _shown(cls, mean, f"{said}\nof whole pictures, not of faces")


def _shown(node: type[io.ComfyNode], number: float, text: str) -> io.NodeOutput:
    """Says a text on the node, and gives out the number and the text."""
    send_text(text, node.hidden.unique_id)
    return io.NodeOutput(number, text, ui=ui.PreviewText(text))
