"""Where our files live: models/lidb, the output folder's lidb, models/hyperdreambooth, models/lidb_basis, and
extra_model_paths.yaml.

The folders are read anew each time. The host's own list of files is cached by the folders' times, and fails when one of
them is gone.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
from aiohttp import web

from ...hdb_core.basis import BasisRecipe
from ...hdb_core.errors import BasisFileError, HDBError
from ...hdb_core.files import basis as basis_file
from ...hdb_core.files import hypernet as hypernet_file
from ...hdb_core.files import lidb as lidb_file
from ...hdb_core.files.container import FileKind, read_digest, read_fields
from ...hdb_core.files.names import portable
from .server import prompt_server

EXTENSION = ".safetensors"


class Shelf(NamedTuple):
    """The folders of one kind of file.

    Attributes:
        category: the host's name for them.
        kind: of file.
        node: that lists them.
        none: what is said when there is no such file.
    """

    category: str
    kind: FileKind
    node: str
    none: str


LIDBS = Shelf(
    "lidb", lidb_file.KIND, "Load LiDB", "There is no saved person yet. Save one with Save LiDB, or put a LiDB file"
)
HYPERNETS = Shelf(
    "hyperdreambooth", hypernet_file.KIND, "Load HyperNet",
    "There is no hypernetwork yet. The template 01 photo to person needs none. Or put the file of one for your base model",
)  # fmt: skip
BASES = Shelf(
    "lidb_basis", basis_file.KIND, "Empty LiDB", "There is no learned basis yet. Fast Finetune needs none. Or put the file of one"
)  # fmt: skip


LOADERS = ("LoadLiDB", "LoadHyperNet", "EmptyLiDB")  # the nodes that list them


class _Seen:
    """The digests of files when the prompt that runs began: by category and name, nothing of earlier prompts."""

    def __init__(self) -> None:
        self._prompt: tuple[str, int] | None = None
        self._digests: dict[tuple[str, str], str] = {}

    def digests(self) -> dict[tuple[str, str], str]:
        if (prompt := running_prompt()) is None or prompt != self._prompt:
            self._prompt, self._digests = prompt, {}
        return self._digests


_SEEN = _Seen()


def running_prompt() -> tuple[str, int] | None:
    """The host's id of the prompt that runs, which a client may choose again, and how many it has begun; None without its
    server."""
    server = prompt_server()
    found = getattr(server, "last_prompt_id", None)
    return None if found is None else (found, getattr(getattr(server, "prompt_queue", None), "task_counter", 0))


def register_folders() -> None:
    """Tell the host about our folders; paths that extra_model_paths.yaml has put there come first."""
    add_folders(LIDBS.category, {EXTENSION}, folder_paths.get_output_directory())
    add_folders(HYPERNETS.category, {EXTENSION})
    add_folders(BASES.category, {EXTENSION})
    if server := prompt_server():
        for shelf in (LIDBS, HYPERNETS, BASES):
            server.routes.get(f"/models/{shelf.category}")(partial(_answer, shelf))
        server.add_on_prompt_handler(without_fingerprints)


async def _answer(shelf: Shelf, _: web.Request) -> web.Response:
    """In place of the host's answer about any folder of models, which fails once one is gone."""
    return web.json_response(names_on(shelf))


def without_fingerprints(request: dict[str, Any]) -> dict[str, Any]:
    """What /prompt was sent, without fingerprints of our files. The host writes them into the prompt of a picture, and
    does not ask `fingerprint` again when that prompt is queued, perhaps after another file has come in a file's place."""
    prompt = request.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        if isinstance(node, dict) and node.get("class_type") in LOADERS:
            node.pop("is_changed", None)
    return request


def add_folders(category: str, extensions: set[str], *above: str) -> None:
    """Tells the host of the folder of a category in its models' folder and in others, after those that it knows."""
    known, theirs = folder_paths.folder_names_and_paths.get(category, ([], set()))
    ours = [os.path.join(folder, category) for folder in (folder_paths.models_dir, *above)]
    paths = [*known, *(path for path in ours if path not in known)]
    folder_paths.folder_names_and_paths[category] = (paths, theirs or extensions)


def names_on(shelf: Shelf) -> list[str]:
    """The names of all files that can be loaded, with ``/`` between folders on every system."""
    return sorted(name for name, path in _files(shelf).items() if _is_ours(shelf.kind, path))


def find(shelf: Shelf, name: str | None) -> Path:
    r"""The file of a name, also if that was typed with ``\``, or in another Unicode form.

    Raises:
        HDBError: of the kind's class, if there is no name, or no such file in the folders.
    """
    files, kind = _files(shelf), shelf.kind
    if not isinstance(name, str) or not name:
        raise kind.error(_nothing(shelf, len(files)) or f"Choose a {kind.name} file from the list of {shelf.node}.")
    if path := files.get(portable(name)):
        return path
    if ".." in name or os.path.isabs(name) or not name.lower().endswith(EXTENSION):
        raise kind.error(f"{name!r} is no name of a {kind.name} file. Choose one from the list of {shelf.node}.")
    raise kind.error(
        f"There is no {kind.name} file {name!r} in {_folders(shelf)}. Put it there, or choose another one from the list."
    )


def passed_over(shelf: Shelf, name: str, found: Path) -> list[str]:
    """A line for each file that has the name of one that was found, too: one that comes first, but cannot be loaded, and
    one with other contents, which is in no list."""
    places = _places(shelf)[portable(name)]
    if found not in places:  # it has just been deleted
        return []
    index = places.index(found)
    damaged, hidden = places[:index], (path for path in places[index + 1 :] if _differs(shelf.kind, path, found))
    return [
        *(f"{path} has the same name, but is damaged or of another kind: this is another file" for path in damaged),
        *(f"{path} has the same name, but other contents: this is {found}. Rename one of them" for path in hidden),
    ]


def is_hidden(shelf: Shelf, path: Path) -> bool:
    """Whether a file's name on the shelf stands for another file."""
    if (inside := _inside(shelf, path)) is None:
        return False
    shown = _files(shelf).get(portable(str(inside)))
    return shown is not None and not shown.samefile(path)


@contextmanager
def unchanged(shelf: Shelf, name: str | None) -> Iterator[Path]:
    """As `find`, of a file that is read in the block, and then still what `fingerprint` saw: the host keeps the result for
    what was seen.

    Raises:
        HDBError: of the kind's class, as `find`, or if it is gone, or another file has come in its place.
    """
    path = find(shelf, name)
    try:
        yield path
        if seen := _SEEN.digests().get((shelf.category, portable(str(name)))):
            require_digest(shelf.kind, path, seen)
    except FileNotFoundError as error:
        raise shelf.kind.error(
            f"{path.name} was deleted while it was read. Choose another one from the list."
        ) from error


def require_digest(kind: FileKind, path: Path, digest: str) -> None:
    """Check that a file is still the one whose `read_digest` was seen earlier in the prompt.

    Raises:
        HDBError: of the kind's class, if another one has come in its place.
    """
    if read_digest(kind, path) != digest:
        raise kind.error(f"{path.name} was replaced while the prompt ran. Queue the prompt again.")


def validated(shelf: Shelf, name: str | None) -> bool | str:
    """What a node's validate_inputs returns for a name; None is missing, null, or comes over a wire.

    Raises:
        HDBError: of the kind's class, if there is nothing to choose. It is raised because the host drops what is returned
            about a missing input.
    """
    if name is None and (nothing := _nothing(shelf, len(_files(shelf)))):
        raise shelf.kind.error(nothing)
    try:
        return name is None or bool(find(shelf, name))
    except HDBError as error:
        return str(error)


def fingerprint(shelf: Shelf, name: str | None) -> str | float:
    """What a node's fingerprint_inputs returns for a name: the same for the same contents, read from the header alone."""
    if name is None:  # it comes over a wire, and is known when the node runs
        return math.nan
    digest = read_digest(shelf.kind, find(shelf, name))
    seen = _SEEN.digests().setdefault((shelf.category, portable(name)), digest)
    return digest if digest == seen else math.nan  # it runs, and `unchanged` refuses it


def is_taken(shelf: Shelf, path: Path) -> bool:
    """Whether a file at a path would have its name on the shelf from a file that is there, in this folder or another."""
    inside = _inside(shelf, path)
    folders = folder_paths.get_folder_paths(shelf.category)
    return inside is not None and any(os.path.lexists(os.path.join(folder, inside)) for folder in folders)


def _inside(shelf: Shelf, path: Path) -> Path | None:
    """A path from the folder of the shelf that it is in, whatever the case of the letters that lead there."""
    for folder in folder_paths.get_folder_paths(shelf.category):
        for parent in path.parents:
            with suppress(OSError):
                if os.path.samefile(parent, folder):
                    return path.relative_to(parent)
    return None


def learned_basis(recipe: BasisRecipe) -> BasisRecipe | None:
    """The learned basis that a recipe names, if there is its file; whoever needs it says so if there is none.

    Raises:
        BasisFileError: there are only files that cannot be read, one of which may be it.
    """
    unread = []
    for path in _files(BASES).values() if recipe.learned else ():
        try:
            if read_digest(BASES.kind, path) == recipe.learned:
                return basis_file.load(path)[1]
        except (BasisFileError, OSError):
            unread.append(path.name)
    if unread:
        raise BasisFileError(
            f"The learned basis {recipe.learned[:12]}…, which is needed here, is not among the files that can be read. Damaged or "
            f"of another kind: {', '.join(unread)}. Put its file, which came with the hypernetwork or the person, into "
            "models/lidb_basis, in place of a damaged one."
        )
    return None


def _files(shelf: Shelf) -> dict[str, Path]:
    r"""Every file of our extension by its `portable` name; of several, the first that can be loaded, or else the first.

    On Linux a file's own name can have a ``\``; it comes after one that is in a folder.
    """
    return {
        name: next((path for path in paths if _is_ours(shelf.kind, path)), paths[0])
        for name, paths in _places(shelf).items()
    }


def _places(shelf: Shelf) -> dict[str, list[Path]]:
    """Every file of our extension, by its `portable` name, in the order of the folders."""
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in folder_paths.get_folder_paths(shelf.category):
        for path in sorted(_below(folder), key=_has_backslash):
            name = portable(os.path.relpath(path, folder))
            if "<" in name:  # the front end's menus take names as HTML; no file of ours is called so
                continue
            with suppress(UnicodeError):
                name.encode()  # one that is no text cannot be sent to the browser
                found[name].append(Path(path))
    return found


def _differs(kind: FileKind, path: Path, other: Path) -> bool:
    try:
        return read_digest(kind, path) != read_digest(kind, other)
    except (HDBError, OSError):
        return False  # it cannot be loaded


def _has_backslash(path: str) -> bool:
    return os.sep == "/" and "\\" in path


def _below(folder: str) -> Iterator[str]:
    """The files of our extension in a folder that may be gone, and in those below; links are followed, but to no folder
    that the way to them has come through."""
    ways = {folder: {os.path.realpath(folder)}}  # place → real folders on the way
    for place, below, names in os.walk(folder, followlinks=True):
        way, above = ways.pop(place), Path(os.path.realpath(place))
        inner = {name: os.path.realpath(os.path.join(place, name)) for name in below}
        below[:] = [name for name in below if inner[name] not in way and not above.is_relative_to(inner[name])]
        ways |= {os.path.join(place, name): way | {inner[name]} for name in below}
        paths = (os.path.join(place, name) for name in names if name.lower().endswith(EXTENSION))
        yield from filter(os.path.isfile, paths)


def _is_ours(kind: FileKind, path: Path) -> bool:
    try:
        stat = path.stat()
        return _has_header(kind, path, (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size))
    except (HDBError, OSError):
        return False


@lru_cache(maxsize=100_000)
def _has_header(kind: FileKind, path: Path, version: tuple[int, ...]) -> bool:
    """Whether a file, as it was at a time, is whole and of a kind and version that can be read.

    Raises:
        HDBError, OSError: if the system did not let us read it, which is not remembered.
    """
    try:
        return bool(read_fields(kind, path))
    except HDBError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return False


def _nothing(shelf: Shelf, others: int) -> str:
    """What to say where no file can be loaded; "" where one can."""
    if names_on(shelf):
        return ""
    unfit = f" The {others} .safetensors files there are damaged or of another kind." if others else ""
    return f"{shelf.none} into one of these folders: {_folders(shelf)}.{unfit}"


def _folders(shelf: Shelf) -> str:
    return ", ".join(folder_paths.get_folder_paths(shelf.category))
