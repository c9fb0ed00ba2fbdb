"""Folders of our files that are empty, gone, unreadable, or full of other people's files."""

from __future__ import annotations

import asyncio
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from aiohttp import web
from safetensors.torch import save_file

# category, node, input
SHELVES = {
    "lidb": ("LoadLiDB", "lidb_name"),
    "hyperdreambooth": ("LoadHyperNet", "hypernet_name"),
    "lidb_basis": ("EmptyLiDB", "basis_name"),
}
EVERY = pytest.mark.parametrize("category", SHELVES)


@pytest.fixture
def shelf(host, tmp_path, category, monkeypatch):
    """The only folder of a kind of file, and a function that lists it as /object_info does."""
    node_id, name = SHELVES[category]
    folder = tmp_path / category
    folder.mkdir()
    monkeypatch.setitem(host.folder_paths.folder_names_and_paths, category, ([str(folder)], {".safetensors"}))
    listed = lambda: host.nodes[node_id].INPUT_TYPES()["required"][name][1]["options"]
    return folder, listed


@pytest.fixture
def honest(host, category, tmp_path) -> bytes:
    """A file of the kind."""
    from devtools import fuzz

    path = tmp_path / "honest.safetensors"
    fuzz.TARGETS[{"lidb": "lidb", "hyperdreambooth": "hypernet", "lidb_basis": "basis"}[category]].make(path)
    return path.read_bytes()


@EVERY
def test_a_folder_that_is_deleted_while_the_server_runs(shelf, honest):
    folder, listed = shelf
    (folder / "below").mkdir()
    (folder / "below" / "one.safetensors").write_bytes(honest)
    assert listed() == ["below/one.safetensors"]
    shutil.rmtree(folder / "below")
    assert listed() == []
    shutil.rmtree(folder)
    assert listed() == []
    folder.write_text("a file instead")
    assert listed() == []


@EVERY
def test_the_hosts_own_route_lists_the_same(host, shelf, honest, category, monkeypatch):
    """As the host builds its routes; without ours, a folder that is gone is an error there."""
    import server
    from aiohttp.test_utils import TestClient, TestServer

    folder, listed = shelf
    instance = type("Server", (), {"routes": web.RouteTableDef(), "add_on_prompt_handler": lambda *_: None})()
    monkeypatch.setattr(server.PromptServer, "instance", instance, raising=False)
    monkeypatch.setattr(host.folder_paths, "filename_list_cache", {})  # of the folders before this test's

    @instance.routes.get("/models/{folder}")
    async def hosts_own(request):
        return web.json_response(host.folder_paths.get_filename_list(request.match_info["folder"]))

    only = host.folder_paths.folder_names_and_paths[category]
    host.module("nodes.host.folders").register_folders()
    monkeypatch.setitem(host.folder_paths.folder_names_and_paths, category, only)  # without the output folder's

    async def answers():
        app = web.Application()
        app.add_routes(instance.routes)
        async with TestClient(TestServer(app)) as client:
            for _ in range(2):
                response = await client.get(f"/models/{category}")
                assert response.status == 200 and await response.json() == listed()
                shutil.rmtree(folder, ignore_errors=True)

    (folder / "one.safetensors").write_bytes(honest)
    assert host.folder_paths.get_filename_list(category) == ["one.safetensors"]
    asyncio.run(answers())


@EVERY
@pytest.mark.skipif(os.name == "nt", reason="names are Unicode")
def test_names_that_are_no_text_are_not_listed(shelf, honest):
    """JSON cannot carry them to the browser and back."""
    folder, listed = shelf
    (folder / os.fsdecode(b"\xff.safetensors")).write_bytes(honest)
    assert listed() == []


@EVERY
@pytest.mark.skipif(os.name == "nt", reason="no file has such a name")
def test_names_that_a_menu_would_run_are_not_listed(shelf, honest):
    """The front end's menus take names as HTML."""
    folder, listed = shelf
    (folder / "<b>").mkdir()
    for name in ("<img src=x onerror=alert(1)>.safetensors", "<b>/a.safetensors", "a & b.safetensors"):
        (folder / name).write_bytes(honest)
    assert listed() == ["a & b.safetensors"]


@EVERY
def test_links(run, host, shelf, honest, category, tmp_path):
    folder, listed = shelf
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "one.safetensors").write_bytes(honest)
    (folder / "file.safetensors").symlink_to(elsewhere / "one.safetensors")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "broken.safetensors").symlink_to(tmp_path / "gone.safetensors")
    (folder / "gone").symlink_to(tmp_path / "gone")
    (folder / "loop").symlink_to(folder)
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.safetensors")  # reading it would wait for ever
    assert listed() == ["file.safetensors", "linked/one.safetensors"]
    assert all(run(SHELVES[category][0], **{SHELVES[category][1]: name}) for name in listed())


@EVERY
def test_links_across(shelf, honest, category):
    """Each way leads once into every folder, not some forty times in turn."""
    folder, listed = shelf
    for name, other in (("a", "b"), ("b", "a")):
        (folder / name).mkdir()
        (folder / name / "link").symlink_to(folder / other)
    (folder / "a" / "one.safetensors").write_bytes(honest)
    assert listed() == ["a/one.safetensors", "b/link/one.safetensors"]


@EVERY
def test_an_unreadable_folder(shelf, honest, monkeypatch):
    """Permissions do not stop root."""
    folder, listed = shelf
    (folder / "open.safetensors").write_bytes(honest)
    (folder / "closed").mkdir()
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert listed() == ["open.safetensors"]


@EVERY
def test_what_is_listed_can_be_loaded_and_nothing_else_is_listed(run, host, shelf, honest, category):
    folder, listed = shelf
    (folder / "Upper.SAFETENSORS").write_bytes(honest)
    (folder / "back\\slash.safetensors").write_bytes(honest)
    cut = folder / "cut.safetensors"
    cut.write_bytes(honest[:-1])
    (folder / "page.safetensors").write_text("<html>")
    (folder / "empty.safetensors").touch()
    (folder / "version.safetensors").write_bytes(honest.replace(b'format_version\\": 1', b'format_version\\": 7'))
    (folder / "model.safetensors").mkdir()
    save_file({"a.lora_up.weight": torch.zeros(1)}, folder / "lora.safetensors")
    save_file({"w": torch.zeros(1)}, folder / "other.safetensors")
    node_id, name = SHELVES[category]
    assert listed() == ["Upper.SAFETENSORS", "back/slash.safetensors"]
    assert all(run(node_id, **{name: one}) for one in listed())
    for bad, said in (
        ("lora", "ordinary LoRA"),
        ("cut", "incomplete"),
        ("version", "has version 7"),
        ("page", "web page"),
    ):
        with pytest.raises(host.module("hdb_core.errors").HDBError, match=said):
            run(node_id, **{name: f"{bad}.safetensors"})
    cut.write_bytes(honest)  # copied again
    assert "cut.safetensors" in listed()


@EVERY
def test_a_damaged_file_hides_no_good_one_of_its_name(run, host, shelf, honest, category, tmp_path, monkeypatch):
    folder, listed = shelf
    other, (node_id, name) = tmp_path / "other", SHELVES[category]
    other.mkdir()
    known = host.folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, category, ([str(folder), str(other)], {".safetensors"}))
    (folder / "one.safetensors").write_text("damaged")
    (other / "one.safetensors").write_bytes(honest)
    assert listed() == ["one.safetensors"] and run(node_id, **{name: "one.safetensors"})


@EVERY
def test_a_passing_error_is_not_remembered(shelf, honest, monkeypatch):
    folder, listed = shelf
    (folder / "one.safetensors").write_bytes(honest)

    def refused(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        assert listed() == []
    assert listed() == ["one.safetensors"]


@EVERY
def test_the_same_name_on_every_system(run, shelf, honest, category):
    folder, listed = shelf
    composed = unicodedata.normalize("NFC", "Zoë")
    (folder / "sub").mkdir()
    (folder / "sub" / (unicodedata.normalize("NFD", composed) + ".safetensors")).write_bytes(honest)
    assert listed() == [f"sub/{composed}.safetensors"]
    node_id, name = SHELVES[category]
    for form in ("NFC", "NFD"):
        for slash in "\\/":
            assert run(node_id, **{name: unicodedata.normalize(form, f"sub{slash}{composed}.safetensors")})


@EVERY
def test_without_a_file_it_says_what_to_do(host, shelf, category):
    folder, _ = shelf
    node_id, name = SHELVES[category]
    node, error = host.nodes[node_id], host.module("hdb_core.errors").HDBError
    for none in ({}, {name: None}):
        with pytest.raises(error, match=rf"^There is no .* yet\. .*{folder.name}\.$"):
            node.validate_inputs(**none)
        with pytest.raises(error, match="yet"):
            node.execute(**none)
        assert node.fingerprint_inputs(**none) != node.fingerprint_inputs(**none)  # NaN: run again
    save_file({"w": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(error, match=r"The 1 \.safetensors files there are damaged or of another kind"):
        node.validate_inputs()


@EVERY
def test_a_missing_name_where_there_are_files(host, shelf, honest, category):
    folder, _ = shelf
    (folder / "one.safetensors").write_bytes(honest)
    node = host.nodes[SHELVES[category][0]]
    assert node.validate_inputs() is True  # the host says that it is missing, or it comes over a wire
    for none in (None, "", 3):
        with pytest.raises(host.module("hdb_core.errors").HDBError, match=r"Choose a .* file from the list of"):
            node.execute(none)


@EVERY
@pytest.mark.parametrize("given", ["missing", "null"])
def test_the_server_refuses_a_prompt_with_that_sentence(shelf, category, given):
    """The host drops what validate_inputs returns about a missing input."""
    import execution

    node_id, name = SHELVES[category]
    prompt = {"1": {"class_type": node_id, "inputs": {name: None} if given == "null" else {}}}
    person = ["1", 0]
    if category == "hyperdreambooth":
        prompt["2"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
        prompt["3"] = {"class_type": "PredictLiDB", "inputs": {"hypernet": ["1", 0], "image": ["2", 0]}}
        person = ["3", 0]
    inputs = {"lidb": person, "filename_prefix": "lidb/a", "rank": 4}
    prompt["4"] = {"class_type": "SaveLiDB", "inputs": inputs}
    valid, _, _, errors = asyncio.run(execution.validate_prompt("0", prompt, None))
    assert not valid
    (said,) = {reason["details"] for node in errors.values() for reason in node["errors"]}
    assert said.startswith("There is no ") and str(shelf[0]) in said
    assert "into one of these folders" in said


def test_a_person_in_place_of_a_damaged_file_is_said_to_be_another(run, host, person, tmp_path, monkeypatch, said):
    (good,) = run("SaveLiDB", lidb=person(3), filename_prefix="lidb/copied")
    (folder := tmp_path / "copies").mkdir()
    known = host.folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "lidb", ([str(folder), str(Path(good).parent)], {".safetensors"}))
    run("LoadLiDB", lidb_name=Path(good).name)
    assert "damaged" not in said[-1]
    (cut := folder / Path(good).name).write_bytes(Path(good).read_bytes()[:9000])
    run("LoadLiDB", lidb_name=Path(good).name)
    assert f"{cut} has the same name, but is damaged" in said[-1]
