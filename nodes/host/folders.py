"""Where our files live: models/lidb, the output folder's lidb, models/hyperdreambooth, models/lidb_basis, and
extra_model_paths.yaml."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import folder_paths

from ...hdb_core.basis import BasisRecipe
from ...hdb_core.errors import BasisFileError, HDBError, HyperNetFileError, LiDBFileError
from ...hdb_core.files import basis as basis_file

LIDBS, HYPERNETS, BASES = "lidb", "hyperdreambooth", "lidb_basis"
EXTENSION = ".safetensors"


def register_folders() -> None:
    """Tell the host about our folders; paths that extra_model_paths.yaml has put there come first."""
    _register(
        LIDBS, os.path.join(folder_paths.models_dir, LIDBS), os.path.join(folder_paths.get_output_directory(), LIDBS)
    )
    _register(HYPERNETS, os.path.join(folder_paths.models_dir, HYPERNETS))
    _register(BASES, os.path.join(folder_paths.models_dir, BASES))


def _register(category: str, *ours: str) -> None:
    known, _ = folder_paths.folder_names_and_paths.get(category, ([], set()))
    paths = [*known, *(path for path in ours if path not in known)]
    folder_paths.folder_names_and_paths[category] = (paths, {EXTENSION})


def saved_lidbs() -> list[str]:
    return folder_paths.get_filename_list(LIDBS)


def saved_hypernets() -> list[str]:
    return folder_paths.get_filename_list(HYPERNETS)


def saved_bases() -> list[str]:
    return folder_paths.get_filename_list(BASES)


def find_lidb(name: str) -> Path:
    """The file of a name from `saved_lidbs`.

    Raises:
        LiDBFileError: the name leaves the folders, is no .safetensors, or no such file exists.
    """
    return _find(LIDBS, name, "LiDB", "Load LiDB", LiDBFileError)


def find_hypernet(name: str) -> Path:
    """The file of a name from `saved_hypernets`.

    Raises:
        HyperNetFileError: as `find_lidb`.
    """
    return _find(HYPERNETS, name, "HyperNet", "Load HyperNet", HyperNetFileError)


def find_basis(name: str) -> Path:
    """The file of a name from `saved_bases`.

    Raises:
        BasisFileError: as `find_lidb`.
    """
    return _find(BASES, name, "basis", "Empty LiDB", BasisFileError)


def learned_basis(recipe: BasisRecipe) -> BasisRecipe | None:
    """The learned basis that a recipe names, if one of `saved_bases` is it; whoever needs it says so if none is."""
    for name in saved_bases() if recipe.learned else ():
        with suppress(BasisFileError, OSError):
            if basis_file.read_digest(path := find_basis(name)) == recipe.learned:
                return basis_file.load(path)[1]
    return None


def _find(category: str, name: str, what: str, node: str, error: type[HDBError]) -> Path:
    if ".." in Path(name).parts or os.path.isabs(name) or not name.endswith(EXTENSION):
        raise error(f"{name!r} is no name of a {what} file. Choose one from the list of {node}.")
    path = folder_paths.get_full_path(category, name)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(category))
        raise error(
            f"There is no {what} file {name!r} in {folders}. Put it there, or choose another one from the list."
        )
    return Path(path)
