"""Train a hypernetwork on a model as ComfyUI loads it.

From ComfyUI's folder: ``python -m custom_nodes.PACK.train RUN --model NAME --photos PHOTOS``, with the name of this pack's
folder for PACK. NAME is the name of a checkpoint in models/checkpoints, or its path. With ``--set 'text_encoders=["NAME"]'
clip_type=TYPE vae=NAME`` it is one in models/diffusion_models. Everything else is as in ``python -m hdb_core.train``, which
reads checkpoints by itself.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

import torch

from .hdb_core.train.__main__ import main
from .hdb_core.train.base.model import BaseModel
from .hdb_core.train.settings import Settings

COMMAND = f"python -m {__package__}.train"


def by_host(settings: Settings, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[BaseModel]:
    """The loader of models as ComfyUI loads them; it computes in a dtype of its own."""
    from comfy.cli_args import args

    # Its other modules decide on the device when they are loaded.
    args.cpu = device.type == "cpu"
    from .nodes.host.train import loaded

    return loaded(settings)


if __name__ == "__main__":
    sys.exit(main(None, by_host, COMMAND))
