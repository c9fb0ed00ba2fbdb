"""Damaged files of computed people and tokens: one sentence, and the next run makes them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save, save_file

from devtools.fuzz import nested, small_layout, split
from hdb_core.basis import BasisRecipe
from hdb_core.errors import HyperNetError
from hdb_core.files.container import checksum
from hdb_core.hypernet import EncoderConfig
from hdb_core.train.data.groups import Group, group_paths, missing_groups
from hdb_core.train.data.people import read_people
from hdb_core.train.data.photos import Entry, Person, Photo
from hdb_core.train.data.tokens import PhotoTokens
from hdb_core.train.face_code import Components
from hdb_core.train.job import Job
from hdb_core.train.run import Run
from hdb_core.train.settings import Settings, changed

BASIS, LAYOUT, ENCODER = BasisRecipe(3, 12, 8), small_layout(), EncoderConfig("clip_vision", 16, 8, num_tokens=3)
PEOPLE = [Person(name, (Photo(Path("1.png")), Photo(Path("2.png")))) for name in ("anna", "ben")]
COUNTS = torch.tensor([2, 2])
WRITTEN = {
    "latents": (
        {"latents": torch.zeros(4, 4, 2, 2).half(), "counts": COUNTS, "up": torch.zeros(2, 4, 8, 1)},
        {"fit": {"basis": BASIS.fields(), "layout": LAYOUT.hash}},
    ),
    "tokens": ({"tokens": torch.zeros(4, 3, 8).half(), "counts": COUNTS}, {"encoder": ENCODER.sizes}),
}  # fmt: skip


def read(folder, kind):
    if kind == "latents":
        return list(read_people(folder, PEOPLE, BASIS, LAYOUT))
    return PhotoTokens(folder, PEOPLE, ENCODER).read([(person, i) for person in PEOPLE for i in range(2)])


DAMAGE = {
    "a dimension less": lambda tensors, meta, kind: tensors.update({kind: tensors[kind].flatten(-2)}),
    "a photo less": lambda tensors, meta, kind: tensors.update({kind: tensors[kind][:3].clone()}),
    "no numbers": lambda tensors, meta, kind: tensors.pop(kind),
    "counts below 0": lambda tensors, meta, kind: tensors.update(counts=torch.tensor([5, -1])),
    "no counts": lambda tensors, meta, kind: tensors.pop("counts"),
    "no names": lambda tensors, meta, kind: meta.pop("names"),
    "names of another type": lambda tensors, meta, kind: meta.update(names="3"),
    "names in lists": lambda tensors, meta, kind: meta.update(names='[["anna"], ["ben"]]'),
    "a name less": lambda tensors, meta, kind: meta.update(names='["anna"]'),
    "deep settings": lambda tensors, meta, kind: meta.update(settings=nested(100_000).decode()),
    "no settings": lambda tensors, meta, kind: meta.update(settings=json.dumps({})),
}


def test_another_run_may_have_more_people_in_the_folder(tmp_path):
    tensors, meta = WRITTEN["latents"]
    Group(0, PEOPLE, tmp_path / "group_00000.safetensors", meta).write(tensors)
    others = [Person(name, PEOPLE[0].photos) for name in ("zoe", "yan")]
    Group(1, others, tmp_path / "group_00001.safetensors", meta).write(tensors)
    assert [own.person for own in read_people(tmp_path, PEOPLE, BASIS, LAYOUT)] == PEOPLE


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_damaged_file_is_one_sentence(tmp_path, kind, damage):
    Group(0, PEOPLE, tmp_path / "group_00000.safetensors", WRITTEN[kind][1]).write(WRITTEN[kind][0])
    assert len(read(tmp_path, kind)) in (2, 4)
    (path,) = group_paths(tmp_path)
    data = path.read_bytes()
    tensors, meta = load(data), split(data)[0]["__metadata__"]
    DAMAGE[damage](tensors, meta, kind)
    meta["checksum"] = checksum(meta, tensors)  # or this alone would be refused
    path.write_bytes(save(tensors, meta))
    with pytest.raises(HyperNetError, match=r"cannot be read|have changed since|holds tokens of"):
        read(tmp_path, kind)


@pytest.mark.parametrize("name", ["latents", "counts", "up"])
def test_changed_numbers_are_not_trained_on(tmp_path, name):
    tensors, settings = WRITTEN["latents"]
    path = tmp_path / "group_00000.safetensors"
    Group(0, PEOPLE, path, settings).write(tensors)
    save_file({**tensors, name: 1 + tensors[name]}, path, split(path.read_bytes())[0]["__metadata__"])
    with pytest.raises(HyperNetError, match=r"do not match its checksum.*Delete it: the next run makes it again"):
        read(tmp_path, "latents")


def test_a_copy_of_a_group_and_other_files_beside_it(tmp_path):
    tensors, settings = WRITTEN["latents"]
    path = tmp_path / "group_00000.safetensors"
    Group(0, PEOPLE, path, settings).write(tensors)
    save_file(tensors, tmp_path / "group_photo.safetensors")
    assert len(read(tmp_path, "latents")) == 2
    shutil.copy(path, tmp_path / "group_00001.safetensors")
    with pytest.raises(HyperNetError, match=r"group_00001.safetensors holds 'anna', and so does group_00000"):
        read(tmp_path, "latents")


def test_fitted_people_of_another_model_and_broken_tokens(tmp_path):
    for kind, name, value in (
        ("latents", "up", torch.zeros(2, 3, 8, 1)),
        ("tokens", "tokens", torch.full((4, 3, 8), torch.nan)),
    ):
        tensors, settings = WRITTEN[kind]
        Group(0, PEOPLE, tmp_path / "group_00000.safetensors", settings).write({**tensors, name: value})
        with pytest.raises(HyperNetError, match=r"cannot be read .*another shape"):
            read(tmp_path, kind)


@pytest.mark.parametrize("name", ["latents", "up"])
def test_a_file_of_another_run_beside_those_of_this_one(tmp_path, name):
    """Of other sizes: torch said so when people of both were in one step."""
    tensors, settings = WRITTEN["latents"]
    for number, own in enumerate((tensors, {**tensors, name: torch.cat([tensors[name]] * 2, -1)})):
        Group(number, PEOPLE, tmp_path / f"group_{number:05}.safetensors", settings).write(own)
    with pytest.raises(
        HyperNetError, match=r"group_00001.safetensors cannot be read .*another shape than those of group_0"
    ):
        read(tmp_path, "latents")


def test_latents_that_are_not_finite():
    with pytest.raises(HyperNetError, match="hold NaN or infinity"):
        Components.of(torch.full((3, 4, 2, 2), torch.nan))


def test_photos_that_were_replaced(tmp_path):
    """Prepared anew, with another cut: their old latents were trained on beside the new pixels."""
    (tmp_path / "anna.jpg").write_bytes(b"1234")
    shard = tmp_path / "shard.tar"
    alone, stored = (
        [Person("anna", (Photo(place),))] for place in (tmp_path / "anna.jpg", Entry(shard, "anna.jpg", 512, 4))
    )
    (group,) = missing_groups(tmp_path / "people", alone, {}, 2)
    group.write(WRITTEN["latents"][0])
    assert not [*missing_groups(tmp_path / "people", alone, {}, 2), *missing_groups(tmp_path / "people", stored, {}, 2)]
    (tmp_path / "anna.jpg").write_bytes(b"12345")
    with pytest.raises(
        HyperNetError, match=r"was made with other settings: photos\. Give the settings that it was made with"
    ):
        list(missing_groups(tmp_path / "people", alone, {}, 2))


def test_processes_that_do_not_see_one_run_folder(tmp_path):
    """Each trained on the people that it had computed itself, and the hypernetwork named those of the first."""
    for name in ("anna", "ben"):
        (tmp_path / f"{name}.jpg").write_bytes(b"1234")
    settings = changed(Settings(), {"photos": str(tmp_path), "group": 1})
    accelerator, base = SimpleNamespace(process_index=0, num_processes=2), SimpleNamespace()
    base.denoiser = SimpleNamespace(layout=LAYOUT)
    job = Job(Run(tmp_path / "run", settings), accelerator, base)
    (group,) = missing_groups(job.run.people, job.needed, {"fit": None}, 1, job.share)
    group.write({"latents": torch.zeros(1, 4, 2, 2).half(), "counts": torch.ones(1, dtype=torch.long)})
    with pytest.raises(HyperNetError, match=r"people lacks 1 of 2 people, such as 'ben'.* one run folder"):
        job.encoded(BASIS)
