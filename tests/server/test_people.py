"""People as things one keeps, in a live server: cancelled, saved, shown, and what other clients see of it."""

import asyncio
import json
import re
import uuid
from dataclasses import replace

import aiohttp
import pytest
from safetensors import safe_open

from devtools.comfy_client import PromptInterrupted
from devtools.workflow import edited
from hdb_core.files import container
from hdb_core.files import lidb as lidb_file

TEXT = 3  # the host's number of messages with the text of a node


def texts_seen(server, prompt, queued_by_us=True, until=None):
    """The (node, text) messages that the client that queues a prompt gets, and those that another one gets; each text
    in one line, as it was before it was wrapped."""

    async def listen(socket, found):
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY and int.from_bytes(message.data[:4]) == TEXT:
                end = 8 + int.from_bytes(message.data[4:8])
                found.append((message.data[8:end].decode(), " ".join(message.data[end:].decode().split())))
                if until and re.search(until, found[-1][1]):
                    server.interrupt()

    async def execute():
        ours, others = [], []
        own, other = uuid.uuid4().hex, uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{server.url}/ws?clientId={own}", max_msg_size=0) as own_socket,
            session.ws_connect(f"{server.url}/ws?clientId={other}", max_msg_size=0) as other_socket,
        ):
            tasks = [asyncio.create_task(listen(own_socket, ours)), asyncio.create_task(listen(other_socket, others))]
            body = {"prompt": prompt} | ({"client_id": own} if queued_by_us else {})
            prompt_id = (await asyncio.to_thread(server.post, "/prompt", body))["prompt_id"]
            while not (history := await asyncio.to_thread(server.get, f"/history/{prompt_id}")):
                await asyncio.sleep(0.3)
            await asyncio.sleep(0.5)  # messages are sent by a queue
            for task in tasks:
                task.cancel()
        return ours, others, history[prompt_id]

    return asyncio.run(execute())


def test_texts_go_to_the_client_that_queued_and_end_with_the_result(server, training_prompt):
    seed = {"10": {"seed": 41}}
    ours, others, _ = texts_seen(server, edited(training_prompt, seed))
    assert others == []
    last = dict(ours)
    assert last["10"].startswith("2 steps, too few to measure") and last["11"].startswith("saved lidb/person_")
    assert last["12"].startswith("strength_model 0.35, strength_clip 0.5, person_guidance 4.5")
    by_nobody, others, history = texts_seen(server, edited(training_prompt, {"10": {"seed": 42}}), queued_by_us=False)
    assert by_nobody == others == [] and history["status"]["status_str"] == "success"


def test_cancel_keeps_the_person_and_a_run_goes_on_from_them(server, object_info, training_prompt):
    endless = edited(training_prompt, {"10": {"steps": 1000, "seed": 43}})
    ours, _, history = texts_seen(server, endless, until=r"^step [3-9]")
    assert history["status"]["messages"][-1][0] == "execution_interrupted"
    last = [text for node, text in ours if node == "10"][-1]
    step, name = re.match(r"cancelled after step (\d+); the person is kept as (lidb/\S+\.safetensors)$", last).groups()
    assert int(step) >= 3 and name.startswith("lidb/unfinished_")
    with safe_open(server.output / name, "pt") as file:
        about = json.loads(file.metadata()["lidb"])["about"]
    assert (about["steps"], about["model"]) == (int(step), "SD15")
    onwards = edited(training_prompt, {"10": {"lidb": ["13", 0], "seed": 44}})
    onwards["13"] = {"class_type": "LoadLiDB", "inputs": {"lidb_name": name.removeprefix("lidb/")}}
    onwards["11"]["inputs"]["name"] = "Anna"
    result = server.run(onwards)
    (said,) = result.outputs["13"]["text"]
    assert said.startswith(f"learned from one photo in {step} steps\nfor SD 1.x (SD15)")
    (saved,) = result.outputs["11"]["text"]
    with safe_open(server.output / saved, "pt") as file:
        about = json.loads(file.metadata()["lidb"])["about"]
    assert re.fullmatch(r"lidb/Anna_\d+_\.safetensors", saved) and about["steps"] == int(step) + 2


def test_two_people_in_a_row_warn_on_the_second_node(server, training_prompt):
    prompt = edited(training_prompt, {"5": {"model": ["14", 0]}})
    again = {**training_prompt["12"]["inputs"], "model": ["12", 0], "clip": ["12", 1]}
    prompt["14"] = {"class_type": "ApplyLiDBToModel", "inputs": again}
    ours, _, history = texts_seen(server, prompt)
    said = {node: text for node, text in ours if node in ("12", "14")}
    assert "mixture" not in said["12"] and "mixture" in said["14"] and "LiDB Hook" in said["14"]
    assert history["status"]["status_str"] == "success"


def test_a_cancel_while_nothing_is_learned_keeps_nothing(server, training_prompt):
    before = set(server.output.rglob("unfinished*"))
    prompt = edited(training_prompt, {"5": {"steps": 400}, "10": {"seed": 45}})
    with pytest.raises(PromptInterrupted):
        server.run(prompt, lambda event: event.node == "5" and server.interrupt())
    assert set(server.output.rglob("unfinished*")) == before


def test_a_prompt_taken_from_a_picture_gets_the_file_that_is_there(server, training_prompt):
    """The host writes a file's fingerprint into it, and would give out the person whom it has kept under that."""
    (saved,) = server.run(training_prompt).outputs["11"]["text"]
    person = lidb_file.load(server.output / saved)
    path = server.output / "lidb" / "replaced.safetensors"
    prompt = {
        "1": {"class_type": "LoadLiDB", "inputs": {"lidb_name": path.name}},
        "2": {"class_type": "SaveLiDB", "inputs": {"lidb": ["1", 0], "filename_prefix": "lidb/again", "rank": 0}},
    }
    for name in ("Anna", "Ben"):
        lidb_file.save(replace(person, about=replace(person.about, name=name)), path)
        prompt["1"].setdefault("is_changed", [container.read_digest(lidb_file.KIND, path)])
        assert server.run(prompt).outputs["1"]["text"][0].startswith(name)
