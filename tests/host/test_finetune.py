"""Fast Finetune on the real host: every option trains, and MODEL and CLIP are the same afterwards whatever happens."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import numpy as np
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
    {"prior_weight": 1.0},
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


def test_cancel_stops_restores_and_keeps_the_person_so_far(run, train, host, fingerprint, said):
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
    words = r"cancelled after step (\d); the person is kept as lidb/(unfinished_\d+_\.safetensors)$"
    steps, name = re.match(words, said[-1]).groups()
    assert int(steps) in (2, 3)  # the host asks in every attention, too
    kept = run("LoadLiDB", lidb_name=name)[0]
    expected = train(steps=int(steps))
    assert (kept.about, kept.rank) == (expected.about, expected.rank)
    torch.testing.assert_close(kept.up @ kept.down, expected.up @ expected.down, rtol=0, atol=1e-3)
    onwards = train(lidb=kept, steps=1, learning_rate=1e-6)
    assert onwards.about.steps == int(steps) + 1
    assert host.module("hdb_core.lidb").cosine(onwards, expected) > 0.999


@pytest.mark.parametrize("steps", [0, 1])
def test_cancel_where_nothing_can_be_kept(train, host, said, monkeypatch, steps):
    import comfy.model_management as management

    def full(name, write):
        raise host.module("hdb_core.errors").LiDBFileError("the disk is full")

    display = host.module("nodes.host.progress").FinetuneDisplay
    monkeypatch.setattr(host.module("nodes.host.kept"), "save_to_output", full)
    after, called = display.__call__, []

    def cancelled(self, progress):
        called.append(progress)
        if len(called) > steps:
            raise management.InterruptProcessingException
        after(self, progress)

    monkeypatch.setattr(display, "__call__", cancelled)
    with pytest.raises(management.InterruptProcessingException):
        train(steps=5)
    words = [
        "cancelled before the first step",
        "cancelled after step 1; the person could not be kept: the disk is full",
    ]
    assert said[-1] == words[steps]


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


def test_divergence_keeps_the_last_good_state(train, host, run, loaded, fingerprint, said):
    finetuning = host.module("hdb_core.finetuning")
    before = fingerprint()
    calls = []

    def turn_to_nan(module, inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else output

    handle = loaded.model.model.diffusion_model.out.register_forward_hook(turn_to_nan)
    try:
        with pytest.raises(finetuning.FinetuneDiverged, match=r"step 3 .* lidb/diverged_\d+_\.safetensors") as caught:
            train(steps=5)
    finally:
        handle.remove()
    assert fingerprint() == before
    assert said[-1] == "stopped by an error after 2 steps"
    name = str(caught.value).split("is kept as lidb/")[1].removesuffix(".")
    kept = run("LoadLiDB", lidb_name=name)[0]
    assert kept.up.abs().sum() > 0


def test_divergence_is_told_where_nothing_can_be_kept(host, monkeypatch):
    node, errors = host.module("nodes.finetune"), host.module("hdb_core.errors")
    keeping = host.module("nodes.host.kept")

    def full(name, write):
        raise errors.LiDBFileError("the disk is full")

    monkeypatch.setattr(keeping, "save_to_output", full)
    lost = host.module("hdb_core.finetuning").FinetuneDiverged("It diverged.", None, (0.5,), 3)
    assert str(node.with_place(lost)) == "It diverged. The state before that step could not be kept: the disk is full."


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


def test_sample_pictures_while_training(train, said):
    """Beside the plot, of the person as they are, and without an effect on the training."""
    import comfy.utils

    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: seen.append(preview))
    try:
        shown = train(steps=5, learning_rate=0.1, sample_every=2)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    sizes = [None if preview is None else preview[1].size for preview in seen]
    assert sizes[1] == sizes[3] == sizes[4] == (512 + 320, 320)  # after steps 2, 4 and the last one
    pictures = [np.asarray(seen[i][1].crop((512, 0, 832, 320)), np.float32) for i in (1, 3, 4)]
    assert all(picture.std() > 1 for picture in pictures)
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.5
    assert torch.equal(shown.up, train(steps=5, learning_rate=0.1).up)


def test_no_sample_picture_where_the_vae_does_not_fit(train, host, loaded, monkeypatch):
    import comfy.model_management as management
    import comfy.utils

    seen = []
    monkeypatch.setattr(loaded.vae, "decode", None)  # is not reached
    pictures = host.module("nodes.host.pictures")
    monkeypatch.setattr(pictures, "free_memory", lambda device: management.minimum_inference_memory())
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: seen.append(preview))
    try:
        train(steps=2, sample_every=1)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert seen[-1][1].size == (512, 320)


def test_the_node_says_what_was_learned(train, said):
    train(steps=14, batch_size=4)
    train(steps=2, batch_size=4)
    assert said[0] == "getting ready"
    long, short = (text for text in said if not text.startswith(("step ", "getting ready")))
    assert re.fullmatch(
        r"14 steps: likeness gained -?\d+ %, other prompts moved \d+ %\. Describe in photo_words .*\.", long
    )
    assert short == "2 steps, too few to measure what was learned."


def test_captions_are_shown_each_once_and_not_too_many(host):
    captioned = host.module("nodes.host.progress").captioned
    assert captioned(["a [v] face, smiling"] * 3) == "captioned “a [v] face, smiling”"
    assert captioned(["a", "b", "a", "c", "d", "e"]) == "captioned “a”, “b”, “c” and 2 others"


def test_the_size_is_shown_and_whether_it_was_chosen(host):
    trained_at = host.module("nodes.host.progress").trained_at
    assert trained_at(88, 184, 0) == "trained at 184 × 88 pixels (resolution 0 is automatic)"
    assert trained_at(512, 512, 512) == "trained at 512 × 512 pixels"


def test_texts_are_in_lines_of_whole_words(host):
    """The front end would break a line inside of a word."""
    progress = host.module("nodes.host.progress")
    name = "lidb/" + 9 * "somebody_"
    text = f"{28 * 'word '}\n\nsaved {name}.safetensors, 26 KB"
    lines = progress.wrapped(text).split("\n")
    assert " ".join(lines).split() == text.split() and lines.count("") == 1
    assert all(len(line) <= progress.LINE or " " not in line for line in lines) and len(lines) > 5


def test_a_line_of_progress(host):
    progress, of = host.module("hdb_core.finetuning").FinetuneProgress, host.module("nodes.host.progress").progress_text
    assert of(progress(5, 20, 0.125, 10.0)) == "step 5 of 20, loss 0.1250, 30 s left"
    automatic = progress(5, 20, 0.125, 10.0, None, 0.4)
    assert of(automatic) == "step 5 of at most 20, loss 0.1250, at most 30 s left"
    looked = of(automatic._replace(gained=0.311))
    assert looked == "step 5 of at most 20, loss 0.1250, likeness 31 % of 40 %, at most 30 s left"
    ended = of(automatic._replace(total=5, gained=0.42))
    assert ended == "step 5 of 5, loss 0.1250, likeness 42 % of 40 %, 0 s left"


@pytest.fixture
def watched(host, monkeypatch):
    """The number of samples of every pass through the UNet, and whether its blocks are then computed twice."""
    denoiser, seen = host.module("nodes.host.denoiser").HostDenoiser, []
    denoise = denoiser.denoise

    def execute(self, noisy, *others):
        twice = sum("forward" in module.__dict__ for module in self._model.diffusion_model.modules())
        seen.append((len(noisy), twice))
        return denoise(self, noisy, *others)

    monkeypatch.setattr(denoiser, "denoise", execute)
    return seen


def test_a_step_is_done_in_the_memory_that_there_is(train, host, loaded, monkeypatch, watched):
    import comfy.model_management as management

    memory = host.module("nodes.host.memory")
    whole = train(batch_size=3)
    watched.clear()
    latents = torch.zeros(1, 4, 16, 16)
    kind = whole.layout, whole.basis, whole.rank, True, latents.shape[1:-2]
    cost = memory._MEASURED[loaded.model.model][kind]
    assert len(cost.blocks) == 12
    for samples, passes in ((2.5, [(2, 0), (1, 0)]), (0.9, [(1, 12)] * 3)):
        free = cost.bytes(1, latents) + (samples - 1) * (cost.bytes(2, latents) - cost.bytes(1, latents))
        monkeypatch.setattr(management, "get_free_memory", lambda device, free=free: free)
        parts = train(batch_size=3)
        assert (parts.up - whole.up).norm() < 0.1 * whole.up.norm()  # rounding in bfloat16
        assert watched == passes * 2
        watched.clear()


def test_out_of_memory_on_the_host(train, host, loaded, fingerprint, monkeypatch):
    """A UNet that never fits: said in one sentence with a resolution that fits, and nothing is left behind."""
    train()
    before = fingerprint()
    denoiser = host.module("nodes.host.denoiser").HostDenoiser

    def full(self, noisy, *others):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(denoiser, "denoise", full)
    error = host.module("hdb_core.errors").FinetuneError
    with pytest.raises(error, match=r"single noise level.* GB were free. Set resolution of Fast Finetune to \d+"):
        train(batch_size=3)
    monkeypatch.undo()
    assert fingerprint() == before


def test_the_cost_is_measured_once_a_model_and_scales(host, loaded, train, monkeypatch, watched):
    train()
    watched.clear()
    train(seed=1)
    assert len(watched) == 2
    train(rank=7)
    assert len(watched) > 4


def test_a_list_of_photos_and_texts_is_one_person(train, host):
    batch, words = picture(128, 128, batch=2), ["smiling\n", "at the\nbeach"]
    of_batch = train(image=batch, photo_words="smiling\nat the beach", batch_size=2)
    of_list = train(image=[batch[:1], batch[1:]], photo_words=words, batch_size=2)
    assert of_list.about.photos == 2 and torch.equal(of_batch.up, of_list.up)
    assert not torch.equal(train(image=batch, batch_size=2).up, of_list.up)  # the words count
    sizes = train(image=[batch[:1], picture(200, 90)], mask=[face_mask(), torch.ones(1, 200, 90)])
    assert sizes.about.photos == 2
    with pytest.raises(host.module("hdb_core.errors").FinetuneError, match="steps got a list of 2"):
        train(steps=[1, 2])


def test_a_photo_is_trained_at_the_size_that_the_model_was_made_for(host, loaded, sd2, sdxl):
    photos = host.module("nodes.host.photos")
    assert photos.native_resolution(loaded.model, "sd1") == 128  # two levels where SD 1.x has four
    config = loaded.model.model.model_config.unet_config
    assert len(config["channel_mult"]) == 2
    height, width = photos.photo_size(400, 800, 0, 128, 8)
    assert (height, width) == (88, 184)
    made = photos.Photos([picture(400, 800)[0].movedim(-1, 0)]).prepare(128, 8)
    assert made[0].shape == (1, 3, 88, 184) and made[1] is None


def test_photos_of_several_sizes_get_one(host):
    common_size = host.module("nodes.host.photos").common_size
    of = lambda *sizes: [torch.zeros(3, *size) for size in sizes]
    assert common_size(of((100, 80), (200, 160), (300, 240))) == (200, 160)
    assert common_size(of((100, 100), (200, 50), (90, 90))) == (100, 100)


def test_a_mask_that_leaves_out_the_middle_is_said_while_training(host, run, loaded, photo, said):
    finetune = host.module("nodes.host.finetune")
    photos = host.module("nodes.host.photos").Photos.of([photo], [1 - face_mask()], None, 0)
    config = host.module("hdb_core.finetuning").FinetuneConfig(steps=1, batch_size=1)
    finetune.finetune_in_host(loaded.model, loaded.clip, loaded.vae, photos, config, None, False, "1")
    assert (
        said[0].startswith("getting ready")
        and said[1].startswith("step 1 of 1")
        and said[-1].startswith("1 step, too few")
    )
    height, width = photo.shape[1:3]
    size = f"trained at {width} × {height} pixels (resolution 0 is automatic)"
    assert all(
        f"\ncaptioned “a [v] face”\n{size}\nthe mask leaves out the middle of the photo" in text for text in said
    )
    right = host.module("nodes.host.photos").Photos.of([photo], [face_mask()], None, 0)
    assert not any("mask" in line for line in right.notes())


def test_a_model_is_let_go_of_after_a_training_and_a_picture(host, run, checkpoint, photo, sample):
    import gc
    import weakref

    import comfy.model_management as management

    model, clip, vae = host.stock["CheckpointLoaderSimple"]().load_checkpoint(checkpoint)
    gone = weakref.ref(model.model)
    (lidb, _) = run("FastFinetune", model=model, clip=clip, vae=vae, image=photo, steps=1)
    sample(*run("ApplyLiDBToModel", model=model, clip=clip, lidb=lidb))
    del model, clip, vae
    management.unload_all_models()
    gc.collect()
    assert gone() is None
