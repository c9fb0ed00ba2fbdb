"""Save and load persons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from comfy_api.latest import io, ui

from ..hdb_core import card
from ..hdb_core.errors import LiDBFileError
from ..hdb_core.files import lidb as lidb_file
from ..hdb_core.files import lora as lora_file
from ..hdb_core.images import as_rgb
from ..hdb_core.lidb import LiDB
from .host.compat import if_known
from .host.folders import LIDBS, fingerprint, learned_basis, names_on, passed_over, unchanged, validated
from .host.output import name_in_output, output_name, prefix_for, refusal, save_once
from .host.progress import preview, send_text
from .types import CATEGORY, LIDB


class SaveLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveLiDB",
            display_name="Save LiDB (person)",
            category=CATEGORY,
            description="Writes a person to a .safetensors file in the output folder, where Load LiDB finds it. A person who is there already is not written again.",
            **if_known(io.Schema, search_aliases=["save person", "save face", "name person"]),
            inputs=[
                LIDB.Input("lidb", tooltip="The person."),
                io.String.Input(
                    "filename_prefix",
                    default="lidb/person",
                    tooltip="Name inside the output folder; a number is added. Load LiDB lists the folder lidb. %date:yyyy-MM-dd%, %year%, %month% … are filled in.",
                ),
                io.Int.Input(
                    "rank",
                    default=lidb_file.DEFAULT_RANK,
                    min=0,
                    max=50,
                    tooltip="Size of the file: a person of a higher rank keeps only its strongest components, and loses some likeness. 0 keeps everything, in 16 bits a number instead of 6.",
                    **if_known(io.Int.Input, advanced=True),
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    placeholder="Anna",
                    tooltip="What you call the person. It is written into the file and names it: lidb/Anna instead of lidb/person.",
                ),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="A picture to recognise the person by. Its middle square is put into the file at 256 × 256 pixels; everybody who gets the file can see it.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written, or that was there.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return refusal(filename_prefix)

    @classmethod
    def execute(
        cls, lidb: LiDB, filename_prefix: str, rank: int, name: str = "", thumbnail: io.Image.Type | None = None
    ) -> io.NodeOutput:
        lidb = card.labelled(lidb, name, None if thumbnail is None else as_rgb(thumbnail, LiDBFileError)[0])
        bits, own = (
            lidb_file.COMPACT if rank else lidb_file.HALF,
            {"name": lidb.about.name, "picture": lidb.about.thumbnail},
        )
        return _saved(
            cls,
            prefix_for(filename_prefix, name),
            lambda path: lidb_file.save(lidb, path, rank or None, bits, new=True),
            [what for what, there in own.items() if there],
        )


class LoadLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadLiDB",
            display_name="Load LiDB (saved person)",
            category=CATEGORY,
            description="Reads a person from models/lidb or from the lidb folder of the output folder, and shows who it is.",
            **if_known(io.Schema, search_aliases=["load person", "load face"]),
            inputs=[
                io.Combo.Input(
                    "lidb_name",
                    options=names_on(LIDBS),
                    tooltip="Files in models/lidb, output/lidb and the lidb paths of extra_model_paths.yaml. Press R to refresh.",
                ),
            ],
            outputs=[
                LIDB.Output(display_name="lidb", tooltip="The person. Connect to Apply LiDB to Model."),
                io.String.Output(
                    display_name="prompt", tooltip="The prompt that the person was learned with, token included."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lidb_name: str | None = None) -> bool | str:
        return validated(LIDBS, lidb_name)

    @classmethod
    def fingerprint_inputs(cls, lidb_name: str | None = None) -> str | float:
        return fingerprint(LIDBS, lidb_name)

    @classmethod
    def execute(cls, lidb_name: str | None = None) -> io.NodeOutput:
        with unchanged(LIDBS, lidb_name) as path:
            lidb = lidb_file.load(path, learned_basis(lidb_file.read_header(path).basis))
        said = "\n".join([*card.lines(lidb), *passed_over(LIDBS, str(lidb_name), path)])
        picture = card.picture_of(lidb.about)
        send_text(said, cls.hidden.unique_id)
        shown = {} if picture is None else preview(picture[None], cls)
        return io.NodeOutput(lidb, lidb.about.prompt, ui={**shown, "text": (said,)})


class SaveLiDBAsLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveLiDBAsLoRA",
            display_name="Save LiDB as LoRA",
            category=CATEGORY,
            description="Writes a person as an ordinary LoRA that the stock Load LoRA node and other programs read, with its trigger word. Some 50 times larger than a LiDB.",
            **if_known(io.Schema, search_aliases=["export LoRA", "convert to LoRA"]),
            inputs=[
                LIDB.Input("lidb", tooltip="The person."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/person",
                    tooltip="Name inside the output folder; a number is added. Load LoRA lists the folder loras.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return refusal(filename_prefix)

    @classmethod
    def execute(cls, lidb: LiDB, filename_prefix: str) -> io.NodeOutput:
        title = output_name(filename_prefix).rpartition("/")[2]
        return _saved(cls, filename_prefix, lambda path: lora_file.save(lidb, path, title=title))


def _saved(
    node: type[io.ComfyNode], prefix: str, write: Callable[[Path], object], contents: Sequence[str] = ()
) -> io.NodeOutput:
    """Writes a file unless it is there, says its name, its size and what it contains on the node, and gives out its path."""
    path, new = save_once(prefix, write)
    parts = [f"{'saved' if new else 'already saved as'} {name_in_output(path)}", f"{path.stat().st_size / 1000:.1f} KB"]
    said = ", ".join([*parts, *([f"with {' and '.join(contents)}"] if contents else [])])
    send_text(said, node.hidden.unique_id)
    return io.NodeOutput(str(path), ui=ui.PreviewText(name_in_output(path)))
