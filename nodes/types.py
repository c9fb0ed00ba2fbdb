"""The custom types of the pack's sockets."""

from comfy_api.latest import io

CATEGORY = "HyperDreamBooth"

LIDB = io.Custom("LIDB")
HYPERNET = io.Custom("HYPERNET")
