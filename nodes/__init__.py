"""The ComfyUI side: the nodes of this pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .finetune import FastFinetune
from .host.folders import register_folders
from .hypernet import LoadHyperNet, PredictLiDB
from .lidb import ApplyLiDBToModel, BlendLiDB, EmptyLiDB, LoadLiDB, SaveLiDB
from .lora import SaveLiDBAsLoRA

NODES: list[type[io.ComfyNode]] = [
    LoadHyperNet, PredictLiDB, EmptyLiDB, FastFinetune, ApplyLiDBToModel, SaveLiDB, LoadLiDB, BlendLiDB, SaveLiDBAsLoRA,
]  # fmt: skip


class HyperDreamBooth(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()
        return NODES
