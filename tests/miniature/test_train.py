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
    return hypernet_file.load(folder / "hypernet.safetensors").state_dict()


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


def test_a_stopped_run_ends_as_one_that_was_not(model, photos, fitted, tmp_path, monkeypatch):
    straight, stopped = (copied(fitted, tmp_path / name) for name in ("straight", "stopped"))
    assert run("train", model, photos, straight, "--steps", "8") == 0
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    rate = train.TrainConfig.rate

    def killed(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return rate(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.TrainConfig, "rate", killed)
        run("train", model, photos, stopped, "--steps", "8")
    assert run("train", model, photos, stopped, "--steps", "8") == 0
    assert hypernet_file.read_header(stopped / "hypernet.safetensors").info["step"] == "8"
    for name, weight in weights(straight).items():
        torch.testing.assert_close(weights(stopped)[name], weight, atol=1e-4, rtol=1e-3)


def test_two_processes_train_as_one(model, photos, fitted, tmp_path):
    """DDP: the same global batch, the same result; and precompute shared between them."""
    alone, together = copied(fitted, tmp_path / "alone"), tmp_path / "together"
    assert run("train", model, photos, alone, "--steps", "4") == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hdb_core.train"]  # fmt: skip
    paths = ["--model", str(model), "--photos", str(photos), "--run", str(together), *SIZES, "--steps", "4"]
    for stage in ("precompute", "train"):
        done = subprocess.run([*launch, stage, *paths], check=False, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((together / "people").iterdir())) == 3
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weights(together)[name], weight, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [("train", [], "Run precompute first"), ("precompute", ["--model", "nowhere"], "no diffusers model"),
     ("precompute", ["--photos", "nowhere"], "There is no folder")],
)  # fmt: skip
def test_refusals(model, photos, tmp_path, capsys, stage, options, message):
    assert run(stage, model, photos, tmp_path, *options) == 1
    assert message in capsys.readouterr().err
