"""Saving into the output folder: names, numbers, and what happens where nothing can be written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("HDB_COMFYUI", ROOT / ".comfyui" / "ComfyUI"))

SAVERS = ("SaveLiDB", "SaveLiDBAsLoRA")
WRITER = """
import sys
from pathlib import Path
from types import ModuleType

root, comfyui, output = sys.argv[1:4]
for name, place in (("pack", root), ("pack.nodes", f"{root}/nodes")):  # without the nodes, which take long to import
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [place]
sys.path[:0] = [comfyui]
import folder_paths
from pack.hdb_core.files.atomic import creating
from pack.nodes.host.folders import LIDBS, add_folders
from pack.nodes.host.output import save_to_output

folder_paths.set_output_directory(output)
add_folders(LIDBS.category, {".safetensors"}, output)
print("ready", flush=True)
input()
for number in range(500):
    def write(path):
        with creating(path) as temporary:
            temporary.write_text(f"{output} {number}")
    print(save_to_output("lidb/person", write).name)
"""


@pytest.fixture
def output(host) -> Path:
    folder = Path(host.folder_paths.get_output_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


def test_two_processes_write_a_thousand_files(tmp_path):
    command = [sys.executable, "-P", "-c", WRITER, str(ROOT), str(COMFYUI), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    names = [name for writer in writers for name in writer.communicate()[0].split()]
    files = sorted(path.name for path in (tmp_path / "lidb").iterdir())
    assert files == sorted(names) == [f"person_{number:05}_.safetensors" for number in range(1, 1001)]


def test_another_person_of_the_same_size_and_second_is_kept(host, output):
    """As on a drive that keeps times in steps of two seconds."""

    def save(text):
        def write(path):
            path.write_text(text)
            os.utime(path, (1e9, 1e9))

        return host.module("nodes.host.output").save_once("seconds/person", write)

    (anna, _), again, (ben, new) = save("Anna"), save("Anna"), save("Ben.")
    assert again == (anna, False) and new and ben != anna
    assert (anna.read_text(), ben.read_text()) == ("Anna", "Ben.")


@pytest.mark.parametrize("node_id", SAVERS)
@pytest.mark.parametrize("prefix", ["lidb\\windows", "lidb/windows"])
def test_both_slashes_make_folders(run, output, person, node_id, prefix):
    (path,) = run(node_id, lidb=person(1), filename_prefix=prefix)
    assert Path(path).parent == output / "lidb"


@pytest.mark.parametrize("node_id", SAVERS)
def test_dates_are_filled_in(run, output, person, node_id):
    before = time.strftime("%Y-%m-%d")
    (path,) = run(node_id, lidb=person(1), filename_prefix="lidb/%date:yyyy-MM-dd%/%year%")
    assert Path(path).relative_to(output).parts[:2] in {("lidb", before), ("lidb", time.strftime("%Y-%m-%d"))}
    assert Path(path).name.startswith(f"{before[:3]}")


@pytest.mark.parametrize("node_id", SAVERS)
@pytest.mark.parametrize(
    "prefix", ["lidb/a:b", "lidb/%date:hh:mm%", "CON", "lidb/a.", "x" * 250, "../a", "C:\\a", "", "a\nb"]
)
def test_a_bad_name_is_refused_before_any_work(host, node_id, prefix):
    message = host.nodes[node_id].validate_inputs(filename_prefix=prefix)
    assert message.startswith("filename_prefix cannot be") and message.endswith("Choose a name such as lidb/person.")
    assert host.nodes[node_id].validate_inputs(filename_prefix="lidb/%date:yyyy%") is True
    assert host.nodes[node_id].validate_inputs() is True  # over a wire


@pytest.mark.parametrize("node_id", SAVERS)
def test_letter_case_does_not_end_the_search_for_a_number(run, host, person, output, node_id, monkeypatch):
    """As on a system that takes both for one name."""
    counted = (str(output), "Case", 1, "", "Case")
    monkeypatch.setattr(host.module("nodes.host.output").folder_paths, "get_save_image_path", lambda *_: counted)
    paths = [Path(run(node_id, lidb=person(seed), filename_prefix="Case")[0]) for seed in range(3)]
    assert len(set(paths)) == 3
    for path in paths:
        path.unlink()


@pytest.mark.skipif(os.name == "nt", reason="there is no limit of a file's size")
@pytest.mark.parametrize("node_id", SAVERS)
def test_a_full_disk_leaves_nothing_behind(run, host, person, output, node_id):
    import resource

    before, limits = files_below(output), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(host.module("hdb_core.errors").LiDBFileError, match=r"Cannot write .*full") as caught:
            run(node_id, lidb=person(1), filename_prefix="lidb/full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_below(output) == before and ".partial" not in str(caught.value)


@pytest.mark.parametrize("node_id", SAVERS)
@pytest.mark.parametrize("trouble", ["read-only", "a file", "a file below"])
def test_a_folder_that_takes_no_files(run, host, person, output, node_id, trouble, monkeypatch):
    folder = output / "lidb" / f"{node_id} {trouble}"
    if trouble == "read-only":  # permissions do not stop root
        allowed = os.open

        def refused(path, *rest, **options):
            if str(path).endswith(".partial"):
                raise PermissionError(13, "Permission denied", str(path))
            return allowed(path, *rest, **options)

        monkeypatch.setattr(os, "open", refused)
    else:
        folder.parent.mkdir(exist_ok=True)
        folder.write_text("a file")
    before = files_below(output)
    prefix = f"lidb/{folder.name}/" + ("below/person" if trouble == "a file below" else "person")
    with pytest.raises(host.module("hdb_core.errors").LiDBFileError, match="Cannot write") as caught:
        run(node_id, lidb=person(1), filename_prefix=prefix)
    assert files_below(output) == before and ".partial" not in str(caught.value) and "person" in str(caught.value)


def test_what_a_kill_left_yesterday_goes_with_the_next_person(run, host, person):
    (path,) = run("SaveLiDB", lidb=person(1), filename_prefix="swept/person")
    old = Path(path).with_name(".hdb-old.partial")
    old.touch()
    yesterday = time.time() - 100_000
    os.utime(old, (yesterday, yesterday))
    run("SaveLiDB", lidb=person(2), filename_prefix="swept/person")
    assert not old.exists()


@pytest.mark.skipif(os.name == "nt", reason="there is no limit of a file's size")
def test_a_full_disk_costs_previews_and_no_results(run, host, person, photo, train, caplog):
    """The person of a training was lost with its loss plot."""
    import resource

    (path,) = run("SaveLiDB", lidb=person(1), filename_prefix="lidb/shown", thumbnail=photo)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        loaded, _ = run("LoadLiDB", lidb_name=Path(path).name)
        run("CropToFace", image=photo, bboxes={"x": 20, "y": 20, "width": 60, "height": 80})
        trained = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert loaded.about.thumbnail and trained.about.steps == 2
    shown = [record.getMessage() for record in caplog.records if "shows no picture" in record.getMessage()]
    assert [text.partition(" shows")[0].partition(" (")[0] for text in shown] == [
        "Load LiDB",
        "Crop to Face",
        "Fast Finetune",
    ]
