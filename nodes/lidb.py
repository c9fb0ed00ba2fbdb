"""Apply, save, load and blend persons."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import folder_paths
from comfy_api.latest import io, ui

from ..hdb_core import basis_file, lidb_file
from ..hdb_core.errors import BasisFileError, LiDBFileError
from ..hdb_core.lidb import STRENGTHS, LiDB, Strengths, nobody, weighted_sum
from .host.folders import find_basis, find_lidb, provide_basis, save_to_output, saved_bases, saved_lidbs
from .host.progress import send_text
from .host.targets import apply_lidb
from .types import CATEGORY, LIDB


class ApplyLiDBToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyLiDBToModel",
            display_name="Apply LiDB to Model",
            category=CATEGORY,
            description="Puts a person into a MODEL and a CLIP, as a LoRA would. Both inputs stay as they are.",
            inputs=[
                io.Model.Input("model", tooltip="The base model of the family that the LiDB was made for."),
                io.Clip.Input(
                    "clip", tooltip="The text encoder of the same checkpoint. Encode your prompt with the output."
                ),
                LIDB.Input("lidb", tooltip="The person, from Fast Finetune or Load LiDB."),
                io.Float.Input(
                    "strength_model",
                    default=STRENGTHS.model,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly the person changes the MODEL: 1 as learned, 0 not at all. Less leaves the prompt more of its words; person_guidance brings the person back.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=STRENGTHS.clip,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly the person changes the CLIP: 1 as learned, 0 not at all. The sampler's cfg adds to it.",
                ),
                io.Float.Input(
                    "person_guidance",
                    default=STRENGTHS.guidance,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    optional=True,  # prompts that were written without it still run
                    tooltip="How far guidance leads to the person: 1 as far as an ordinary LoRA does, 2 twice as far. More shows more of the person, and in the end less of the prompt. Works up to nearly twice the cfg of the sampler, and not at a cfg of 1.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL with the person."),
                io.Clip.Output(tooltip="The CLIP with the person."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        lidb: LiDB,
        strength_model: float,
        strength_clip: float,
        person_guidance: float = STRENGTHS.guidance,
    ) -> io.NodeOutput:
        return io.NodeOutput(*apply_lidb(model, clip, lidb, Strengths(strength_model, strength_clip, person_guidance)))


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
                    tooltip="Name inside the output folder; a number is added. Load LiDB lists the folder lidb. %year%, %month%, %day% … are filled in.",
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
    def execute(cls, lidb: LiDB, filename_prefix: str, rank: int) -> io.NodeOutput:
        bits = lidb_file.COMPACT if rank else lidb_file.HALF
        path = save_to_output(filename_prefix, lambda path: lidb_file.save(lidb, path, rank or None, bits))
        name = path.relative_to(folder_paths.get_output_directory()).as_posix()
        send_text(f"saved {name}, {path.stat().st_size / 1000:.1f} KB", cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui=ui.PreviewText(name))


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
                    options=saved_lidbs(),
                    tooltip="Files in models/lidb, output/lidb and the lidb paths of extra_model_paths.yaml. Press R to refresh.",
                ),
            ],
            outputs=[
                LIDB.Output(display_name="lidb", tooltip="The person. Connect Apply LiDB to Model."),
                io.String.Output(display_name="prompt", tooltip="The prompt it was made with, with its token."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lidb_name: str | None) -> bool | str:
        try:
            return lidb_name is None or bool(find_lidb(lidb_name))
        except LiDBFileError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, lidb_name: str) -> str:
        return hashlib.sha256(find_lidb(lidb_name).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, lidb_name: str) -> io.NodeOutput:
        path = find_lidb(lidb_name)
        provide_basis(lidb_file.read_header(path).basis)
        lidb = lidb_file.load(path)
        return io.NodeOutput(lidb, lidb.info.get("prompt", ""))


class EmptyLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EmptyLiDB",
            display_name="Empty LiDB",
            category=CATEGORY,
            description="Nobody yet, in a basis that was learned from people: Fast Finetune needs a third of the steps from there.",
            inputs=[
                io.Combo.Input(
                    "basis_name",
                    options=saved_bases(),
                    tooltip="Files in models/lidb_basis and the lidb_basis paths of extra_model_paths.yaml, each for one base model. Press R to refresh.",
                ),
            ],
            outputs=[
                LIDB.Output(display_name="lidb", tooltip="Connect the lidb of Fast Finetune. Changes nothing itself.")
            ],
        )

    @classmethod
    def validate_inputs(cls, basis_name: str | None) -> bool | str:
        try:
            return basis_name is None or bool(find_basis(basis_name))
        except BasisFileError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, basis_name: str) -> str:
        return basis_file.read_digest(find_basis(basis_name))

    @classmethod
    def execute(cls, basis_name: str) -> io.NodeOutput:
        return io.NodeOutput(nobody(*basis_file.load(find_basis(basis_name))))


class BlendLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendLiDB",
            display_name="Blend LiDB",
            category=CATEGORY,
            description="Mixes two persons of the same model family, or two runs of one person, into one LiDB.",
            inputs=[
                LIDB.Input("lidb_a", tooltip="The first person."),
                LIDB.Input("lidb_b", tooltip="The second person, made with the same base model and prompt."),
                io.Float.Input(
                    "blend", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="0 is the first person, 1 the second."
                ),
            ],
            outputs=[LIDB.Output(display_name="lidb", tooltip="The blend. Its rank is the sum of both ranks.")],
        )

    @classmethod
    def execute(cls, lidb_a: LiDB, lidb_b: LiDB, blend: float) -> io.NodeOutput:
        total = weighted_sum([lidb_a, lidb_b], [1 - blend, blend])
        return io.NodeOutput(replace(total, info={**lidb_b.info, **lidb_a.info, "made_by": "blend"}))
