"""Saved workflows against hand-written schemas: what is converted, and what is refused."""

import copy

import pytest

from devtools.workflow import WorkflowError, edited, nodes_of, to_prompt

SCHEMAS = {
    "Loader": {"input": {"required": {"name": [["a.safetensors"], {}]}}, "output": ["MODEL"]},
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"min": 0, "max": 99, "control_after_generate": True}],
                "method": ["COMBO", {"options": ["euler", "heun"]}],
                "strength": ["FLOAT", {"min": 0.0, "max": 1.0}],
            },
            "optional": {"mask": ["MASK", {}], "text": ["STRING", {"forceInput": True}]},
        },
        "output": ["LATENT"],
    },
    "LoadImage": {"input": {"required": {"image": [["x.png"], {"image_upload": True}]}}, "output": ["IMAGE", "MASK"]},
}
WORKFLOW = {
    "nodes": [
        {"id": 1, "type": "Loader", "widgets_values": ["b.safetensors"]},
        {"id": 2, "type": "LoadImage", "widgets_values": ["y.png", "image"]},
        {
            "id": 3,
            "type": "Sampler",
            "inputs": [{"name": "model", "link": 7}, {"name": "mask", "link": 8}, {"name": "text", "link": None}],
            "widgets_values": [5, "fixed", "heun", 0.5],
        },
        {"id": 4, "type": "Note", "widgets_values": ["about"]},
    ],
    "links": [[7, 1, 0, 3, 0, "MODEL"], [8, 2, 1, 3, 1, "MASK"]],
}


@pytest.fixture
def workflow():
    return copy.deepcopy(WORKFLOW)


def test_widgets_and_links_become_inputs(workflow):
    prompt = to_prompt(workflow, SCHEMAS)
    assert prompt == {
        "1": {"class_type": "Loader", "inputs": {"name": "b.safetensors"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "y.png"}},
        "3": {
            "class_type": "Sampler",
            "inputs": {"model": ["1", 0], "mask": ["2", 1], "seed": 5, "method": "heun", "strength": 0.5},
        },
    }


def test_a_bypassed_node_passes_its_input_on(workflow):
    """As the front end has it: the first linked input of the same type."""
    ports = {"inputs": [{"name": "m", "type": "MODEL", "link": None}, {"name": "mask", "type": "MASK", "link": 8}]}
    outputs = {"outputs": [{"type": "IMAGE"}, {"type": "MASK"}]}
    for number in (5, 6):
        workflow["nodes"].append({"id": number, "type": "Crop", "mode": 4, **copy.deepcopy(ports), **outputs})
    workflow["nodes"][-2]["inputs"][1]["link"] = 9
    workflow["nodes"][2]["inputs"][1]["link"] = 10
    workflow["links"] += [[9, 6, 1, 5, 1, "MASK"], [10, 5, 1, 3, 1, "MASK"]]
    workflow["links"][1][3] = 6
    schemas = SCHEMAS | {"Crop": {"input": {}, "output": ["IMAGE", "MASK"]}}
    assert to_prompt(workflow, schemas) == to_prompt(WORKFLOW, schemas)
    workflow["nodes"][-1]["inputs"][1]["link"] = None
    with pytest.raises(WorkflowError, match=r"Crop \(6\): is bypassed, and no input of type MASK is linked"):
        to_prompt(workflow, schemas)


def test_a_link_wins_over_the_widget_it_covers(workflow):
    workflow["nodes"][2]["inputs"].append({"name": "strength", "link": 9, "widget": {"name": "strength"}})
    workflow["nodes"].append({"id": 5, "type": "Number", "widgets_values": [0.25]})
    workflow["links"].append([9, 5, 0, 3, 3, "FLOAT"])
    number = {"Number": {"input": {"required": {"value": ["FLOAT", {}]}}, "output": ["FLOAT"]}}
    assert to_prompt(workflow, SCHEMAS | number)["3"]["inputs"]["strength"] == ["5", 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["nodes"][0].update(type="Gone"), "no such node"),
        (lambda w: w["nodes"][0].update(mode=2), "muted"),
        (lambda w: w["nodes"][0].update(widgets_values=[]), "no widget value for 'name'"),
        (lambda w: w["nodes"][0].update(widgets_values=["a.safetensors", "b"]), "too many"),
        (lambda w: w["nodes"][2].update(widgets_values=[5, "heun", 0.5]), "control_after_generate"),
        (lambda w: w["nodes"][2].update(widgets_values=["5", "fixed", "heun", 0.5]), "expected INT"),
        (lambda w: w["nodes"][2].update(widgets_values=[5, "fixed", "dpm", 0.5]), "one of euler, heun"),
        (lambda w: w["nodes"][2].update(widgets_values=[5, "fixed", "heun", 1.5]), "expected 0.0 to 1.0"),
        (lambda w: w["nodes"][2]["inputs"][0].update(link=None), "required inputs without a value or link: model"),
        (lambda w: w["nodes"][2]["inputs"][0].update(name="other"), "no input 'other'"),
        (lambda w: w["links"][0].__setitem__(1, 2), "takes MODEL, but is linked to IMAGE"),
        (lambda w: w["links"][0].__setitem__(4, 1), "does not end at 'model'"),
        (lambda w: w["links"][0].__setitem__(1, 99), "a node that is not there"),
    ],
)
def test_what_does_not_fit_is_refused(workflow, change, message):
    change(workflow)
    with pytest.raises(WorkflowError, match=message):
        to_prompt(workflow, SCHEMAS)


def test_edits_leave_the_original(workflow):
    prompt = to_prompt(workflow, SCHEMAS)
    changed = edited(prompt, {node: {"seed": 6} for node in nodes_of(prompt, "Sampler")})
    assert (prompt["3"]["inputs"]["seed"], changed["3"]["inputs"]["seed"]) == (5, 6)
