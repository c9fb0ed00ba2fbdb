"""The pictures that the host's template browser shows of the example workflows.

``python dev.py thumbnails`` runs them on the miniature and writes ``example_workflows/NAME.jpg``: the photo beside the
picture that the workflow makes. One that needs a model which is not shipped gets none.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from . import workflow
from .comfy_client import PromptError, ServerError
from .comfy_server import ComfyServer, raise_on_terminate
from .demo import PHOTO, decoded
from .environment import ROOT, Host, SetupError
from .stale import record

if TYPE_CHECKING:
    from PIL.Image import Image

# In this order: the last one loads the person that the one before it saves.
WORKFLOWS = (
    "photo to person with HyperNet", "several photos to person", "photo to person", "saved person in text-to-image",
)  # fmt: skip
SIZE = 192  # of each picture, in pixels


def main() -> int:
    raise_on_terminate()
    try:
        host = Host.from_environ()
        with ComfyServer(host, host.base) as server:
            made = pictures(server)
    except (ServerError, SetupError, PromptError, workflow.WorkflowError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped, and the server with it.", file=sys.stderr)
        return 130
    photo = decoded(PHOTO.read_bytes())
    for name, picture in made.items():
        path = ROOT / "example_workflows" / f"{name}.jpg"
        beside(photo, picture).save(path, quality=85)
        record(path)
        print(f"{path.name}: {path.stat().st_size} bytes")
    return 0


def pictures(server: ComfyServer) -> dict[str, Image]:
    """What each workflow makes as it is shipped, but for the name of the saved person."""
    info, made, person = server.object_info(), {}, ""
    for name in WORKFLOWS:
        prompt = workflow.to_prompt(workflow.load(ROOT / "example_workflows" / f"{name}.json"), info)
        prompt = workflow.edited(prompt, {n: {"lidb_name": person} for n in workflow.nodes_of(prompt, "LoadLiDB")})
        result = server.run(prompt)
        for node in workflow.nodes_of(prompt, "SaveLiDB"):
            person = result.outputs[node]["text"][0].removeprefix("lidb/")
        (saved,) = workflow.nodes_of(prompt, "SaveImage")
        made[name] = decoded(server.images(result, saved)[0])
    return made


def beside(photo: Image, picture: Image) -> Image:
    """The two in a row, ``SIZE`` pixels each."""
    from PIL import Image

    sheet = Image.new("RGB", (2 * SIZE, SIZE))
    for i, tile in enumerate((photo, picture)):
        sheet.paste(tile.resize((SIZE, SIZE), Image.Resampling.LANCZOS), (i * SIZE, 0))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
