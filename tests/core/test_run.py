"""The folder of a run: its settings, which of them may still change, and its stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hdb_core.errors import HyperNetError
from hdb_core.train import run as run_module
from hdb_core.train.__main__ import given, main, parser
from hdb_core.train.data.people import EncodedPerson
from hdb_core.train.data.photos import Person, Photo
from hdb_core.train.describe import markdown, purposes
from hdb_core.train.loop import _append, logged_step
from hdb_core.train.run import FIXED, Run
from hdb_core.train.settings import PATHS, Settings, changed, flat
from hdb_core.train.split import require_unseen, split, trained_on

NEW = {"model": "model.safetensors", "photos": "photos"}
DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_all_settings_is_of_this_code():
    assert (DOCS / "train-config.md").read_text(encoding="utf-8") == markdown()


def test_every_setting_says_what_it_is_for():
    texts = purposes(Settings())
    assert set(texts) == set(flat(Settings())) >= set(PATHS)
    assert all(len(text) > 8 for text in texts.values())


def test_the_command_line_is_short_and_explained():
    options = [action for action in parser()._actions if action.option_strings and action.dest != "help"]
    assert len(options) <= 15
    assert all(action.help for action in options)


def test_options_and_other_settings():
    args = parser().parse_args(["run", "--steps", "5", "--no-convolutions", "--set", "prompt=a [w] face", "cpu=true",
                                "--set", "train.noise=[0.05,0.95]"])  # fmt: skip
    assert given(args) == {"train.steps": 5, "convolutions": False, "prompt": "a [w] face", "cpu": True,
                           "train.noise": [0.05, 0.95]}  # fmt: skip
    with pytest.raises(SystemExit):
        given(parser().parse_args(["run", "--set", "prompt"]))
    deep = "[" * 5000
    assert given(parser().parse_args(["run", "--set", f"prompt={deep}"])) == {"prompt": deep}


def test_settings_come_back_from_their_file(tmp_path):
    stem, noise = [[16, 2]], [0.05, 0.95]
    values = {**NEW, "encoder.stem": stem, "train.noise": noise, "train.augment": ["flip"], "fit.learning_rate": 1}
    run = Run.open(tmp_path / "run", values)
    run.write_settings()
    assert Run.open(tmp_path / "run", {}).settings == run.settings
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["encoder"]["stem"], stored["train"]["noise"], stored["fit"]["learning_rate"]) == (stem, noise, 1.0)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_file_with_a_few_settings_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**NEW, "train": {"steps": 7}}))
    assert Run.open(tmp_path, {"rank": 2}).settings == changed(Settings(), {**NEW, "train.steps": 7, "rank": 2})


def test_a_file_of_settings_as_notepad_saves_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NEW), encoding="utf-8-sig")
    assert Run.open(tmp_path, {}).settings == changed(Settings(), NEW)


@pytest.mark.parametrize(
    "name", ["config.json", "evaluation.json", "basis.json", "log.csv", "pretrain.csv", "samples/step_000500.png"]
)
def test_a_new_run_does_not_write_over_files_of_others(tmp_path, name, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"seed": 7, "rank": 3}')
    assert main([str(tmp_path), "--model", "model.safetensors", "--photos", "photos"]) == 1
    assert f"{path} " in (said := capsys.readouterr().err) and "it may be somebody else's" in said
    assert path.read_text() == '{"seed": 7, "rank": 3}'
    if name != "config.json":
        (tmp_path / "config.json").write_text(json.dumps(NEW))
        assert Run.open(tmp_path, {})  # a run's own


def test_a_new_run_takes_the_cut_of_its_photos(tmp_path):
    values = {**NEW, "photos": str(tmp_path / "photos")}
    said = tmp_path / "photos" / "prepared.json"
    assert Run.open(tmp_path / "run", values).settings.encoder.cut == "centre"  # photos that no one has prepared
    said.parent.mkdir()
    said.write_text('{"cut": "face"}')
    run = Run.open(tmp_path / "run", values)
    assert run.settings == changed(Settings(), {**values, "encoder.cut": "face"})
    assert Run.open(tmp_path / "run", {**values, "encoder.cut": "centre"}).settings.encoder.cut == "centre"
    run.write_settings()
    said.write_text('{"cut": "centre"}')
    assert Run.open(tmp_path / "run", values).settings.encoder.cut == "face"  # a run goes on as it began
    for text in ("{", "[]", '{"cut": "nose"}', "{}", '{"cut": []}'):
        said.write_text(text)
        with pytest.raises(HyperNetError, match=r"prepared.json cannot be read .*or set encoder.cut"):
            Run.open(tmp_path / "other", values)


@pytest.mark.parametrize("text", ["{", "[]", '{"train": {"step": 1}}', '{"rank": "1"}', '{"train": 3}'])
def test_a_broken_file_of_settings_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HyperNetError, match=r"config.json cannot be read|no setting|rank: a whole number"):
        Run.open(tmp_path, NEW)


@pytest.mark.parametrize("name", ["prompt", "class_prompt"])
def test_a_prompt_that_no_hypernetwork_could_be_saved_with_is_refused(name):
    with pytest.raises(HyperNetError, match=r"prompts: at most 2,000 characters, got 2005"):
        changed(Settings(), {**NEW, name: "face " * 401})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX")
@pytest.mark.parametrize("name", ["config.json", "log.csv", "begin"])
def test_pipes_in_a_run_are_refused_and_not_waited_for(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(NEW))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    (tmp_path / "hypernet.safetensors").touch()
    with pytest.raises(HyperNetError, match="folder or a device"):
        run = Run.open(tmp_path, {**NEW, "begin_with": str(tmp_path / "begin") if name == "begin" else ""})
        run.stages()
        run.finished("train")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"], ids=["NUL", "half a character"])
def test_a_folder_that_cannot_have_its_name(tmp_path, name, capsys):
    assert main([str(tmp_path / name), "--model", "model.safetensors", "--photos", "photos"]) == 1
    assert "cannot be written: no file can have this name" in capsys.readouterr().err


def test_a_new_run_needs_a_model_and_photos(tmp_path):
    with pytest.raises(HyperNetError, match="Give it --model and --photos"):
        Run.open(tmp_path, {"model": "model"})


@pytest.mark.parametrize(
    ("begun", "name", "value"),
    [("basis.safetensors", "basis.down_dim", 6), ("basis.safetensors", "basis.learn_from", 3), ("basis.safetensors", "held_out", 0.5),
     ("people", "image_size", 64), ("people", "fit.steps", 3), ("pretrain_state.safetensors", "encoder.depth", 1),
     ("pretrain_state.safetensors", "pretrain.portraits", True), ("state.safetensors", "rank", 4), ("state.safetensors", "prompt", "a [w] face"),
     ("state.safetensors", "net.depth", 1), ("state.safetensors", "basis.seed", 1), ("state.safetensors", "held_out", 0.5), ("state.safetensors", "overfit", 4),
     ("state.safetensors", "convolutions", False), ("state.safetensors", "begin_with", "other.safetensors"),
     ("state.safetensors", "prediction_type", "v_prediction"), ("people", "prediction_type", "epsilon")],
)  # fmt: skip
def test_what_results_depend_on_cannot_change(tmp_path, begun, name, value):
    Run.open(tmp_path, NEW).write_settings()
    Run.open(tmp_path, {name: value})  # while nothing has begun
    (tmp_path / begun).mkdir()
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(HyperNetError, match=rf"{name} is .* cannot become .*has begun"):
        Run.open(tmp_path, {name: value})
    assert (tmp_path / "config.json").read_text() == before


def test_the_rest_can_change(tmp_path):
    Run.open(tmp_path, NEW).write_settings()
    for begun in ("people", "pretrain_state.safetensors", "state.safetensors"):
        (tmp_path / begun).mkdir()
    free = {"train.steps": 5, "train.learning_rate": 1e-4, "accumulate": 2, "mixed_precision": "no", "cpu": True,
            "model": "elsewhere", "photos": "elsewhere", "samples.every": 0, "evaluate.draws": 4}  # fmt: skip
    assert flat(Run.open(tmp_path, free).settings).items() >= free.items()
    names = set(flat(Settings()))
    assert all(any(n == f or n.startswith(f"{f}.") for n in names) for fixed in FIXED.values() for f in fixed)


def test_stages_that_apply(tmp_path):
    encoder, hypernet = tmp_path / "encoder.safetensors", tmp_path / "hypernet.safetensors"
    save_file({"w": torch.zeros(1)}, encoder)
    save_file({"w": torch.zeros(1)}, hypernet, {"hypernet": "{}"})
    all_but_basis = ["precompute", "pretrain", "train", "evaluate"]
    frozen = ["precompute", "train", "evaluate"]
    for values, stages in (
        ({}, all_but_basis),
        ({"basis.learn_from": 4}, ["basis", *all_but_basis]),
        ({"clip_vision": "encoder"}, frozen),
        ({"pretrain.steps": 0}, frozen),
        ({"begin_with": str(encoder)}, all_but_basis),
        ({"begin_with": str(hypernet)}, frozen),
        ({"train.steps": 0}, ["precompute", "pretrain"]),
    ):
        assert Run.open(tmp_path / "run", {**NEW, **values}).stages() == stages
    encoder.write_bytes(b"nothing")
    for name, reason in (("none", "No such file"), (encoder.name, "header too small"), (".", "a folder or a device")):
        with pytest.raises(HyperNetError, match=rf"begin_with cannot be read: .*{reason}"):
            Run.open(tmp_path / "run", {**NEW, "begin_with": str(tmp_path / name)}).stages()


def test_a_training_is_finished_when_its_log_and_its_file_say_so(tmp_path):
    run = Run.open(tmp_path, {**NEW, "train.steps": 20, "pretrain.steps": 10})
    run.write_settings()
    assert logged_step(run.log) == 0 and not run.finished("train")
    run.log.write_text("step,loss\n10,1\n20,1\n")
    assert not run.finished("train")
    run.file.touch()
    assert run.finished("train") and not run.finished("pretrain") and not run.finished("precompute")
    assert not Run.open(tmp_path, {**NEW, "train.steps": 30}).finished("train")


DAMAGED_LOGS = {
    "no step": b"loss\n1\n",
    "a text": b"step,loss\nten,1\n",
    "a short row": b"loss,step\n1\n",
    "a long row": b"step,loss\n10,1,2\n",
    "NUL": b"step,loss\n1\0,1\n",
    "no text": b"step,loss\n1,\xff\n",
    "quotes": b'step,loss\n1,"2\n',
    "a field": b"step,loss\n1," + b"x" * 200_000 + b"\n",
    "a number": b"step,loss\n" + b"1" * 5000 + b",1\n",
}


@pytest.mark.parametrize("damage", DAMAGED_LOGS)
def test_a_damaged_log_is_named(tmp_path, damage):
    run = Run.open(tmp_path, {**NEW, "train.steps": 20})
    run.log.write_bytes(DAMAGED_LOGS[damage])
    run.file.touch()
    for use in (lambda: run.finished("train"), lambda: _append(run.log, {"step": 30, "loss": 1.0})):
        with pytest.raises(HyperNetError, match=r"log.csv is damaged .*Delete it"):
            use()


def encoded(names):
    return [EncodedPerson(Person(name, (Photo(Path(name)),)), torch.zeros(1, 4, 2, 2)) for name in names]


def test_people_are_split_and_recognised():
    people = encoded("abcdefg")
    trained, kept = split(people, 0.3)
    assert (len(trained), len(kept)) == (5, 2) and kept == people[-2:]
    assert split(people, 0.01)[1] == people[-1:]
    assert split(people, 0.3, overfit=2) == (people[:2], people[:2])
    with pytest.raises(HyperNetError, match="1 people are too few"):
        split(people[:1], 0.3)
    require_unseen(people, 2, {"trained_on": trained_on(trained)})
    require_unseen(people, 1, {"trained_on": trained_on(trained)})
    for judged, others in ((4, people), (2, encoded("xbcdefg"))):
        with pytest.raises(HyperNetError, match=f"trained on some of the last {judged} of these 7 people"):
            require_unseen(others, judged, {"trained_on": trained_on(trained)})
    for info in ({}, {"trained_on": ""}, {"trained_on": "many people"}, {"trained_on": "9" * 5000}):
        with pytest.raises(HyperNetError, match="does not say whom it was trained on"):
            require_unseen(people, 1, info)


HOLDER = """
import sys
from pathlib import Path
from hdb_core.train.run import Run

with Run.open(Path(sys.argv[1]), {"model": "model.safetensors", "photos": "photos"}).locked():
    print("ready", flush=True)
    input()
"""


def test_a_second_training_in_one_folder_is_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=DOCS.parent, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:  # fmt: skip
        assert other.stdout.readline() == b"ready\n"
        assert main([str(folder), "--model", "model.safetensors", "--photos", "photos"]) == 1
        assert f"Another training is running in {folder}." in capsys.readouterr().err
        other.kill()
    with Run.open(folder, NEW).locked():  # a killed one does not keep it
        pass


COMPUTING = HOLDER.replace('"photos": "photos"', '"photos": "photos", "precomputed": sys.argv[2]').replace(
    "locked", "computing"
)


def test_two_trainings_do_not_compute_in_one_folder_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "PATIENCE", 0)
    runs = [Run.open(tmp_path / name, {**NEW, "precomputed": str(tmp_path / "shared")}) for name in "ab"]
    with subprocess.Popen([sys.executable, "-c", COMPUTING, runs[0].folder, runs[0].shared], cwd=DOCS.parent,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:  # fmt: skip
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(HyperNetError, match=r"Another training is running in .*shared"), runs[1].computing():
            pass
        other.kill()
    with runs[1].computing(), runs[0].locked(), runs[1].locked():  # folders of their own
        pass


def test_what_killed_trainings_were_writing_is_removed(tmp_path):
    run = Run.open(tmp_path / "run", {**NEW, "precomputed": str(tmp_path / "shared")})
    left = [folder / ".hdb-1.partial" for folder in (run.folder, run.samples, run.people, run.tokens, run.shared)]
    for path in (*left, run.folder / "other.partial"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with run.locked():
        assert [path.exists() for path in left] == [False, False, True, True, True]
    with run.computing():  # the other run may be writing its own files
        assert [path.exists() for path in left] == [False, False, False, False, True]
    assert (run.folder / "other.partial").exists()


def test_a_run_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(HyperNetError, match=r"run cannot be written"), Run.open(tmp_path / "run", NEW).locked():
        pass


def test_a_lost_process_is_one_sentence_and_another_error_a_traceback(tmp_path, capsys):
    def load(message):
        def loader(*_):
            raise RuntimeError(message)

        return loader

    (tmp_path / "photos").mkdir()
    asked = [str(tmp_path / "run"), "--model", "model.safetensors", "--photos", str(tmp_path / "photos"), "--cpu"]
    asked += ["--mixed-precision", "no"]  # accelerate keeps the first of a process
    for person in range(2):
        Image.new("RGB", (64, 64), (person, 0, 0)).save(tmp_path / "photos" / f"{person}.png")
    assert main(asked, load("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer")) == 1
    assert "Another process has ended, so this one ends, too" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="something else"):
        main(asked, load("something else"))
