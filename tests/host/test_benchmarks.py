"""The benchmarks' way into the host: the same pictures for a seed, persons through files, references that leave no trace."""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.common.dreambooth import DreamBoothConfig, dreambooth
from benchmarks.common.methods import FILE, FastFinetuning
from benchmarks.common.settings import COMPLETE, LORA, NOISE, NodeConfig, resolved
from benchmarks.common.studio import HYPERNET, Sampling, Studio
from benchmarks.common.subjects import Subject
from benchmarks.common.textual_inversion import TextualInversionConfig, embeddings, textual_inversion, token_ids
from benchmarks.gpu import training
from benchmarks.gpu.part import Part
from hdb_core.recommended import AS_LORA
from miniature.people import SPLITS


@pytest.fixture(scope="module")
def studio(host, checkpoint, base_directory):
    return Studio(host, base_directory / "models" / "checkpoints" / checkpoint, Sampling(steps=2))


@pytest.fixture(scope="module")
def subject():
    return Subject(SPLITS["dev"].start)


@pytest.fixture(scope="module")
def layout(host, studio):
    modules, family = host.module("nodes.host.targets").target_modules(studio.base.model, studio.base.clip)
    return host.module("hdb_core.layout").layout_of(modules, family)


@pytest.fixture(scope="module")
def hypernet(host, layout, tmp_path_factory):
    """The file of an untrained hypernetwork outside of the host's folders."""
    core, path = host.module("hdb_core.hypernet"), tmp_path_factory.mktemp("nets") / "random.safetensors"
    encoder = core.EncoderConfig(image_size=64, token_width=32, patch_size=16, stem=((16, 1),), depth=1, heads=2)
    net = core.HyperNet.create(core.HyperNetConfig(layout, encoder=encoder, width=32, depth=1, heads=2, iterations=2))
    host.module("hdb_core.files.hypernet").save(net, path, {})
    return path


def one_picture(studio, models=None, seed=5) -> np.ndarray:
    return studio.pictures(models or studio.base, "a [v] face", seed, 1).astype(int)


def test_pictures_depend_on_the_seed_alone(studio):
    first = one_picture(studio)
    assert first.shape == (1, 128, 128, 3)
    np.testing.assert_array_equal(first, one_picture(studio))
    assert (first != one_picture(studio, seed=6)).any()
    assert studio.pictures(studio.base, "two people", 5, 2, width=256).shape == (2, 128, 256, 3)


def test_saved_rows_are_of_files_as_the_node_writes_them(studio, host, person, tmp_path):
    lidb = person(1, rank=6)
    _, path = studio.saved(lidb, "default")
    host.module("hdb_core.files.lidb").save(lidb, tmp_path / "same.safetensors", **FILE)
    assert path.read_bytes() == (tmp_path / "same.safetensors").read_bytes()


def test_bfloat16_pictures_are_those_of_float32(studio, monkeypatch):
    """So scores of machines that compute in either may stand in one table."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(studio, "dtype", dtype)
        made[dtype] = one_picture(studio)
    other_seed = np.abs(made[torch.float32] - one_picture(studio, seed=6)).mean()
    difference = np.abs(made[torch.float32] - made[torch.bfloat16]).mean()
    assert 0 < difference < 0.2 * other_seed


def test_a_person_through_a_file(studio, subject):
    lidb, seconds = studio.finetune(subject.photos(1), steps=1, rank=2, basis={"down_dim": 25, "up_dim": 12})
    loaded, path = studio.saved(lidb, "bench")
    assert seconds > 0
    assert path.stat().st_size < 20_000
    assert (loaded.down.shape[1:], loaded.up.shape[1:]) == ((2, 25), (12, 2))
    with torch.inference_mode():
        assert (one_picture(studio, studio.apply(loaded)) != one_picture(studio)).any()


def test_a_person_learned_from_several_photos(studio, subject, monkeypatch):
    asked, finetune = [], studio.finetune
    monkeypatch.setattr(studio, "finetune", lambda *args, **given: asked.append(given) or finetune(*args, **given))
    method = FastFinetuning("x", {"steps": 1}, described=True, masked=True, photos=3)
    three, one = (m.made(SimpleNamespace(studio=studio), subject).lidb for m in (method, replace(method, photos=1)))
    assert asked[0]["masks"].shape == (3, 128, 128) and len(set(asked[0]["photo_words"].splitlines())) == 3
    assert not torch.equal(three.up, one.up)


def test_a_predicted_person(studio, subject, hypernet):
    one, three = (studio.predict(hypernet, subject.photos(photos)) for photos in (1, 3))
    assert not torch.equal(one.lidb.up, three.lidb.up) and three.lidb.about.photos == 3
    assert 0 < one.flops < three.flops and 0 < one.seconds < 1
    goes_on, _ = studio.finetune(subject.photos(1), lidb=one.lidb, steps=1, rank=2)
    assert goes_on.about.made_from == "a prediction"
    assert studio.finetune_step_flops(subject.photos(1), {"rank": 2}, lidb=one.lidb) > one.flops


def test_a_person_with_guidance_of_their_own(studio, subject):
    person = studio.predict(HYPERNET, subject.photo[None]).lidb
    chosen = (AS_LORA, AS_LORA._replace(guidance=1.5), AS_LORA._replace(guidance=studio.sampling.cfg))
    lora, guided, far = (studio.apply(person, strengths) for strengths in chosen)
    assert lora.negative is None and guided.negative is not None
    changes = [np.abs(one_picture(studio, models) - one_picture(studio)).mean() for models in (lora, guided, far)]
    assert 0 < changes[0] < changes[1] < changes[2]


def test_a_setting_that_is_not_given_is_the_widgets_default(host):
    nodes = (host.nodes["FastFinetune"], host.nodes["FastFinetuneOptions"])
    slots = [slot for node in nodes for slot in node.GET_SCHEMA().inputs]
    widgets = {slot.id: slot.default for slot in slots if hasattr(slot, "default")}
    settings = {name: value for name, value in vars(NodeConfig()).items() if name in widgets}
    assert "convolutions" in settings and settings == {name: widgets[name] for name in settings}


def test_settings_reach_the_training(studio, subject, monkeypatch, host):
    """Those of noise levels, the down side's rate and the basis, too, which no widget has."""
    seen, node = [], host.module("nodes.finetune")
    finetune = node.finetune_in_host
    monkeypatch.setattr(node, "finetune_in_host", lambda *given: seen.append(given) or finetune(*given))
    settings = {**LORA, "steps": 1, "batch_size": 1, "basis": {"down_dim": 40, "up_dim": 40}, "seed": 7}
    studio.finetune(subject.photos(1), class_pictures=subject.renders[:1], **settings)
    ((*_, config, _, convolutions, _, _),) = seen
    expected = resolved({name: value for name, value in settings.items() if name != "convolutions"})
    assert {**vars(config), "noise": vars(config.noise), "basis": config.basis.fields()} == expected
    assert not convolutions and set(vars(config.noise)) == NOISE


def test_a_lora_with_class_pictures(studio, subject, layout):
    assert all(layer.in_features <= COMPLETE["down_dim"] for layer in layout.layers)
    assert all(layer.out_features <= COMPLETE["up_dim"] for layer in layout.layers)
    basis = {"down_dim": 40, "up_dim": 40}
    settings = {**LORA, "steps": 1, "rank": 1, "batch_size": 1, "basis": basis}
    lora, _ = studio.finetune(subject.photos(1), class_pictures=subject.renders[:2], **settings)
    size = studio.lora_size(lora, "bench")
    numbers = sum(layer.in_features + layer.out_features for layer in layout.layers)
    assert 2 * numbers < size < 2 * numbers + 500 * len(layout.layers)  # names and shapes


def test_flops_of_a_step_grow_with_the_batch(studio, subject):
    one, two = (studio.finetune_step_flops(subject.photos(1), {"batch_size": n}) for n in (1, 2))
    assert one < two < 2 * one  # the text is encoded once for all samples


@pytest.mark.parametrize("ends_early", [False, True])
def test_dreambooth_trains_and_puts_the_base_back(studio, subject, fingerprint, ends_early):
    before, plain = fingerprint(), one_picture(studio)
    config = DreamBoothConfig(rate=1e-3, checkpoints=(1, 2), batch_size=1)
    run = dreambooth(studio, subject.photo, subject.renders[:2], config, seed=0)
    first = next(run)
    after_one = one_picture(studio)
    assert (after_one != plain).any()
    assert first.parameters > 80_000_000
    assert first.flops > 0
    if ends_early:
        run.close()
    else:
        second = next(run)
        assert second.flops == 2 * first.flops
        assert (one_picture(studio) != after_one).any()
        assert next(run, None) is None
    assert fingerprint() == before
    np.testing.assert_array_equal(one_picture(studio), plain)


def test_textual_inversion_learns_the_rare_token_alone(studio, subject, fingerprint):
    before, plain = fingerprint(), one_picture(studio)
    other = studio.pictures(studio.base, "a face", 5, 1)
    config = TextualInversionConfig(rate=0.1, checkpoints=(1, 2), batch_size=1)
    run = textual_inversion(studio, subject.photo, config, seed=0)
    first, after_one = next(run), one_picture(studio)
    assert (after_one != plain).any()
    np.testing.assert_array_equal(studio.pictures(studio.base, "a face", 5, 1), other)
    assert first.parameters == len(token_ids(studio.base.clip, "[v]")) * embeddings(studio.base.clip).weight.shape[1]
    second = next(run)
    assert second.flops == 2 * first.flops > 0
    assert (one_picture(studio) != after_one).any()
    run.close()
    assert fingerprint() == before
    np.testing.assert_array_equal(one_picture(studio), plain)


def test_the_rates_of_a_training(host, tmp_path):
    part = Part(tmp_path / "rates.json", "cpu", 600, toy=True)
    with torch.inference_mode(False):
        seen = training.trained(part, host, "mini", tmp_path, people=2, steps=4)
    assert (seen.photos, seen.fitted, seen.fit_steps) == (9, 8, 4)  # and the one that the plan of a run encodes
    assert seen.flops["train"] > seen.flops["pretrain"] > 0
    training.report(part, "mini", seen, people=2, most=1e12)
    rows = {row["what"]: row for row in part.rows}
    assert rows["mini, train"]["share_of_peak"] > 0
    assert rows["mini, all"]["with_fitted_people"] > rows["mini, all"]["hours_for_15000"] > 0


def test_a_training_that_does_not_fit_leaves_room_for_a_smaller_one(host, tmp_path, monkeypatch):
    begun = []

    def trained(part, host, family, folder, people, steps):
        assert not any(before() for before in begun)
        layer = torch.nn.Linear(1, 1)
        layer.parts = [layer]  # as an Accelerator and what it prepared
        begun.append(weakref.ref(layer))
        raise torch.OutOfMemoryError(f"no room for {people}")

    monkeypatch.setattr(sys, "argv", ["training", "--json", str(tmp_path / "rates.json"), "--device", "cpu"])
    for name, value in (("opened", lambda *_: host), ("peak", lambda _: 1e12), ("trained", trained)):
        monkeypatch.setattr(training, name, value)
    training.main()
    rows = json.loads((tmp_path / "rates.json").read_text(encoding="utf-8"))["rows"]
    assert [row["failed"] for row in rows] == [f"OutOfMemoryError: no room for {people}" for people in (32, 8, 2)]
