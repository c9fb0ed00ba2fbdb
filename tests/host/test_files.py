"""Save LiDB, Load LiDB and Save LiDB as LoRA on the host's folders."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open


def load_name(host, path: str) -> str:
    """The name under which Load LiDB lists a file of the output folder."""
    return Path(path).relative_to(Path(host.folder_paths.get_output_directory(), "lidb")).as_posix()


@pytest.mark.parametrize("convolutions", [False, True], ids=["attention", "all"])
def test_save_load_apply_gives_the_same_picture(run, host, train, sample, loaded, convolutions):
    lidb = train(steps=2, learning_rate=0.1, convolutions=convolutions)
    (path,) = run("SaveLiDB", lidb=lidb, filename_prefix="lidb/same", rank=0)
    again, prompt = run("LoadLiDB", lidb_name=load_name(host, path))
    assert prompt == "a [v] face"
    assert again.rank == lidb.rank
    direct, through_file = (
        sample(*run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=one)) for one in (lidb, again)
    )
    base = sample(loaded.model, loaded.clip)
    moved = (direct - base).abs().mean()
    assert moved > 0
    assert (direct - through_file).abs().mean() < 0.02 * moved


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (2, 2), (3, 3), (50, 4), (0, 4)])
def test_rank_of_the_file(run, host, person, rank, expected):
    (path,) = run("SaveLiDB", lidb=person(1, rank=4), filename_prefix="lidb/rank", rank=rank)
    loaded = run("LoadLiDB", lidb_name=load_name(host, path))[0]
    assert (loaded.up.abs().sum(1) > 0).sum() == expected * len(loaded.layout.layers)


def test_files_are_numbered_and_listed_at_once(run, host, person):
    paths = [Path(run("SaveLiDB", lidb=person(seed), filename_prefix="lidb/numbered")[0]) for seed in (1, 2)]
    assert [path.name for path in paths] == ["numbered_00001_.safetensors", "numbered_00002_.safetensors"]
    options = next(i for i in host.nodes["LoadLiDB"].GET_SCHEMA().inputs if i.id == "lidb_name")
    assert "COMBO" in options.get_io_type()
    assert {path.name for path in paths} <= set(
        host.nodes["LoadLiDB"].INPUT_TYPES()["required"]["lidb_name"][1]["options"]
    )


@pytest.mark.parametrize("place", ["models", "yaml"])
def test_a_number_that_another_folder_has_taken_is_passed_over(run, host, person, base_directory, place):
    """Load LiDB would give that folder's person."""
    (first,) = run("SaveLiDB", lidb=person(8), filename_prefix=f"lidb/taken_{place}")
    folder = base_directory / "models" / "lidb" if place == "models" else host.extra
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(first, folder / Path(first).name)
    (second,) = run("SaveLiDB", lidb=person(9, rank=3), filename_prefix=f"lidb/taken_{place}")
    assert Path(second).name == f"taken_{place}_00002_.safetensors"
    assert [run("LoadLiDB", lidb_name=Path(path).name)[0].rank for path in (first, second)] == [2, 3]


def test_a_person_whose_name_another_folder_takes_later_is_saved_anew(run, host, person, said):
    """That name loads the other one from then on, and Load LiDB says so."""
    save = lambda seed, where: Path(run("SaveLiDB", lidb=person(seed), filename_prefix=f"{where}/yan")[0])
    own, theirs = save(1, "lidb"), save(2, "not_on_the_shelf")
    host.extra.mkdir(parents=True, exist_ok=True)
    os.replace(theirs, other := host.extra / own.name)
    run("LoadLiDB", lidb_name=own.name)
    assert f"{own} has the same name, but other contents: this is {other}" in said[-1]
    again = save(1, "lidb")
    assert again.name == "yan_00002_.safetensors" and said[-1].startswith(f"saved lidb/{again.name}")
    assert save(1, "lidb") == again and own.is_file()


@pytest.mark.skipif(os.sep != "/", reason="a name holds no backslash on Windows")
def test_a_name_with_a_backslash_hides_no_file_of_a_folder(run, host, person):
    (own,) = run("SaveLiDB", lidb=person(1), filename_prefix="lidb/friends/anna")
    (other,) = run("SaveLiDB", lidb=person(2), filename_prefix="lidb/stranger")
    stranger = Path(other).parent / rf"friends\{Path(own).name}"
    os.replace(other, stranger)
    find = host.module("nodes.host.folders")
    assert find.find(find.LIDBS, f"friends/{Path(own).name}") == Path(own)
    os.remove(own)
    assert find.find(find.LIDBS, f"friends/{Path(own).name}") == stranger


@pytest.mark.parametrize("place", ["models", "yaml", "subfolder"])
def test_found_where_models_live(run, host, person, base_directory, place):
    (path,) = run("SaveLiDB", lidb=person(7), filename_prefix=f"elsewhere/{place}")
    folder = {
        "models": base_directory / "models" / "lidb",
        "yaml": host.extra,
        "subfolder": base_directory / "models" / "lidb" / "family",
    }[place]
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(path, folder / f"{place}.safetensors")
    name = os.path.join("family", "subfolder.safetensors") if place == "subfolder" else f"{place}.safetensors"
    assert name in host.folder_paths.get_filename_list("lidb")
    assert run("LoadLiDB", lidb_name=name)[0].rank == 2


@pytest.mark.parametrize("node_id", ["SaveLiDB", "SaveLiDBAsLoRA"])
def test_two_servers_on_one_output_folder_do_not_overwrite_each_other(run, host, person, node_id, monkeypatch):
    module, paths = host.module("nodes.host.output"), iter((1, 1, 1, 2))
    folder = Path(host.folder_paths.get_output_directory(), "shared")
    prefix = f"shared/{node_id}"
    numbered = lambda *_: (str(folder), node_id, next(paths), "", prefix)
    monkeypatch.setattr(module.folder_paths, "get_save_image_path", numbered)
    first, second = (Path(run(node_id, lidb=person(seed), filename_prefix=prefix)[0]) for seed in (1, 2))
    assert (first.name, second.name) == (f"{node_id}_00001_.safetensors", f"{node_id}_00002_.safetensors")
    assert first.read_bytes() != second.read_bytes() and len(list(folder.glob(f"{node_id}*"))) == 2


@pytest.mark.parametrize("node_id", ["SaveLiDB", "SaveLiDBAsLoRA"])
def test_the_same_person_is_not_saved_twice(run, host, person, said, node_id):
    folder = Path(host.folder_paths.get_output_directory(), "twice")
    of = lambda seed, **inputs: Path(
        run(node_id, lidb=person(seed, rank=4), filename_prefix=f"twice/{node_id}", **inputs)[0]
    )
    first, other, again = of(1), of(2), of(1)
    assert first == again != other and len(list(folder.glob(f"{node_id}*"))) == 2
    assert said[0].startswith(f"saved twice/{first.name}") and said[2].startswith(
        f"already saved as twice/{first.name}"
    )
    if node_id == "SaveLiDB":  # other settings are another file, and so is another name
        assert of(1, rank=1) != first != of(1, name="Anna")
        assert of(1, name="Anna").name == "Anna_00001_.safetensors"


def test_of_two_equal_files_the_first_stays(run, host, person):
    """Also where another server writes the same at the same time: neither may delete the other's."""
    save_once = host.module("nodes.host.output").save_once
    folder = Path(host.folder_paths.get_output_directory(), "same")
    write = lambda path: path.write_bytes(b"the same")
    path, new = save_once("same/person", write)
    assert new and path.name == "person_00001_.safetensors"

    def also_by_another(own):
        write(own)
        (folder / "person_00009_.safetensors").write_bytes(b"the same")

    path.unlink()
    assert save_once("same/person", also_by_another) == (path, True)
    (folder / "person_x_00000_.safetensors").write_bytes(b"the same")  # of another prefix
    assert save_once("same/person_x_y", write)[1]
    assert save_once("same/person", write) == (path, False)


def test_a_link_to_the_new_file_is_no_earlier_one(host):
    """It has the same contents: the new file was removed, and nobody's was left."""
    folder = Path(host.folder_paths.get_output_directory(), "linked")
    folder.mkdir()
    (folder / "person_00001_.safetensors").symlink_to("person_00002_.safetensors")
    path, new = host.module("nodes.host.output").save_once("linked/person", lambda path: path.write_bytes(b"new"))
    assert new and path.name == "person_00002_.safetensors" and path.read_bytes() == b"new"


def test_a_person_is_saved_with_a_name_and_a_picture_and_shown(run, host, person, photo, said):
    about = replace(person(1).about, steps=57, model="SD15")
    lidb = replace(person(1), about=about)
    (path,) = run("SaveLiDB", lidb=lidb, name="Anna / 2", thumbnail=photo)
    assert Path(path).name == "Anna _ 2_00001_.safetensors" and Path(path).parent.name == "lidb"
    assert said[-1].endswith("with name and picture")
    node = host.nodes["LoadLiDB"].PREPARE_CLASS_CLONE({})
    output = node.execute(lidb_name=load_name(host, path))
    loaded = output.args[0]
    assert loaded.about.name == "Anna / 2"
    made = "learned from one photo in 57 steps"
    expected = f"Anna / 2\n{made}\nfor SD 1.x (SD15), rank 2\nprompt: a [v] face"
    assert output.ui["text"] == (expected,) and said[-1] == expected
    (shown,) = output.ui["images"]
    with Image.open(Path(host.folder_paths.get_temp_directory(), shown["filename"])) as file:
        thumbnail = torch.from_numpy(np.asarray(file.convert("RGB")).astype(np.float32) / 255)
    small = torch.nn.functional.interpolate(thumbnail.movedim(-1, 0)[None], 128, mode="area")[0].movedim(0, -1)
    assert (small - photo[0]).abs().mean() < 0.02
    (other,) = run("SaveLiDB", lidb=person(2), filename_prefix="lidb/plain")
    assert "with" not in said[-1]
    assert "images" not in node.execute(lidb_name=load_name(host, other)).ui


def test_a_grey_and_a_transparent_thumbnail(run, host, person, photo):
    for picture in (photo[..., :1], torch.cat([photo, photo[..., :1]], -1)):
        (path,) = run("SaveLiDB", lidb=person(1), name="any picture", thumbnail=picture)
        assert run("LoadLiDB", lidb_name=load_name(host, path))[0].about.thumbnail


def test_other_files_are_not_listed(host):
    stray = host.extra / "notes.txt"
    stray.write_text("no person")
    assert stray.name not in host.folder_paths.get_filename_list("lidb")


def test_a_changed_file_is_read_again(run, host, person):
    node = host.nodes["LoadLiDB"]
    (path,) = run("SaveLiDB", lidb=person(1), filename_prefix="lidb/changed")
    name = load_name(host, path)
    first = node.fingerprint_inputs(lidb_name=name)
    assert first == node.fingerprint_inputs(lidb_name=name)
    (other,) = run("SaveLiDB", lidb=person(2), filename_prefix="lidb/other")
    os.replace(other, path)
    assert first != node.fingerprint_inputs(lidb_name=name)


def test_a_file_that_is_replaced_while_the_prompt_runs_is_refused(run, host, person, monkeypatch):
    """The host would keep the other person under the fingerprint of this one."""
    node = host.nodes["LoadLiDB"]
    (path,) = run("SaveLiDB", lidb=person(1), filename_prefix="lidb/replaced")
    name = load_name(host, path)

    def begin(prompt):
        monkeypatch.setattr(host.module("nodes.host.folders"), "running_prompt", lambda: prompt)

    def replace(number):
        (other,) = run("SaveLiDB", lidb=person(number), filename_prefix="lidb/replacing")
        os.replace(other, path)

    def refused():
        with pytest.raises(host.module("hdb_core.errors").LiDBFileError, match="was replaced while the prompt ran"):
            run("LoadLiDB", lidb_name=name)

    begin("first")
    first = node.fingerprint_inputs(lidb_name=name)
    run("LoadLiDB", lidb_name=name)
    replace(2)
    refused()
    # A second node of this name, which the host asks now: it must not get what the host keeps of an earlier prompt.
    assert node.fingerprint_inputs(lidb_name=name) != node.fingerprint_inputs(lidb_name=name)
    refused()
    begin("second")
    assert first != node.fingerprint_inputs(lidb_name=name) == node.fingerprint_inputs(lidb_name=name)
    run("LoadLiDB", lidb_name=name)
    replace(3)
    node.fingerprint_inputs(lidb_name=None)  # of another node, whose name comes over a wire
    refused()
    begin("third")
    run("LoadLiDB", lidb_name=name)
    node.fingerprint_inputs(lidb_name=name)
    monkeypatch.setattr(host.module("nodes.files"), "learned_basis", lambda _: replace(4))  # between two readings
    refused()


def test_a_prompt_is_another_one_under_the_same_id(host, monkeypatch):
    """Clients may choose it."""
    import server

    queue = SimpleNamespace(task_counter=1)
    instance = SimpleNamespace(last_prompt_id="mine", prompt_queue=queue)
    monkeypatch.setattr(server.PromptServer, "instance", instance, raising=False)
    running = host.module("nodes.host.folders").running_prompt
    first = running()
    queue.task_counter += 1
    assert first != running() == running()
    monkeypatch.delattr(server.PromptServer, "instance")
    assert running() is None


def test_a_file_that_is_deleted_while_it_is_read(run, host, person, monkeypatch):
    (path,) = run("SaveLiDB", lidb=person(1), filename_prefix="lidb/deleted")
    name = load_name(host, path)
    monkeypatch.setattr(host.module("nodes.files"), "learned_basis", lambda _: os.unlink(path))
    with pytest.raises(host.module("hdb_core.errors").LiDBFileError, match="was deleted while it was read"):
        run("LoadLiDB", lidb_name=name)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "a/../../b.safetensors",
        "/absolute.safetensors",
        "missing.safetensors",
        "person.ckpt",
        "",
    ],
)
def test_names_outside_the_folders_are_refused(run, host, base_directory, name):
    secret = base_directory / "models" / "secret.safetensors"
    secret.parent.mkdir(exist_ok=True)
    secret.write_bytes(b"secret")
    errors = host.module("hdb_core.errors")
    message = host.nodes["LoadLiDB"].validate_inputs(lidb_name=name)
    assert isinstance(message, str)
    assert "list" in message
    with pytest.raises(errors.LiDBFileError):
        run("LoadLiDB", lidb_name=name)


@pytest.mark.parametrize("node_id", ["SaveLiDB", "SaveLiDBAsLoRA"])
@pytest.mark.parametrize("prefix", ["../person", "lidb/../../person", "/absolute/person", "", "lidb/"])
def test_prefixes_outside_the_output_folder_are_refused(run, host, person, node_id, prefix):
    errors = host.module("hdb_core.errors")
    with pytest.raises(errors.LiDBFileError, match="inside the output folder"):
        run(node_id, lidb=person(1), filename_prefix=prefix)


@pytest.mark.parametrize("node_id", ["SaveLiDB", "SaveLiDBAsLoRA"])
def test_a_folder_that_cannot_be_written(run, host, person, node_id):
    errors = host.module("hdb_core.errors")
    blocked = Path(host.folder_paths.get_output_directory(), "blocked")
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file where a folder should be")  # root may write anywhere, so permissions prove nothing
    with pytest.raises(errors.LiDBFileError, match="Cannot write"):
        run(node_id, lidb=person(1), filename_prefix="blocked/person")


def test_read_only_folder(run, host, person):
    errors = host.module("hdb_core.errors")
    folder = Path(host.folder_paths.get_output_directory(), "readonly")
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write into read-only folders")
        with pytest.raises(errors.LiDBFileError, match="Cannot write"):
            run("SaveLiDB", lidb=person(1), filename_prefix="readonly/person")
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(("convolutions", "count"), [(False, 32), (True, 52)], ids=["attention", "all"])
def test_export_equals_the_lidb_in_the_stock_lora_loader(run, apply, host, person, sample, loaded, convolutions, count):
    lidb = person(3, convolutions=convolutions)
    (path,) = run("SaveLiDBAsLoRA", lidb=lidb)
    host.folder_paths.add_model_folder_path("loras", str(Path(path).parent))  # the server does so when it starts
    model, clip = host.stock["LoraLoader"]().load_lora(loaded.model, loaded.clip, Path(path).name, 1.0, 1.0)
    assert (len(model.patches), len(clip.patcher.patches)) == (count, 8)
    exported = sample(model, clip)
    direct = sample(*apply(lidb))
    moved = (direct - sample(loaded.model, loaded.clip)).abs().mean()
    assert (direct - exported).abs().mean() < 0.05 * moved


@pytest.mark.parametrize("blend", [0.0, 0.25, 1.0])
def test_blend_is_the_weighted_sum(run, host, person, blend):
    core = host.module("hdb_core.lidb").core
    about, strengths = host.module("hdb_core.lidb").About, host.module("hdb_core.recommended").Strengths
    first = replace(person(1), about=about("one photo", token="[a]", strengths=strengths(0.4, 0.4, 4.0)))
    second = replace(person(2), about=about("a prediction", token="[b]", strengths=strengths(0.8, 0.8, 2.0)))
    (both,) = run("BlendLiDB", lidb_a=first, lidb_b=second, blend=blend)
    torch.testing.assert_close(core(both), (1 - blend) * core(first) + blend * core(second), atol=1e-4, rtol=1e-4)
    assert both.about.strengths == pytest.approx((0.4 + 0.4 * blend, 0.4 + 0.4 * blend, 4 - 2 * blend))
    assert (both.about.made_from, both.about.token) == (
        ("a prediction", "[b]") if blend > 0.5 else ("one photo", "[a]")
    )


def test_a_person_keeps_what_it_says_about_itself_in_files(run, host, person):
    about = host.module("hdb_core.lidb").About("several photos", "a sks face", "sks", photos=3, steps=7, model="SD15")
    lidb = replace(person(1), about=about)
    (path,) = run("SaveLiDB", lidb=lidb, filename_prefix="lidb/about")
    assert run("LoadLiDB", lidb_name=load_name(host, path))[0].about == about
    (path,) = run("SaveLiDBAsLoRA", lidb=lidb)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["lidb_token"] == "sks" and metadata["lidb_made_from"] == "several photos"
    assert metadata["modelspec.trigger_phrase"] == "sks" and metadata["modelspec.title"] == "person"


def test_a_name_after_a_date_with_folders(run, person):
    (path,) = run("SaveLiDB", lidb=person(3), filename_prefix="lidb/%date:yyyy/MM%", name="Anna")
    assert Path(path).name == "Anna_00001_.safetensors" and Path(path).parents[1].name == "lidb"
    assert Path(path).parent.name.isdecimal()
