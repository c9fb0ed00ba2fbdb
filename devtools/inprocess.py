"""The real ComfyUI inside this process, with this pack loaded as the host loads it: for tests, benchmarks."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from .device import host_options
from .environment import ROOT, SetupError

VIDEO = "av"  # the host imports it for the types of its video nodes


class Placeholders(MetaPathFinder, Loader):
    """Modules of a package that is not there, in which every name is an empty class: enough to be imported."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Of the package and all below it; asked after everybody else, so that a real one comes first."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == self.package else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


class _Placeholder(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@dataclass(frozen=True)
class InProcessHost:
    """A booted host.

    Attributes:
        folder_paths: the host's module of that name.
        nodes: node id → class, the host's own and the pack's.
        package: the name under which the host imported the pack.
    """

    folder_paths: ModuleType
    nodes: Mapping[str, Any]
    package: str

    def module(self, name: str) -> ModuleType:
        """A module of the pack as the host knows it, such as ``hdb_core.lidb``: its classes are those of the nodes."""
        return importlib.import_module(f"{self.package}.{name}")

    def run(self, node_id: str, **inputs: Any) -> tuple:
        """A node's outputs for these inputs and its widgets' defaults. The caller sets inference mode, as the executor does.

        Nodes that take lists get a list of one for whatever is no list.
        """
        node = self.nodes[node_id]
        if not hasattr(node, "GET_SCHEMA"):
            return getattr(node(), node.FUNCTION)(**inputs)
        widgets = (i for i in node.GET_SCHEMA().inputs if not getattr(i, "force_input", None))
        defaults = {i.id: i.default for i in widgets if getattr(i, "default", None) is not None}
        given = {**defaults, **inputs}
        if node.INPUT_IS_LIST:
            given = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        clone = node.PREPARE_CLASS_CLONE({})
        return getattr(clone, node.FUNCTION)(**given).args


def boot(
    comfyui: Path,
    base: Path,
    options: Sequence[str] = (),
    extra_paths: Path | None = None,
    device: str = "cpu",
) -> InProcessHost:
    """Imports the host, once a process.

    Args:
        comfyui: its folder.
        base: the folder of models, input, output, temp.
        options: more of its command line.
        extra_paths: an ``extra_model_paths.yaml``.
        device: that the host computes on.

    Raises:
        SetupError: there is no host in `comfyui`, or it could not load the pack.
    """
    if not (comfyui / "main.py").is_file():
        raise SetupError(f"No ComfyUI in {comfyui}. Run `python dev.py test` once: it unpacks one.")
    sys.path.insert(0, str(comfyui))
    if find_spec(VIDEO) is None:
        sys.meta_path.append(Placeholders(VIDEO))
    arguments, sys.argv = sys.argv, ["main.py", *host_options(device), "--base-directory", str(base), *options]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import folder_paths
        import utils.extra_config  # before `nodes`, which puts a folder with another `utils` on the path

        import nodes
    finally:
        sys.argv = arguments
    if extra_paths is not None:  # the host does so before it loads custom nodes
        utils.extra_config.load_extra_path_config(str(extra_paths))
    if not asyncio.run(nodes.load_custom_node(str(ROOT), module_parent="custom_nodes")):
        raise SetupError("ComfyUI could not load this pack; its log says why.")
    package = str(ROOT).replace(".", "_x_")  # the host names a pack by its path
    return InProcessHost(folder_paths, nodes.NODE_CLASS_MAPPINGS, package)
