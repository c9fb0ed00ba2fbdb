"""`hdb_core.train` from a folder of photos to a hypernetwork, on a tiny random diffusers model."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from unittest.mock import Mock

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
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from hdb_core.errors import HyperNetError
from hdb_core.files import basis as basis_file
from hdb_core.files import container
from hdb_core.files import hypernet as hypernet_file
from hdb_core.hypernet import HyperNet
from hdb_core.train import loop
from hdb_core.train import state as state_file
from hdb_core.train.__main__ import main
from hdb_core.train.base import vision
from hdb_core.train.base.denoiser import load_base_model
from hdb_core.train.base.local import identity_of
from hdb_core.train.data.faces import PhotoPixels
from hdb_core.train.data.photos import find_people
from hdb_core.train.data.tokens import PhotoTokens, precompute_tokens
from hdb_core.train.encoder_loss import PhotoLoss
from hdb_core.train.loop import LoopConfig, TrainingLoop
from hdb_core.train.turns import ordinary
from miniature.photos import FIRST, write_person
from miniature.text import load_tokenizer

from ..second_device import SecondDevice

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--mixed-precision", "no", "--cpu", "--no-convolutions", "--image-size", "64", "--people", "4", "--steps", "8",
         "--set", "group=3", "held_out=0.3", "basis.down_dim=12", "basis.up_dim=8", "fit.steps=3",
         "encoder.image_size=32", "encoder.token_width=32", "encoder.depth=1", "encoder.stem=[[16,1],[16,1]]",
         "net.width=32", "net.depth=1", "net.code=4", "pretrain.steps=2", "pretrain.people=4",
         "train.warmup=2", "train.max_photos=2", "train.regression_weight=1", "train.learning_rate=5e-4",
         "evaluate.photos=2", "samples.every=0"]  # fmt: skip


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=2048, norm_num_groups=8,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
        )  # fmt: skip
        sizes = {"num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 4, "projection_dim": 16}
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, **sizes))
        second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, **sizes))
        vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    tokenizer, schedule = load_tokenizer(), DDPMScheduler(beta_schedule="scaled_linear")
    parts = {"unet": unet, "text_encoder": text, "text_encoder_2": second, "vae": vae, "scheduler": schedule}
    for name, part in {**parts, "tokenizer": tokenizer, "tokenizer_2": tokenizer}.items():
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(FIRST, FIRST + 7):
        write_person(folder, seed, 3)
    return folder


@pytest.fixture(scope="session")
def straight(model, photos, tmp_path_factory):
    """A whole run with fitted people, on one process and without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert run(model, photos, folder) == 0
    return folder


@pytest.fixture
def prepared(straight, tmp_path):
    """The same run before its stage train; the function copies it into a folder of this name."""

    def copy(name="run"):
        (tmp_path / name).mkdir()
        shutil.copytree(straight / "people", tmp_path / name / "people", copy_function=os.link)
        for file in ("encoder.safetensors", "pretrain_state.safetensors", "pretrain.csv", "config.json"):
            os.link(straight / file, tmp_path / name / file)
        return tmp_path / name

    return copy


@pytest.fixture
def ended(straight, prepared):
    """The whole run, its hypernetwork lost."""

    def copy(name="run"):
        folder = prepared(name)
        for file in ("state.safetensors", "log.csv"):
            os.link(straight / file, folder / file)
        return folder

    return copy


@pytest.fixture
def clean_state():
    """A process otherwise keeps its first device and precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


SHARED_DOWN = ["net.predict_down=false"]  # so few steps do not teach a down side of each person's own


def command(model, photos, folder, *options, stage=None):
    only = ["--stage", stage] if stage else []
    return [str(folder), "--model", str(model), "--photos", str(photos), *only, *SIZES, *options]


def run(model, photos, folder, *options, stage=None):
    return main(command(model, photos, folder, *options, stage=stage))


def rows_of(log):
    return list(csv.DictReader(log.open()))


def evaluation(folder):
    return [json.loads(line) for line in (folder / "evaluation.json").read_text().splitlines()]


def weights(folder):
    """In float32; those of the file are rounded."""
    stored = load_file(folder / "state.safetensors")
    return {name.removeprefix("net."): weight for name, weight in stored.items() if name.startswith("net.")}


def test_one_command_does_all_stages(straight):
    assert len(list((straight / "people").glob("group_*.safetensors"))) == 3
    assert [int(row["step"]) for row in rows_of(straight / "pretrain.csv")] == [2]
    header = hypernet_file.read_header(straight / "hypernet.safetensors")
    assert header.info["step"] == "8" and header.config.basis.down_dim == 12 and header.config.encoder.cut == "centre"
    assert not any(str(straight.parent) in value for value in header.info.values())
    net = hypernet_file.load(straight / "hypernet.safetensors")
    assert net.code_map.any() and net.direct.any()
    table = evaluation(straight)
    assert [(row["photos"], row["iterations"]) for row in table] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in table:
        assert fmean(row["own_of_each"]) == pytest.approx(row["own"], abs=1e-5) and len(set(row["own_of_each"])) > 1
    stored = json.loads((straight / "config.json").read_text())
    assert (stored["train"]["steps"], stored["fit"]["steps"], stored["seed"]) == (8, 3, 0)


def test_all_stages_on_sdxl(sdxl, photos, tmp_path):
    folder = tmp_path / "run"
    assert run(sdxl, photos, folder, "--set", "samples.every=2", "samples.steps=2") == 0
    layout = hypernet_file.load(folder / "hypernet.safetensors").config.layout
    # Of CLIP-L the last layer is not read, and not trained.
    assert layout.describe() == "SDXL, 32 UNet + 12 text layers"
    losses = evaluation(folder)[0]
    assert losses["own"] != losses["base"] and losses["own"] < 10
    assert (folder / "samples" / "step_000002.png").exists()


def test_a_run_goes_on_without_its_options(model, photos, prepared, straight, capsys):
    """And says what it will do, and after its first steps how long it takes; what is finished is not done again."""
    folder = prepared()
    for file in folder.glob("*.*"):  # no links: a second training writes
        shutil.copy(file, file.with_suffix(".copy"))
        os.replace(file.with_suffix(".copy"), file)
    assert main([str(folder), "--steps", "20"]) == 0
    said = capsys.readouterr()
    assert "7 people, 21 photos, 2 of them kept for evaluate" in said.out and "Disk: about" in said.out
    assert "MB are free" in said.out and "iterations: 1: regression " in said.out
    assert f"{folder / 'hypernet.safetensors'} goes into ComfyUI's models/hyperdreambooth" in said.out
    assert "Stages: precompute (each person fitted in 3 steps), pretrain (2 steps of 4 people), train (20" in said.out
    assert "pretrain is finished." in said.out and "for the 10 that are left" in said.out + said.err
    written = (folder / "state.safetensors").stat().st_mtime_ns
    assert main([str(folder)]) == 0
    assert "train is finished." in capsys.readouterr().out
    assert (folder / "state.safetensors").stat().st_mtime_ns == written
    assert main([str(folder), "--rank", "2"]) == 1
    assert "rank is 1" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["rank"] == 1


def test_precompute_resumes_and_notices_other_settings(model, photos, prepared, capsys):
    folder = prepared()
    paths = sorted((folder / "people").iterdir())
    assert [path.name for path in paths] == [f"group_{n:05}.safetensors" for n in range(3)]
    lost = load_file(paths[1])
    paths[1].unlink()
    before = paths[0].stat().st_mtime_ns
    assert run(model, photos, folder, stage="precompute") == 0
    assert paths[0].stat().st_mtime_ns == before
    for name, tensor in load_file(paths[1]).items():
        torch.testing.assert_close(tensor, lost[name])
    assert run(model, photos, folder, "--set", "fit.learning_rate=0.5", stage="precompute") == 1
    assert "fit.learning_rate is 0.05" in capsys.readouterr().err


def test_runs_share_what_one_has_precomputed(model, photos, prepared, tmp_path, capsys):
    """People who are not fitted need the photos only, whoever was fitted in the folder."""
    folder, other = prepared(), tmp_path / "other"
    (folder / "people" / "group_00001.safetensors").unlink()
    shared = ["--set", f"precomputed={folder}", "fit.steps=0"]
    assert run(model, photos, other, *shared, "basis.seed=1", stage="precompute") == 0
    assert {path.name for path in other.iterdir()} == {"config.json", "run.lock"}
    found = [set(load_file(path)) for path in sorted((folder / "people").iterdir())]
    assert found == [{"latents", "counts", "up"}, {"latents", "counts"}, {"latents", "counts", "up"}]
    assert run(model, photos, tmp_path / "third", "--image-size", "32", *shared, stage="precompute") == 1
    assert "was made with other settings: image_size" in capsys.readouterr().err
    assert (
        run(model, photos, tmp_path / "fourth", "--set", f"precomputed={folder}", "fit.steps=4", stage="precompute")
        == 1
    )
    assert "was made with other settings: fit" in capsys.readouterr().err


def test_another_base_model_is_refused(model, photos, prepared, ended, tmp_path, capsys):
    """Of the same layers: the training went on with the latents of the first one's VAE."""
    folder, moved, other = prepared(), tmp_path / "moved", tmp_path / "other"
    for copy in (moved, other):
        shutil.copytree(model, copy)
    (weights,) = (other / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"] * 0.9}, weights)
    settings = (folder / "config.json").read_bytes()
    assert run(other, photos, folder) == 1
    assert "was computed with another base model than" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == settings
    assert run(other, photos, tmp_path / "new", "--set", f"precomputed={folder}", stage="precompute") == 1
    assert "was computed with another base model than" in capsys.readouterr().err
    (moved / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"not loaded")
    assert run(moved, photos, folder, stage="precompute") == 0
    trained = ended("trained")
    shutil.rmtree(trained / "people")
    assert run(other, photos, trained, "--steps", "9") == 1
    assert "is of a training with another base model. Give the settings" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_models_that_differ_in_one_tensor(tmp_path, suffix):
    """Between places that a look all over the file skipped, as the VAE of SDXL."""
    names = [f"{number:02}" for number in range(20)]
    weights = {name: torch.randn(300, 100, generator=torch.Generator().manual_seed(0)) for name in names}
    paths = [tmp_path / f"{n}{suffix}" for n in range(20)]
    for name, path in zip(names, paths, strict=True):
        changed = {**weights, name: weights[name] / 2}
        save_file(changed, path) if suffix == ".safetensors" else torch.save(changed, path)
    assert len({identity_of([path]) for path in paths}) == len(paths)
    moved = tmp_path / f"moved{suffix}"
    shutil.copy(paths[0], moved)
    assert identity_of([moved]) == identity_of([paths[0]])


def test_training_learns_and_is_judged_by_masks(model, photos, prepared, tmp_path, capsys):
    folder = prepared()
    options = ["--steps", "40", "--set", "train.learning_rate=3e-3", *SHARED_DOWN]
    assert run(model, photos, folder, *options, stage="train") == 0
    rows = rows_of(folder / "log.csv")
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    assert float(rows[-1]["regression"]) < float(rows[0]["regression"])
    assert run(model, photos, folder, *options, stage="evaluate") == 0
    assert all(len({row[name] for name in ("own", "mean", "stranger", "base")}) == 4 for row in evaluation(folder))
    masked = shutil.copytree(photos, tmp_path / "masked")
    for photo in list(masked.glob("*/*.png")):
        Image.new("L", Image.open(photo).size, 255).save(photo.with_suffix(".mask.png"))
    assert run(model, masked, folder, *options, stage="evaluate") == 0  # the same people, judged by their faces
    assert run(model, masked, folder, *options, "--steps", "41", stage="train") == 1
    assert "of a training with another number of masks" in capsys.readouterr().err


def test_a_check_on_a_few_people_before_a_long_training(model, photos, tmp_path, capsys):
    """It learns them by heart, is judged by them, and is never taken for the beginning of the training itself."""
    folder = tmp_path / "check"
    check = ["--steps", "200", "--set", "train.learning_rate=3e-3", "train.regression_weight=1", "pretrain.people=2"]
    check += ["pretrain.steps=60", "pretrain.warmup=5", "pretrain.learning_rate=3e-3"]
    assert run(model, photos, folder, "--overfit", "2", *check) == 0
    groups = sorted((folder / "people").iterdir())
    written = [group.stat().st_mtime_ns for group in groups]
    row = evaluation(folder)[-1]
    assert len(groups) == 1 and len(row["own_of_each"]) == 2 and row["regression"] < 0.5 * row["mean_predictor"]
    assert run(model, photos, folder, *check, "--overfit", "0", stage="precompute") == 1
    assert "overfit is 2" in capsys.readouterr().err
    shared = ["--set", f"precomputed={folder}"]  # its people are the first of all
    assert run(model, photos, tmp_path / "whole", *shared, stage="precompute") == 0
    assert len(list((folder / "people").iterdir())) == 3
    assert [group.stat().st_mtime_ns for group in groups] == written


@pytest.mark.usefixtures("clean_state")
def test_every_stage_on_another_device(model, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "mps")
    monkeypatch.setattr(sys.modules[__name__], "SIZES", [option for option in SIZES if option != "--cpu"])
    options = ["--set", "basis.learn_from=3", 'train.augment=["flip"]', "samples.every=2"]
    with SecondDevice(torch.device("mps")) as there:
        assert run(model, photos, tmp_path, "--steps", "2", *options) == 0
        assert run(model, photos, tmp_path, "--steps", "3", *options) == 0  # from its state
        assert len(there) > 1000
    learned = basis_file.load(tmp_path / "basis.safetensors")[1]
    assert hypernet_file.load(tmp_path / "hypernet.safetensors", learned).down_start.device.type == "cpu"


def test_pretrained_encoder_is_what_training_starts_from(model, photos, prepared, capsys):
    """The encoder stays what it was; its pretraining resumes."""
    folder = prepared()
    for lost in ("encoder.safetensors", "pretrain_state.safetensors", "pretrain.csv"):
        (folder / lost).unlink()
    options = ["--set", "pretrain.learning_rate=3e-3", "pretrain.steps=60"]
    assert run(model, photos, folder, *options, stage="train") == 1
    assert "The image encoder is untrained" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, 20)
        run(model, photos, folder, *options, stage="pretrain")
    assert run(model, photos, folder, *options, stage="pretrain") == 0
    rows = rows_of(folder / "pretrain.csv")
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50, 60]
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    assert run(model, photos, folder, *options, "--steps", "3", stage="train") == 0
    for name, weight in load_file(folder / "encoder.safetensors").items():
        torch.testing.assert_close(weights(folder)[f"net.encoder.{name}"], weight)


def test_an_encoder_of_another_run(model, photos, straight, tmp_path, capsys):
    other, third = tmp_path / "other", tmp_path / "third"
    theirs = ["--set", f"precomputed={straight}", f"begin_with={straight / 'encoder.safetensors'}"]
    slow = ["pretrain.learning_rate=1e-9", "pretrain.steps=1"]
    assert run(model, photos, other, *theirs, *slow, stage="pretrain") == 0
    for name, weight in load_file(straight / "encoder.safetensors").items():
        torch.testing.assert_close(load_file(other / "encoder.safetensors")[name], weight, atol=1e-6, rtol=1e-6)
    assert run(model, photos, third, "--steps", "1", *theirs, "pretrain.steps=0", stage="train") == 0
    for name, weight in load_file(straight / "encoder.safetensors").items():
        torch.testing.assert_close(weights(third)[f"net.encoder.{name}"], weight)
    fourth = [*theirs, "pretrain.steps=0", "encoder.token_width=64"]
    assert run(model, photos, tmp_path / "fourth", "--steps", "1", *fourth, stage="train") == 1
    assert "an image encoder of other sizes" in capsys.readouterr().err
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((straight / "encoder.safetensors").read_bytes()[:-100])
    assert run(model, photos, tmp_path / "fifth", "--steps", "1", *theirs, f"begin_with={cut}") == 1
    assert "begin_with cannot be read" in capsys.readouterr().err
    flipped = bytearray((straight / "encoder.safetensors").read_bytes())
    flipped[-1001] ^= 0x40
    cut.write_bytes(flipped)
    assert run(model, photos, tmp_path / "sixth", "--steps", "1", *theirs, f"begin_with={cut}") == 1
    assert "'cut.safetensors' is damaged or incomplete: its contents do not match" in capsys.readouterr().err


def test_portraits_are_predicted_and_never_seen(model, photos, straight, tmp_path, monkeypatch):
    seen, shown = [], []
    read, text = PhotoPixels.read, PhotoLoss.text
    monkeypatch.setattr(
        PhotoPixels, "read", lambda self, photos: seen.extend(n for _, n in photos) or read(self, photos)
    )
    monkeypatch.setattr(PhotoLoss, "text", lambda self, words: shown.extend(words) or text(self, words))
    options = ["--set", f"precomputed={straight}", "pretrain.people=8", "pretrain.steps=4", "pretrain.portraits=true"]
    assert run(model, photos, tmp_path, *options, stage="pretrain") == 0
    assert set(seen) == {1, 2}
    portrait = (photos / f"{FIRST:08}" / "0.txt").read_text().strip()
    assert set(shown) == {"", f"a face, {portrait}"}


def test_training_begins_with_another_hypernetwork(model, photos, straight, tmp_path, capsys):
    second, other = tmp_path / "second", tmp_path / "other"
    start = ["--set", f"precomputed={straight}", f"begin_with={straight / 'hypernet.safetensors'}"]
    slow = ["--steps", "1", *start, "train.learning_rate=1e-9"]
    kept = [*slow, "train.class_weight=1"]  # which the other did not have
    assert run(model, photos, second, *kept) == 0 and not (second / "encoder.safetensors").exists()
    first, then = (hypernet_file.read_header(folder / "hypernet.safetensors") for folder in (straight, second))
    assert (first.config.by_token, then.config.by_token) == (False, True)
    for name, weight in hypernet_file.load(straight / "hypernet.safetensors").state_dict().items():
        torch.testing.assert_close(weights(second)[f"net.{name}"], weight, atol=1e-6, rtol=1e-6)
    for changes, named in (
        (["prompt=a [w] face"], "prompt (a [v] face, not a [w] face)"),
        (["net.depth=9"], "net.depth ("),
        (["convolutions=true", "train.regression_weight=0"], "layout"),
    ):
        assert run(model, photos, other, *slow, *changes, stage="train") == 1
        assert f"differs from the hypernetwork to be trained in: {named}" in capsys.readouterr().err


def test_a_face_code_is_found_once_and_trained_from(model, photos, ended, straight):
    folder = ended()
    assert run(model, photos, folder, "--steps", "10", stage="train") == 0
    assert torch.equal(weights(folder)["net.code_map"], weights(straight)["net.code_map"])
    assert not torch.equal(weights(folder)["net.direct"], weights(straight)["net.direct"])


@pytest.mark.parametrize(("count", "wanted", "seen"), [(1, 1, [0]), (2, 2, [0, 0]), (3, 2, [1, 1]), (4, 3, [1, 2, 1])])
def test_people_are_judged_by_ordinary_photos(count, wanted, seen):
    assert ordinary(count, wanted) == seen


def test_everything_in_a_learned_basis(model, photos, straight, tmp_path, capsys):
    """Learned, fitted and predicted in it; a hypernetwork of another basis is refused."""
    folder, learned = tmp_path / "run", ["--set", "basis.learn_from=4"]
    assert run(model, photos, folder, stage="basis") == 1
    assert "Set basis.learn_from" in capsys.readouterr().err
    assert run(model, photos, folder, "--steps", "1", *learned) == 0
    made = (folder / "basis.safetensors").stat().st_mtime_ns
    assert run(model, photos, folder, "--steps", "1", *learned, stage="basis") == 0
    assert (folder / "basis.safetensors").stat().st_mtime_ns == made
    measured = json.loads((folder / "basis.json").read_text())
    assert measured["unseen_people"] == 2 and measured["held"] > measured["held_by_a_random_basis"]
    _, recipe = basis_file.load(folder / "basis.safetensors")
    assert hypernet_file.read_header(folder / "hypernet.safetensors").config.basis == recipe
    assert run(model, photos, folder, "--steps", "1", *learned, stage="evaluate") == 0
    file = ["--steps", "1", "--set", f"precomputed={straight}", f"basis.file={folder / 'basis.safetensors'}"]
    encoder = [f"begin_with={straight / 'encoder.safetensors'}", "pretrain.steps=0"]
    assert run(model, photos, tmp_path / "second", *file, *encoder, stage="train") == 1
    assert "No person was fitted for these layers and in this basis" in capsys.readouterr().err
    diffusion = [*file, *encoder, "train.regression_weight=0"]
    assert run(model, photos, tmp_path / "third", *diffusion, stage="train") == 0
    start = [*file, f"begin_with={straight / 'hypernet.safetensors'}", "train.regression_weight=0"]
    assert run(model, photos, tmp_path / "fourth", *start, stage="train") == 1
    assert "differs from the hypernetwork to be trained in: basis" in capsys.readouterr().err


def test_people_fitted_for_other_layers_count_as_not_fitted(model, photos, straight, tmp_path, capsys):
    options = ["--convolutions", "--set", f"precomputed={straight}", f"begin_with={straight / 'encoder.safetensors'}"]
    assert run(model, photos, tmp_path, *options, "pretrain.steps=0", stage="train") == 1
    assert "No person was fitted for these layers" in capsys.readouterr().err


@pytest.mark.usefixtures("clean_state")
def test_diffusion_loss_alone_in_bf16(model, photos, tmp_path):
    """No one is fitted: people are only encoded."""
    options = ["--mixed-precision", "bf16", "--steps", "4", "--rank", "2", "--set", "fit.steps=0"]
    assert run(model, photos, tmp_path, *options, "train.regression_weight=0") == 0
    assert "up" not in load_file(tmp_path / "people" / "group_00000.safetensors")
    (row, *_) = rows_of(tmp_path / "log.csv")
    assert set(row) == {"step", "rate", "loss", "diffusion"}
    assert all(row["own"] != row["base"] and "regression" not in row for row in evaluation(tmp_path))


def stopping(monkeypatch, step):
    """Lets a training save after every step, and stop before this one."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 0)
    rate = LoopConfig.rate

    def rate_or_stop(self, now):
        if now == step:
            raise SystemExit
        return rate(self, now)

    monkeypatch.setattr(LoopConfig, "rate", rate_or_stop)


STOP_OF_TWO = """
import sys
from pytest import MonkeyPatch
from hdb_core.train.__main__ import main
from tests.miniature.test_train import stopping
with MonkeyPatch.context() as patch:
    stopping(patch, int(sys.argv[1]))
    try:
        main(sys.argv[2:])
    except SystemExit:
        pass
"""


def launch(target, model, photos, folder, *options, stage=None):
    """On two processes; the target is ``-m MODULE``, or a script and its first arguments."""
    # Without GPUs, accelerate's own launcher starts one process, however many it is asked for.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *target]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [*torchrun, *command(model, photos, folder, *options, stage=stage)]
    done = subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train, processes: 2" in done.stdout


def assert_same_weights(folder, other, atol=2e-4, rtol=2e-3):
    assert hypernet_file.read_header(folder / "hypernet.safetensors").info["step"] == "8"
    for name, weight in weights(other).items():
        torch.testing.assert_close(weights(folder)[name], weight, atol=atol, rtol=rtol)


def test_a_stopped_run_ends_as_one_that_was_not(model, photos, prepared, straight):
    folder = prepared()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, 5)
        run(model, photos, folder, stage="train")
    assert run(model, photos, folder, stage="train") == 0
    assert_same_weights(folder, straight, atol=1e-4, rtol=1e-3)


def test_steps_that_a_kill_undid_are_logged_once(model, photos, prepared):
    folder = prepared()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 2)
        with pytest.MonkeyPatch.context() as killed, pytest.raises(SystemExit):
            stopping(killed, 5)
            killed.setattr(TrainingLoop, "_save", lambda self: None)
            run(model, photos, folder, stage="train")
        assert len((folder / "log.csv").read_text().splitlines()) == 3
        (folder / "hypernet.safetensors").unlink()  # which is never there without a state
        diffusion = ["--set", "train.regression_weight=0"]  # other losses are other columns
        assert run(model, photos, folder, *diffusion, stage="train") == 0
    rows = rows_of(folder / "log.csv")
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    assert not any(row.get("regression") for row in rows)


def test_a_run_that_was_killed_before_its_last_save_is_not_finished(model, photos, ended, straight):
    """Its log would say so, beside the file of an earlier step."""
    folder = ended()
    shutil.copy(straight / "hypernet.safetensors", folder)
    with pytest.MonkeyPatch.context() as killed, pytest.raises(SystemExit):

        def kill(self):
            raise SystemExit

        killed.setattr(TrainingLoop, "_save", kill)
        run(model, photos, folder, "--steps", "12")
    assert run(model, photos, folder, "--steps", "12") == 0
    assert hypernet_file.read_header(folder / "hypernet.safetensors").info["step"] == "12"
    assert [int(row["step"]) for row in rows_of(folder / "log.csv")][-1] == 12


def test_a_file_of_other_layers_is_not_evaluated(model, photos, ended, straight, capsys):
    """Such as that of a run with another base model; same names with other sizes ended in an error of torch's."""
    folder, header = ended(), hypernet_file.read_header(straight / "hypernet.safetensors")
    first, *rest = header.config.layout.layers
    for layers in ([replace(first, in_features=first.in_features + 1), *rest], rest):
        layout = replace(header.config.layout, layers=tuple(layers))
        net = HyperNet.create(replace(header.config, layout=layout))
        hypernet_file.save(net, folder / "hypernet.safetensors", header.info)
        assert run(model, photos, folder, stage="evaluate") == 1
        assert "hypernet.safetensors was trained for SD 1.x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("result", "lost", "longer"),
    [
        ("hypernet.safetensors", ("state.safetensors",), ["--steps", "12"]),
        ("hypernet.safetensors", ("state.safetensors", "log.csv"), []),
        ("encoder.safetensors", ("pretrain_state.safetensors",), ["--set", "pretrain.steps=4"]),
    ],
)
def test_a_result_without_its_state_is_not_written_over(model, photos, ended, straight, capsys, result, lost, longer):
    """Such as a stranger's in a new run folder; what is finished needs no state."""
    folder = ended()
    shutil.copy(straight / "hypernet.safetensors", folder)
    for name in lost:
        (folder / name).unlink()
    before = (folder / result).read_bytes()
    assert run(model, photos, folder, *longer) == 1
    assert f"{result} is there, but not {lost[0]} to go on from" in capsys.readouterr().err
    assert (folder / result).read_bytes() == before
    if longer:
        assert run(model, photos, folder) == 0


def test_a_run_that_ended_before_its_file_writes_it(model, photos, ended, straight):
    folder = ended()
    assert run(model, photos, folder, stage="train") == 0
    written, kept = (hypernet_file.load(f / "hypernet.safetensors").state_dict() for f in (folder, straight))
    assert all(torch.equal(weight, kept[name]) for name, weight in written.items())


def test_a_state_of_other_sizes_is_refused(model, photos, straight, tmp_path, capsys):
    """Even if the file of settings beside it was written by hand."""
    os.link(straight / "state.safetensors", tmp_path / "state.safetensors")
    others = ["--rank", "2", "--set", f"precomputed={straight}", "basis.seed=1", "prompt=a [w] face", "net.depth=2"]
    (tmp_path / "config.json").write_text(json.dumps({"model": str(model), "photos": str(photos), "rank": 2, "held_out": 0.5, "prompt": "a [w] face", "convolutions": False,
        "basis": {"seed": 1, "down_dim": 12, "up_dim": 8}, "net": {"depth": 2, "width": 32, "code": 4},
        "encoder": {"image_size": 32, "token_width": 32, "depth": 1, "stem": [[16, 1], [16, 1]]}}))  # fmt: skip
    others += ["held_out=0.5", "train.regression_weight=0"]
    assert run(model, photos, tmp_path, *others, stage="train") == 1
    said = capsys.readouterr().err
    assert "of a training with another basis, depth, prompt, rank, set of people." in said


def test_rates_are_those_of_now(model, photos, ended, straight, monkeypatch):
    folder = ended()
    groups, write = [], loop.state_file.write
    spied = lambda path, net, optimizer, *rest: (
        groups.extend(optimizer.param_groups) or write(path, net, optimizer, *rest)
    )
    monkeypatch.setattr(loop.state_file, "write", spied)
    assert run(model, photos, folder, "--steps", "9", "--set", "train.weight_decay=0", stage="train") == 0
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert {group["scale"] for group in groups} == {1.0, 3.0}
    moved = {n for n, w in weights(folder).items() if not torch.allclose(w, weights(straight)[n], atol=1e-7)}
    assert moved and not any("encoder" in name for name in moved)


def test_a_training_that_diverges_keeps_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", -1)
    state, net = tmp_path / "state.safetensors", torch.nn.Linear(3, 1)

    class Loss:
        def read(self, step, part):
            return torch.ones(4, 3)

        def __call__(self, net, step, part, read):
            return {"loss": net(read).square().mean() / (0.0 if step == 12 else 1.0)}

    config = LoopConfig(steps=30, people=4)
    training = TrainingLoop(Accelerator(cpu=True), net, config, state, tmp_path / "log.csv")
    with pytest.raises(HyperNetError, match=r"step 13 are not finite.*Lower learning_rate"):
        training.run(Loss(), lambda: None)
    assert container.read_fields(state_file.KIND, state)["step"] == 12
    assert all(bool(weight.isfinite().all()) for weight in load_file(state).values())
    assert {path.name for path in tmp_path.iterdir()} == {"state.safetensors", "log.csv"}


def test_what_ends_a_training_is_said_last(model, photos, prepared, monkeypatch, capsys):
    def refuse(self, norm):
        if self.step == 3:
            raise HyperNetError("It diverged.")

    monkeypatch.setattr(TrainingLoop, "_require_finite", refuse)
    assert run(model, photos, prepared(), stage="train") == 1
    assert re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1] == "It diverged."


def test_ctrl_c_ends_a_training_with_a_sentence(model, photos, prepared, monkeypatch, capsys):
    monkeypatch.setattr(TrainingLoop, "_require_finite", Mock(side_effect=KeyboardInterrupt))
    assert run(model, photos, prepared(), stage="train") == 130
    assert re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1] == "Stopped. The same command goes on."


@pytest.mark.parametrize("parts", ["2", "4"])
def test_accumulated_gradients_are_those_of_the_whole(model, photos, prepared, straight, parts):
    folder = prepared()
    assert run(model, photos, folder, "--accumulate", parts, stage="train") == 0
    assert_same_weights(folder, straight, atol=1e-5, rtol=1e-5)


def test_samples_are_drawn_and_change_nothing(model, photos, prepared, straight):
    folder = prepared()
    options = ["--set", "samples.every=5", "samples.people=2", "samples.steps=3", "samples.words=in a park"]
    assert run(model, photos, folder, *options, stage="train") == 0
    paths = sorted((folder / "samples").iterdir())
    assert [path.name for path in paths] == ["step_000005.png", "step_000008.png"]  # at the end, too
    first, last = (Image.open(path) for path in paths)
    assert first.size == (5 * (64 + 4), 28 + 2 * (64 + 4))
    assert ImageChops.difference(first, last).getbbox() is not None
    assert not (straight / "samples").exists()
    assert_same_weights(folder, straight, atol=0, rtol=0)


def test_two_processes_train_as_one(model, photos, straight, tmp_path):
    """DDP: the same global batch, the same result, in every stage."""
    launch(["-m", "hdb_core.train"], model, photos, tmp_path)
    assert len(list((tmp_path / "people").iterdir())) == 3
    for name, weight in load_file(straight / "encoder.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "encoder.safetensors")[name], weight, atol=2e-4, rtol=2e-3)
    assert_same_weights(tmp_path, straight)
    assert evaluation(tmp_path)[-1]["own"] == pytest.approx(evaluation(straight)[-1]["own"], rel=1e-3)


def test_one_process_learns_the_basis_for_two(model, photos, tmp_path):
    launch(["-m", "hdb_core.train"], model, photos, tmp_path, "--steps", "1", "--set", "basis.learn_from=2")
    recipe = basis_file.load(tmp_path / "basis.safetensors")[1]
    assert hypernet_file.read_header(tmp_path / "hypernet.safetensors").config.basis == recipe


def test_one_process_stops_two_go_on_and_one_ends(model, photos, prepared, straight, tmp_path):
    """And the two accumulate, which the one does not."""
    folder, script = prepared(), tmp_path / "stop.py"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, 2)
        run(model, photos, folder, stage="train")
    script.write_text(STOP_OF_TWO)
    launch([str(script), "5"], model, photos, folder, "--accumulate", "2", stage="train")
    assert hypernet_file.read_header(folder / "hypernet.safetensors").info["step"] == "5"
    assert run(model, photos, folder, "--accumulate", "1", stage="train") == 0
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


def test_behind_a_frozen_encoder(model, photos, straight, prepared, clip_vision, tmp_path):
    """From precompute to evaluate; the tokens are computed once, and the file holds none of the encoder."""
    folder, encoder = tmp_path / "frozen", ["--clip-vision", clip_vision()]
    shutil.copytree(straight / "people", folder / "people", copy_function=os.link)
    assert run(model, photos, folder, *encoder, stage="precompute") == 0
    paths = sorted((folder / "tokens").iterdir())
    assert [tuple(load_file(path)["tokens"].shape) for path in paths] == [(9, 5, 24), (9, 5, 24), (3, 5, 24)]
    lost, before = load_file(paths[1])["tokens"], paths[0].stat().st_mtime_ns
    paths[1].unlink()
    options = [*encoder, "--steps", "40", "--set", "train.learning_rate=3e-3", *SHARED_DOWN]
    assert run(model, photos, folder, *options) == 0
    assert paths[0].stat().st_mtime_ns == before and torch.equal(load_file(paths[1])["tokens"], lost)
    rows = rows_of(folder / "log.csv")
    assert float(rows[-1]["regression"]) < float(rows[0]["regression"])
    header = hypernet_file.read_header(folder / "hypernet.safetensors")
    found = header.config.encoder
    assert (found.kind, found.name, found.num_tokens, found.token_width) == ("clip_vision", "encoder", 5, 24)
    assert (found.image_size, found.mean) == (28, vision.HOST_ENCODERS[0].colors[0])
    assert not any(name.startswith("encoder.") for name in weights(folder))
    assert weights(folder)["net.code_map"].shape == (24, 4) and weights(folder)["net.direct"].any()
    assert not any(str(tmp_path) in value for value in header.info.values())
    assert all(len({row[name] for name in ("own", "mean", "stranger", "base")}) == 4 for row in evaluation(folder))


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
    with pytest.raises(
        HyperNetError, match=r"tokens of 0 photos.*who has 3. Run the stage precompute with --clip-vision"
    ):
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


def test_another_encoder_than_that_of_the_run(model, photos, straight, clip_vision, tmp_path, capsys):
    folder, first = tmp_path / "frozen", clip_vision()
    shutil.copytree(straight / "people", folder / "people", copy_function=os.link)
    assert run(model, photos, folder, "--steps", "1", "--clip-vision", first, stage="train") == 0
    other = clip_vision(seed=1, name="other")
    assert run(model, photos, folder, "--steps", "2", "--clip-vision", other, stage="train") == 1
    assert "was made with other settings: weights of the encoder" in capsys.readouterr().err
    os.rename(folder / "tokens", tmp_path / "tokens")
    assert run(model, photos, folder, "--steps", "2", "--clip-vision", other, stage="train") == 1
    assert "of a training with another image encoder." in capsys.readouterr().err
    shutil.rmtree(folder / "tokens")
    os.rename(tmp_path / "tokens", folder / "tokens")
    assert run(model, photos, folder, "--steps", "2", "--clip-vision", "", stage="train") == 1
    assert "of a training with another encoder, image encoder." in capsys.readouterr().err
    os.rename(first, tmp_path / "elsewhere")
    moved = str(tmp_path / "elsewhere")
    assert run(model, photos, folder, "--steps", "2", "--clip-vision", moved, stage="train") == 0


def test_a_frozen_encoder_is_not_pretrained(model, photos, clip_vision, tmp_path, capsys):
    assert run(model, photos, tmp_path / "run", "--clip-vision", clip_vision(), stage="pretrain") == 1
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

    def described(**other):
        """An encoder whose config.json says something else."""
        folder = Path(clip_vision(name="_".join(other)))
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
        return folder

    (listed := tmp_path / "listed").mkdir()
    (listed / "config.json").write_text("[]")
    for folder, message in (
        (tmp_path / "nowhere", "lacks config.json"),
        (unknown, "holds 'resnet', but Load CLIP Vision takes CLIP"),
        (clip_vision(width=32, name="wide"), r"patch size (32, 2, 28, 14)) that Load CLIP Vision cannot load"),
        (empty, "holds no weights called model.safetensors"),
        (broken, "model.safetensors cannot be read ("),
        (partial, "lacks 4 weights"),
        (listed, "listed is damaged ("),
        (described(model_type=[]), "model_type is damaged ("),
        (described(num_attention_heads=0), "num_attention_heads is damaged ("),
        (described(num_attention_heads=7, name="seven"), "num_attention_heads_name is damaged ("),
        (described(quantization_config={"quant_method": "gptq", "bits": 4}), "holds quantised weights"),
        (described(intermediate_size=10**9), "its config.json describes 98,000,"),  # transformers would make 400 GB up
    ):
        assert run(model, photos, tmp_path / "run", "--clip-vision", str(folder), stage="precompute") == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_no_attention_is_downloaded(model, clip_vision, tmp_path, name):
    """A config.json could name a kernel, whose code transformers would fetch where the package kernels is installed."""
    folders = Path(clip_vision()), Path(shutil.copytree(model, tmp_path / "model")) / "text_encoder"
    for folder in folders:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: "somebody/kernel"}))
    assert vision.load_vision_encoder(folders[0], torch.device("cpu")).model.config._attn_implementation == "sdpa"
    assert load_base_model(folders[1].parent, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [("train", [], "Run the stage precompute first"), ("precompute", ["--model", "nowhere"], "There is no nowhere"),
     ("precompute", ["--photos", "nowhere"], "There is no folder"), ("precompute", ["--set", "tokenizer=nowhere"], "lacks tokenizer"),
     (None, ["--set", "begin_with=nowhere"], "nowhere")],
)  # fmt: skip
def test_refusals(model, photos, tmp_path, capsys, stage, options, message):
    assert run(model, photos, tmp_path, *options, stage=stage) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["begin_with=hypernet.safetensors", "net.depth=9"], "differs from the hypernetwork to be trained in: net.depth"),
        (["begin_with=encoder.safetensors", "encoder.token_width=64"], "an image encoder of other sizes"),
        (["begin_with=encoder.safetensors", "pretrain.steps=0", "encoder.depth=2"], "an image encoder of other sizes"),
        (["pretrain.steps=0"], "The image encoder is untrained"),
        (["encoder.summary=0"], "Set encoder.summary to 1 or more"),
        (["encoder.summary=0", "train.steps=0"], "Set encoder.summary to 1 or more"),
        (["fit.steps=0"], "No person was fitted"),
        (["accumulate=3"], "4 people a step must be a multiple of 1 processes times --accumulate 3"),
        (["pretrain.people=5", "accumulate=2"], "5 people a step must be a multiple"),
        (["held_out=0.99"], "7 people are too few"),
        (['train.augment=["flip"]'], "train.augment needs torchvision"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_long_work(
    model, photos, straight, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    monkeypatch.chdir(straight)
    assert run(model, photos, tmp_path / "run", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "people").exists()


def test_people_that_cannot_be_shared_out(model, photos, prepared, capsys):
    assert run(model, photos, prepared(), "--accumulate", "3", stage="train") == 1
    assert "4 people a step must be a multiple of 1 processes times --accumulate 3" in capsys.readouterr().err
