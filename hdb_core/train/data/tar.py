"""Finds the files in a tar file.

Python's own reader takes a damaged header for the end of the file. For some files of 1 MB it takes minutes, or gigabytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MOST_EXTENDED = 1 << 16  # bytes of an extended header or of a long name
_OF_ALL, _LONG_NAME, _LONG_LINK = tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_EXTENDED = (_OF_ALL, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, _LONG_NAME, _LONG_LINK)
_SPARSE = {"GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major"}  # any of these: only parts of a file are stored
_KNOWN = {"path", "size", *_SPARSE}


class Member(NamedTuple):
    """A file in a tar file: its name, where its contents begin, and how many bytes they have."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, end: int) -> Iterator[Member]:
    """The files of an uncompressed tar file, in their order; folders and the like are left out.

    Args:
        file: at its beginning.
        end: its size, bytes.

    Raises:
        tarfile.TarError, ValueError: if it is damaged or cut, goes on after its end, or holds a link or a sparse file.
    """
    shared: dict[str, str] = {}  # what extended headers say of all files that follow
    own: dict[str, str] = {}  # and of the next one
    while (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        offset, size = file.tell(), header.size
        if header.type in _EXTENDED:
            if not 0 <= size <= MOST_EXTENDED:
                raise ValueError(f"it has an extended header of {size:,} bytes")
            (shared if header.type == _OF_ALL else own).update(_said(header.type, file.read(size)))
        else:
            said = shared | own
            own = {}
            name, size = said.get("path") or header.name, int(said.get("size") or size)
            if header.islnk() or header.issym():
                raise ValueError(f"{name!r:.100} is a link; tar's --hard-dereference -h writes files instead")
            if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
                size = 0  # of a folder, after which nothing is stored
            is_sparse = header.type == tarfile.GNUTYPE_SPARSE or _SPARSE & said.keys()
            if is_sparse or not 0 <= size <= end - offset:  # below 0, the same could come again for ever
                raise ValueError(f"{name!r:.100} is not in it as a whole")
            if header.isreg():
                yield Member(name, offset, size)
        file.seek(offset + size + -size % tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError("its end is missing")
    while more := file.read(1 << 20):
        if more.strip(b"\0"):
            raise ValueError("it goes on after its end; two are joined by tar -A")


def _said(kind: bytes, text: bytes) -> Iterator[tuple[str, str]]:
    """What an extended header says, as lines such as "18 path=anna/1.jpg" with their length, or as a name alone."""
    if kind == _LONG_NAME:
        yield "path", _decoded(text.partition(b"\0")[0])
    text = b"" if kind in (_LONG_NAME, _LONG_LINK) else text.rstrip(b"\0")
    start = 0
    while start < len(text):
        length = text[start : start + 10].partition(b" ")[0]
        end = start + int(length) if length.isdigit() else 0
        line = text[start + len(length) + 1 : end]
        key, equals, value = line.partition(b"=")
        if not equals or not line.endswith(b"\n") or end > len(text):
            raise ValueError("it has a garbled extended header")
        if (known := _decoded(key)) in _KNOWN:
            yield known, _decoded(value[:-1])
        start = end


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")
