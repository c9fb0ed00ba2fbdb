"""The custom types of the pack's sockets."""

from comfy_api.latest import io

CATEGORY = "HyperDreamBooth"

LIDB = io.Custom("LIDB")
HYPERNET = io.Custom("HYPERNET")
FINETUNE_OPTIONS = io.Custom("FINETUNE_OPTIONS")
APPLY_OPTIONS = io.Custom("APPLY_OPTIONS")
