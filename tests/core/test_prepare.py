"""Photos prepared for a training: what is kept, what is dropped and why, what belongs to them."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from hdb_core.errors import HyperNetError
from hdb_core.faces import Box, cut_out, oval, square_of
from hdb_core.train import photos as command
from hdb_core.train.data.photos import Photo, find_people, read_bytes
from hdb_core.train.data.prepare import Checks, _Sheet, prepare
from hdb_core.train.photos import main

CHECKS = Checks(size=192, smallest=128)


def picture(seed, size=(160, 160)):
    generator = torch.Generator().manual_seed(seed)
    coarse = Image.fromarray((255 * torch.rand(5, 5, 3, generator=generator)).byte().numpy()).resize(size)
    fine = Image.fromarray((255 * torch.rand(*size[::-1], 3, generator=generator)).byte().numpy())
    return Image.blend(coarse, fine, 0.2)


def picture_of(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(0).save(path)


def contents(folder):
    return {read_bytes(photo.path) for person in find_people(folder) for photo in person.photos}


@pytest.fixture
def source(tmp_path):
    """Anna: a good photo, the same one again, saved anew, a blurred and a tiny one, no picture; ben is single."""
    folder = tmp_path / "source"
    (folder / "anna").mkdir(parents=True)
    picture(0).save(folder / "anna" / "1.png")
    (folder / "anna" / "1.txt").write_text("smiling\n")
    picture(0).save(folder / "anna" / "2.png")
    picture(0).save(folder / "anna" / "3.jpg", quality=90)
    picture(1).filter(ImageFilter.GaussianBlur(5)).save(folder / "anna" / "4.png")
    picture(2, (200, 80)).save(folder / "anna" / "5.png")
    (folder / "anna" / "6.png").write_text("no picture")
    picture(3, (360, 240)).save(folder / "anna" / "7.png")
    Image.linear_gradient("L").resize((360, 240)).save(folder / "anna" / "7.mask.png")
    picture(4).save(folder / "ben.png")
    return folder


def test_what_is_kept_and_what_is_dropped(source, tmp_path):
    into = tmp_path / "data"
    counted = prepare(source, into, CHECKS)
    assert counted == {"kept": 3, "double": 2, "blurred": 1, "tiny": 1, "unreadable": 1, "people": 2}
    with (into / "photos.csv").open() as file:
        dropped = {row["file"].rpartition("/")[2]: row["dropped"] for row in csv.DictReader(file)}
    assert dropped == {
        "1.png": "", "2.png": "double", "3.jpg": "double", "4.png": "blurred", "5.png": "tiny", "6.png": "unreadable",
        "7.png": "", "ben.png": "",
    }  # fmt: skip
    anna, ben = find_people(into / "photos")
    assert (anna.name, ben.name) == ("anna", "ben")
    whole, cut = anna.photos
    # One that is as it should be is copied; others are cut and reduced, with their mask.
    assert whole.path.read_bytes() == (source / "anna" / "1.png").read_bytes()
    assert whole.words == "smiling" and whole.mask is None
    assert cut.size() == (192, 192)
    assert json.loads((into / "photos" / "prepared.json").read_text()) == {"cut": "centre"}
    before, after = (find_people(folder)[0].photos[-1] for folder in (source, into / "photos"))
    assert (before.pixels(24) - after.pixels(24)).abs().mean() < 0.03
    torch.testing.assert_close(before.region(8, 8), after.region(8, 8), atol=0.03, rtol=0)
    with Image.open(into / "report.png") as sheet:
        assert sheet.width > 300 and len(sheet.getcolors(1 << 24)) > 1000


@pytest.mark.parametrize("size", [(180, 120), (720, 480), (361, 240)])
def test_masks_of_another_resolution(source, tmp_path, size):
    """They were cut as if they had the photo's: half a mask lay beside its face, and of a large one a corner was kept."""
    mask = source / "anna" / "7.mask.png"
    prepare(source, tmp_path / "same", CHECKS)
    Image.linear_gradient("L").resize(size).save(mask)
    prepare(source, tmp_path / "other", CHECKS)
    same, other = (find_people(tmp_path / name / "photos")[0].photos[-1] for name in ("same", "other"))
    torch.testing.assert_close(same.region(8, 8), other.region(8, 8), atol=0.03, rtol=0)
    Image.linear_gradient("L").resize((240, 240)).save(mask)
    assert prepare(source, tmp_path / "none", CHECKS)["mask of other shape"] == 1


def test_ctrl_c_ends_with_a_sentence(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hdb_core.train.photos.prepare", Mock(side_effect=KeyboardInterrupt))
    assert main([str(source), "--into", str(tmp_path / "data")]) == 130
    assert "Stopped. The same command begins again." in capsys.readouterr().err


def test_a_sharpness_that_makes_no_sense_is_refused(source, tmp_path, capsys):
    assert main([str(source), "--into", str(tmp_path / "data"), "--least-sharpness", "nan"]) == 1
    assert "Expected least_sharpness: from 0 to 1, got nan" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["size", "smallest"])
@pytest.mark.parametrize("value", [-1, 0, 1, 100_000])
def test_sizes_that_make_no_sense_are_refused(source, tmp_path, capsys, name, value):
    assert main([str(source), "--into", str(tmp_path / "data"), f"--{name}", str(value)]) == 1
    assert f"Expected {name}: from 2 to 8,192" in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_shards_are_the_same_as_folders(source, tmp_path):
    for seed in range(5, 9):
        (source / str(seed)).mkdir()
        for number in range(2):
            picture(10 * seed + number).save(source / str(seed) / f"{number}.png")
    prepare(source, tmp_path / "plain", CHECKS)
    prepare(source, tmp_path / "shards", CHECKS, shard_bytes=200_000)
    shards = sorted(path.name for path in (tmp_path / "shards" / "photos").glob("*.tar"))
    assert len(shards) > 1 and shards[0] == "shard_00000.tar"
    plain, stored = (find_people(tmp_path / name / "photos") for name in ("plain", "shards"))
    assert sorted(person.name for person in plain) == sorted(person.name for person in stored)
    for one, other in zip(plain, sorted(stored, key=lambda person: person.name), strict=True):
        for photo, same in zip(one.photos, other.photos, strict=True):
            assert photo.words == same.words
            assert torch.equal(photo.whole(), same.whole())
            assert torch.equal(photo.region(4, 4), same.region(4, 4))


def test_captions_of_a_data_set(source, tmp_path):
    rows = [{"file_name": "ben.png", "text": "at the beach"}, {"file_name": "anna/1.png", "text": "other words"}]
    (source / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    prepare(source, tmp_path / "data", CHECKS)
    anna, ben = find_people(tmp_path / "data" / "photos")
    assert ben.photos[0].words == "at the beach"
    assert anna.photos[0].words == "smiling"  # its own file counts
    (source / "metadata.jsonl").write_text('{"image": "ben.png"}')
    with pytest.raises(HyperNetError, match=r"metadata\.jsonl cannot be read"):
        prepare(source, tmp_path / "other", CHECKS)
    (source / "metadata.jsonl").write_text(
        '{"file_name": "train/ben.png", "text": "of another folder: left out untold"}'
    )
    with pytest.raises(HyperNetError, match=r"metadata\.jsonl names no photo of .*, but .*train/ben\.png"):
        prepare(source, tmp_path / "other", CHECKS)


SAID = {
    '{"file_name": "ben.png", "text": null}': "",
    '\ufeff{"file_name": "ben.png", "caption": "at\u2028night"}': "at\u2028night",
    '{"file_name": "Zo\u00eb.png", "text": "other normal form"}': "other normal form",
}


@pytest.mark.parametrize("line", SAID)
def test_captions_as_others_write_them(tmp_path, line):
    name = "Zoe\u0308.png" if "Zo" in line else "ben.png"
    picture_of(tmp_path / "source" / name)
    (tmp_path / "source" / "metadata.jsonl").write_text(line, encoding="utf-8")
    prepare(tmp_path / "source", tmp_path / "data", CHECKS)
    (person,) = find_people(tmp_path / "data" / "photos")
    assert person.photos[0].words == SAID[line]


TEXTS = {"3": "3", "list": '["a"]', "half": r'"\ud800"', "deep": "[" * 100_000, "long": f'"{"a" * 2001}"'}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_captions_that_are_no_texts(tmp_path, text):
    picture_of(tmp_path / "source" / "ben.png")
    (tmp_path / "source" / "metadata.jsonl").write_text('{"file_name": "ben.png", "text": ' + text + "}")
    with pytest.raises(HyperNetError, match=r"metadata\.jsonl cannot be read"):
        prepare(tmp_path / "source", tmp_path / "data", CHECKS)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("options", "written"), [([], "anna"), (["--shards", "1"], "shard_00000.partial")])
def test_after_a_full_disk_the_same_command_goes_on(source, tmp_path, monkeypatch, capsys, options, written):
    """What the system says of a full disk names no file. Until all is written there is nothing to train on."""
    write, add = Path.write_bytes, tarfile.TarFile.addfile

    def full(target, data):
        if target.parent.name == "anna":
            raise OSError(28, "No space left on device")
        return write(target, data)

    def full_shard(shard, header, file):
        if header.name.startswith("anna"):
            raise OSError(28, "No space left on device")
        return add(shard, header, file)

    def command(into):
        return main([str(source), "--into", str(into), "--smallest", "128", *options])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        patch.setattr(tarfile.TarFile, "addfile", full_shard)
        assert command(tmp_path / "data") == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and str(tmp_path / "data" / "photos.partial" / written) in said
    with pytest.raises(HyperNetError, match="There is no folder"):
        find_people(tmp_path / "data" / "photos")
    assert command(tmp_path / "data") == command(tmp_path / "other") == 0
    made, expected = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("data", "other")
    )
    assert made == expected
    assert command(tmp_path / "data") == 1
    assert "holds something already" in capsys.readouterr().err


def test_only_the_photos_of_a_stopped_command_are_replaced(source, tmp_path):
    into = tmp_path / "data"
    (into / "photos.partial").mkdir(parents=True)
    (into / "report.png").write_text("mine")
    with pytest.raises(HyperNetError, match="holds something already"):
        prepare(source, into, CHECKS)
    assert (into / "report.png").read_text() == "mine"
    (into / "report.png").unlink()
    (into / "photos.partial").rmdir()
    (into / "photos.partial").symlink_to(source)
    with pytest.raises(HyperNetError, match="holds something already"):
        prepare(source, into, CHECKS)
    (into / "photos.partial").unlink()
    picture_of(mine := into / "photos.partial" / "anna" / "1.png")
    with pytest.raises(HyperNetError, match="holds something already"):
        prepare(source, into, CHECKS)
    assert mine.exists()
    (into / "photos.partial" / "prepared.json").write_text('{"cut": "centre"}')
    (into / "notes.txt").write_text("mine")
    with pytest.raises(HyperNetError, match="holds something already"):
        prepare(source, into, CHECKS)
    (into / "notes.txt").unlink()
    assert prepare(source, into, CHECKS)["kept"] == 3
    assert not (into / "photos.partial").exists()


def test_a_command_that_was_stopped_at_its_report_begins_anew(source, tmp_path, monkeypatch):
    into = tmp_path / "data"

    def killed(sheet):
        (into / ".hdb-1.partial").write_bytes(b"half")  # a kill cleans nothing up
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Sheet, "image", killed)
        prepare(source, into, CHECKS)
    assert {path.name for path in into.iterdir()} == {"photos.partial", "photos.csv", ".hdb-1.partial"}
    assert prepare(source, into, CHECKS)["kept"] == 3
    assert {path.name for path in into.iterdir()} == {"photos", "photos.csv", "report.png"}


def test_photos_in_formats_that_are_not_read(source, tmp_path):
    """A telephone's were passed over, and who had no others was missing."""
    (source / "anna" / "8.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    picture(8).save(source / "zoe.bmp")
    counted = prepare(source, tmp_path / "data", CHECKS)
    assert (counted["kept"], counted["unreadable"], counted["people"]) == (4, 2, 3)
    with pytest.raises(HyperNetError, match=r"8\.HEIC cannot be read as a picture \(it is none of PNG, JPEG"):
        find_people(source)[0].photos[-1].pixels(16)


def test_the_folder_around_the_prepared_photos(source, tmp_path):
    """It was trained on as a person called report, and one of all people's single photos."""
    into = tmp_path / "data"
    prepare(source, into, CHECKS)
    with pytest.raises(HyperNetError, match=r"are in .*photos. Give that folder"):
        find_people(into)


# Names of people in a shard, as nobody's folder can be called on every system.
FOREIGN = (
    "..",
    "../../up",
    "a/b",
    "a_b",
    "A_B",
    "a\\b",
    "con",
    "x.",
    "x",
    "\udcff",
    "new\nline",
    "long" * 90,
    "y.mask",
    "z.MASK. ",
    "NUL\0",
    "." * 250 + "x",
    "anna",
    "anna.png",
    "single",
    "prepared.json",
)


@pytest.mark.parametrize("shard_bytes", [0, 10**9], ids=["folders", "shards"])
def test_foreign_names_of_people_stay_inside_and_apart(tmp_path, shard_bytes):
    (tmp_path / "source").mkdir()
    with tarfile.open(tmp_path / "source" / "foreign.tar", "w") as shard:
        for seed, name in enumerate(FOREIGN):
            for number in range(1 + seed % 2):
                picture(10 * seed + number).save(file := io.BytesIO(), "PNG")
                header = tarfile.TarInfo("any")
                header.size, header.pax_headers = file.tell(), {"path": f"{name}/{number}.png"}
                file.seek(0)
                shard.addfile(header, file)
    counted = prepare(tmp_path / "source", tmp_path / "data", CHECKS, shard_bytes=shard_bytes)
    people = find_people(tmp_path / "data" / "photos")
    assert counted["people"] == len(people) == len({person.name.casefold() for person in people}) == len(FOREIGN)
    assert contents(tmp_path / "data" / "photos") == contents(tmp_path / "source")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"photos", "photos.csv", "report.png"}


# The boxes of a detector, by the size of the photo, and what becomes of it.
FOUND = {
    (160, 160): ([], "no face"),
    (200, 80): ([Box(0, 0, 20, 24)], "tiny"),  # too small to say where its square is
    (360, 240): ([Box(0, 0, 46, 60), Box(220, -10, 95, 130)], ""),  # with someone in the background
    (300, 300): ([Box(20, 60, 96, 130), Box(180, 60, 80, 110)], "several faces"),
    (192, 192): ([Box(20, 40, 104, 143)], ""),  # its square is as large as the photo, and stands elsewhere
}


def test_photos_are_cut_to_faces(source, tmp_path):
    picture(5, (300, 300)).save(source / "anna" / "8.png")
    picture(6, (192, 192)).save(source / "anna" / "9.png")
    into = tmp_path / "data"
    counted = prepare(source, into, CHECKS, lambda pixels: FOUND[pixels.shape[:0:-1]][0])
    assert counted == {"kept": 2, "no face": 5, "unreadable": 1, "tiny": 1, "several faces": 1, "people": 1}
    assert json.loads((into / "photos" / "prepared.json").read_text()) == {"cut": "face"}
    with (into / "photos.csv").open() as file:
        dropped = {row["file"].rpartition("/")[2]: row["dropped"] for row in csv.DictReader(file)}
    for path in source.rglob("*.png"):
        if path.name not in ("6.png", "7.mask.png"):
            assert dropped[path.name] == FOUND[Image.open(path).size][1]

    (anna,) = find_people(into / "photos")
    with_mask, without = anna.photos
    x, y, side = square_of(FOUND[360, 240][0][1])
    assert with_mask.size() == (side, side) and y < 0
    before = find_people(source)[0].photos[-3]
    assert (with_mask.whole()[:, -y:] - before.whole()[:, : side + y, x : x + side]).abs().mean() < 0.05
    rows = with_mask.whole()[:, :-y]  # beyond the edge, it is repeated
    assert all((one - other).abs().mean() < 0.1 for one, other in pairwise(rows.unbind(1)))
    own, given = (Photo(photo.mask).whole()[0] for photo in (with_mask, before))
    torch.testing.assert_close(own[-y:], given[: side + y, x : x + side], atol=1 / 255, rtol=0)

    x, y, side = square = square_of(FOUND[192, 192][0][0])
    assert side == 192 and (x, y) != (0, 0)
    uncut = find_people(source)[0].photos[-1].whole()
    assert (without.whole() - cut_out(uncut, square)).abs().mean() < 0.02 < (without.whole() - uncut).abs().mean()
    face = oval(FOUND[192, 192][0][0], square)
    torch.testing.assert_close(Photo(without.mask).whole()[0], face, atol=1 / 255, rtol=0)


def test_the_command_says_that_it_lacks_a_detector(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.detectors, "has_opencv", lambda: False)
    options = [str(source), "--into", str(tmp_path / "data"), "--cut", "face"]
    (tmp_path / "yunet_final.pth").write_text("<html>")
    names = ("yunet.onnx", "none.pth", "yunet_final.pth", "yunet.safetensors")
    onnx, missing, page, weights = (str(tmp_path / name) for name in names)
    save_file({"weight": torch.zeros(1)}, weights)
    monkeypatch.setitem(sys.modules, "kornia.contrib", None)
    for yunet, message in (
        ([], "no OpenCV .* Give --yunet"),
        (["--yunet", onnx], "no OpenCV"),
        (["--yunet", missing], "none.pth"),
        (["--yunet", page], "'yunet_final.pth' is no YuNet file"),
        (["--yunet", weights], "pip install kornia"),
    ):
        assert main([*options, *yunet]) == 1
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "data").exists()  # it is said before any work


def test_the_command(source, tmp_path, capsys):
    options = [str(source), "--into", str(tmp_path / "data"), "--size", "192", "--smallest", "128"]
    assert main(options) == 0
    assert "3 photos of 2 people" in (said := capsys.readouterr().out)
    assert "1 unreadable, 1 tiny, 1 blurred, 2 double" in said and "cut to the centre" in said
    assert main(options) == 1
    assert "holds something already" in capsys.readouterr().err
    assert main([str(source), "--into", str(tmp_path / "none"), "--smallest", "400"]) == 1
    said = capsys.readouterr().err
    assert "None of the photos" in said and "7 tiny" in said and "--smallest (400)" in said
