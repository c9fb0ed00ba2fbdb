"""The nodes in other languages: everything that the schemas show is translated, and nothing else is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = {"ja": re.compile("[ぁ-んァ-ン一-龥]"), "zh": re.compile("[一-龥]")}
SAME_EVERYWHERE = re.compile(r"(LiDB( [AB])?|CLIP|CLIP Vision|VAE|HyperNet|cfg)")


def shown(node) -> dict[str, str]:
    """What a front end shows of a node: path in ``nodeDefs.json`` → text in English."""
    schema = node.GET_SCHEMA()
    texts = {"display_name": schema.display_name, "description": schema.description}
    for kind, slots in (("inputs", [(i.id, i) for i in schema.inputs]), ("outputs", enumerate(schema.outputs))):
        for key, slot in slots:
            texts |= {f"{kind}.{key}.name": str(key), f"{kind}.{key}.tooltip": slot.tooltip}
    return texts


def flat(value, path=()) -> dict[str, str]:
    if not isinstance(value, dict):
        return {".".join(path): value}
    return {name: text for key, inner in value.items() for name, text in flat(inner, (*path, key)).items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_that_nodes_show_is_translated(host, language):
    there = flat(json.loads((FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8")))
    wanted = {f"{node_id}.{path}" for node_id, node in host.nodes.items() for path in shown(node)}
    assert sorted(wanted - there.keys()) == [], f"missing in locales/{language}/nodeDefs.json"
    assert sorted(there.keys() - wanted) == [], f"of no node, in locales/{language}/nodeDefs.json"


@pytest.mark.parametrize(("language", "letters"), LANGUAGES.items())
def test_translations_are_in_their_language(language, letters):
    there = flat(json.loads((FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8")))
    assert [
        path for path, text in there.items() if not letters.search(text) and not SAME_EVERYWHERE.fullmatch(text)
    ] == []


def test_the_languages_are_those_that_are_tested():
    assert {path.name for path in FOLDER.iterdir()} == {"en", *LANGUAGES}


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_an_input_whose_zero_means_something_says_so_in_its_name(host, language):
    """Where 0 is chosen for its own sake and is no amount. In English all else is in the schemas."""
    there = flat(json.loads((FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8")))
    zero = re.compile(r"\b0( is|:| keeps) ")
    named = {
        f"{node_id}.inputs.{one.id}.name": one.id
        for node_id, node in host.nodes.items()
        for one in node.GET_SCHEMA().inputs
        if one.io_type == "INT" and zero.search(one.tooltip)
    }
    assert len(named) == 4 and all("(0" in there[path] for path in named)
    if language == "en":
        assert there.keys() == named.keys() and all(there[path].startswith(name) for path, name in named.items())
