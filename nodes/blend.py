"""Two persons into one."""

from __future__ import annotations

from comfy_api.latest import io

from ..hdb_core.lidb import LiDB
from ..hdb_core.lidb import blend as blended
from .host.compat import if_known
from .types import CATEGORY, LIDB


class BlendLiDB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendLiDB",
            display_name="Blend LiDB (mix people)",
            category=CATEGORY,
            description="Mixes two people of the same model family, or two results for one person, into one LiDB.",
            **if_known(io.Schema, search_aliases=["mix people", "merge persons"]),
            inputs=[
                LIDB.Input("lidb_a", tooltip="The first person."),
                LIDB.Input("lidb_b", tooltip="The second person, of the same model family and basis."),
                io.Float.Input(
                    "blend", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="0 is the first person, 1 the second."
                ),
            ],
            outputs=[LIDB.Output(display_name="lidb", tooltip="The blend. Its rank is the sum of both ranks.")],
        )

    @classmethod
    def execute(cls, lidb_a: LiDB, lidb_b: LiDB, blend: float) -> io.NodeOutput:
        return io.NodeOutput(blended(lidb_a, lidb_b, blend))
