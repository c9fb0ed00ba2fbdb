"""Save and load persons."""

from __future__ import annotations

import hashlib
import math

from comfy_api.latest import io, ui

from ..hdb_core.files import lidb as lidb_file
from ..hdb_core.files import lora as lora_file
from ..hdb_core.lidb import LiDB
from .host.folders import LIDBS, find, learned_basis, names_on, validated
from .host.output import name_in_output, refusal, save_to_output
from .host.progress import send_text
from .types import CATEGORY, LIDB


class SaveLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveLiDB",
            display_name="Save LiDB",
            category=CATEGORY,
            description="Writes a person to a .safetensors file in the output folder, where Load LiDB finds it.",
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
    def execute(cls, lidb: LiDB, filename_prefix: str, rank: int) -> io.NodeOutput:
        bits = lidb_file.COMPACT if rank else lidb_file.HALF
        path = save_to_output(filename_prefix, lambda path: lidb_file.save(lidb, path, rank or None, bits, new=True))
        send_text(f"saved {name_in_output(path)}, {path.stat().st_size / 1000:.1f} KB", cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui=ui.PreviewText(name_in_output(path)))


class LoadLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadLiDB",
            display_name="Load LiDB",
            category=CATEGORY,
            description="Reads a person from models/lidb or from the lidb folder of the output folder.",
            inputs=[
                io.Combo.Input(
                    "lidb_name",
                    options=names_on(LIDBS),
                    tooltip="Files in models/lidb, output/lidb and the lidb paths of extra_model_paths.yaml. Press R to refresh.",
                ),
            ],
            outputs=[
                LIDB.Output(display_name="lidb", tooltip="The person. Connect Apply LiDB to Model."),
                io.String.Output(display_name="prompt", tooltip="The prompt it was made with, with its token."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lidb_name: str | None = None) -> bool | str:
        return validated(LIDBS, lidb_name)

    @classmethod
    def fingerprint_inputs(cls, lidb_name: str | None = None) -> str | float:
        if lidb_name is None:
            return math.nan  # a name over a wire is known when the node runs
        return hashlib.sha256(find(LIDBS, lidb_name).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, lidb_name: str | None = None) -> io.NodeOutput:
        path = find(LIDBS, lidb_name)
        lidb = lidb_file.load(path, learned_basis(lidb_file.read_header(path).basis))
        return io.NodeOutput(lidb, lidb.about.prompt)


class SaveLiDBAsLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveLiDBAsLoRA",
            display_name="Save LiDB as LoRA",
            category=CATEGORY,
            description="Writes a person as an ordinary LoRA that the stock Load LoRA node and other programs read. Some 30 times larger than a LiDB.",
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
        path = save_to_output(filename_prefix, lambda path: lora_file.save(lidb, path))
        send_text(f"saved {name_in_output(path)}, {path.stat().st_size / 1000:.0f} KB", cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui=ui.PreviewText(name_in_output(path)))
