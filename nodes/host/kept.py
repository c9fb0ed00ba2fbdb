"""A person whose training did not come to its end, in a file of the folder that Load LiDB lists."""

from __future__ import annotations

from dataclasses import replace

from ...hdb_core.errors import HDBError
from ...hdb_core.files import lidb as lidb_file
from ...hdb_core.lidb import LiDB
from .output import name_in_output, save_to_output


def of_model(lidb: LiDB, model: str) -> LiDB:
    """The person with the host's class of the model noted."""
    return replace(lidb, about=replace(lidb.about, model=model))


def kept(lidb: LiDB, name: str) -> str:
    """Saves a person without any loss under a name such as ``unfinished``; says where, or why not."""
    try:
        path = save_to_output(f"lidb/{name}", lambda path: lidb_file.save(lidb, path, new=True))
    except (HDBError, OSError) as error:
        return f"could not be kept: {error}"
    return f"is kept as {name_in_output(path)}"
