"""The example workflows as somebody sees who opens one: legible at once, in order, with everything there that it loads."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from devtools.environment import ROOT
from devtools.workflow import load
from miniature.examples import SAVED

FOLDER = ROOT / "example_workflows"
TEMPLATES = sorted(FOLDER.glob("*.json"))
COMPLETE = [path for path in TEMPLATES if path.stem != "03 photo to person with Z-Image"]  # that needs files of its own
WIDEST, HIGHEST = 1900, 1200  # a window of 1600 × 900 then shows all of it at 60 %, where text is still drawn
TITLE = 30  # of a node, above its position
# To which a node grows when a run shows its results: as the front end drew them.
GROWN = {"LoadLiDB": 348, "FastFinetune": 570, "SaveLiDB": 176, "ApplyLiDBToModel": 190, "CropToFace": 416}
EXAMPLES = {"hdb_miniature", "hdb_example_lora", "hdb_silhouette", *SAVED}  # that `dev.py` makes
LOADERS = {
    *("LoadImage", "LoadLiDB", "LoadHyperNet", "LoraLoader", "CheckpointLoaderSimple", "ControlNetLoader"),
}


def rectangle(node):
    (x, y), (width, height) = node["pos"], node["size"]
    height = max(height, GROWN.get(node["type"], 0))
    return x, y - TITLE, x + width, y + height


def apart(one, other):
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def inside(one, x, y, width, height):
    return x <= one[0] and y <= one[1] and one[2] <= x + width and one[3] <= y + height


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_layout(path):
    workflow = load(path)
    places = [rectangle(node) for node in workflow["nodes"]]
    assert all(apart(*two) for two in combinations(places, 2))
    assert all(any(inside(place, *group["bounding"]) for group in workflow["groups"]) for place in places)
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in workflow["groups"])]
    assert all(apart(*two) for two in combinations(boxes, 2))
    assert max(box[2] for box in boxes) - min(box[0] for box in boxes) <= WIDEST
    assert max(box[3] for box in boxes) - min(box[1] for box in boxes) <= HIGHEST
    # Nodes 2.0 takes nodes for elsewhere if it fits the view itself. Text is drawn from a scale of 0.58 on.
    (left, top), scale = workflow["extra"]["ds"]["offset"], workflow["extra"]["ds"]["scale"]
    assert scale >= 0.58 and all(
        scale * (x + left) >= 90
        and scale * (y + top) >= 130
        and scale * (right + left) <= 1600
        and scale * (bottom + top) <= 900
        for x, y, right, bottom in boxes
    )


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_note(path):
    (note,) = (node["widgets_values"][0] for node in load(path)["nodes"] if node["type"] == "MarkdownNote")
    assert note.startswith("### ") and len(note.split()) <= 110
    assert "`" not in note  # blue on blue in Nodes 2.0


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_what_it_loads_is_there(path):
    """In a server that `dev.py serve` has started for the first time."""
    loaded = [node["widgets_values"][0] for node in load(path)["nodes"] if node["type"] in LOADERS]
    photos = {file.name for file in (FOLDER / "input").iterdir()}
    assert len(loaded) >= 2 and all(name in photos or Path(name).stem in EXAMPLES for name in loaded)


def test_no_two_templates_share_the_id_of_a_node():
    """The front end routes progress by it, whichever tab is open."""
    ids = sorted(
        (min(numbers), max(numbers))
        for numbers in ([node["id"] for node in load(path)["nodes"]] for path in FOLDER.glob("*.json"))
    )
    assert all(last < first for (_, last), (first, _) in pairwise(ids))
    assert len({json.loads(path.read_text(encoding="utf-8"))["id"] for path in FOLDER.glob("*.json")}) == len(ids)


def test_every_template_has_a_picture_of_its_own():
    pictures, templates = (list(FOLDER.glob(pattern)) for pattern in ("*.jpg", "*.json"))
    assert {path.stem for path in pictures} == {path.stem for path in templates}
    assert len({path.read_bytes() for path in pictures}) == len(templates)
