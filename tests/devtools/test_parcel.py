"""Parcels: pieces of at most a size, which give the files back, and say when one of them is missing."""

import random
import zipfile

import pytest

from devtools.parcel import pack, pieces, unpack


@pytest.fixture
def files(tmp_path):
    made = {}
    for name, size in (("a/one.bin", 2500), ("two.bin", 10)):
        made[name] = tmp_path / name.replace("/", "_")
        made[name].write_bytes(random.Random(size).randbytes(size))
    return made


@pytest.fixture
def parcel(files, tmp_path):
    (tmp_path / "out").mkdir()
    pack(files | {"missing": tmp_path / "missing"}, tmp_path / "out", piece=200)
    return tmp_path / "out"


def test_files_come_back(parcel, files, tmp_path):
    assert len(pieces(parcel)) > 11 and all(path.stat().st_size <= 200 for path in parcel.iterdir())
    assert unpack(parcel, tmp_path / "back") == list(files)
    for name, path in files.items():
        assert (tmp_path / "back" / name).read_bytes() == path.read_bytes()


def test_a_smaller_parcel_leaves_no_piece_of_the_one_before(parcel, files, tmp_path):
    pack({"two.bin": files["two.bin"]}, parcel, piece=200)
    assert len(list(parcel.iterdir())) == 1
    assert unpack(parcel, tmp_path / "back") == ["two.bin"]


def test_a_missing_or_damaged_piece_is_noticed(parcel, tmp_path):
    third = pieces(parcel)[3]
    third.write_bytes(bytes(len(third.read_bytes())))
    with pytest.raises(zipfile.BadZipFile, match="damaged"):
        unpack(parcel, tmp_path / "back")
    third.unlink()
    with pytest.raises(zipfile.BadZipFile):
        unpack(parcel, tmp_path / "back")
    with pytest.raises(FileNotFoundError, match="No parcel"):
        unpack(tmp_path, tmp_path / "back")
