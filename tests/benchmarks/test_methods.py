"""Which rows a benchmark has, what decides their keys, and that finished cells are not made again."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import base, tune
from benchmarks.common.bench import Bench, parsed_settings
from benchmarks.common.cells import Cell
from benchmarks.common.dreambooth import DreamBoothConfig
from benchmarks.common.kept import KeptScores, Place
from benchmarks.common.methods import (
    DreamBooth,
    FastFinetuning,
    LearnedBasis,
    LoRA,
    Predicted,
    Stranger,
    fill,
    sampled_texts,
)
from benchmarks.common.results import share
from benchmarks.common.settings import LORA, NOISE, STRENGTHS, NodeConfig
from benchmarks.common.studio import Sampling
from benchmarks.common.subjects import Subject
from benchmarks.common.textual_inversion import TextualInversionConfig
from hdb_core.finetuning import FinetuneConfig
from hdb_core.recommended import (
    AS_LORA,
    FROM_PHOTO,
    FROM_PHOTOS,
    FROM_PREDICTION,
    IN_LEARNED_BASIS,
    PREDICTED_BY_TOKEN,
    RECOMMENDED,
    Strengths,
)
from miniature.people import SPLITS

DEV = SPLITS["dev"].start


@pytest.fixture
def bench(tmp_path):
    checkpoint = tmp_path / "base.safetensors"
    checkpoint.write_bytes(b"weights")
    return Bench(checkpoint, Sampling(), 2, tmp_path, KeptScores(tmp_path / "cells.jsonl", {"a": "a-1", "b": "b-1"}))


class Counting:
    """Two rows of flat pictures; counts its runs and remembers what was wanted."""

    rows = {"one": {"rank": 1}, "two": {"rank": 2}}  # noqa: RUF012

    def __init__(self):
        self.asked = []

    def run(self, bench, subject, wanted):
        self.asked.append((subject.seed, sorted(wanted)))
        for row in self.rows:
            yield row, Cell(np.zeros((1, 2, 8, 8, 3), np.uint8), {"prompts": ["a face"]})


def test_only_what_is_missing_is_made(bench):
    method, lines = Counting(), []
    fill(bench, [method], ["one"], Subject(DEV), lines.append)
    fill(bench, [method], ["one", "two"], Subject(DEV), lines.append)
    fill(bench, [method], ["one", "two"], Subject(DEV), lines.append)
    fill(bench, [method], ["two"], Subject(DEV + 1), lines.append)
    assert method.asked == [(DEV, ["one"]), (DEV, ["two"]), (DEV + 1, ["two"])]
    assert [line.split(":")[0] for line in lines] == [f"{DEV} one", f"{DEV} two", f"{DEV + 1} two"]


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="Windows keeps no load")
def test_seconds_of_a_busy_machine_are_not_kept(monkeypatch):
    cores, flat = os.cpu_count() or 1, np.zeros((2, 8, 8, 3), np.uint8)
    studio = SimpleNamespace(pictures=lambda *_: flat, made_on={"card": "a CPU"})
    for load, kept in ((cores, {"steps": 12, "seconds": 3.0}), (cores + 1, {"steps": 12})):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        cell = sampled_texts(
            SimpleNamespace(studio=studio, seeds=2), None, Subject(DEV), ["a face"], steps=12, seconds=3.0
        )
        assert cell.facts == {"prompts": ["a face"], "made_on": {"card": "a CPU"}, **kept}


def test_what_every_judge_has_scored_elsewhere_is_not_made_again(bench):
    method = Counting()
    for row, judges in (("one", ("a-1", "b-1")), ("two", ("a-1", "b-0"))):
        for judge in judges:
            bench.kept.add(Place(row, bench.cells.key(method.rows[row]), DEV, judge), {"scores": {}})
    fill(bench, [method], ["one", "two"], Subject(DEV), str)
    assert method.asked == [(DEV, ["two"])]


def test_a_row_is_keyed_by_every_setting_of_its_training(bench):
    keys = {
        bench.cells.key(settings)
        for method in (
            FastFinetuning("x", {"steps": 40}),
            FastFinetuning("x", {"steps": 40}, masked=True),
            FastFinetuning("x", {"steps": 40}, photos=3),
            FastFinetuning("x", {"steps": 41}),
            FastFinetuning("x", {"steps": 40, "basis": {"down_dim": 25}}),
            DreamBooth(DreamBoothConfig(rate=1e-5, checkpoints=(40,))),
            DreamBooth(DreamBoothConfig(rate=2e-5, checkpoints=(40,))),
        )
        for settings in method.rows.values()
    }
    assert len(keys) == 5 * 2 + 2


def test_a_prediction_is_keyed_by_the_file_and_all_that_it_is_asked(bench, tmp_path, write_hypernet):
    seeds = {"one": 1, "two": 2, "again": 1}
    nets = [write_hypernet(tmp_path / f"{name}.safetensors", seed) for name, seed in seeds.items()]
    one, two, again = (Predicted("hyper", path) for path in nets)
    assert one.rows == again.rows
    cold, warm, lora = FastFinetuning("x"), FastFinetuning("x", start=one), LoRA("x", LORA)
    methods = (one, two, Predicted("hyper", nets[0], photos=3), cold, warm, lora,
               FastFinetuning("x", start=two), FastFinetuning("x", start=one, described=True))  # fmt: skip
    keys = {bench.cells.key(method.rows[method.name]) for method in methods}
    assert len(keys) == len(methods)
    assert lora.rows["x"]["class_pictures"] and list(lora.rows) == ["x"]
    assert Stranger(one).rows["stranger"] == one.rows["hyper"]


@pytest.mark.parametrize("by_token", [False, True])
def test_each_way_to_apply_a_person_is_a_row(bench, tmp_path, write_hypernet, by_token):
    net = write_hypernet(tmp_path / "net.safetensors", by_token=by_token)
    own = PREDICTED_BY_TOKEN if by_token else RECOMMENDED[FROM_PREDICTION].strengths
    one, both = Predicted("hyper", net), Predicted("hyper", net, strengths=(own, AS_LORA))
    assert list(both.rows) == ["hyper", "hyper_as_lora"]
    assert both.rows["hyper"] == one.rows["hyper"] == {**both.rows["hyper_as_lora"], "strengths": own._asdict()}
    assert FastFinetuning("x", start=one).rows["x"]["strengths"] == own._asdict()
    assert FastFinetuning("x").rows["x"]["strengths"] == STRENGTHS._asdict()
    assert bench.cells.key(both.rows["hyper"]) != bench.cells.key(both.rows["hyper_as_lora"])
    tuned = FastFinetuning("x", start=both, strengths=(AS_LORA, Strengths(0.5, 1, 3)))
    assert list(tuned.rows) == ["x", "x_0.5,1,3", "x_saved"]
    assert FastFinetuning("x", start=one, strengths=(AS_LORA,)).rows["x"] == tuned.rows["x"]


def test_other_photos_show_the_person_elsewhere():
    subject = Subject(DEV)
    photos = subject.photos(4)
    np.testing.assert_array_equal(photos[0], subject.photo)
    assert len({photo.tobytes() for photo in photos}) == 4
    np.testing.assert_array_equal(photos[:3], subject.photos(3))


def test_a_default_that_is_spelled_out_is_the_same_row(bench):
    spelled = FastFinetuning("x", {"steps": 40, "rank": FinetuneConfig().rank})
    short = FastFinetuning("x", {"steps": 40})
    assert bench.cells.key(spelled.rows["x"]) == bench.cells.key(short.rows["x"])


def test_noise_levels_are_set_by_their_own_names(bench):
    assert parsed_settings(["max_timestep=0.8", "weighting=native"], NodeConfig) == {
        "max_timestep": [0.8], "weighting": ["native"]
    }  # fmt: skip
    plain, other = FastFinetuning("x"), FastFinetuning("x", {"max_timestep": 0.5})
    assert (
        other.config["noise"] == {**plain.config["noise"], "max_timestep": 0.5} and set(other.config["noise"]) == NOISE
    )
    assert bench.cells.key(plain.rows["x"]) != bench.cells.key(other.rows["x"])


def test_automatic_steps_are_those_recommended(tmp_path):
    """What ends them decides a row's key; a number of steps stays a number."""
    starts = (Predicted("hyper", tmp_path / "net.safetensors"), LearnedBasis(tmp_path / "basis.safetensors"))
    chosen = (FastFinetuning("x"), FastFinetuning("x", photos=3), *(FastFinetuning("x", start=s) for s in starts))
    for method, source in zip(chosen, (FROM_PHOTO, FROM_PHOTOS, FROM_PREDICTION, IN_LEARNED_BASIS), strict=True):
        advised = RECOMMENDED[source]
        until = {"enough": advised.enough, "most": advised.most_steps}
        assert method.config["steps"] == (advised.steps if advised.enough is None else until)
    assert FastFinetuning("x", {"steps": 56}).config["steps"] == 56


def test_a_checkpoint_does_not_depend_on_the_others(bench):
    one, more = (DreamBooth(DreamBoothConfig(checkpoints=c)).rows["dreambooth@50"] for c in ((50,), (50, 100)))
    assert bench.cells.key(one) == bench.cells.key(more)


def test_sweeps(tmp_path, write_hypernet):
    net = write_hypernet(tmp_path / "net.safetensors")
    pairs = ["learning_rate=0.01,0.02", "max_timestep=0.9"]
    cold, warm, lora = (tune.swept(method, pairs, net) for method in ("lidb", "hyper", "lora"))
    names = ["learning_rate=0.01 max_timestep=0.9", "learning_rate=0.02 max_timestep=0.9"]
    assert [m.name for m in cold] == [m.name for m in warm] == [m.name for m in lora] == names
    assert cold[1].settings == warm[1].settings == {"learning_rate": 0.02, "max_timestep": 0.9}
    assert (cold[1].start, warm[1].start) == (None, Predicted("hyper", net))
    (learned,) = tune.swept("learned", [], net, basis=net)
    assert learned.start == LearnedBasis(net) and learned.start.settings != cold[0].config
    assert lora[1].settings == {**LORA, "learning_rate": 0.02, "max_timestep": 0.9}
    (reference,) = tune.swept("dreambooth", ["rate=1e-5"], net, checkpoints=[3, 5])
    assert list(reference.rows) == ["rate=1e-05@3", "rate=1e-05@5"]
    (inversion,) = tune.swept("textual_inversion", [], net)
    assert list(inversion.rows) == [f"defaults@{n}" for n in TextualInversionConfig().checkpoints]
    assert [m.name for m in tune.swept("lidb", [], net)] == ["defaults"]


@pytest.mark.parametrize("pair", ["learning_rat=0.1", "rank=many", "basis=1", "noise=1", "train_text_encoder=perhaps"])
def test_settings_that_make_no_sense(pair):
    with pytest.raises(SystemExit, match=pair):
        parsed_settings([pair], FinetuneConfig)


def test_prompts_of_the_base_ask_for_what_they_say():
    seeds = range(DEV, DEV + 8)
    for asked in (*base.context_prompts(seeds), *base.identity_prompts(seeds)):
        spoken = [v for name, v in asked.expected.items() if name not in ("background", "facial_hair")]
        assert spoken
        assert all(value in asked.text for value in spoken)
    styles = [asked.expected["style"] for asked in base.style_prompts(seeds)]
    assert len(set(styles)) == 4
    assert "photo" not in styles


def test_halves_of_pairs_ask_for_their_own_side():
    for left, right in base.pair_prompts(range(DEV, DEV + 20)):
        assert left.text == right.text
        for side, text in zip((left, right), left.text.split(", on the right "), strict=True):
            assert all(v in text for name, v in side.expected.items() if name not in ("facial_hair", "expression"))


def test_shares_cover_everybody_once():
    parts = [share(text) for text in ("1/3", "2/3", "3/3")]
    assert sorted(i for part, parts in parts for i in range(10) if i % parts == part) == list(range(10))
    for wrong in ("0/2", "3/2", "half"):
        with pytest.raises(ValueError, match=r"."):
            share(wrong)
