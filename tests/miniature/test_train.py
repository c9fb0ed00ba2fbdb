"""`hdb_core.train` from a folder of photos to a hypernetwork, on a tiny random diffusers model."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from benchmarks import training as comparison
from hdb_core import basis as basis_module
from hdb_core import basis_file, hypernet_file, train
from hdb_core.errors import HyperNetError
from hdb_core.training import trainer, vision
from hdb_core.training.faces import PhotoPixels
from hdb_core.training.loop import TrainConfig, ordinary
from hdb_core.training.photos import find_people
from hdb_core.training.pretrain import PhotoLoss
from hdb_core.training.tokens import PhotoTokens, precompute_tokens
from miniature.photos import FIRST, write_person
from miniature.text import load_tokenizer

from ..second_device import SecondDevice

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--mixed-precision", "no", "--cpu", "--image-size", "64", "--group", "3", "--fit-steps", "3", "--down-dim", "12",
         "--up-dim", "8", "--encoder-size", "32", "--encoder-width", "32", "--encoder-depth", "1", "--stem", "16x1", "16x1", "--width", "32",
         "--depth", "1", "--people", "4", "--warmup", "2", "--held-out", "0.3", "--max-photos", "2",
         "--regression-weight", "1", "--code", "0", "--encoder-rate", "0.2", "--learning-rate", "5e-4"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=768, norm_num_groups=8,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, hidden_size=768, intermediate_size=32, num_attention_heads=4))  # fmt: skip
        vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
        vae.decoder.layers[-1].weight.data *= 100  # or all pictures are black
    for name, part in (("unet", unet), ("text_encoder", text), ("vae", vae), ("tokenizer", load_tokenizer(ROOT))):
        part.save_pretrained(folder / name)
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(FIRST, FIRST + 7):
        write_person(folder, seed, 3)
    return folder


@pytest.fixture(scope="module")
def fitted(model, photos, tmp_path_factory):
    """A run in which everybody is fitted."""
    folder = tmp_path_factory.mktemp("run")
    assert run("precompute", model, photos, folder) == 0
    return folder


@pytest.fixture
def clean_state():
    """A process otherwise keeps its first device and precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(stage, model, photos, folder, *options):
    return train.main(
        [stage, "--model", str(model), "--photos", str(photos), "--folder", str(folder), *SIZES, *options]
    )


def copied(fitted, target):
    (target / "people").mkdir(parents=True)
    for path in (fitted / "people").iterdir():
        os.link(path, target / "people" / path.name)
    return target


def weights(folder):
    """In float32; those of the file are rounded."""
    return torch.load(folder / "state.pt", weights_only=True)["net"]


def test_precompute_resumes_and_notices_other_settings(model, photos, fitted, tmp_path, capsys):
    folder = copied(fitted, tmp_path / "run")
    paths = sorted((folder / "people").iterdir())
    assert [path.name for path in paths] == [f"group_{n:05}.safetensors" for n in range(3)]
    lost = load_file(paths[1])
    paths[1].unlink()
    before = paths[0].stat().st_mtime_ns
    assert run("precompute", model, photos, folder) == 0
    assert paths[0].stat().st_mtime_ns == before
    for name, tensor in load_file(paths[1]).items():
        torch.testing.assert_close(tensor, lost[name])
    assert run("precompute", model, photos, folder, "--fit-rate", "0.5") == 1
    assert "other settings" in capsys.readouterr().err


def test_train_and_evaluate(model, photos, fitted, tmp_path, capsys):
    folder = copied(fitted, tmp_path / "run")
    assert run("train", model, photos, folder, "--steps", "40", "--learning-rate", "3e-3") == 0
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    assert float(rows[-1]["regression"]) < float(rows[0]["regression"])
    header = hypernet_file.read_header(folder / "hypernet.safetensors")
    assert header.info["step"] == "40" and header.config.basis.down_dim == 12
    assert run("evaluate", model, photos, folder) == 0
    table = [json.loads(line) for line in (folder / "evaluation.json").read_text().splitlines()]
    assert [(row["photos"], row["iterations"]) for row in table] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(len({row[name] for name in ("own", "mean", "stranger", "nobody")}) == 4 for row in table)
    for row in table:
        assert fmean(row["own_of_each"]) == pytest.approx(row["own"], abs=1e-5) and len(set(row["own_of_each"])) > 1
    assert run("evaluate", model, photos, folder, "--held-out", "0.1") == 0  # of one person
    (row, *_) = (json.loads(line) for line in (folder / "evaluation.json").read_text().splitlines())
    assert len(row["own_of_each"]) == 1 and "mean" not in row and "stranger" not in row
    masked = shutil.copytree(photos, tmp_path / "masked")
    for photo in list(masked.glob("*/*.png")):
        Image.new("L", Image.open(photo).size, 255).save(photo.with_suffix(".mask.png"))
    assert run("evaluate", model, masked, folder) == 0  # the same people, judged by their faces
    assert run("train", model, masked, folder, "--steps", "41") == 1
    assert "of a training with another number of masks" in capsys.readouterr().err
    assert run("evaluate", model, photos, folder, "--held-out", "0.5") == 1
    assert "may have been trained on some of the last 4 of these 7 people" in capsys.readouterr().err


def test_a_check_on_a_few_people_before_a_long_training(model, photos, tmp_path, capsys):
    """It learns them by heart, is judged by them, and is never taken for the beginning of the training itself."""
    folder, check = tmp_path / "run", ["--overfit", "2"]
    assert run("precompute", model, photos, folder, *check) == 0
    (group,) = (folder / "people").iterdir()
    written = group.stat().st_mtime_ns
    assert run("train", model, photos, folder, "--steps", "100", "--learning-rate", "3e-3", *check) == 0
    assert run("evaluate", model, photos, folder, *check) == 0
    row = json.loads((folder / "evaluation.json").read_text().splitlines()[-1])
    assert len(row["own_of_each"]) == 2 and row["regression"] < 0.5 * row["mean_predictor"]
    assert run("precompute", model, photos, folder) == 0
    assert len(list((folder / "people").iterdir())) == 3 and group.stat().st_mtime_ns == written
    assert run("train", model, photos, folder, "--steps", "101") == 1
    assert "is of a training with another overfit" in capsys.readouterr().err


@pytest.mark.usefixtures("clean_state")
def test_every_stage_on_another_device(model, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "mps")
    monkeypatch.setattr(sys.modules[__name__], "SIZES", [option for option in SIZES if option != "--cpu"])
    with SecondDevice(torch.device("mps")) as there:
        assert run("basis", model, photos, tmp_path, "--basis-people", "3") == 0
        assert run("precompute", model, photos, tmp_path) == 0
        assert run("pretrain", model, photos, tmp_path, "--pretrain-people", "4", "--pretrain-steps", "2") == 0
        options = ["--augment", "flip", "--encoder", str(tmp_path / "encoder.safetensors"), "--sample-every", "2"]
        assert run("train", model, photos, tmp_path, "--steps", "2", *options) == 0
        assert run("train", model, photos, tmp_path, "--steps", "3", *options) == 0  # from its state
        assert run("evaluate", model, photos, tmp_path) == 0
        assert len(there) > 1000
    assert hypernet_file.load(tmp_path / "hypernet.safetensors").down_start.device.type == "cpu"


def test_pretrained_encoder_is_what_training_starts_from(model, photos, fitted, tmp_path, capsys):
    """Without a rate of its own the encoder stays what it was; its pretraining resumes."""
    folder, options = copied(fitted, tmp_path / "run"), ["--pretrain-people", "4", "--pretrain-rate", "3e-3"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 20)
        run("pretrain", model, photos, folder, "--pretrain-steps", "60", *options)
    assert run("pretrain", model, photos, folder, "--pretrain-steps", "60", *options) == 0
    rows = list(csv.DictReader((folder / "pretrain.csv").open()))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50, 60]
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    assert run("train", model, photos, folder, "--steps", "3", "--encoder-rate", "0") == 0
    for name, weight in load_file(folder / "encoder.safetensors").items():
        torch.testing.assert_close(weights(folder)[f"net.encoder.{name}"], weight)


def test_an_encoder_of_another_folder(model, photos, fitted, tmp_path, capsys):
    folder, other = copied(fitted, tmp_path / "run"), copied(fitted, tmp_path / "other")
    options = ["--pretrain-people", "4", "--pretrain-steps", "1"]
    assert run("pretrain", model, photos, folder, *options) == 0
    theirs = ["--encoder", str(folder / "encoder.safetensors")]
    assert run("pretrain", model, photos, other, *options, *theirs, "--pretrain-rate", "1e-9") == 0
    for name, weight in load_file(folder / "encoder.safetensors").items():
        torch.testing.assert_close(load_file(other / "encoder.safetensors")[name], weight, atol=1e-6, rtol=1e-6)
    (other / "encoder.safetensors").unlink()
    assert run("train", model, photos, other, "--steps", "1", "--encoder-rate", "0", *theirs) == 0
    for name, weight in load_file(folder / "encoder.safetensors").items():
        torch.testing.assert_close(weights(other)[f"net.encoder.{name}"], weight)
    third = copied(fitted, tmp_path / "third")
    of_a_hypernet = ["--encoder", str(other / "hypernet.safetensors")]
    assert run("train", model, photos, third, "--steps", "1", "--encoder-rate", "0", *of_a_hypernet) == 0
    kept = hypernet_file.load(other / "hypernet.safetensors").encoder.state_dict()
    for name, weight in hypernet_file.load(third / "hypernet.safetensors").encoder.state_dict().items():
        torch.testing.assert_close(weight, kept[name])
    (third / "hypernet.safetensors").unlink()
    (third / "state.pt").unlink()
    assert run("train", model, photos, third, "--steps", "1", "--encoder-width", "64", *theirs) == 1
    assert "an image encoder of other sizes" in capsys.readouterr().err
    whole = (folder / "encoder.safetensors").read_bytes()
    (folder / "encoder.safetensors").write_bytes(whole[:-100])
    assert run("train", model, photos, third, "--steps", "1", *theirs) == 1
    assert "damaged or no safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--begin-with", "--clip-vision"])
def test_an_encoder_beside_one_that_brings_its_own_is_refused(other, model, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("train", model, photos, tmp_path, "--encoder", "any.safetensors", other, "any")
    assert "bring their own" in capsys.readouterr().err


def test_portraits_are_predicted_and_never_seen(model, photos, fitted, tmp_path, monkeypatch):
    seen, shown = [], []
    read, text = PhotoPixels.read, PhotoLoss.text
    monkeypatch.setattr(
        PhotoPixels, "read", lambda self, photos: seen.extend(n for _, n in photos) or read(self, photos)
    )
    monkeypatch.setattr(PhotoLoss, "text", lambda self, words: shown.extend(words) or text(self, words))
    folder = copied(fitted, tmp_path / "run")
    options = ["--pretrain-people", "8", "--pretrain-steps", "4", "--portraits"]
    assert run("pretrain", model, photos, folder, *options) == 0
    assert set(seen) == {1, 2}
    portrait = (photos / f"{FIRST:08}" / "0.txt").read_text().strip()
    assert set(shown) == {"", f"a face, {portrait}"}


def test_training_begins_with_another_hypernetwork(model, photos, fitted, tmp_path, capsys):
    first, second, other = (copied(fitted, tmp_path / name) for name in ("first", "second", "other"))
    assert run("train", model, photos, first, "--steps", "3") == 0
    start = ["--begin-with", str(first / "hypernet.safetensors")]
    assert run("train", model, photos, second, "--steps", "1", "--learning-rate", "1e-9", *start) == 0
    for name, weight in hypernet_file.load(first / "hypernet.safetensors").state_dict().items():
        torch.testing.assert_close(weights(second)[f"net.{name}"], weight, atol=1e-6, rtol=1e-6)
    assert run("train", model, photos, other, "--steps", "1", "--prompt", "a [w] face", *start) == 1
    assert "differs from the hypernetwork to be trained in: prompt" in capsys.readouterr().err


CODE = ["--code", "4", "--encoder-rate", "0", "--regression-weight", "0"]


def test_a_face_code_is_found_once_and_trained_from(model, photos, fitted, tmp_path, capsys):
    folder, second = copied(fitted, tmp_path / "run"), copied(fitted, tmp_path / "second")
    assert run("train", model, photos, folder, "--steps", "2", *CODE) == 1
    assert "The image encoder has learned nothing yet" in capsys.readouterr().err
    assert run("pretrain", model, photos, folder, "--pretrain-people", "4", "--pretrain-steps", "1") == 0
    assert run("train", model, photos, folder, "--steps", "2", *CODE) == 0
    found = weights(folder)
    assert found["net.code_map"].abs().sum() > 0 and found["net.direct"].abs().sum() > 0
    assert run("train", model, photos, folder, "--steps", "4", *CODE) == 0
    assert torch.equal(weights(folder)["net.code_map"], found["net.code_map"])
    assert not torch.equal(weights(folder)["net.direct"], found["net.direct"])
    assert run("evaluate", model, photos, folder) == 0
    start = ["--begin-with", str(folder / "hypernet.safetensors"), "--learning-rate", "1e-9"]
    assert run("train", model, photos, second, "--steps", "1", *CODE, *start) == 0
    torch.testing.assert_close(weights(second)["net.code_map"], found["net.code_map"], atol=1e-3, rtol=1e-2)
    with pytest.raises(SystemExit):
        run("train", model, photos, folder, "--code", "4")
    assert "--code needs --encoder-rate 0" in capsys.readouterr().err


def test_a_face_code_on_two_processes(model, photos, fitted, tmp_path):
    one, two = copied(fitted, tmp_path / "one"), copied(fitted, tmp_path / "two")
    assert run("pretrain", model, photos, one, "--pretrain-people", "4", "--pretrain-steps", "1") == 0
    options = ["--steps", "8", "--rank", "2", *CODE, "--encoder", str(one / "encoder.safetensors")]
    assert run("train", model, photos, one, *options) == 0
    launch(["-m", "hdb_core.train"], "train", model, photos, two, *options)
    assert_same_weights(two, one)


@pytest.mark.parametrize(("count", "wanted", "seen"), [(1, 1, [0]), (2, 2, [0, 0]), (3, 2, [1, 1]), (4, 3, [1, 2, 1])])
def test_people_are_judged_by_ordinary_photos(count, wanted, seen):
    assert ordinary(count, wanted) == seen


def test_everything_in_a_learned_basis(model, photos, fitted, tmp_path, capsys, monkeypatch):
    """Learned, fitted and predicted in it; a hypernetwork of another basis is refused."""
    folder, first = tmp_path / "run", copied(fitted, tmp_path / "first")
    assert run("basis", model, photos, folder, "--basis-people", "4") == 0
    made = (folder / "basis.safetensors").stat().st_mtime_ns
    assert run("basis", model, photos, folder) == 0 and (folder / "basis.safetensors").stat().st_mtime_ns == made
    measured = json.loads((folder / "basis.json").read_text())
    assert measured["unseen_people"] == 2 and measured["held"] > measured["held_by_a_random_basis"]
    basis = ["--basis", str(folder / "basis.safetensors")]
    assert run("train", model, photos, first, "--steps", "1", *basis) == 1
    assert "Nobody was fitted in this basis" in capsys.readouterr().err
    diffusion = [*basis, "--regression-weight", "0"]
    assert run("train", model, photos, copied(fitted, tmp_path / "diffusion"), "--steps", "1", *diffusion) == 0
    assert run("train", model, photos, first, "--steps", "2") == 0
    start = ["--begin-with", str(first / "hypernet.safetensors"), "--steps", "1"]
    assert run("precompute", model, photos, folder) == 0  # finds what is in its folder
    assert run("train", model, photos, folder, *start) == 1
    assert "differs from the hypernetwork to be trained in: basis" in capsys.readouterr().err
    assert run("train", model, photos, folder, "--steps", "1") == 0
    _, recipe = basis_file.load(folder / "basis.safetensors")
    assert hypernet_file.read_header(folder / "hypernet.safetensors").config.basis == recipe
    monkeypatch.setattr(basis_module, "_LEARNED", {})  # as in another process
    basis_module.layer_basis.cache_clear()
    assert run("evaluate", model, photos, folder) == 0


def test_people_of_other_layers_are_refused(model, photos, fitted, tmp_path, capsys):
    first, second = copied(fitted, tmp_path / "first"), tmp_path / "second"
    assert run("train", model, photos, first, "--steps", "1") == 0
    assert run("train", model, photos, first, "--steps", "2", "--convolutions") == 1
    assert "Give --convolutions to both stages or to none" in capsys.readouterr().err
    start = ["--begin-with", str(first / "hypernet.safetensors"), "--regression-weight", "0"]
    assert run("precompute", model, photos, second, "--fit-steps", "0", "--convolutions") == 0
    assert run("train", model, photos, second, "--steps", "1", "--convolutions", *start) == 1
    assert "differs from the hypernetwork to be trained in: layout" in capsys.readouterr().err


def test_precompute_may_write_elsewhere(model, photos, tmp_path):
    folder, shared = tmp_path / "run", tmp_path / "shared"
    assert run("precompute", model, photos, folder, "--precomputed", str(shared), "--fit-steps", "0") == 0
    assert len(list((shared / "people").glob("group_*.safetensors"))) == 3 and not list(folder.iterdir())


def test_ways_to_train_are_compared(model, photos, fitted, tmp_path):
    """The benchmark trains and evaluates a variant once."""
    options = ["--model", str(model), "--photos", str(photos), "--precomputed", str(fitted), *SIZES]
    before = sorted(fitted.rglob("*"))
    rows = []
    for name in ("regression", "diffusion, k = 1"):
        run = train.Run(tmp_path / name)
        rows.append(comparison.trained(name, run.folder, 2, options, photos))
        written = run.state.stat().st_mtime_ns
        assert comparison.trained(name, run.folder, 2, options, photos) == rows[-1]
        assert run.state.stat().st_mtime_ns == written
    assert sorted(fitted.rglob("*")) == before
    assert [row["steps"] for row in rows] == [2, 2]
    assert hypernet_file.read_header(run.file).config.iterations == 1
    assert "diffusion" not in (tmp_path / "regression" / "log.csv").read_text().splitlines()[0]
    assert len(comparison.table(rows).splitlines()) == 4
    with_errors = [{**rows[0], "variant": name, "nobody": 0.5, "own_of_each": own}
                   for name, own in (("diffusion", [0.4, 0.3]), ("regression", [0.35, 0.2]))]  # fmt: skip
    assert "| 15.0 ± 5.0 |" in comparison.table(with_errors).splitlines()[-1]
    assert comparison.merged(rows[::-1], {**rows[0], "own": 0.0}) == [{**rows[0], "own": 0.0}, rows[1]]


@pytest.mark.usefixtures("clean_state")
def test_diffusion_loss_alone_in_bf16(model, photos, tmp_path):
    """Nobody is fitted: people are only encoded."""
    options = ["--mixed-precision", "bf16", "--fit-steps", "0", "--regression-weight", "0", "--steps", "4"]
    options += ["--rank", "2"]
    for stage in ("precompute", "pretrain", "train", "evaluate"):
        assert run(stage, model, photos, tmp_path, *options, "--pretrain-steps", "2", "--pretrain-people", "4") == 0
    up = load_file(tmp_path / "people" / "group_00000.safetensors")["up"]
    assert not up.any() and up.shape[-1] == 1
    (row, *_) = csv.DictReader((tmp_path / "log.csv").open())
    assert set(row) == {"step", "rate", "loss", "diffusion"}
    table = [json.loads(line) for line in (tmp_path / "evaluation.json").read_text().splitlines()]
    assert all(row["own"] != row["nobody"] and "regression" not in row for row in table)


def stopping(monkeypatch, step):
    """Lets a training save after every step, and stop before this one."""
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0)
    rate = train.TrainConfig.rate

    def rate_or_stop(self, now):
        if now == step:
            raise KeyboardInterrupt
        return rate(self, now)

    monkeypatch.setattr(train.TrainConfig, "rate", rate_or_stop)


STOP_OF_TWO = """
import sys
from pytest import MonkeyPatch
from hdb_core import train
from tests.miniature.test_train import stopping
with MonkeyPatch.context() as patch:
    stopping(patch, int(sys.argv[1]))
    try:
        train.main(sys.argv[2:])
    except KeyboardInterrupt:
        pass
"""


def launch(target, stage, model, photos, folder, *options):
    """On two processes; the target is ``-m MODULE``, or a script and its first arguments."""
    # Without GPUs, accelerate's own launcher starts one process whatever it is told.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *target, stage]
    paths = ["--model", str(model), "--photos", str(photos), "--folder", str(folder), *SIZES, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *paths], check=False, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{stage}, processes: 2" in done.stdout


def assert_same_weights(folder, other, atol=2e-4, rtol=2e-3):
    assert hypernet_file.read_header(folder / "hypernet.safetensors").info["step"] == "8"
    for name, weight in weights(other).items():
        torch.testing.assert_close(weights(folder)[name], weight, atol=atol, rtol=rtol)


@pytest.fixture(scope="module")
def straight(model, photos, fitted, tmp_path_factory):
    """A run of eight steps on one process."""
    folder = copied(fitted, tmp_path_factory.mktemp("straight"))
    assert run("train", model, photos, folder, "--steps", "8") == 0
    return folder


def test_a_stopped_run_ends_as_one_that_was_not(model, photos, fitted, straight, tmp_path):
    folder = copied(fitted, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 5)
        run("train", model, photos, folder, "--steps", "8")
    assert run("train", model, photos, folder, "--steps", "8") == 0
    assert_same_weights(folder, straight, atol=1e-4, rtol=1e-3)


def test_steps_that_a_kill_undid_are_logged_once(model, photos, fitted, tmp_path):
    folder, late = copied(fitted, tmp_path), ["--steps", "8", "--diffusion-start", "6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOG_EVERY", 2)
        with pytest.MonkeyPatch.context() as killed, pytest.raises(KeyboardInterrupt):
            stopping(killed, 5)
            killed.setattr(trainer.Trainer, "_save", lambda self: None)
            run("train", model, photos, folder, *late)
        assert len((folder / "log.csv").read_text().splitlines()) == 3
        assert run("train", model, photos, folder, *late) == 0
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    assert [bool(row["diffusion"]) for row in rows] == [False, False, False, True]


def ended(straight, target):
    """The run of eight steps, its file lost."""
    os.link(straight / "state.pt", copied(straight, target) / "state.pt")
    return target


def test_a_run_that_ended_before_its_file_writes_it(model, photos, straight, tmp_path):
    folder = ended(straight, tmp_path / "run")
    assert run("train", model, photos, folder, "--steps", "8") == 0
    written, kept = (hypernet_file.load(f / "hypernet.safetensors").state_dict() for f in (folder, straight))
    assert all(torch.equal(weight, kept[name]) for name, weight in written.items())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--basis-seed", "1"], "basis"),
        (["--rank", "2"], "rank"),
        (["--prompt", "a [w] face"], "prompt"),
        (["--depth", "2"], "depth"),
        (["--held-out", "0.5"], "set of people"),
    ],
)
def test_a_run_goes_on_as_it_was_begun(model, photos, straight, tmp_path, capsys, options, name):
    folder = ended(straight, tmp_path / "run")
    assert run("train", model, photos, folder, "--steps", "9", "--regression-weight", "0", *options) == 1
    assert f"of a training with another {name}." in capsys.readouterr().err


def test_rates_are_those_of_now(model, photos, straight, tmp_path):
    folder = ended(straight, tmp_path / "run")
    assert run("train", model, photos, folder, "--steps", "9", "--encoder-rate", "1e-9", "--weight-decay", "0") == 0
    groups = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert 1e-9 in {group["scale"] for group in groups}
    moved = {n for n, w in weights(folder).items() if not torch.allclose(w, weights(straight)[n], atol=1e-7)}
    assert moved and not any("encoder" in name for name in moved)


def test_a_training_that_diverges_keeps_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_EVERY", -1)
    state, net = tmp_path / "state.pt", torch.nn.Linear(3, 1)

    def loss_of(net, step, part):
        return {"loss": net(torch.ones(4, 3)).square().mean() / (0.0 if step == 12 else 1.0)}

    config = TrainConfig(steps=30, people=4)
    loop = trainer.Trainer(Accelerator(cpu=True), net, config, state, tmp_path / "log.csv")
    with pytest.raises(HyperNetError, match=r"step 13 are not finite.*Lower --learning-rate"):
        loop.run(loss_of, lambda: None)
    kept = torch.load(state, weights_only=True)
    assert kept["step"] == 12
    assert all(bool(w.isfinite().all()) for name in ("net", "average") for w in kept[name].values())


@pytest.mark.parametrize("parts", ["2", "4"])
def test_accumulated_gradients_are_those_of_the_whole(model, photos, fitted, straight, tmp_path, parts):
    folder = copied(fitted, tmp_path)
    assert run("train", model, photos, folder, "--steps", "8", "--accumulate", parts) == 0
    assert_same_weights(folder, straight, atol=1e-5, rtol=1e-5)


def test_samples_are_drawn_and_change_nothing(model, photos, fitted, straight, tmp_path):
    folder = copied(fitted, tmp_path)
    options = ["--sample-every", "4", "--sample-people", "2", "--sample-steps", "3", "--sample-words", "in a park"]
    assert run("train", model, photos, folder, "--steps", "8", *options) == 0
    paths = sorted((folder / "samples").iterdir())
    assert [path.name for path in paths] == ["step_000004.png", "step_000008.png"]
    first, last = (Image.open(path) for path in paths)
    assert first.size == (5 * (64 + 4), 28 + 2 * (64 + 4))
    assert ImageChops.difference(first, last).getbbox() is not None
    assert not (straight / "samples").exists()
    assert_same_weights(folder, straight, atol=0, rtol=0)


def test_two_processes_train_as_one(model, photos, straight, tmp_path):
    """DDP: the same global batch, the same result; and precompute shared between them, while one learns the basis."""
    launch(["-m", "hdb_core.train"], "basis", model, photos, tmp_path / "basis", "--basis-people", "2")
    assert basis_file.load(tmp_path / "basis" / "basis.safetensors")[1].up_dim == 8
    for stage in ("precompute", "train"):
        launch(["-m", "hdb_core.train"], stage, model, photos, tmp_path, "--steps", "8")
    assert len(list((tmp_path / "people").iterdir())) == 3
    assert_same_weights(tmp_path, straight)


def test_one_process_stops_and_two_go_on(model, photos, fitted, straight, tmp_path):
    """And the two accumulate, which the one did not."""
    folder = copied(fitted, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 4)
        run("train", model, photos, folder, "--steps", "8")
    launch(["-m", "hdb_core.train"], "train", model, photos, folder, "--steps", "8", "--accumulate", "2")
    assert_same_weights(folder, straight)


def test_two_processes_stop_and_one_goes_on(model, photos, fitted, straight, tmp_path):
    folder, script = copied(fitted, tmp_path / "run"), tmp_path / "stop.py"
    script.write_text(STOP_OF_TWO)
    launch([str(script), "4"], "train", model, photos, folder, "--steps", "8")
    assert hypernet_file.read_header(folder / "hypernet.safetensors").info["step"] == "4"
    assert run("train", model, photos, folder, "--steps", "8") == 0
    assert_same_weights(folder, straight)


@pytest.fixture
def clip_vision(tmp_path, monkeypatch):
    """Folders of small random image encoders by width and seed; the first width is known to the host."""
    row = vision.HOST_ENCODERS[0]._replace(width=24, depth=2, image_size=28)
    monkeypatch.setattr(vision, "HOST_ENCODERS", [row])

    def make(seed=0, width=24, name="encoder"):
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, intermediate_size=48, projection_dim=16))
        for weight in model.parameters():
            weight.data = 5 * weight  # so that the photos count
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


def test_behind_a_frozen_encoder(model, photos, fitted, clip_vision, tmp_path):
    """From precompute to evaluate; the tokens are computed once, and the file holds none of the encoder."""
    folder, encoder = copied(fitted, tmp_path / "run"), ("--clip-vision", clip_vision())
    assert run("precompute", model, photos, folder, *encoder) == 0
    paths = sorted((folder / "tokens").iterdir())
    assert [tuple(load_file(path)["tokens"].shape) for path in paths] == [(9, 5, 24), (9, 5, 24), (3, 5, 24)]
    lost, before = load_file(paths[1])["tokens"], paths[0].stat().st_mtime_ns
    paths[1].unlink()
    assert run("train", model, photos, folder, "--steps", "40", "--learning-rate", "3e-3", *encoder) == 0
    assert paths[0].stat().st_mtime_ns == before and torch.equal(load_file(paths[1])["tokens"], lost)
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert float(rows[-1]["regression"]) < float(rows[0]["regression"])
    header = hypernet_file.read_header(folder / "hypernet.safetensors")
    found = header.config.encoder
    assert (found.kind, found.name, found.num_tokens, found.token_width) == ("clip_vision", "encoder", 5, 24)
    assert (found.image_size, found.mean) == (28, vision.HOST_ENCODERS[0].colors[0])
    assert not any(name.startswith("encoder.") for name in weights(folder))
    assert not any(str(tmp_path) in value for value in header.info.values())
    assert run("evaluate", model, photos, folder) == 0
    table = [json.loads(line) for line in (folder / "evaluation.json").read_text().splitlines()]
    assert all(len({row[name] for name in ("own", "mean", "stranger", "nobody")}) == 4 for row in table)
    coded = copied(fitted, tmp_path / "coded")
    assert run("train", model, photos, coded, "--steps", "2", *CODE, *encoder) == 0
    assert weights(coded)["net.code_map"].shape == (24, 4) and weights(coded)["net.direct"].any()


def test_tokens_are_those_of_the_photo(photos, clip_vision, tmp_path):
    people = find_people(photos)[:4]
    encoder = vision.load_vision_encoder(Path(clip_vision()), torch.device("cpu"))
    precompute_tokens(encoder, people, tmp_path / "tokens", group=3)
    tokens = PhotoTokens(tmp_path / "tokens", people, encoder.config)
    chosen = [(people[3], 2), (people[0], 1), (people[1], 0)]
    read = tokens.read(chosen)
    expected = torch.cat([encoder.encode([person.photos[i].whole()]) for person, i in chosen])
    torch.testing.assert_close(read, expected, atol=2e-3, rtol=1e-3)  # float16
    assert not torch.allclose(read[0], read[1], atol=1e-2)


def test_tokens_that_are_not_there_or_of_another_encoder(photos, clip_vision, tmp_path):
    people = find_people(photos)
    encoder = vision.load_vision_encoder(Path(clip_vision()), torch.device("cpu"))
    precompute_tokens(encoder, people[:4], tmp_path / "tokens", group=3)
    with pytest.raises(HyperNetError, match=r"tokens of 0 photos.*who has 3. Run precompute with --clip-vision"):
        PhotoTokens(tmp_path / "tokens", people, encoder.config)
    wider = replace(encoder.config, name="ViT-H-14", token_width=1280, num_tokens=257)
    with pytest.raises(HyperNetError, match=r"5 tokens of width 24 a photo, but the encoder is 'ViT-H-14' with 257"):
        PhotoTokens(tmp_path / "tokens", people[:4], wider)


def test_whole_models_bring_their_image_encoder(clip_vision, tmp_path):
    """A folder of all of CLIP, as it is published, is as good as one of its image encoder."""
    alone = Path(clip_vision())
    described = json.loads((alone / "config.json").read_text())
    with torch.random.fork_rng():
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 10,
        }
        whole = CLIPModel(CLIPConfig(text_config=text, vision_config=described, projection_dim=16))
    whole.load_state_dict(load_file(alone / "model.safetensors"), strict=False)
    whole.save_pretrained(tmp_path / "whole")
    first, second = (vision.load_vision_encoder(folder, torch.device("cpu")) for folder in (alone, tmp_path / "whole"))
    assert first.weights == second.weights
    photo = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.encode([photo]), second.encode([photo]))


def test_another_encoder_than_that_of_the_run(model, photos, fitted, clip_vision, tmp_path, capsys):
    folder, first = copied(fitted, tmp_path / "run"), clip_vision()
    assert run("train", model, photos, folder, "--steps", "1", "--clip-vision", first) == 0
    assert run("train", model, photos, folder, "--steps", "2", "--clip-vision", clip_vision(seed=1, name="other")) == 1
    assert "another base model or image encoder" in capsys.readouterr().err
    assert run("train", model, photos, folder, "--steps", "2") == 1
    assert "of a training with another encoder." in capsys.readouterr().err
    os.rename(first, tmp_path / "elsewhere")
    assert run("train", model, photos, folder, "--steps", "2", "--clip-vision", str(tmp_path / "elsewhere")) == 0


def test_a_frozen_encoder_is_not_pretrained(model, photos, fitted, clip_vision, tmp_path, capsys):
    assert run("pretrain", model, photos, copied(fitted, tmp_path / "run"), "--clip-vision", clip_vision()) == 1
    assert "Leave the stage pretrain out" in capsys.readouterr().err


def test_encoders_that_cannot_be_used(model, photos, clip_vision, tmp_path, capsys):
    unknown, empty = tmp_path / "unknown", Path(clip_vision(name="empty"))
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "resnet"}')
    (empty / "model.safetensors").unlink()
    partial = Path(clip_vision(name="partial"))
    kept = {name: t for name, t in load_file(partial / "model.safetensors").items() if "layers.0.mlp" not in name}
    save_file(kept, partial / "model.safetensors", {"format": "pt"})
    broken = Path(clip_vision(name="broken"))
    os.truncate(broken / "model.safetensors", 5000)
    for folder, message in (
        (tmp_path / "nowhere", "lacks config.json"),
        (unknown, "holds 'resnet', but Load CLIP Vision takes CLIP"),
        (clip_vision(width=32, name="wide"), r"patch size (32, 2, 28, 14)) that Load CLIP Vision cannot load"),
        (empty, "holds no weights that can be read"),
        (broken, "holds no weights that can be read"),
        (partial, "lacks 4 weights"),
    ):
        assert run("precompute", model, photos, tmp_path / "run", "--clip-vision", str(folder)) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [("train", [], "Run precompute first"), ("precompute", ["--model", "nowhere"], "no diffusers model"),
     ("precompute", ["--photos", "nowhere"], "There is no folder")],
)  # fmt: skip
def test_refusals(model, photos, tmp_path, capsys, stage, options, message):
    assert run(stage, model, photos, tmp_path, *options) == 1
    assert message in capsys.readouterr().err


def test_people_that_cannot_be_shared_out(model, photos, fitted, tmp_path, capsys):
    assert run("train", model, photos, copied(fitted, tmp_path), "--accumulate", "3") == 1
    assert "--people 4 must be a multiple of 1 processes times --accumulate 3" in capsys.readouterr().err
