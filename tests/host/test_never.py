"""What users of such nodes have met elsewhere and must not meet here: the whole way of a person, provoked on the real host."""

from __future__ import annotations

import inspect
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def whole_way(run, host, loaded, photo, sample, hypernet_config, write_hypernet):
    """A photo to a picture, through every node that needs no detector; and the global generators before it is sampled,
    since the stock KSampler seeds one."""

    def execute():
        models = {"model": loaded.model, "clip": loaded.clip}
        (face,), _, _ = run("CropToFace", image=photo, bboxes={"x": 20, "y": 20, "width": 70, "height": 70})
        (hypernet,) = run("LoadHyperNet", hypernet_name=write_hypernet(hypernet_config))
        predicted, _ = run("PredictLiDB", hypernet=hypernet, image=face, model=loaded.model)
        (options,) = run("FastFinetuneOptions", sample_every=1, batch_size=1)
        lidb, _ = run("FastFinetune", **models, vae=loaded.vae, image=photo, steps=2, lidb=predicted, options=options)
        (path,) = run("SaveLiDB", lidb=lidb, name="whole way", thumbnail=photo)
        again, _ = run("LoadLiDB", lidb_name=Path(path).name)
        (both,) = run("BlendLiDB", lidb_a=again, lidb_b=predicted, blend=0.3)
        run("CompareLiDB", lidb_a=both, lidb_b=again)
        run("SaveLiDBAsLoRA", lidb=both)
        run("LiDBHook", **models, lidb=both)
        applied = run("ApplyLiDBToModel", **models, lidb=both)
        states = generators()
        return sample(*applied), states

    return execute


def generators():
    return torch.random.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())  # noqa: NPY002


def test_no_node_changes_a_global_generator(whole_way):
    before = generators()
    picture, after = whole_way()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert torch.equal(whole_way()[0], picture)  # and none depends on one


def test_no_node_asks_the_network(whole_way, monkeypatch):
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    assert whole_way()[0].isfinite().all() and asked == []


@pytest.mark.parametrize("node_id", ["ApplyLiDBToModel", "LiDBHook"])
def test_a_layer_that_the_host_does_not_know_is_never_skipped_in_silence(
    run, host, loaded, person, node_id, monkeypatch
):
    """The host leaves out what it does not know; a person without effect would be the result."""
    apply, lidb = host.module("nodes.host.apply"), person(1)
    keys = host.module("hdb_core.layout").host_keys

    def renamed(layout):
        names = keys(layout)
        return names | {layout.layers[0].name: "diffusion_model.renamed.weight"}

    monkeypatch.setattr(apply, "host_keys", renamed)
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match=r"31 of 32 layers.*diffusion_model.renamed"):
        run(node_id, model=loaded.model, clip=loaded.clip, lidb=lidb)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_person_on_weights_of_every_type(run, host, checkpoint, loaded, person, sample, dtype):
    """The same change of the picture as on those of float32, and the type does not meet another one anywhere."""
    import comfy.sd

    path = host.folder_paths.get_full_path("checkpoints", checkpoint)
    options = {"model_options": {"dtype": getattr(torch, dtype)}}
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(path, **options)
    assert next(model.model.diffusion_model.middle_block.parameters()).dtype == getattr(torch, dtype)

    def change(model, clip):
        applied = run("ApplyLiDBToModel", model=model, clip=clip, lidb=person(1))
        return (sample(*applied) - sample(model, clip)).flatten()

    expected, found = change(loaded.model, loaded.clip), change(model, clip)
    assert torch.nn.functional.cosine_similarity(expected, found, dim=0) > 0.9


def test_no_node_has_the_name_of_one_of_the_hosts(host):
    root = Path(inspect.getfile(host.stock["KSampler"])).parent
    sources = [root / "nodes.py", *(root / "comfy_extras").glob("*.py"), *(root / "comfy_api_nodes").glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert len(sources) > 50 and '"KSampler"' in text
    assert [node_id for node_id in host.nodes if f'"{node_id}"' in text] == []
