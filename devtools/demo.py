"""One photo in, that person's pictures out, through ComfyUI; run by `python dev.py demo`."""

from __future__ import annotations

import argparse
import errno
import io
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import workflow
from .comfy_client import Progress, PromptError, PromptInterrupted, ServerError
from .comfy_server import KEEP_RESULTS, ComfyServer, raise_on_terminate
from .device import add_option
from .environment import CHECKPOINT, HYPERNET, OF_THE_MINIATURE, ROOT, Host, SetupError, lacking

if TYPE_CHECKING:
    from PIL.Image import Image

    from miniature.prompts import EvaluationPrompt

OUTPUT = ROOT / "output"
WORKFLOW = ROOT / "example_workflows" / "02 photo to person with HyperNet.json"
PHOTO = ROOT / "example_workflows" / "input" / "hdb_photo.png"
PERSON_SEED = 20_000_000  # whom the photo shows: the first person of the test split
TOKEN = "[v]"
SD15_LAYERS = 128 + 48  # attention of UNet and text encoder
SD15_CONVOLUTIONS = 58
STAGES = {
    "CheckpointLoaderSimple": "load",
    "PredictLiDB": "predict",
    "FastFinetune": "finetune",
    "KSampler": "sample",
    "VAEDecode": "decode",
}
LABELS = {"before": "before", "predicted": "predicted", "after": "predicted and fine-tuned"}
COLUMNS = tuple(LABELS)
SCORES = ("identity", "retrieval", "adherence", "joint")
SCENES = "plain", "accessory", "pencil sketch", "pixel art", "night", "painting"  # kinds of prompts
OF_PEOPLE = "plain", "accessory", "painting"  # of the picture of several people
TILE, GAP, LINE, CHARACTERS = 160, 8, 19, 20  # pixels; characters in a line
CLEAR = "\r\033[K" if sys.stdout.isatty() else ""  # back to an empty line


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--steps", type=int, help="of FastFinetune (default: automatic)")
    parser.add_argument(
        "--seeds", type=int, default=4, help="pictures for each prompt, all judged (default: %(default)s)"
    )
    parser.add_argument(
        "--people", type=int, default=0, help="also draw so many people into demo_people.jpg (default: %(default)s)"
    )
    add_option(parser, default="cpu")
    args = parser.parse_args()
    raise_on_terminate()
    try:
        OUTPUT.mkdir(exist_ok=True)
        run(Host.from_environ(), steps=args.steps, seeds=args.seeds, device=args.device, people=args.people)
    except (ServerError, SetupError, PromptError, PromptInterrupted, workflow.WorkflowError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:
        hint = " Free some space and run this again." if error.errno == errno.ENOSPC else ""
        print(f"\n{error}.{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped, and the server with it.", file=sys.stderr)
        return 130
    return 0


def run(host: Host, steps: int | None, seeds: int, device: str, people: int = 0) -> None:
    """The whole demonstration; writes `demo_person.safetensors`, `demo.png` and `demo.json` to `output/`, and with ``people``
    `demo_people.jpg`."""
    from hdb_core.files.atomic import replacing

    for folder, name in (("checkpoints", CHECKPOINT), ("hyperdreambooth", HYPERNET)):
        if not (host.base / "models" / folder / name).is_file():
            raise SetupError(f"The miniature's {name} is not in models/{folder}: is weights/ complete?")
    scenes = scene_prompts(PERSON_SEED, SCENES)
    texts = [scene.text(TOKEN) for scene in scenes]
    since = time.monotonic()
    print("Starting ComfyUI …", flush=True)
    with ComfyServer(host, host.base, device=device, options=KEEP_RESULTS) as server:
        session = Session(server, steps, seeds, {"start": time.monotonic() - since})
        pictures = {column: {text: session.pictures(text, column) for text in texts} for column in COLUMNS}
        person = OUTPUT / "demo_person.safetensors"
        with replacing(person) as copy:  # a full disk leaves that of an earlier run
            shutil.copyfile(session.saved, copy)
        rows = [row_of_pictures(server, PERSON_SEED + number, steps) for number in range(people)]
    scores = {}
    if lack := lacking(OF_THE_MINIATURE):  # a ComfyUI of the user's own
        print(f"Not judged: {lack}", flush=True)
    else:
        print("Judging …", flush=True)
        since = time.monotonic()
        scores = judged(scenes, pictures)
        session.seconds["judge"] = time.monotonic() - since
    report = {
        **sizes(person),
        **scores,
        "seeds": seeds,
        "prompts": texts,
        "seconds": {name: round(value, 1) for name, value in session.seconds.items()},
    }
    first = {column: [pictures[column][text][0] for text in texts] for column in COLUMNS}
    sheet([["the base model", *first["before"]], [decoded(PHOTO.read_bytes()), *first["after"]]], ["", *texts]).save(
        OUTPUT / "demo.png"
    )
    if people:
        sheet(side_by_side(rows)).save(OUTPUT / "demo_people.jpg", quality=88)
    (OUTPUT / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(summary(report))


def row_of_pictures(server: ComfyServer, seed: int, steps: int | None) -> list[Image]:
    """The photo of a drawn person, and the workflow's picture of each scene of `OF_PEOPLE`."""
    from PIL import Image

    from miniature.captions import photo_words
    from miniature.drawing import photo
    from miniature.prompts import evaluation_photo

    person, context = evaluation_photo(seed)
    shown = Image.fromarray(photo(person, context))
    path = server.input / f"demo_{seed}.png"
    shown.save(path)
    session = Session(server, steps, 1, {}, path.name, photo_words(context))
    pictures = [session.pictures(scene.text(TOKEN), "after")[0] for scene in scene_prompts(seed, OF_PEOPLE)]
    path.unlink()
    return [shown, *pictures]


def side_by_side(rows: Sequence[list[Image]]) -> list[list[Image | str]]:
    """Rows in two halves, the second one beside the first."""
    half = -(-len(rows) // 2)
    return [[*left, *right] for left, right in zip_longest(rows[:half], rows[half:], fillvalue=[])]


class Session:
    """The example workflow in a running server, queued once for each prompt; the server's cache keeps the person.

    Args:
        server: that runs.
        steps: of FastFinetune; None leaves them automatic.
        seeds: pictures of a prompt.
        seconds: receives how long the stages took.
        photo: a file in the server's ``input``.
        words: what it shows besides the person; None leaves the workflow's, of its own photo.
    """

    def __init__(self, server: ComfyServer, steps: int | None, seeds: int, seconds: dict[str, float],
                 photo: str = PHOTO.name, words: str | None = None) -> None:  # fmt: skip
        self.server, self.seconds = server, seconds
        self.saved = Path()
        prompt = workflow.to_prompt(workflow.load(WORKFLOW), server.object_info())
        (finetune,), (predict,), (self._apply,), (sampler,), (loader,) = (
            workflow.nodes_of(prompt, kind)
            for kind in ("FastFinetune", "PredictLiDB", "ApplyLiDBToModel", "KSampler", "LoadImage")
        )
        self._person = {"before": [finetune, 0], "predicted": [predict, 0], "after": [finetune, 0]}
        (self._save,), (self._pictures,) = (workflow.nodes_of(prompt, kind) for kind in ("SaveLiDB", "SaveImage"))
        changed = {"steps": steps, "photo_words": words}
        self._text = prompt[sampler]["inputs"]["positive"][0]
        self._prompt = workflow.edited(
            prompt,
            {
                finetune: {name: value for name, value in changed.items() if value is not None},
                loader: {"image": photo},
                prompt[sampler]["inputs"]["latent_image"][0]: {"batch_size": seeds},
            },
        )

    def pictures(self, text: str, column: str) -> list[Image]:
        """The pictures of a prompt, one for each seed; ``column`` is one of `COLUMNS`."""
        apply = {"lidb": self._person[column], "strength": 0.0 if column == "before" else 1.0}
        prompt = workflow.edited(self._prompt, {self._text: {"text": text}, self._apply: apply})
        label = f"“{text}” {LABELS[column]}"
        since = time.monotonic()
        result = self.server.run(prompt, lambda progress: show(label, progress))
        print(f"{CLEAR}{label}: {time.monotonic() - since:.0f} s", flush=True)
        for node, taken in result.seconds.items():
            if stage := STAGES.get(prompt[node]["class_type"]):
                self.seconds[stage] = self.seconds.get(stage, 0.0) + taken
        if self._save in result.outputs:
            self.saved = self.server.output / result.outputs[self._save]["text"][0]
        return [decoded(data) for data in self.server.images(result, self._pictures)]


def scene_prompts(seed: int, kinds: Sequence[str]) -> list[EvaluationPrompt]:
    """The first prompt of each kind; all contradict the expression, clothing and background of a person's photo."""
    from miniature.prompts import evaluation_photo, evaluation_prompts

    prompts = evaluation_prompts(*evaluation_photo(seed))
    return [next(prompt for prompt in prompts if prompt.kind == kind) for kind in kinds]


def judged(
    scenes: Sequence[EvaluationPrompt], pictures: Mapping[str, Mapping[str, Sequence[Image]]]
) -> dict[str, dict[str, float]]:
    """The judge's scores of the scene pictures by column and prompt: score → column → mean."""
    import numpy as np

    from miniature.judge import Judge
    from miniature.prompts import evaluation_photo
    from miniature.scores import ceilings, score_pictures, summarise

    judge = Judge.load("a")
    person, photo = evaluation_photo(PERSON_SEED)
    ceiling = dict(zip(scenes, ceilings(judge, person, scenes), strict=True))
    report: dict[str, dict[str, float]] = {name: {} for name in SCORES}
    for column, own in pictures.items():
        prompts = [scene for scene in scenes for _ in own[scene.text(TOKEN)]]
        readings = judge.read(np.stack([np.asarray(p) for scene in scenes for p in own[scene.text(TOKEN)]]))
        means = summarise(score_pictures(readings, person, photo, prompts, [ceiling[prompt] for prompt in prompts]))
        for name in SCORES:
            report[name][column] = round(means[name].value, 3)
    return report


def sizes(person: Path) -> dict[str, int]:
    """Bytes of the person's file, and of the same person on SD 1.5: as many components a layer, the same header; and the
    steps that it says it took."""
    from hdb_core.files.lidb import read_header

    header = read_header(person)
    component = header.component_bytes
    components = sum(header.ranks)
    sd15_layers = SD15_LAYERS + SD15_CONVOLUTIONS * header.layout.has_convolutions
    lidb_bytes = person.stat().st_size
    on_sd15 = components / len(header.layout.layers) * sd15_layers
    there = round(lidb_bytes + component * (on_sd15 - components))
    counts = {"lidb_bytes": lidb_bytes, "lidb_bytes_sd15": there, "sd15_layers": sd15_layers}
    return {**counts, "rank": max(header.ranks), "steps": header.about.steps}


def summary(report: Mapping[str, Any]) -> str:
    lines = [
        f"The person: {report['lidb_bytes'] / 1000:.1f} KB at rank {report['rank']}.",
        f"On SD 1.5 it would be {report['lidb_bytes_sd15'] / 1000:.1f} KB ({report['sd15_layers']} layers, counted).",
        f"Predicted in {report['seconds'].get('predict', 0):.1f} s, the network's loading included.",
        f"Fine-tuned in {report['seconds'].get('finetune', 0):.0f} s, {report['steps']} steps.",
        *(
            f"{k.capitalize()}: " + ", ".join(f"{report[k][c]:.2f} {LABELS[c]}" for c in COLUMNS)
            for k in SCORES
            if k in report
        ),
        "Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items()),
        f"In {OUTPUT}: demo.png, demo_person.safetensors, demo.json",
    ]
    return "\n".join(lines)


def show(label: str, progress: Progress) -> None:
    """One console line that follows a node."""
    if not CLEAR:
        return
    stage = STAGES.get(progress.class_type, progress.class_type)
    eta = f", {progress.eta:.0f} s left" if progress.value else ""
    print(f"{CLEAR}{label}: {stage} {progress.value}/{progress.maximum}{eta}", end="", flush=True)


def decoded(data: bytes) -> Image:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def sheet(rows: Sequence[Sequence[Image | str]], labels: Sequence[str] = ()) -> Image:
    """Rows of pictures; a text may stand in place of one, and each column may have a label below."""
    from PIL import Image, ImageDraw, ImageFont

    wrapped = [textwrap.wrap(label, CHARACTERS) for label in labels]
    below = LINE * max(map(len, wrapped), default=0)
    width, height = max(map(len, rows)) * (TILE + GAP) + GAP, len(rows) * (TILE + GAP) + GAP + below
    made = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(15)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            corner = GAP + x * (TILE + GAP), GAP + y * (TILE + GAP)
            if isinstance(tile, str):
                middle, text = (corner[0] + TILE / 2, corner[1] + TILE / 2), textwrap.fill(tile, CHARACTERS)
                draw.text(middle, text, "black", font, anchor="mm", align="center")
            else:
                made.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), corner)
    for x, lines in enumerate(wrapped):
        draw.multiline_text((GAP + x * (TILE + GAP), height - below - GAP / 2), "\n".join(lines), "black", font)
    return made


if __name__ == "__main__":
    sys.exit(main())
