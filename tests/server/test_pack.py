"""The pack in a live server: it loads without complaint, trains, saves, applies, and leaves the host as it was."""

import io
from dataclasses import replace
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from PIL import Image

from devtools import thumbnails
from devtools.comfy_client import PromptError, PromptInterrupted
from devtools.environment import PACK, ROOT
from devtools.workflow import edited, load, nodes_of, to_prompt
from hdb_core.files import lidb as lidb_file

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def ours(object_info):
    return {name: schema for name, schema in object_info.items() if schema["python_module"] == f"custom_nodes.{PACK}"}


def pixels(server, result):
    """The first picture of node 7, without the metadata of its file."""
    return Image.open(io.BytesIO(server.images(result, "7")[0])).tobytes()


def test_the_pack_loads_without_complaint(server, ours):
    assert {"FastFinetune", "ApplyLiDBToModel", "SaveLiDB", "LoadLiDB"} <= ours.keys()
    log = server.log.read_text(encoding="utf-8")
    assert not [line for line in log.splitlines() if PACK in line and ("FAILED" in line or "Cannot import" in line)]
    start, ready, _ = log.partition("To see the GUI")
    assert ready and "Traceback" not in start  # of a package that the host lacks, too


def test_every_input_has_a_tooltip(ours):
    inputs = [
        (f"{name}.{key}", spec[1] if len(spec) > 1 else {})
        for name, schema in ours.items()
        for group in ("required", "optional")
        for key, spec in schema["input"].get(group, {}).items()
    ]
    assert inputs
    assert [key for key, options in inputs if not options.get("tooltip")] == []


def test_example_workflows_are_offered_as_templates(server):
    assert sorted(server.get("/api/workflow_templates")[PACK]) == sorted(path.stem for path in WORKFLOWS)


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_templates_have_a_picture(name, server):
    url = f"{server.url}/api/workflow_templates/{PACK}/{quote(name)}.jpg"
    with urlopen(url) as response:
        picture = Image.open(io.BytesIO(response.read()))
    assert picture.size == (thumbnails.SIZE, thumbnails.SIZE)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_fit_the_schemas(path, object_info, ours):
    prompt = to_prompt(load(path), object_info)
    assert {node["class_type"] for node in prompt.values()} & ours.keys()


def test_a_person_is_learned_saved_and_applied(server, training_prompt):
    events = []
    result = server.run(training_prompt, events.append)
    assert [event.value for event in events if event.node == "10"][-1] == 2
    (name,) = result.outputs["11"]["text"]
    assert (server.output / name).stat().st_size < 120_000
    assert name.split("/")[-1] in str(server.object_info()["LoadLiDB"]["input"]["required"])
    after = pixels(server, result)
    base = edited(training_prompt, {"12": {"strength": 0.0}})
    without = edited(training_prompt, {"5": {"model": ["1", 0]}, "2": {"clip": ["1", 1]}})
    assert pixels(server, server.run(base)) == pixels(server, server.run(without)) != after


def test_interrupted_training_leaves_the_host_as_it_was(server, sampling_prompt, training_prompt):
    before = pixels(server, server.run(sampling_prompt))
    endless = edited(training_prompt, {"10": {"steps": 1000, "seed": 1}})
    with pytest.raises(PromptInterrupted):
        server.run(endless, lambda event: event.node == "10" and event.value >= 2 and server.interrupt())
    # Another number with the same float32 value: the sampler runs again, on the same loaded model.
    after = pixels(server, server.run(edited(sampling_prompt, {"5": {"cfg": 3.0 + 1e-12}})))
    assert before == after


def test_an_error_in_training_leaves_the_host_as_it_was(server, sampling_prompt, training_prompt):
    """Training goes on from a person whose numbers are beyond what the model can compute with."""
    saved = server.run(edited(training_prompt, {"10": {"seed": 2}})).outputs["11"]["text"][0]
    person = lidb_file.load(server.output / saved)
    lidb_file.save(replace(person, up=1e9 * person.up), server.output / "lidb" / "huge.safetensors")
    before = pixels(server, server.run(sampling_prompt))
    training_prompt["13"] = {"class_type": "LoadLiDB", "inputs": {"lidb_name": "huge.safetensors"}}
    with pytest.raises(PromptError, match="diverged at step"):
        server.run(edited(training_prompt, {"10": {"lidb": ["13", 0]}}))
    after = pixels(server, server.run(edited(sampling_prompt, {"5": {"cfg": 3.0 + 2e-12}})))
    assert before == after


@pytest.mark.usefixtures("training_prompt")  # which puts the example photos where the host finds them
@pytest.mark.parametrize("name", thumbnails.WORKFLOWS)
def test_example_workflows_run_as_they_are(name, server, object_info):
    prompt = to_prompt(load(ROOT / "example_workflows" / f"{name}.json"), object_info)
    quick = {"FastFinetune": {"steps": 2}, "KSampler": {"steps": 2}}
    changes = {node: inputs for kind, inputs in quick.items() for node in nodes_of(prompt, kind)}
    result = server.run(edited(prompt, changes))
    (saved,) = nodes_of(prompt, "SaveImage")
    assert server.images(result, saved)


def test_the_blueprint_is_offered(server, ours):
    """The host reads subgraphs of packs; each node in it has an input for every link that ends there."""
    (entry,) = (e for e in server.get("/global_subgraphs").values() if e["info"]["node_pack"] == f"custom_nodes.{PACK}")
    assert entry["name"] == "Personalise from photo"
    path = ROOT / "subgraphs" / f"{entry['name']}.json"
    assert path.read_text(encoding="utf-8").isascii()  # older hosts read it in the platform's encoding
    workflow = load(path)
    ((node,), (graph,)) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    assert node["type"] == graph["id"] and [s["name"] for s in node["inputs"]] == [s["name"] for s in graph["inputs"]]
    inside = {one["id"]: one for one in graph["nodes"]}
    assert {one["type"] for one in inside.values()} <= ours.keys()
    for link in graph["links"]:
        if link["target_id"] in inside:
            slot = inside[link["target_id"]]["inputs"][link["target_slot"]]
            schema = ours[inside[link["target_id"]]["type"]]["input"]
            assert slot["link"] == link["id"] and slot["name"] in {**schema["required"], **schema.get("optional", {})}
