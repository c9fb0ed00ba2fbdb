"""What users read: tooltips, help pages, defaults that run, layer counts of the model families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from miniature.captions import photo_words

from ..example_photos import CONTEXTS

ROOT = Path(__file__).resolve().parents[2]


def test_every_socket_and_widget_has_a_tooltip(host):
    for node_id, node in host.nodes.items():
        schema = node.GET_SCHEMA()
        assert schema.node_id == node_id == node.__name__
        assert schema.description
        assert all(slot.tooltip for slot in (*schema.inputs, *schema.outputs)), node_id


def test_every_node_has_a_help_page_that_names_its_inputs(host):
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(host.nodes)
    for node_id, node in host.nodes.items():
        page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
        table = page.split("| input | meaning |\n|---|---|\n", 1)[1].split("\n\n", 1)[0]
        named = [name for row in table.splitlines() for name in row.split("|")[1].strip().split(", ")]
        assert sorted(named) == sorted(slot.id for slot in node.GET_SCHEMA().inputs), node_id


BY_NAME = "person", "face", "photo", "portrait", "dreambooth", "hyperdreambooth", "lora", "train", "people"
BY_ALIAS = "identity", "likeness", "faceid"


def test_a_search_finds_nodes_by_what_they_are_for(host):
    """Older front ends search names alone, newer ones aliases, too."""
    names = " ".join(node.GET_SCHEMA().display_name for node in host.nodes.values()).lower()
    assert [word for word in BY_NAME if word not in names] == []
    found = [getattr(node.GET_SCHEMA(), "search_aliases", None) or () for node in host.nodes.values()]
    aliases = " ".join(alias for own in found for alias in own).lower()
    assert not aliases or [word for word in BY_ALIAS if word not in aliases] == []


def test_widget_limits_are_those_of_the_settings(host):
    nodes = (host.nodes["FastFinetune"], host.nodes["FastFinetuneOptions"])
    widgets = {slot.id: slot for node in nodes for slot in node.GET_SCHEMA().inputs}
    config = host.module("hdb_core.finetuning").FinetuneConfig
    for name in ("steps", "rank", "batch_size"):
        for value in (widgets[name].min, widgets[name].max):
            assert getattr(config(**{name: value}), name) == value
        with pytest.raises(host.module("hdb_core.errors").FinetuneError):
            config(**{name: widgets[name].min - 1})


MADE_FROM = {
    "02 photo to person with HyperNet": "a prediction",
    "01 photo to person": "one photo",
    "03 photo to person with Z-Image": "one photo",
    "04 several photos to person": "several photos",
}


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_example_workflows_have_the_defaults_of_the_nodes(host, path):
    """A fresh node does what the workflow does; only captions say what its photos show, and hooks have the sampler's cfg."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    shown = [node["widgets_values"][0] for node in nodes if node["type"] == "LoadImage"]
    (sampler,) = (node["widgets_values"] for node in nodes if node["type"] == "KSampler")
    saved = [node for node in nodes if node["type"] in host.nodes]
    assert saved and not {"FastFinetuneOptions", "ApplyOptions"} & {node["type"] for node in saved}
    for node in saved:
        inputs = [i for i in host.nodes[node["type"]].GET_SCHEMA().inputs if not getattr(i, "force_input", None)]
        widgets = [i for i in inputs if getattr(i, "default", None) is not None]
        if widgets:  # the name of a file has no default
            expected = {widget.id: widget.default for widget in widgets}
            if node["type"] == "FastFinetune":
                expected["photo_words"] = "\n".join(photo_words(CONTEXTS[name]) for name in shown)
            if node["type"] == "LiDBHook":
                expected["cfg"] = sampler[3]
            assert node["widgets_values"] == list(expected.values())


@pytest.mark.parametrize("name", MADE_FROM)
def test_example_workflows_are_recommended_for_what_they_make_persons_from(host, name):
    """Automatic steps and the file's strengths then are those of this row of the table."""
    nodes = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
    photos = sum(node["type"] == "LoadImage" for node in nodes)
    (finetune,) = (node for node in nodes if node["type"] == "FastFinetune")
    linked = {slot["name"] for slot in finetune["inputs"] if slot["link"] is not None}
    recommended = host.module("hdb_core.recommended")
    assert recommended.made_from(photos, predicted="lidb" in linked, learned=False) == MADE_FROM[name]
    assert "lidb" not in linked or any(node["type"] == "PredictLiDB" for node in nodes)


def test_the_recommendations(host):
    recommended = host.module("hdb_core.recommended")
    assert recommended.RECOMMENDED == {
        "a prediction": (14, (0.7, 0.5, 2.5), 0.25),
        "one photo": (56, (0.35, 0.5, 4.5), 0.4),
        "several photos": (100, (0.7, 0.5, 2.5), 0.33),
        "photos in a learned basis": (8, (0.7, 0.5, 2.5), None),
    }


SDXL_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 2048,
    "num_heads": -1, "num_head_channels": 64, "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "channel_mult": (1, 2, 4), "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
    "adm_in_channels": 2816, "num_classes": "sequential",
}  # fmt: skip


@pytest.mark.parametrize("convolutions", [False, True], ids=["attention", "all"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_layers_of_full_size_models(host, family, convolutions):
    """Names and counts on the host's own modules, without memory for their weights."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.utils import unet_to_diffusers

    layout = host.module("hdb_core.layout")
    config = host.load_file("random_checkpoint.py").FULL_UNET if family == "sd1" else SDXL_UNET
    with torch.device("meta"):
        unet = UNetModel(**config, operations=comfy.ops.disable_weight_init)
    found = layout.layout_of(layout.find_targets(dict(unet.named_modules()), {}, family, convolutions), family)
    assert len(found.layers) == {"sd1": 128, "sdxl": 560}[family] + convolutions * {"sd1": 58, "sdxl": 45}[family]
    host_names = unet_to_diffusers({**config, "transformer_depth": list(config["transformer_depth"])})
    keys = layout.host_keys(found)
    for layer in found.layers:
        name = layer.name.removeprefix("unet.") + ".weight"
        assert keys[layer.name] == f"diffusion_model.{host_names[name]}"
