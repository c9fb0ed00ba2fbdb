"""The file: round trip, size, atomic writing, and a plain refusal of everything else."""

import base64
import json
import os
import zlib
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from hdb_core.basis import BasisRecipe
from hdb_core.errors import LiDBError, LiDBFileError
from hdb_core.files import container
from hdb_core.files.lidb import COMPACT, DEFAULT_RANK, FULL, HALF, MAX_COUNT, load, read_header, save
from hdb_core.finetuning import FinetuneConfig
from hdb_core.finetuning.factors import describe
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import About, LiDB, core, norm, strongest, truncate
from hdb_core.recommended import Strengths


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
    return LiDB(layout, recipe, down, up, About(steps=40))


def rewrite(path, edit=lambda fields: None, tensors=None, metadata=None, sign=True):
    """Save a file again with another header, and an honest checksum if there is one."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lidb"])
    tensors = tensors or safetensors.torch.load(data)
    edit(fields)
    if sign and "checksum" in fields:
        fields["checksum"] = container.checksum(fields, tensors)
    metadata = {"lidb": json.dumps(fields)} if metadata is None else metadata
    path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.fixture
def path(tmp_path, make_lidb):
    save(make_lidb(0, 2), tmp_path / "person.safetensors")
    return tmp_path / "person.safetensors"


@pytest.mark.parametrize("size", [1e-15, 1e-10, 1.0, 1e10])
@pytest.mark.parametrize(("bits", "error"), [(COMPACT, 5e-2), (HALF, 1e-3), (FULL, 1e-6)])
def test_round_trip(tmp_path, make_lidb, bits, error, size):
    lidb = make_lidb(0, 3)
    lidb = replace(lidb, down=lidb.down * size, up=lidb.up * size)
    save(lidb, tmp_path / "p.safetensors", bits=bits)
    loaded = load(tmp_path / "p.safetensors")
    assert loaded.layout == lidb.layout and loaded.basis == lidb.basis and loaded.about == lidb.about
    assert loaded.down.dtype == loaded.up.dtype == torch.float32
    cores = [one.up.double() @ one.down.double() for one in (loaded, lidb)]
    assert (cores[0] - cores[1]).norm() <= error * cores[1].norm()


@pytest.mark.parametrize("rank", [2, 5])
def test_a_loaded_person_saves_to_the_same_file(tmp_path, make_lidb, rank):
    """A name or a thumbnail that is given later costs no likeness; 6 bits lost 2 to 3 percent of the person each time."""
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    lidb = make_lidb(0, 5)
    save(replace(lidb, up=lidb.up * torch.arange(1, 6)), first, rank, COMPACT)
    save(load(first), again, rank, COMPACT)
    assert again.read_bytes() == first.read_bytes()


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
    convolutions = [Layer(f"{block}.conv{k}", 11520, 1280) for block in blocks for k in (1, 2)][:58]
    layout = Layout("sd1", (*layout.layers, *convolutions))
    assert save(random_lidb(layout, DEFAULT_RANK), path, rank=DEFAULT_RANK, bits=COMPACT) <= 120_000
    assert sum(read_header(path).ranks) == 4 * 234


def test_truncates_on_request(tmp_path, make_lidb):
    lidb, path = make_lidb(0, 4), tmp_path / "p.safetensors"
    smaller = LiDB(lidb.layout, lidb.basis, lidb.down, lidb.up * torch.linspace(1, 9, len(lidb.up))[:, None, None])
    save(smaller, path, rank=2)
    kept = strongest(smaller, 2 * len(lidb.up))
    assert max(read_header(path).ranks) == kept.rank > 2 and sum(read_header(path).ranks) == 2 * len(lidb.up)
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


def test_a_person_that_changes_nothing_has_a_file(tmp_path, make_lidb):
    lidb, path = make_lidb(0, 2), tmp_path / "p.safetensors"
    save(LiDB(lidb.layout, lidb.basis, lidb.down, torch.zeros_like(lidb.up)), path)
    assert not core(load(path)).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rank": 0}, "at least 1"), ({"rank": 1.5}, "rank: a whole number"), ({"rank": "2"}, "rank: a whole number"),
     ({"bits": 8}, "bits: 6, 16 or 32, got 8"), ({"bits": None}, "bits: 6, 16 or 32"), ({"bits": [6]}, "bits: 6, 16 or 32")],
)  # fmt: skip
def test_wrong_arguments_are_refused(tmp_path, make_lidb, wrong, message):
    with pytest.raises(LiDBError, match=message):
        save(make_lidb(), tmp_path / "p.safetensors", **wrong)
    assert not list(tmp_path.iterdir())


def test_factors_beyond_float16_are_balanced(tmp_path, make_lidb):
    lidb, path = make_lidb(0, 2), tmp_path / "p.safetensors"
    lopsided = LiDB(lidb.layout, lidb.basis, lidb.down * 1e-6, lidb.up * 1e6)
    save(lopsided, path)
    assert (core(load(path)) - core(lidb)).norm() < 1e-3 * norm(lidb)


def test_the_header_is_readable_without_tensors(path, make_lidb):
    header = read_header(path)
    assert (header.layout, header.basis, header.about) == (make_lidb().layout, make_lidb().basis, make_lidb().about)
    assert header.ranks == (2,) * len(header.layout.layers)


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


def about_field(name, value):
    return lambda fields: fields["about"].update({name: value})


def remove_field(name):
    return lambda fields: fields.pop(name)


def rename_a_layer(fields):
    layers = json.loads(zlib.decompress(base64.b64decode(fields["layers"])))
    layers[0][0] += "x"
    fields["layers"] = base64.b64encode(zlib.compress(json.dumps(layers).encode())).decode()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_field("format_version", 2), "format version 1, .*has version 2"),
        (remove_field("format_version"), "has version None"),
        (lambda fields: fields["basis"].update(seed=8), "another basis"),
        (lambda fields: fields["basis"].update(stream="other"), "another basis"),
        (lambda fields: fields["basis"].update(version=2), "basis of version 1, got 2"),
        (lambda fields: fields["basis_probe"].__setitem__(0, 0.5), "another basis"),
        (set_field("family", "sdxl"), "does not match its hash"),
        (rename_a_layer, "does not match its hash"),
        (set_field("layers", "?"), "garbles"),
        (set_field("layers", "AAAA"), "garbles"),
        (set_field("ranks", [2]), "garbles"),
        (set_field("ranks", ["two"]), "garbles"),
        (set_field("ranks", [0] * 16), "garbles"),
        (set_field("dtype", "int4"), "garbles"),
        (set_field("about", []), "garbles"),
        (about_field("made_from", "clay"), "garbles"),
        (about_field("steps", "many"), "garbles"),
        (about_field("name", 7), "garbles"),
        (about_field("colour", "red"), "garbles"),
        (about_field("strengths", [1, 2]), "garbles"),
        (about_field("strengths", {"model": 1, "clip": 1, "guidance": 2}), "strengths|Strengths"),
        (about_field("strengths", [1, 1, 0.5]), r"garbles a field \(strengths\)"),
        (
            lambda fields: fields.update(basis_probe=list(map(str, fields["basis_probe"]))),
            "basis_probe: expected float",
        ),
        (set_field("ranks", [1] * 5000), "a list of 5,000 items"),
        (about_field("strengths", [1, 2, float("inf")]), "garbles"),
        (remove_field("checksum"), "do not match its checksum"),
        (remove_field("basis"), "lacks"),
    ],
)
def test_headers_that_do_not_fit(path, edit, message):
    rewrite(path, edit)
    with pytest.raises(LiDBFileError, match=message):
        load(path)


def test_a_header_that_is_no_json(path):
    rewrite(path, metadata={"lidb": "["})
    with pytest.raises(LiDBFileError, match="garbles a field"):
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


def test_a_changed_header_does_not_fit_its_checksum(path):
    rewrite(path, about_field("steps", 41), sign=False)
    with pytest.raises(LiDBFileError, match="do not match its checksum"):
        load(path)


def test_nan_with_an_honest_checksum(path):
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["up"][0, 0] = float("nan")
    rewrite(path, tensors=tensors)
    with pytest.raises(LiDBFileError, match="holds NaN"):
        load(path)


@pytest.mark.parametrize("bits", [COMPACT, HALF])
@pytest.mark.parametrize("edit", ["missing", "longer", "another type", "more"])
def test_tensors_with_an_honest_checksum_that_do_not_fit(tmp_path, make_lidb, bits, edit):
    path = tmp_path / "p.safetensors"
    save(make_lidb(0, 2), path, bits=bits)
    tensors = safetensors.torch.load(path.read_bytes())
    changed = {
        "missing": {name: t for name, t in tensors.items() if not name.startswith("up")},
        "longer": tensors | {"down": torch.cat([tensors["down"], tensors["down"][:1]])},
        "another type": tensors | {"down": tensors["down"].view(torch.int8)},
        "more": tensors | {"third": torch.zeros(3)},
    }[edit]
    rewrite(path, tensors=changed)
    with pytest.raises(LiDBFileError, match="damaged"):
        load(path)


@pytest.mark.parametrize(
    ("name", "value"), [("down_scale", -1.0), ("up_scale", 0.0), ("up_scale", float("nan")), ("down", 0)]
)
def test_numbers_that_no_writer_gives_are_refused(tmp_path, make_lidb, name, value):
    """Scales that turn a row round, and the code of -32."""
    path = tmp_path / "p.safetensors"
    save(make_lidb(0, 2), path, bits=COMPACT)
    tensors = safetensors.torch.load(path.read_bytes())
    tensors[name][0] = value
    rewrite(path, tensors=tensors)
    with pytest.raises(LiDBFileError, match=r"scale of no size|out of its range"):
        load(path)


@pytest.mark.parametrize("learned", ["\x1b[2J" + "0" * 60, "0" * 100_000, "\n"])
def test_texts_of_a_file_are_shown_in_one_line(path, learned):
    rewrite(path, lambda fields: fields["basis"].update(learned=learned))
    with pytest.raises(LiDBFileError, match="Expected the hash of a learned basis") as error:
        load(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_half_a_character_in_a_name_is_refused(path):
    for edit in (about_field("name", "\ud800"), lambda fields: fields.update(family="\ud800")):
        rewrite(path, edit)
        with pytest.raises(LiDBFileError, match="garbles") as error:
            load(path)
        str(error.value).encode()


def test_sizes_that_overflow_are_damage(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["down"] = {"dtype": "F16", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    header["up"] = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(LiDBFileError, match="damaged"):
        load(path)


@pytest.mark.parametrize(
    ("about", "message"),
    [(About(thumbnail="A" * 1_100_000), "header"), (About(strengths=Strengths(101, 1, 1)), "strengths"),
     (About(photos=-1), "photos"), (About(made_from="clay"), "made_from"), (About(strengths=Strengths(1, 1, 0.5)), "strengths"),
     (About(prompt="face " * 401), "prompt"), (About(token="v" * 2001), "prompt"), (About(name="\ud800"), "surrogates"), (About(model=object()), "not JSON")],
    ids=["thumbnail", "strengths", "photos", "made_from", "guidance", "prompt", "token", "half a character", "no text"],
)  # fmt: skip
def test_what_could_not_be_read_is_not_written(tmp_path, make_lidb, about, message):
    with pytest.raises(LiDBFileError, match=rf"(?s){message}.*nothing was written"):
        save(replace(make_lidb(), about=about), tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_who_goes_on_from_a_file_of_the_most_steps_can_be_saved(tmp_path, make_lidb):
    """A stranger's file may say so."""
    lidb = make_lidb()
    old = replace(lidb, about=replace(lidb.about, steps=MAX_COUNT))
    new = replace(lidb, about=describe(FinetuneConfig(), 1, old, 5))
    save(new, tmp_path / "p.safetensors")
    assert load(tmp_path / "p.safetensors").about.steps == MAX_COUNT
