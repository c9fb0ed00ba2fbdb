"""HyperDreamBooth in plain PyTorch, without ComfyUI: predict, fine-tune, save, load and apply persons (`LiDB`).

``docs/python.md`` shows all of it in an example.
"""

from .adapters import Adapters, attach
from .files.hypernet import load as load_hypernet
from .files.lidb import load, save
from .finetuning import FinetuneConfig, finetune
from .hypernet import HyperNet, predict, preprocess
from .layout import find_targets, layout_of
from .lidb import LiDB, expand

__all__ = [
    "Adapters",
    "FinetuneConfig",
    "HyperNet",
    "LiDB",
    "attach",
    "expand",
    "find_targets",
    "finetune",
    "layout_of",
    "load",
    "load_hypernet",
    "predict",
    "preprocess",
    "save",
]
