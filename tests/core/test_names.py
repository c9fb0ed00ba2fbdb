"""Names as users write them: dates, systems, and what is refused."""

from datetime import datetime

import pytest

from hdb_core.errors import LiDBFileError
from hdb_core.files.names import checked_prefix, portable, with_dates

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
