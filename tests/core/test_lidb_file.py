"""The file: round trip, size, atomic writing, and a plain refusal of everything else."""

import base64
import json
import os
import zlib
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from hdb_core import container
from hdb_core.basis import BasisRecipe
from hdb_core.errors import LiDBError, LiDBFileError
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import LiDB, core, cosine, norm, start_down, strongest, truncate
from hdb_core.lidb_file import COMPACT, DEFAULT_RANK, FULL, HALF, KIND, load, read_header, save


def sd1_layout():
    """The sizes and names of SD 1.5: 128 UNet and 48 CLIP-L layers."""
    blocks = [("down_blocks", level, j, 320 * 2**level) for level in range(3) for j in range(2)]
    blocks += [("up_blocks", level, j, 1280 // 2 ** (level - 1)) for level in (1, 2, 3) for j in range(3)]
    layers = []
    for section, level, j, width in [*blocks, ("mid_block", None, 0, 1280)]:
        prefix = f"unet.{section}" + ("" if level is None else f".{level}") + f".attentions.{j}.transformer_blocks.0"
        for attention, context in (("attn1", width), ("attn2", 768)):
            sizes = {"to_q": width, "to_k": context, "to_v": context, "to_out.0": width}
            layers += [Layer(f"{prefix}.{attention}.{p}", size, width) for p, size in sizes.items()]
    text = "text_encoder.text_model.encoder.layers"
    layers += [Layer(f"{text}.{i}.self_attn.{p}_proj", 768, 768) for i in range(12) for p in ("q", "k", "v", "out")]
    return Layout("sd1", tuple(layers))


def random_lidb(layout, rank, recipe=None):
    recipe = recipe or BasisRecipe()
    generator = torch.Generator().manual_seed(rank)
    down = torch.randn(len(layout.layers), rank, recipe.down_dim, generator=generator)
    up = torch.randn(len(layout.layers), recipe.up_dim, rank, generator=generator)
    return LiDB(layout, recipe, down, up, {"prompt": "a [v] face", "token": "[v]", "made_by": "fast fine-tune"})


def rewrite(path, edit=lambda fields: None, tensors=None, metadata=None):
    """Save a file again with another header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lidb"])
    edit(fields)
    metadata = {"lidb": json.dumps(fields)} if metadata is None else metadata
    path.write_bytes(safetensors.torch.save(tensors or safetensors.torch.load(data), metadata))


@pytest.fixture
def path(tmp_path, make_lidb):
    save(make_lidb(0, 2), tmp_path / "person.safetensors")
    return tmp_path / "person.safetensors"


@pytest.mark.parametrize(("bits", "error"), [(COMPACT, 5e-2), (HALF, 1e-3), (FULL, 1e-6)])
def test_round_trip(tmp_path, make_lidb, bits, error):
    lidb = make_lidb(0, 3)
    save(lidb, tmp_path / "p.safetensors", bits=bits)
    loaded = load(tmp_path / "p.safetensors")
    assert loaded.layout == lidb.layout and loaded.basis == lidb.basis and loaded.info == lidb.info
    assert loaded.down.dtype == loaded.up.dtype == torch.float32
    assert (core(loaded) - core(lidb)).norm() <= error * norm(lidb)


def test_a_loaded_person_saves_to_the_same_numbers(path, tmp_path):
    first = load(path)
    save(first, tmp_path / "again.safetensors")
    assert 1 - cosine(first, load(tmp_path / "again.safetensors")) < 1e-6


def test_sizes_on_sd1(tmp_path):
    layout, path = sd1_layout(), tmp_path / "p.safetensors"
    assert layout.describe() == "SD 1.x, 128 UNet + 48 text layers"
    rank1 = random_lidb(layout, 1)
    assert rank1.num_values == 26_400
    assert save(rank1, path) == path.stat().st_size <= 64_000
    components = DEFAULT_RANK * len(layout.layers)
    size = save(random_lidb(layout, 5), path, rank=DEFAULT_RANK, bits=COMPACT)
    names_and_header = size - components * read_header(path).component_bytes
    assert 0 < names_and_header < 4_000

    blocks = [f"unet.{side}_blocks.{i}.resnets.{j}" for side in ("down", "up") for i in range(4) for j in range(4)]
    convolutions = [Layer(f"{block}.conv{k}", 1280, 1280) for block in blocks for k in (1, 2)][:58]
    layout = Layout("sd1", (*layout.layers, *convolutions))
    assert save(random_lidb(layout, DEFAULT_RANK), path, rank=DEFAULT_RANK, bits=COMPACT) <= 120_000
    assert sum(read_header(path).ranks) == 4 * 234


def test_a_shared_down_side_costs_nothing(tmp_path, make_lidb):
    lidb, path = make_lidb(0, 3), tmp_path / "p.safetensors"
    shared = LiDB(lidb.layout, lidb.basis, start_down(lidb.basis, lidb.layout, 3), lidb.up)
    assert save(shared, path) < save(lidb, tmp_path / "q.safetensors") - 2 * 3 * lidb.basis.down_dim * 10
    assert read_header(path).shared_down
    assert torch.equal(load(path).down, shared.down)
    torch.testing.assert_close(load(path).up, shared.up, atol=1e-3, rtol=1e-3)


def test_truncates_on_request(tmp_path, make_lidb):
    lidb, path = make_lidb(0, 4), tmp_path / "p.safetensors"
    smaller = LiDB(lidb.layout, lidb.basis, lidb.down, lidb.up * torch.linspace(1, 9, len(lidb.up))[:, None, None])
    save(smaller, path, rank=2)
    kept = strongest(smaller, 2 * len(lidb.up))
    assert read_header(path).rank == kept.rank > 2 and sum(read_header(path).ranks) == 2 * len(lidb.up)
    assert (core(load(path)) - core(kept)).norm() < 1e-3 * norm(smaller)
    assert (core(kept) - core(smaller)).norm() < (core(truncate(smaller, 2)) - core(smaller)).norm()


@pytest.mark.parametrize("dims", [(7, 5), (9, 6), (8, 7)])  # of numbers that do not fill their last bytes
def test_six_bits_change_a_number_by_a_60th_of_its_row_at_most(tmp_path, make_lidb, dims):
    layout = Layout("sd1", make_lidb().layout.layers[:1])
    lidb = truncate(random_lidb(layout, 1, BasisRecipe(0, *dims)), 1)
    save(lidb, tmp_path / "p.safetensors", bits=COMPACT)
    loaded = load(tmp_path / "p.safetensors")
    for row, stored in ((lidb.down[0, 0], loaded.down[0, 0]), (lidb.up[0, :, 0], loaded.up[0, :, 0])):
        assert 0 < (stored - row).abs().max() <= row.abs().max() / 60


def test_files_of_the_second_version_are_read(tmp_path, make_lidb):
    lidb, path = truncate(make_lidb(0, 2), 2), tmp_path / "p.safetensors"
    ranks = [2] * len(lidb.down)
    fields = container.space_fields(lidb.layout, lidb.basis)
    fields |= {"rank": 2, "ranks": ranks, "down": "stored", "dtype": "int8", "info": {}}
    tensors = {}
    for name, rows in (("down", lidb.down.flatten(0, 1)), ("up", lidb.up.mT.flatten(0, 1))):
        scale = rows.abs().amax(1) / 127
        tensors |= {name: (rows / scale[:, None]).round().to(torch.int8), f"{name}_scale": scale}
    container.write(replace(KIND, version=2), path, fields, tensors)
    assert (core(load(path)) - core(lidb)).norm() <= 2e-2 * norm(lidb)
    components = sum(ranks)
    assert read_header(path).component_bytes * components == sum(t.numel() * t.element_size() for t in tensors.values())


def test_files_of_the_first_version_are_read(tmp_path, make_lidb):
    lidb, path = make_lidb(0, 2), tmp_path / "p.safetensors"
    fields = container.space_fields(lidb.layout, lidb.basis) | {"rank": 2, "down": "stored", "info": {}}
    container.write(replace(KIND, version=1), path, fields, {"down": lidb.down, "up": lidb.up})
    assert torch.equal(load(path).up, lidb.up) and torch.equal(load(path).down, lidb.down)


def test_a_person_that_changes_nothing_has_a_file(tmp_path, make_lidb):
    lidb, path = make_lidb(0, 2), tmp_path / "p.safetensors"
    save(LiDB(lidb.layout, lidb.basis, lidb.down, torch.zeros_like(lidb.up)), path)
    assert not core(load(path)).any()


def test_rank_zero_is_refused(tmp_path, make_lidb):
    with pytest.raises(LiDBError, match="at least 1"):
        save(make_lidb(), tmp_path / "p.safetensors", rank=0)
    assert not list(tmp_path.iterdir())


def test_factors_beyond_float16_are_balanced(tmp_path, make_lidb):
    lidb, path = make_lidb(0, 2), tmp_path / "p.safetensors"
    lopsided = LiDB(lidb.layout, lidb.basis, lidb.down * 1e-6, lidb.up * 1e6)
    save(lopsided, path)
    assert (core(load(path)) - core(lidb)).norm() < 1e-3 * norm(lidb)


def test_the_header_is_readable_without_tensors(path, make_lidb):
    header = read_header(path)
    assert (header.layout, header.basis, header.rank) == (make_lidb().layout, make_lidb().basis, 2)
    assert header.info["prompt"] == "a [v] face"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_what_is_not_finite_is_not_written(path, make_lidb, value):
    before, lidb = path.read_bytes(), make_lidb(0, 2)
    lidb.up[1, 0, 0] = value
    lidb.down[1, :, 0] = max(value, 1.0)
    with pytest.raises(LiDBFileError, match="nothing was written"):
        save(lidb, path)
    assert path.read_bytes() == before


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(path, make_lidb, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(LiDBFileError, match="No space left"):
        save(make_lidb(1, 2), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path, make_lidb):
    with pytest.raises(LiDBFileError, match=r"Cannot write 'p.safetensors' into .*nowhere"):
        save(make_lidb(), tmp_path / "nowhere" / "p.safetensors")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_folder_is_named(tmp_path, make_lidb):
    tmp_path.chmod(0o500)
    with pytest.raises(LiDBFileError, match="writable"):
        save(make_lidb(), tmp_path / "p.safetensors")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nobody.safetensors")


@pytest.mark.parametrize("content", [b"", b"abc", b"<!DOCTYPE html><html>Not found</html>", b"PK\x03\x04" + bytes(60)])
def test_other_kinds_of_files(tmp_path, content):
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with pytest.raises(LiDBFileError, match="not in the safetensors format"):
        load(path)


def test_a_lora_is_named_as_such(tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(safetensors.torch.save({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}))
    with pytest.raises(LiDBFileError, match="ordinary LoRA"):
        load(path)
    path.write_bytes(safetensors.torch.save({"model.weight": torch.zeros(2, 2)}))
    with pytest.raises(LiDBFileError, match="not a LiDB"):
        load(path)


@pytest.mark.parametrize("keep", [7, 8, 40, 400, -1, -100])
def test_truncated_files(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LiDBFileError):
        load(path)


def test_truncated_numbers_are_counted(path):
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LiDBFileError, match=r"damaged or incomplete: expected [\d,]+ bytes"):
        load(path)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_flipped_bit_is_found(path, place):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)
    with pytest.raises(LiDBFileError):
        load(path)


def set_field(name, value):
    return lambda fields: fields.update({name: value})


def remove_field(name):
    return lambda fields: fields.pop(name)


def rename_a_layer(fields):
    layers = json.loads(zlib.decompress(base64.b64decode(fields["layers"])))
    layers[0][0] += "x"
    fields["layers"] = base64.b64encode(zlib.compress(json.dumps(layers).encode())).decode()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_field("format_version", 4), "format version 1 to 3.*has version 4"),
        (remove_field("format_version"), "has version None"),
        (lambda fields: fields["basis"].update(seed=8), "another basis"),
        (lambda fields: fields["basis"].update(stream="other"), "another basis"),
        (lambda fields: fields["basis"].update(version=2), "basis of version 1, got 2"),
        (lambda fields: fields["basis_probe"].__setitem__(0, 0.5), "another basis"),
        (set_field("family", "sdxl"), "does not match its hash"),
        (rename_a_layer, "does not match its hash"),
        (set_field("layers", "?"), "garbles"),
        (set_field("layers", "AAAA"), "garbles"),
        (set_field("rank", "two"), "garbles"),
        (set_field("rank", 3), "damaged"),
        (set_field("ranks", [2]), "garbles"),
        (set_field("ranks", ["two"]), "garbles"),
        (set_field("info", []), "garbles"),
        (remove_field("checksum"), "do not match its checksum"),
        (set_field("down", "shared"), "checksum"),
        (remove_field("basis"), "lacks"),
    ],
)
def test_headers_that_do_not_fit(path, edit, message):
    rewrite(path, edit)
    with pytest.raises(LiDBFileError, match=message):
        load(path)


def test_a_header_that_is_no_json(path):
    rewrite(path, metadata={"lidb": "["})
    with pytest.raises(LiDBFileError, match="header is not readable"):
        load(path)
    rewrite_raw = safetensors.torch.load(path.read_bytes())
    path.write_bytes(safetensors.torch.save(rewrite_raw, {"lidb": "[]"}))
    with pytest.raises(LiDBFileError, match="version None"):
        load(path)


def test_tensors_that_do_not_fit(path):
    tensors = safetensors.torch.load(path.read_bytes())
    rewrite(path, tensors={"up": tensors["up"]})
    with pytest.raises(LiDBFileError, match="damaged"):
        load(path)


def test_nan_with_an_honest_checksum(path):
    from hdb_core.container import checksum

    tensors = safetensors.torch.load(path.read_bytes())
    tensors["up"][0, 0] = float("nan")
    rewrite(path, lambda fields: fields.update(checksum=checksum(fields, tensors)), tensors)
    with pytest.raises(LiDBFileError, match="holds NaN"):
        load(path)
