"""The ComfyUI side: the nodes of this pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyLiDBToModel, ApplyOptions
from .blend import BlendLiDB
from .compare import CompareLiDB, SimilarityToPhoto
from .empty import EmptyLiDB
from .face import CropToFace, PasteFace
from .files import LoadLiDB, SaveLiDB, SaveLiDBAsLoRA
from .finetune import FastFinetune, FastFinetuneOptions
from .hook import LiDBHook
from .host.faces import register_detectors
from .host.folders import register_folders
from .host.sockets import checked
from .hypernet import LoadHyperNet, PredictLiDB

NODES: list[type[io.ComfyNode]] = [
    CropToFace, PasteFace, LoadHyperNet, PredictLiDB, EmptyLiDB, FastFinetune, FastFinetuneOptions, ApplyLiDBToModel, ApplyOptions,
    SaveLiDB, LoadLiDB, BlendLiDB, CompareLiDB, SimilarityToPhoto, LiDBHook, SaveLiDBAsLoRA,
]  # fmt: skip


class HyperDreamBooth(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()
        register_detectors()
        return [checked(node) for node in NODES]
