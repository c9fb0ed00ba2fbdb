"""The pictures that the host's template browser shows of the example workflows.

``python dev.py thumbnails [NAME …]`` runs them on the miniature as they are shipped and writes
``example_workflows/NAME.jpg``: a square with the picture that the workflow makes and the photos of the people in it. One
that needs a model which is not shipped gets the example photo with that model's name. ``icon`` makes the pack's icon.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import workflow
from .comfy_client import PromptError, ServerError
from .comfy_server import KEEP_RESULTS, ComfyServer, raise_on_terminate
from .demo import PHOTO, decoded
from .environment import ROOT, Host, SetupError
from .stale import record

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = ROOT / "example_workflows"
ICON = "icon"
NAMED = {"03 photo to person with Z-Image": "Z-Image", ICON: "[v]"}
WORKFLOWS = tuple(path.stem for path in sorted(FOLDER.glob("*.json")) if path.stem not in NAMED)
SIZE = 256  # of the square, in pixels
INSET = 84  # of a photo in a corner


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py thumbnails", description=__doc__)
    parser.add_argument("names", nargs="*", default=(*WORKFLOWS, *NAMED), metavar="NAME", help="default: all of them")
    names = parser.parse_args().names
    raise_on_terminate()
    try:
        host = Host.from_environ()
        with ComfyServer(host, host.base, options=KEEP_RESULTS) as server:
            info = server.object_info()
            for name in names:
                since = time.monotonic()
                path = ROOT / f"{ICON}.png" if name == ICON else FOLDER / f"{name}.jpg"
                made = named(name) if name in NAMED else thumbnail(server, prompt_of(path.with_suffix(".json"), info))
                made.save(path, quality=88)
                record(path)
                print(f"{path.name}: {path.stat().st_size} bytes, {time.monotonic() - since:.0f} s", flush=True)
    except (ServerError, SetupError, PromptError, workflow.WorkflowError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped, and the server with it.", file=sys.stderr)
        return 130
    return 0


def prompt_of(path: Path, info: Mapping[str, Any]) -> workflow.Prompt:
    """A saved workflow in API format."""
    return workflow.to_prompt(workflow.load(path), info)


def named(name: str) -> Image:
    """The photo of the demonstration, and below it the name of the model that a workflow needs, or the token."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = decoded(PHOTO.read_bytes()).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    draw, band = ImageDraw.Draw(sheet), SIZE // 6
    draw.rectangle((0, SIZE - band, SIZE, SIZE), fill="#202020")
    draw.text((SIZE / 2, SIZE - band / 2), NAMED[name], "white", ImageFont.load_default(band * 0.6), anchor="mm")
    return sheet


def thumbnail(server: ComfyServer, prompt: workflow.Prompt) -> Image:
    """What a workflow makes, beside the photos of those whom it makes it of."""
    result = server.run(prompt)
    (saved,) = workflow.nodes_of(prompt, "SaveImage")
    return square(decoded(server.images(result, saved)[0]), [decoded(path.read_bytes()) for path in photos_of(prompt)])


def photos_of(prompt: workflow.Prompt) -> list[Path]:
    """The photos of the people, of a saved one that of the same name, otherwise those that are loaded; control pictures."""
    people = [Path(prompt[node]["inputs"]["lidb_name"]).stem for node in workflow.nodes_of(prompt, "LoadLiDB")]
    loaded = {node: Path(prompt[node]["inputs"]["image"]).stem for node in workflow.nodes_of(prompt, "LoadImage")}
    controls = [prompt[node]["inputs"]["image"][0] for node in workflow.nodes_of(prompt, "ControlNetApplyAdvanced")]
    names = [*(people or loaded.values()), *(loaded[node] for node in controls)]
    return [FOLDER / "input" / f"{name}.png" for name in names]


def square(picture: Image, photos: Sequence[Image]) -> Image:
    """A picture with photos in its lower corner, or above them if it is wide."""
    from PIL import Image

    sheet = Image.new("RGB", (SIZE, SIZE), "#202020")
    height = SIZE * picture.height // picture.width
    sheet.paste(picture.resize((SIZE, height), Image.Resampling.LANCZOS))
    side = min(SIZE - height, SIZE // len(photos)) or INSET
    left = (SIZE - side * len(photos)) // 2 if height < SIZE else 0
    for number, photo in enumerate(photos):
        small = photo.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + number * side, SIZE - side))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
