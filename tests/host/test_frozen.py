"""What version 1.0 promised: a workflow or an API call that was saved then still runs.

`nodes_1_0.json` holds the nodes as they were. Widgets are saved by their place and links by an output's number, so new
ones come behind the old; an input that an old workflow lacks is optional.
"""

import json
from pathlib import Path

import pytest

PROMISED = json.loads(Path(__file__).with_name("nodes_1_0.json").read_text(encoding="utf-8"))
WIDGETS = "COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"


def values_of(slot):
    """What a widget takes: its choices, unless they are files, or its range."""
    if slot.get_io_type() == "COMBO":
        return [] if slot.id.endswith("_name") else list(slot.options)
    limits = [getattr(slot, limit, None) for limit in ("min", "max")]
    return [] if None in limits else limits


def described(schema):
    """A node as `nodes_1_0.json` has it: inputs as [name, type, choices or range], types of outputs."""
    return {
        "inputs": [[slot.id, slot.get_io_type(), values_of(slot)] for slot in schema.inputs],
        "outputs": [slot.get_io_type() for slot in schema.outputs],
    }


def broken(promised, schema):
    """What an old workflow of a node would stumble over."""
    now, faults = described(schema), []
    inputs = {name: (kind, values) for name, kind, values in now["inputs"]}
    for name, kind, values in promised["inputs"]:
        if inputs.get(name, ("", []))[0] != kind:
            faults.append(f"{name} was of type {kind}")
            continue
        still = inputs[name][1]
        missing = set(values) - set(still)
        if missing if kind == "COMBO" else values and not still[0] <= values[0] <= values[1] <= still[1]:
            faults.append(f"{name} took {values}")
    widgets = [[name for name, kind, _ in node["inputs"] if kind in WIDGETS] for node in (promised, now)]
    if widgets[1][: len(widgets[0])] != widgets[0]:
        faults.append(f"its widgets began with {widgets[0]}")
    if now["outputs"][: len(promised["outputs"])] != promised["outputs"]:
        faults.append(f"its outputs began with {promised['outputs']}")
    old = {name for name, _, _ in promised["inputs"]}
    new = [slot.id for slot in schema.inputs if slot.id not in old and not slot.optional]
    return faults + [f"{name} is new and required" for name in new]


def test_old_workflows_find_their_nodes_as_they_were(host):
    schemas = {node_id: node.GET_SCHEMA() for node_id, node in host.nodes.items()}
    assert {node_id: broken(PROMISED[node_id], schemas[node_id]) for node_id in PROMISED} == {i: [] for i in PROMISED}
    assert set(schemas) >= set(PROMISED)


CHANGES = {
    "steps was of type FLOAT": lambda node: node["inputs"][6].__setitem__(1, "FLOAT"),
    "words was of type STRING": lambda node: node["inputs"][5].__setitem__(0, "words"),
    "steps took [0, 20000]": lambda node: node["inputs"][6].__setitem__(2, [0, 20000]),
    "its widgets began with": lambda node: node["inputs"].insert(4, node["inputs"].pop(5)),
    "its outputs began with ['IMAGE', 'LIDB']": lambda node: node["outputs"].reverse(),
    "vae is new and required": lambda node: node["inputs"].pop(2),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_a_changed_node_is_noticed(host, fault):
    """Each change of the promise stands for the opposite change of the node."""
    promised = json.loads(json.dumps(PROMISED["FastFinetune"]))
    CHANGES[fault](promised)
    assert any(found.startswith(fault) for found in broken(promised, host.nodes["FastFinetune"].GET_SCHEMA()))
