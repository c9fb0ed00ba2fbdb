"""The ComfyUI side: the nodes of this pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyLiDBToModel, ApplyOptions
from .blend import BlendLiDB
from .empty import EmptyLiDB
from .files import LoadLiDB, SaveLiDB, SaveLiDBAsLoRA
from .finetune import FastFinetune, FastFinetuneOptions
from .host.folders import register_folders
from .hypernet import LoadHyperNet, PredictLiDB

NODES: list[type[io.ComfyNode]] = [
    LoadHyperNet, PredictLiDB, EmptyLiDB, FastFinetune, FastFinetuneOptions, ApplyLiDBToModel, ApplyOptions, SaveLiDB,
    LoadLiDB, BlendLiDB, SaveLiDBAsLoRA,
]  # fmt: skip


class HyperDreamBooth(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()
        return NODES
