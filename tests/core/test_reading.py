"""What is asked of every file before it is opened, and how a message quotes one."""

import json
import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save, save_file

from devtools import fuzz
from hdb_core import detectors
from hdb_core.basis import BasisRecipe
from hdb_core.errors import MOST_SHOWN, FaceError, HDBError, LayoutError
from hdb_core.files import basis, container, hypernet, lidb, lora
from hdb_core.files.reading import opened, read_whole, reason, regular
from hdb_core.hypernet import HyperNet, HyperNetConfig
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import LiDB
from hdb_core.train.base.local import require_safetensors, require_unquantised

KINDS = sorted(set(fuzz.TARGETS) - {"config"})
UNNAMEABLE = pytest.mark.parametrize("name", ["a\0b", "\ud800"], ids=["NUL", "half a character"])


@pytest.fixture
def honest(tmp_path):
    def make(kind):
        fuzz.TARGETS[kind].make(tmp_path / "honest.safetensors")
        return tmp_path / "honest.safetensors"

    return make


def test_a_message_is_one_printable_line_that_ends_as_it_was_written():
    text = str(HDBError("Got '\x1b[2J\n\ud800\u202e" + "x" * 5000 + "'. Load another file."))
    assert (
        text.isprintable() and text.startswith(r"Got '\x1b[2J\n\ud800\u202exxx") and text.endswith("Load another file.")
    )
    assert len(text) <= MOST_SHOWN and str(HDBError(text)) == text and str(HDBError("Zoë → 'é'")) == "Zoë → 'é'"


def test_a_reason_is_never_empty():
    assert reason(MemoryError()) == "MemoryError" and reason(FileNotFoundError(2, "No such file")) == "No such file"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX")
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_or_a_folder_is_refused_and_not_waited_for(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(HDBError, match="folder or a device"):
            fuzz.TARGETS[kind].load(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="Linux makes files up")
def test_a_link_to_a_file_of_the_systems_is_an_empty_file(tmp_path, monkeypatch):
    """/proc/kmsg counts as a file, too, and never ends."""
    for name in ("link", "link.pth", "config.json"):
        (tmp_path / name).symlink_to("/proc/version")
    assert (tmp_path / "link").read_bytes()
    monkeypatch.setattr(Path, "open", Mock(side_effect=AssertionError))
    assert read_whole(tmp_path / "link") == opened(tmp_path / "link").read() == b""
    for kind in KINDS:
        with pytest.raises(HDBError, match="not in the safetensors format"):
            fuzz.TARGETS[kind].load(tmp_path / "link")
    with pytest.raises(FaceError, match="is no YuNet file"):
        detectors.yunet(tmp_path / "link.pth")
    with pytest.raises(ValueError, match="Expecting value"):
        require_unquantised(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX")
def test_a_model_described_by_a_pipe_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    require_unquantised(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(LayoutError, match=r"config\.json cannot be read \(No such file"):
        require_unquantised(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(LayoutError, match=r"config\.json cannot be read \(it is a folder or a device"):
        require_unquantised(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.fp16.safetensors"])
def test_pickled_weights_and_variants_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"a pickle may compute for ever")
    with pytest.raises(LayoutError, match=r"holds no weights called model\.safetensors"):
        require_safetensors(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, shard := tmp_path / "model-00001-of-00001.safetensors")
    require_safetensors(tmp_path)
    for named in (name, "../model-00001-of-00001.safetensors", "model.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": shard.name, "b": named}})
        )
        with pytest.raises(LayoutError, match="names other files than the folder's shards"):
            require_safetensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard.name}}))
    require_safetensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": shard.name, "c": shard.name}})
    )
    with pytest.raises(LayoutError, match=r"00001\.safetensors lacks 'c', which model\.safetensors\.index\.json names"):
        require_safetensors(tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1", b"hollow"])
def test_weights_that_are_not_whole_are_named(tmp_path, content):
    """Beside whole ones, too, as an interrupted download leaves them."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    stray = tmp_path / "model-00001-of-00002.safetensors"
    stray.write_bytes(content)
    if content == b"hollow":
        stray.write_bytes(save({"a": torch.zeros(1 << 20)})[:4096])
        os.truncate(stray, len(save({"a": torch.zeros(1 << 20)})))
    with pytest.raises(
        LayoutError, match=r"model-00001-of-00002\.safetensors cannot be read \(.*\)\. Download it again"
    ):
        require_safetensors(tmp_path)


@UNNAMEABLE
@pytest.mark.parametrize("kind", KINDS)
def test_names_that_no_file_can_have(tmp_path, kind, name, honest):
    target = fuzz.TARGETS[kind]
    with pytest.raises(HDBError, match="no file can have this name"):
        target.load(tmp_path / name)
    with pytest.raises(HDBError, match="no file can have this name"):
        target.save(target.load(honest(kind)), tmp_path / name)
    with pytest.raises(OSError, match="no file can have this name"):
        lora.save(fuzz.small_lidb(), tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_mostly_a_hole_costs_nothing(kind, honest):
    path = honest(kind)
    header, rest = fuzz.split(path.read_bytes())
    header["large"] = {"dtype": "U8", "shape": [10**11], "data_offsets": [len(rest), len(rest) + 10**11]}
    path.write_bytes(fuzz.joined(header, rest))
    try:
        os.truncate(path, path.stat().st_size + 10**11)
    except OSError:
        pytest.skip("no such files on this disk")
    start = time.process_time()
    with pytest.raises(HDBError, match="most of it is not there"):
        fuzz.TARGETS[kind].load(path)
    assert time.process_time() - start < 1


def test_a_file_that_is_whole_or_small_is_no_hollow_one(tmp_path):
    (tmp_path / "whole").write_bytes(bytes(3_000_000))
    (tmp_path / "small").touch()
    os.truncate(tmp_path / "small", 100_000)
    assert all(regular(path) == path for path in (tmp_path / "whole", tmp_path / "small"))


def test_a_person_is_not_larger_than_its_components(honest):
    path = honest("lidb")
    header, rest = fuzz.split(path.read_bytes())
    header["more"] = {"dtype": "U8", "shape": [3_000_000], "data_offsets": [len(rest), len(rest) + 3_000_000]}
    path.write_bytes(fuzz.joined(header, rest + bytes(3_000_000)))
    with pytest.raises(HDBError, match="larger than its header says"):
        lidb.read_header(path)


BEYOND = {
    "dims": (Layout("sd1", (Layer("unet.a", 2000, 2000),)), (1025, 8)),
    "features": (Layout("sd1", (Layer("unet.a", 65_537, 8),)), (4, 4)),
    "no features": (Layout("sd1", (Layer("unet.a", 0, 8),)), (4, 4)),
    "name": (Layout("sd1", (Layer("unet." + "a" * 252, 8, 8),)), (4, 4)),
    "family": (Layout("s" * 257, (Layer("unet.a", 8, 8),)), (4, 4)),
    "kernel": (Layout("sd1", (Layer("unet.conv1", 10, 8),)), (4, 4)),
    "layers": (Layout("sd1", tuple(Layer(f"unet.a{i}", 1, 1) for i in range(4097))), (1, 1)),
    "twice": (Layout("sd1", (Layer("unet.a", 8, 8),) * 2), (4, 4)),
}


@pytest.mark.parametrize("beyond", BEYOND)
@pytest.mark.parametrize("kind", ["lidb", "hypernet", "basis"])
def test_what_could_not_be_read_is_not_written(tmp_path, monkeypatch, kind, beyond):
    layout, (a, b) = BEYOND[beyond]
    monkeypatch.setattr(container, "probe", lambda *_: [])  # of no use here, and slow
    recipe, count = BasisRecipe(0, a, b), len(layout.layers)
    with pytest.raises(HDBError, match=r"could not be read again .*; nothing was written"):
        if kind == "lidb":
            lidb.save(LiDB(layout, recipe, torch.ones(count, 1, a), torch.ones(count, b, 1)), tmp_path / "file")
        elif kind == "hypernet":
            encoder = fuzz.small_hypernet().config.encoder
            made = HyperNet.create(HyperNetConfig(layout, recipe, encoder, width=8, depth=1, heads=2, code=3))
            hypernet.save(made, tmp_path / "file", {})
        else:
            basis.save(layout, {}, (a, b), tmp_path / "file", {})
    assert not list(tmp_path.iterdir())
