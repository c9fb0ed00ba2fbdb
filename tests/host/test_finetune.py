"""Fast Finetune on the real host: every option trains, and MODEL and CLIP are the same afterwards whatever happens."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch


def picture(height: int, width: int, channels: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(2))


def face_mask(height: int = 128, width: int = 128) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, 32:96, 32:96] = 1
    return mask


def test_every_layer_learns(run, loaded, photo):
    inputs = {"model": loaded.model, "clip": loaded.clip, "vae": loaded.vae, "image": photo}
    (options,) = run("FastFinetuneOptions", train_text_encoder=True)
    lidb, plot = run("FastFinetune", **inputs, steps=2, options=options)
    assert lidb.layout.describe() == "SD 1.x, 52 UNet + 8 text layers"
    assert (lidb.up.flatten(1).norm(dim=1) > 0).all()
    assert not (lidb.up.is_inference() or lidb.up.requires_grad)
    assert plot.shape == (1, 320, 512, 3)
    assert 0 <= plot.min() < plot.max() <= 1


CASES = {"a prediction": (True, 1), "one photo": (False, 1), "several photos": (False, 3)}


@pytest.mark.parametrize("made_from", CASES)
def test_automatic_steps_are_the_recommended_ones(run, host, loaded, person, photo, monkeypatch, made_from):
    """So are the strengths that the person is then applied with."""
    recommended, lidb = host.module("hdb_core.recommended"), host.module("hdb_core.lidb")
    predicted, photos = CASES[made_from]
    strengths = recommended.RECOMMENDED[made_from].strengths
    steps = {name: 1 + i for i, name in enumerate(CASES)}[made_from]  # for a test, fewer than there are
    monkeypatch.setitem(recommended.RECOMMENDED, made_from, recommended.Recommendation(steps, strengths))
    start = replace(person(1), about=lidb.About(made_from=recommended.FROM_PREDICTION)) if predicted else None
    inputs = {"model": loaded.model, "clip": loaded.clip, "vae": loaded.vae, "lidb": start}
    made, _ = run("FastFinetune", **inputs, image=photo.expand(photos, -1, -1, -1))
    about = made.about
    assert (about.made_from, about.steps, about.photos) == (made_from, steps, photos)
    assert (about.strengths, about.model, about.token) == (strengths, "SD15", "[v]")


def test_defaults_of_the_options_are_those_of_the_node_without_them(run, host):
    (options,) = run("FastFinetuneOptions")
    assert options == host.module("nodes.host.finetune").FinetuneOptions()


OPTIONS = [
    {"prompt": "(a [v]:1.3) face"},  # prompt weights take another path through the text encoder
    {"prompt": "a [v] face, " + "very " * 90},  # more than one chunk of 77 tokens
    {"class_prompt": "a person"},
    {"rank": 1},
    {"rank": 50},
    {"learning_rate": 1e-6},
    {"convolutions": False},
    {"batch_size": 1},
    {"batch_size": 5},
    {"resolution": 64},
    {"resolution": 192},
    {"train_text_encoder": False},
    {"prior_weight": 0.5, "class_images": picture(100, 140, batch=2)},
    {"prior_weight": 1.0, "class_images": picture(128, 128), "class_prompt": "a face, " + "very " * 90},
    {"mask": face_mask()},
    {"mask": face_mask(256, 192), "image": picture(256, 192)},
    {"image": picture(128, 128, batch=3)},
    {"image": picture(128, 128, channels=4)},
    {"image": picture(128, 128, channels=1)},
    {"image": picture(90, 250)},
    {"image": picture(1500, 1500), "resolution": 128},
    {"seed": 0xFFFFFFFFFFFFFFFF},
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: ",".join(option))
def test_every_option_trains(train, option):
    lidb = train(**{"steps": 1, "batch_size": 1, **option})
    text = torch.tensor([layer.is_text for layer in lidb.layout.layers])
    moved = lidb.up.flatten(1).norm(dim=1) > 0
    assert moved[~text].all()
    assert moved[text].all() == option.get("train_text_encoder", True)
    assert lidb.rank == option.get("rank", 4)


def test_continues_exactly_from_a_lidb(train, host, person):
    start = person(1, scale=0.05)
    tiny_step = train(lidb=start, steps=1, learning_rate=1e-6, rank=1, convolutions=False)
    assert tiny_step.rank == start.rank
    assert host.module("hdb_core.lidb").cosine(start, tiny_step) > 1 - 1e-5


def test_a_person_keeps_its_layers_and_gets_more(train, host, person):
    core = host.module("hdb_core.lidb").core
    wider = train(lidb=person(1), steps=1, learning_rate=1e-6, convolutions=True)
    again = train(lidb=wider, steps=1, learning_rate=1e-6, convolutions=False)
    assert wider.layout.describe() == "SD 1.x, 52 UNet + 8 text layers" and again.layout == wider.layout
    torch.testing.assert_close(core(wider)[:40], core(person(1)), atol=1e-3, rtol=0)
    torch.testing.assert_close(core(again), core(wider), atol=1e-3, rtol=0)


def test_same_seed_same_person(train):
    first, again, other = train(seed=1), train(seed=1), train(seed=2)
    assert torch.equal(first.up, again.up)
    assert not torch.equal(first.up, other.up)


def test_global_generator_is_left_alone(train):
    state = torch.random.get_rng_state()
    train(steps=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_clip_skip_counts(train, host, loaded):
    skipped = host.stock["CLIPSetLastLayer"]().set_last_layer(loaded.clip, -11)[0]  # ends after the second layer
    earlier = host.stock["CLIPSetLastLayer"]().set_last_layer(loaded.clip, -12)[0]  # ends after the first
    both, one = train(clip=skipped, steps=1), train(clip=earlier, steps=1)
    text = [i for i, layer in enumerate(both.layout.layers) if layer.is_text]
    assert (both.up[text].flatten(1).norm(dim=1) > 0).sum() == 8
    assert (one.up[text].flatten(1).norm(dim=1) > 0).sum() == 4


def test_trains_on_top_of_a_patched_model(train, run, loaded, person):
    model, clip = run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=person(5))
    on_base, on_patched = train(steps=1), train(model=model, clip=clip, steps=1)
    assert not torch.equal(on_base.up, on_patched.up)


def test_trains_the_model_that_a_newer_host_reads_anew(train, fingerprint, newer_patchers):
    expected, before = train(train_text_encoder=True), fingerprint()
    newer_patchers()
    assert torch.equal(train(train_text_encoder=True).up, expected.up)
    assert fingerprint() == before


def test_a_model_that_a_newer_host_cannot_read_anew_is_refused(train, host, monkeypatch):
    def clone(self, disable_dynamic=False):
        raise RuntimeError("Cannot create non-dynamic delegate")

    monkeypatch.setattr(sys.modules["comfy.model_patcher"].ModelPatcher, "clone", clone)
    with pytest.raises(
        host.module("hdb_core.errors").FinetuneError,
        match="Load Checkpoint, or start ComfyUI with --disable-dynamic-vram",
    ):
        train(steps=1)


def test_host_is_unchanged_afterwards(train, fingerprint):
    before = fingerprint()
    train(mask=face_mask(), prior_weight=0.5, class_images=picture(128, 128))
    assert fingerprint() == before


def test_cancel_stops_and_restores(train, fingerprint):
    import comfy.model_management
    import comfy.utils

    before = fingerprint()
    seen = []

    def cancel_after_two_steps(value, total, preview, node_id=None):
        seen.append((value, total, preview))
        if value == 2:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(cancel_after_two_steps)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(steps=50)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert [value for value, _, _ in seen] == [1, 2]
    assert fingerprint() == before


@pytest.mark.parametrize("part", ["unet", "text", "vae"])
def test_error_restores(train, loaded, fingerprint, part):
    before = fingerprint()
    victim = {
        "unet": loaded.model.model.diffusion_model.middle_block[1],
        "text": loaded.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[1],
        "vae": loaded.vae.first_stage_model.taesd_encoder[3],
    }[part]
    calls = []

    def fail_on_second_call(*_):
        calls.append(1)
        if len(calls) == 2 or part == "vae":
            raise RuntimeError("out of memory, as it were")

    handle = victim.register_forward_hook(fail_on_second_call)
    try:
        with pytest.raises(RuntimeError, match="as it were"):
            train(steps=5)
    finally:
        handle.remove()
    assert fingerprint() == before


def test_divergence_keeps_the_last_good_state(train, host, run, loaded, fingerprint):
    finetuning = host.module("hdb_core.finetuning")
    before = fingerprint()
    calls = []

    def turn_to_nan(module, inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else output

    handle = loaded.model.model.diffusion_model.out.register_forward_hook(turn_to_nan)
    try:
        with pytest.raises(finetuning.FinetuneDiverged, match=r"step 3 .* diverged_0\d+_\.safetensors") as caught:
            train(steps=5)
    finally:
        handle.remove()
    assert fingerprint() == before
    name = str(caught.value).split("is kept in ")[1].split(";")[0]
    kept = run("LoadLiDB", lidb_name=name)[0]
    assert kept.up.abs().sum() > 0


def test_divergence_is_told_where_nothing_can_be_kept(host, monkeypatch):
    node, errors = host.module("nodes.finetune"), host.module("hdb_core.errors")

    def full(name, write):
        raise errors.LiDBFileError("the disk is full")

    monkeypatch.setattr(node, "save_to_output", full)
    lost = host.module("hdb_core.finetuning").FinetuneDiverged("It diverged.", None, (0.5,), 3)
    assert str(node.kept(lost)) == "It diverged. The state before that step could not be kept: the disk is full"


def test_progress_and_preview(train):
    import comfy.utils

    seen = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: seen.append((value, total, preview))
    )
    try:
        train(steps=3)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert [(value, total) for value, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    kind, image, _ = seen[-1][2]
    assert (kind, image.size) == ("PNG", (512, 320))


def test_a_step_takes_as_many_samples_at_once_as_there_is_memory_for(train, host, loaded, monkeypatch):
    import comfy.model_management as management

    denoiser, seen = host.module("nodes.host.denoiser").HostDenoiser, []
    denoise = denoiser.denoise

    def watched(self, noisy, *others):
        seen.append(len(noisy))
        return denoise(self, noisy, *others)

    monkeypatch.setattr(denoiser, "denoise", watched)
    whole = train(batch_size=3)
    a_sample = host.module("nodes.host.memory").memory_of(loaded.model, 16 * 16)
    for free in (2.5 * a_sample, 0):
        monkeypatch.setattr(management, "get_free_memory", lambda device, free=free: free)
        parts = train(batch_size=3)
        assert (parts.up - whole.up).norm() < 0.1 * whole.up.norm()  # rounding in bfloat16
    assert seen == [3, 3, 2, 1, 2, 1, *[1] * 6]
