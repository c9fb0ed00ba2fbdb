"""A person into a MODEL and a CLIP."""

from __future__ import annotations

from comfy_api.latest import io

from ..hdb_core.lidb import LiDB
from ..hdb_core.recommended import FROM_PREDICTION, RECOMMENDED, Strengths
from .host.apply import apply_lidb, mixture
from .host.compat import if_known
from .host.progress import log, send_text
from .types import APPLY_OPTIONS, CATEGORY, LIDB

DEFAULTS = RECOMMENDED[FROM_PREDICTION].strengths


def strength_inputs() -> list[io.Input]:
    """What says how strongly a person is applied, at the end of a node's inputs."""
    return [
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How much of the person: 0 is the base model, 1 is the strength that the LiDB recommends.",
        ),
        APPLY_OPTIONS.Input(
            "options",
            optional=True,
            tooltip="From Apply Options: strengths of your own instead of those of the LiDB. strength multiplies them, too.",
        ),
    ]


def strengths_of(lidb: LiDB, strength: float, options: Strengths | None) -> Strengths:
    """The values of `strength_inputs` together: options replace the person's own strengths, and strength scales both."""
    return (lidb.about.strengths if options is None else options).scaled(strength)


def in_words(strengths: Strengths, strength: float, options: Strengths | None) -> str:
    """What a person is applied with, as the inputs of Apply Options are called, and where it comes from."""
    model, clip, guidance = strengths
    source = "recommended for this person" if options is None else "those of Apply Options"
    times = "" if strength == 1 else f", times a strength of {strength:g}"
    return f"strength_model {model:.3g}, strength_clip {clip:.3g}, person_guidance {guidance:.3g}: {source}{times}"


class ApplyLiDBToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyLiDBToModel",
            display_name="Apply LiDB to Model (person as a LoRA)",
            category=CATEGORY,
            description="Applies a person to a MODEL and a CLIP, as a LoRA loader does. Both inputs stay as they are.",
            **if_known(io.Schema, search_aliases=["apply person", "apply LoRA", "identity", "likeness", "FaceID"]),
            inputs=[
                io.Model.Input("model", tooltip="A base model of the family that the LiDB was made for."),
                io.Clip.Input(
                    "clip", tooltip="The text encoder of the same checkpoint. Encode your prompt with the output."
                ),
                LIDB.Input("lidb", tooltip="The person, from Fast Finetune, Predict LiDB or Load LiDB."),
                *strength_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL with the person."),
                io.Clip.Output(tooltip="The CLIP with the person."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        lidb: LiDB,
        strength: float,
        options: Strengths | None = None,
    ) -> io.NodeOutput:
        strengths = strengths_of(lidb, strength, options)
        if warning := mixture(model, lidb):
            log.warning("Apply LiDB to Model: %s", warning)
        send_text("\n".join(filter(None, (warning, in_words(strengths, strength, options)))), cls.hidden.unique_id)
        return io.NodeOutput(*apply_lidb(model, clip, lidb, strengths))


class ApplyOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyOptions",
            display_name="Apply Options",
            category=CATEGORY,
            description="Strengths for Apply LiDB to Model. 1, 1 and 1 apply a person as an ordinary LoRA.",
            **if_known(io.Schema, search_aliases=["person guidance", "person strength"]),
            inputs=[
                io.Float.Input(
                    "strength_model",
                    default=DEFAULTS.model,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength on the MODEL, as in Load LoRA. Less follows the prompt better; person_guidance then brings the likeness back.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=DEFAULTS.clip,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength on the CLIP, as in Load LoRA.",
                ),
                io.Float.Input(
                    "person_guidance",
                    default=DEFAULTS.guidance,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    tooltip="How strongly guidance (cfg) pulls towards the person: 1 is as with an ordinary LoRA, 2 twice that. Above about twice the sampler's cfg, the prompt is followed less. At a cfg of 1 the person is applied more strongly instead.",
                ),
            ],
            outputs=[
                APPLY_OPTIONS.Output(display_name="options", tooltip="Connect to Apply LiDB to Model or LiDB Hook.")
            ],
        )

    @classmethod
    def execute(cls, strength_model: float, strength_clip: float, person_guidance: float) -> io.NodeOutput:
        return io.NodeOutput(Strengths(strength_model, strength_clip, person_guidance))
