"""A person as HOOKS, for a part of a picture or of the sampling."""

from __future__ import annotations

from comfy_api.latest import io

from ..hdb_core.lidb import LiDB
from ..hdb_core.recommended import Strengths
from .apply import strength_inputs, strengths_of
from .host.apply import hook_of
from .host.compat import if_known
from .types import CATEGORY, LIDB


class LiDBHook(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiDBHook",
            display_name="LiDB Hook (two people in one picture)",
            category=CATEGORY,
            description="A person for one prompt only, so that a mask or a range of steps can limit them. Connect to Set CLIP Hooks, and encode the positive prompt with its CLIP.",
            **if_known(
                io.Schema,
                search_aliases=["two people", "couple", "regional person", "regional prompt", "person by mask"],
            ),
            inputs=[
                io.Model.Input("model", tooltip="The base model. Connect the same one to the sampler."),
                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint."),
                LIDB.Input("lidb", tooltip="The person, from Load LiDB, Fast Finetune or Predict LiDB."),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The cfg of your KSampler. The negative prompt does not know the person, so cfg strengthens them; the hook takes that into account.",
                ),
                *strength_inputs(),
            ],
            outputs=[
                io.Hooks.Output(tooltip="For Set CLIP Hooks. Use it for the positive prompt only."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        lidb: LiDB,
        strength: float,
        cfg: float,
        options: Strengths | None = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(hook_of(model, clip, lidb, strengths_of(lidb, strength, options), cfg))
