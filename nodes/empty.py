"""A start in a learned basis."""

from __future__ import annotations

from comfy_api.latest import io

from ..hdb_core.errors import BasisFileError
from ..hdb_core.files import basis as basis_file
from ..hdb_core.lidb import nobody
from .host.folders import find_basis, saved_bases
from .types import CATEGORY, LIDB


class EmptyLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EmptyLiDB",
            display_name="Empty LiDB",
            category=CATEGORY,
            description="An untrained LiDB in a basis that was learned from people. Fast Finetune needs a third of the steps from there.",
            inputs=[
                io.Combo.Input(
                    "basis_name",
                    options=saved_bases(),
                    tooltip="Files in models/lidb_basis and the lidb_basis paths of extra_model_paths.yaml, each for one base model. Press R to refresh.",
                ),
            ],
            outputs=[
                LIDB.Output(
                    display_name="lidb", tooltip="Connect the lidb of Fast Finetune. It has no effect by itself."
                )
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
