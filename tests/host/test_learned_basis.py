"""Empty LiDB, and people in a learned basis, whose file must be where they are loaded."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import pytest
import torch

NAME = "learned.safetensors"


@pytest.fixture
def basis(host, loaded, base_directory):
    """A basis in models/lidb_basis for the random miniature; its vectors are of no meaning. Returns its path."""
    layout = host.module("hdb_core.layout")
    recipe = host.module("hdb_core.basis").BasisRecipe(11, 12, 8)
    modules, family = host.module("nodes.host.targets").target_modules(loaded.model, loaded.clip, convolutions=True)
    target = layout.layout_of(modules, family)
    bases = {layer.name: host.module("hdb_core.basis").layer_basis(recipe, layer) for layer in target.layers}
    path = base_directory / "models" / "lidb_basis" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    host.module("hdb_core.files.basis").save(target, bases, (12, 8), path, {})
    return path


@pytest.fixture
def forget(host, monkeypatch):
    """As after a restart: no model holds a basis."""

    def execute():
        monkeypatch.setattr(host.module("nodes.host.bases"), "_OF_MODEL", weakref.WeakKeyDictionary())

    return execute


def test_learned_saved_loaded_after_a_restart_and_applied(run, host, train, sample, loaded, basis, forget):
    (empty,) = run("EmptyLiDB", basis_name=NAME)
    assert empty.basis.learned and empty.layout.has_convolutions
    untouched = sample(loaded.model, loaded.clip)
    applied = sample(*run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=empty))
    assert torch.equal(applied, untouched)
    person = train(lidb=empty, steps=2, learning_rate=0.1, rank=2)
    assert person.basis == empty.basis and person.rank == 2 and person.about.made_from == "photos in a learned basis"
    (path,) = run("SaveLiDB", lidb=person, filename_prefix="lidb/learned", rank=0)
    direct = sample(*run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=person))
    forget()
    again, _ = run("LoadLiDB", lidb_name=os.path.basename(path))
    through_file = sample(*run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=again))
    moved = (direct - untouched).abs().mean()
    assert moved > 0 and (direct - through_file).abs().mean() < 0.02 * moved


def test_without_its_file_the_person_says_so(run, host, train, basis, forget, monkeypatch):
    (empty,) = run("EmptyLiDB", basis_name=NAME)
    (path,) = run("SaveLiDB", lidb=train(lidb=empty, steps=1), filename_prefix="lidb/alone")
    forget()
    basis.unlink()
    (basis.parent / "notes.safetensors").write_text("no basis")
    try:
        with pytest.raises(
            host.module("hdb_core.errors").BasisFileError, match=r"notes\.safetensors.*models/lidb_basis"
        ):
            run("LoadLiDB", lidb_name=Path(path).name)
    finally:
        (basis.parent / "notes.safetensors").unlink()
    paths = host.folder_paths.folder_names_and_paths  # other tests add folders
    monkeypatch.setitem(paths, "lidb_basis", ([str(basis.parent)], {".safetensors"}))
    with pytest.raises(host.module("hdb_core.errors").LiDBFileError, match=r"not there.*models/lidb_basis"):
        run("LoadLiDB", lidb_name=Path(path).name)


def test_a_damaged_basis_is_named(run, host, train, basis, forget):
    (empty,) = run("EmptyLiDB", basis_name=NAME)
    (path,) = run("SaveLiDB", lidb=train(lidb=empty, steps=1), filename_prefix="lidb/alone")
    whole = basis.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        forget()
        basis.write_bytes(damaged)
        with pytest.raises(host.module("hdb_core.errors").BasisFileError, match=rf"kind: {NAME}"):
            run("LoadLiDB", lidb_name=Path(path).name)


def test_a_hypernetwork_finds_its_basis(run, host, photo, basis, write_hypernet, hypernet_config, forget):
    layout, recipe = host.module("hdb_core.files.basis").load(basis)
    config = type(hypernet_config)(**{**vars(hypernet_config), "layout": layout, "basis": recipe})
    name = write_hypernet(config, "in_a_learned_basis.safetensors")
    forget()
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    lidb, _ = run("PredictLiDB", hypernet=hypernet, image=photo)
    assert lidb.basis == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [("../learned.safetensors", "no name of a LiDB basis"), ("gone.safetensors", "There is no LiDB basis")],
)
def test_bad_names(run, host, basis, name, message):
    assert message in host.nodes["EmptyLiDB"].validate_inputs(name)
    with pytest.raises(host.module("hdb_core.errors").BasisFileError, match=message):
        run("EmptyLiDB", basis_name=name)


def test_another_file_is_refused(run, host, basis, person):
    (path,) = run("SaveLiDB", lidb=person(1), filename_prefix="lidb/no_basis")
    os.replace(path, basis.parent / "person.safetensors")
    with pytest.raises(host.module("hdb_core.errors").BasisFileError, match="not a LiDB basis"):
        run("EmptyLiDB", basis_name="person.safetensors")
