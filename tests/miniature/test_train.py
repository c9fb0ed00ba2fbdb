"""`hdb_core.train` from a folder of photos to a hypernetwork, on a tiny random diffusers model."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageChops
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from hdb_core import hypernet_file, train
from miniature.photos import FIRST, write_person
from miniature.text import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--mixed-precision", "no", "--cpu", "--image-size", "64", "--group", "3", "--fit-steps", "3", "--down-dim", "12",
         "--up-dim", "8", "--encoder-size", "32", "--encoder-width", "32", "--encoder-depth", "1", "--width", "32",
         "--depth", "1", "--people", "4", "--warmup", "2", "--held-out", "0.3", "--max-photos", "2"]  # fmt: skip


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


def run(stage, model, photos, folder, *options):
    return train.main([stage, "--model", str(model), "--photos", str(photos), "--run", str(folder), *SIZES, *options])


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


def test_train_and_evaluate(model, photos, fitted, tmp_path):
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
    assert all(row["own"] != row["nobody"] != row["stranger"] for row in table)


def stopping(monkeypatch, step):
    """Lets a training save after every step, and stop before this one."""
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
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
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", *target, stage]  # fmt: skip
    paths = ["--model", str(model), "--photos", str(photos), "--run", str(folder), *SIZES, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *paths], check=False, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


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
    """DDP: the same global batch, the same result; and precompute shared between them."""
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
