"""Names as users write them: dates, systems, and what is refused."""

from datetime import datetime

import pytest

from hdb_core.errors import LiDBFileError
from hdb_core.files.names import checked_prefix, made_portable, portable, with_dates

NOW = datetime(2025, 3, 7, 4, 5, 9)
ADDED = len("_00001_.safetensors")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lidb/%date:yyyy-MM-dd%/a", "lidb/2025-03-07/a"),
        ("%date:d.M.yy h_m_s%", "7.3.25 4_5_9"),
        ("%date:hhmmss%", "040509"),
        ("%date:yyyyMMdd%_%date:hh%", "20250307_04"),
        ("%date:yyy y%", "yyy y"),
        ("%year%-%width%-%KSampler.seed%-100%", "%year%-%width%-%KSampler.seed%-100%"),
        ("%date:%", "%date:%"),
    ],
)
def test_dates_are_those_of_the_front_end(name, expected):
    assert with_dates(name, NOW) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lidb\\person", "lidb/person"),
        ("lidb//./person", "lidb/person"),
        ("lidb/Zoe\u0308", "lidb/Zo\u00eb"),
        ("lidb/山田 太郎", "lidb/山田 太郎"),
        ("console/common", "console/common"),
        ("lidb/.hidden", "lidb/.hidden"),
        ("x" * (255 - ADDED), "x" * (255 - ADDED)),
        ("y" * 255 + "/x", "y" * 255 + "/x"),
    ],
)
def test_one_name_on_every_system(name, expected):
    assert checked_prefix(name, ADDED) == expected
    assert portable(expected) == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((f"lidb/a{c}b", "cannot be part of a name on Windows") for c in ':*?"<>|'),
        *((f"lidb/a{c}b", "control character") for c in "\0\n\t\x7f\ud800"),
        *((f"lidb/{name}", "device on Windows") for name in ("CON", "nul", "Com1.png", "LPT9.a.b", "aux .txt", "com²")),
        *((name, "ends with a dot or a space") for name in ("lidb /a", "lidb./a", "lidb/a.", "lidb/a ", "lidb/...")),
        *((name, "no name inside the output folder") for name in ("", "/", "/a", "\\a", "C:\\a", "c:a", "..\\a", "a/../b", "a/", "a\\", ".")),
        ("x" * (256 - ADDED), "longer than 255 bytes"),
        ("ä" * 119, "longer than 255 bytes"),
        ("ä" * 128 + "/x", "longer than 255 bytes"),
    ],
)  # fmt: skip
def test_what_is_refused(name, reason):
    with pytest.raises(LiDBFileError, match=reason) as caught:
        checked_prefix(name, ADDED)
    assert "lidb/person" in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("anna", "anna"), ("J. R. Zoe\u0308", "J. R. Zo\u00eb"), ("a/b\\c:d", "a_b_c_d"), ("..", "_"), ("", "_"), ("a. .", "a"),
        ("con", "_con"), ("Nul.x", "_Nul.x"), ("a\0\n\udcffb", "a___b"), ("../../etc", ".._.._etc"), ("x" * 300, "x" * 200),
        ("ä" * 101 + ".", "ä" * 100), ('Anna / 2: the "cat".', "Anna _ 2_ the _cat_"), ("a\u200bb\ud800", "a_b_"), (" a", "a"),
        ("." * 250 + "x", "_"), ("con" + " " * 250 + "x", "_con"), ("con." + "x" * 250, "_con." + "x" * 195),
    ],
)  # fmt: skip
def test_any_text_becomes_a_name(name, made):
    assert made_portable(name, 200) == made == checked_prefix(made, 0)


@pytest.mark.parametrize("letter", ["a", "é", "漢", "🙂"])
def test_a_long_name_is_cut(letter):
    name = made_portable(letter * 300, 120)
    assert 120 - 4 < len(name.encode()) <= 120
    assert checked_prefix(f"lidb/{name}", ADDED)
