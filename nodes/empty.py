"""A start in a learned basis."""

from __future__ import annotations

from comfy_api.latest import io

from ..hdb_core.files import basis as basis_file
from ..hdb_core.lidb import nobody
from .host.compat import if_known
from .host.folders import BASES, fingerprint, names_on, unchanged, validated
from .types import CATEGORY, LIDB


class EmptyLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EmptyLiDB",
            display_name="Empty LiDB",
            category=CATEGORY,
            description="An untrained LiDB in a basis that was learned from people. 8 steps of Fast Finetune in it do what 24 do without.",
            **if_known(io.Schema, search_aliases=["learned basis", "new person"]),
            inputs=[
                io.Combo.Input(
                    "basis_name",
                    options=names_on(BASES),
                    tooltip="Files in models/lidb_basis and the lidb_basis paths of extra_model_paths.yaml, each for one base model. Press R to refresh.",
                ),
            ],
            outputs=[
                LIDB.Output(
                    display_name="lidb", tooltip="Connect to the lidb of Fast Finetune. It has no effect by itself."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, basis_name: str | None = None) -> bool | str:
        return validated(BASES, basis_name)

    @classmethod
    def fingerprint_inputs(cls, basis_name: str | None = None) -> str | float:
        return fingerprint(BASES, basis_name)

    @classmethod
    def execute(cls, basis_name: str | None = None) -> io.NodeOutput:
        with unchanged(BASES, basis_name) as path:
            return io.NodeOutput(nobody(*basis_file.load(path)))
