"""A person as an ordinary LoRA file."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io, ui
from safetensors.torch import save

from ..hdb_core.lidb import LiDB, expand, truncate
from .host.folders import save_to_output
from .host.progress import send_text
from .types import CATEGORY, LIDB

PREFIXES = {
    "sd1": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sd2": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}


def lora_state_dict(lidb: LiDB) -> dict[str, torch.Tensor]:
    """A LiDB with the names and factors of a kohya LoRA: up (out, R), down (R, in) float16, alpha = R.

    Those of a convolution are kernels: up (out, R, 1, 1), down (R, in, k, k).
    """
    state_dict = {}
    kernels = {layer.name: layer.kernel_size for layer in lidb.layout.layers}
    # Truncation to its own rank leaves the person as it is and balances the factors: both stay in float16's range.
    for name, (up, down) in expand(truncate(lidb, lidb.rank)).items():
        component, layer = name.split(".", 1)
        if size := kernels[name]:
            up, down = up[..., None, None], down.unflatten(1, (-1, size, size))
        key = f"{PREFIXES[lidb.layout.family][component]}_{layer.replace('.', '_')}"
        state_dict[f"{key}.lora_up.weight"] = up.half().contiguous()
        state_dict[f"{key}.lora_down.weight"] = down.half().contiguous()
        state_dict[f"{key}.alpha"] = torch.tensor(float(lidb.rank))
    return state_dict


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
    def execute(cls, lidb: LiDB, filename_prefix: str) -> io.NodeOutput:
        metadata = {f"lidb_{key}": value for key, value in lidb.info.items()}
        data = save(lora_state_dict(lidb), metadata)
        path = save_to_output(filename_prefix, lambda path: path.write_bytes(data))
        name = path.relative_to(folder_paths.get_output_directory()).as_posix()
        send_text(f"saved {name}, {path.stat().st_size / 1000:.0f} KB", cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui=ui.PreviewText(name))
