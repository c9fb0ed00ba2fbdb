"""A training through ComfyUI's own model: the same losses as through diffusers, from one checkpoint file; and any model that
the host loads, to a prediction in its nodes."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from miniature.checkpoint import expand
from miniature.photos import FIRST, write_person

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
SETTINGS = [
    "--mixed-precision", "no", "--cpu", "--image-size", "128", "--people", "4", "--steps", "3", "--set",
    "held_out=0.4", "basis.down_dim=12", "basis.up_dim=8", "encoder.image_size=32", "encoder.token_width=32",
    "encoder.depth=1", "encoder.stem=[[16,1],[16,1]]", "net.width=32", "net.depth=1", "net.code=2", "pretrain.steps=2",
    "pretrain.people=4", "train.warmup=1", "samples.every=3", "samples.people=1", "samples.steps=2",
]  # fmt: skip
EVERY_LOSS = ["fit.steps=2", "train.regression_weight=1", "train.class_weight=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(FIRST, FIRST + 5):
        write_person(folder, seed, 2, masks="face")
    return folder


@pytest.fixture
def train(host, base_directory, photos, tmp_path):
    """Trains by one of the programs; returns the run's folder."""
    path = base_directory / "models" / "checkpoints" / "to_train.safetensors"
    if not path.exists():
        expand(WEIGHTS, path)

    def execute(program, model, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        with torch.inference_mode(False):
            folder = tmp_path / program
            arguments = [str(folder), "--model", str(model or path), "--photos", str(photos), *SETTINGS, *options]
            if program == "host":
                module = host.module("train")
                code = module.main(arguments, module.by_host, module.COMMAND)
            else:
                words = host.module("hdb_core.train.base.single_file").find_tokenizer(WEIGHTS)
                code = host.module("hdb_core.train.__main__").main([*arguments, f"tokenizer={words}"])
        return code, folder

    yield execute
    AcceleratorState._reset_state(reset_partial_state=True)


def numbers(folder):
    logged = [row for log in ("pretrain.csv", "log.csv") for row in csv.DictReader((folder / log).open())]
    judged = [json.loads(line) for line in (folder / "evaluation.json").read_text().splitlines()]
    losses = [float(row["loss"]) for row in logged]
    return torch.tensor(losses + [row[name] for row in judged for name in ("own", "base", "stranger")])


def test_same_losses_as_through_diffusers(train):
    (ended, host_folder), (also_ended, folder) = train("host", "to_train.safetensors"), train("diffusers", None)
    assert ended == also_ended == 0
    found, expected = numbers(host_folder), numbers(folder)
    # The host computes in bfloat16 where that is fast.
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)
    assert (host_folder / "samples" / "step_000003.png").exists()


def test_refusals(train, capsys):
    assert train("host", "none.safetensors")[0] == 1
    assert "no 'none.safetensors' in models/checkpoints" in capsys.readouterr().err
    assert train("host", "to_train.safetensors", "tokenizer=somewhere")[0] == 1
    assert "Leave prediction_type and tokenizer out" in capsys.readouterr().err


DAMAGED = {
    "cut": lambda path: path.write_bytes((WEIGHTS / "miniature_vae.safetensors").read_bytes()[:1000]),
    "page": lambda path: path.write_text("<html>"),
    "another": lambda path: save_file({"a.lora_up.weight": torch.zeros(1)}, path),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_comfyui_cannot_load(train, tmp_path, capsys, name):
    DAMAGED[name](path := tmp_path / f"{name}.safetensors")
    assert train("host", path)[0] == 1
    assert f"ComfyUI cannot load {path}" in (said := capsys.readouterr().err.splitlines()[-1]) and said.endswith(".")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("first_stage_model.", "is no whole checkpoint, with MODEL, CLIP and VAE"),
        ("first_stage_model.taesd_decoder.3.", "of the weights that ComfyUI looks for in it, the first is taesd_decoder.3"),
        ("model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.", "the first is middle_block.1.transformer_blocks"),
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.", "lacks 1 of the weights"),
    ],
)  # fmt: skip
def test_what_a_checkpoint_lacks_is_said(train, base_directory, tmp_path, capsys, lost, said):
    """The host leaves it as the memory happens to be."""
    whole = load_file(base_directory / "models" / "checkpoints" / "to_train.safetensors")
    left = {name: tensor for name, tensor in whole.items() if not name.startswith(lost)}
    assert len(left) < len(whole)
    save_file(left, path := tmp_path / "incomplete.safetensors")
    assert train("host", path)[0] == 1
    assert f"{path} " in (line := capsys.readouterr().err.splitlines()[-1]) and said in line


@pytest.mark.parametrize(
    ("dtype", "beside"),
    [(torch.int8, "SCB"), (torch.int8, ""), (torch.float8_e4m3fn, "weight_scale_inv"), (torch.float8_e4m3fn, "weight.scale")],
)  # fmt: skip
def test_quantised_weights_that_comfyui_does_not_read_are_refused(
    train, base_directory, tmp_path, capsys, dtype, beside
):
    """They were taken for the weights themselves."""
    whole = load_file(base_directory / "models" / "checkpoints" / "to_train.safetensors")
    name = next(name for name in whole if name.endswith("attn1.to_q.weight"))
    whole |= {name: torch.ones_like(whole[name]).to(dtype)}
    whole |= {name.replace("weight", beside): torch.ones(1)} if beside else {}
    save_file(whole, path := tmp_path / "quantised.safetensors")
    assert train("host", path)[0] == 1
    assert f"{path} holds quantised weights (" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_that_git_has_not_fetched(train, tmp_path, capsys):
    """torch's own message advises to load it in the unsafe way."""
    (path := tmp_path / "pointer.ckpt").write_bytes(b"version https://git-lfs")
    assert train("host", path)[0] == 1
    assert f"{path} or a file beside it (it holds something else than weights)" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["Z-Image", "Flux.1", "Qwen-Image"])
def test_any_model_of_the_host(host, run, apply, photos, tmp_path, base_directory, family):
    """From photos to a picture of a predicted person, on a tiny model of a family with random weights."""
    models, training = host.load_file("random_models.py"), host.module("nodes.host.train")
    if family not in models.available():
        pytest.skip(f"this ComfyUI has no {family}")
    model, clip = models.random_model(family), models.Encoder(models.FAMILIES[family])
    vae = models.Vae(family, model)

    @contextmanager
    def load(settings, device, dtype):
        with training.opened(model, clip, vae, settings.convolutions, family) as base:
            yield base

    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    folder = tmp_path / "run"
    arguments = [str(folder), "--model", family, "--photos", str(photos), *SETTINGS, *EVERY_LOSS]
    with torch.inference_mode(False):
        assert host.module("hdb_core.train.__main__").main(arguments, load) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert numbers(folder).isfinite().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())

    name = f"{family} trained.safetensors"
    (base_directory / "models" / "hyperdreambooth").mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "hypernet.safetensors", base_directory / "models" / "hyperdreambooth" / name)
    (net,) = run("LoadHyperNet", hypernet_name=name)
    lidb, prompt = run("PredictLiDB", hypernet=net, image=torch.rand(1, 96, 96, 3), model=model)
    assert prompt == "a [v] face" and lidb.about.strengths == host.module("hdb_core.recommended").PREDICTED_BY_TOKEN
    blank = {"samples": torch.zeros(vae.encode(torch.zeros(1, 64, 64, 3)).shape)}

    def sample(model, clip):
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, ""))
        return host.stock["KSampler"]().sample(model, 3, 2, 1.0, "euler", "simple", positive, negative, blank)[0][
            "samples"
        ]

    person, base = sample(*apply(lidb, model, clip)), sample(model, clip)
    assert person.isfinite().all() and not torch.equal(person, base)


def test_three_files(train, sd3_files, base_directory, capsys):
    files = [f'text_encoders=["{sd3_files.clip}"]', f"vae={sd3_files.vae}"]
    assert train("host", sd3_files.model, *files)[0] == 1
    assert "as clip_type one of stable_diffusion, " in capsys.readouterr().err
    swapped = [f'text_encoders=["{base_directory / "models" / "vae" / sd3_files.vae}"]', files[1]]
    for kind, why in (("sd3", "'NoneType' object"), ("stable_diffusion", "most of its weights are missing")):
        assert train("host", sd3_files.model, *swapped, f"clip_type={kind}")[0] == 1
        assert f"as text encoder of the clip_type {kind!r} ({why}" in capsys.readouterr().err
    folder = base_directory / "models" / "text_encoders"
    whole = load_file(folder / sd3_files.clip)
    for lost, said in (("token_embedding.", "token_embedding.weight"), ("layers.0.mlp.fc2.", "layers.0.mlp.fc2")):
        save_file({n: t for n, t in whole.items() if lost not in n}, folder / "incomplete.safetensors")
        texts = 'text_encoders=["incomplete.safetensors"]'
        assert train("host", sd3_files.model, texts, files[1], "clip_type=sd3")[0] == 1
        assert said in (line := capsys.readouterr().err.splitlines()[-1]) and "of the weights that ComfyUI" in line
    code, folder = train("host", sd3_files.model, *files, "clip_type=sd3")
    assert code == 0 and numbers(folder).isfinite().all()


def test_diffusers_reads_one_file_alone(train, capsys):
    assert train("diffusers", None, "vae=tiny.safetensors")[0] == 1
    assert "python -m custom_nodes.PACK.train" in capsys.readouterr().err
