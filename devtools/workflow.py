"""Saved workflows (the front end's JSON) turned into prompts (what the server runs), checked against the schemas."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
FRONT_END_ONLY = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4
CONTROL_VALUES = {"fixed", "increment", "decrement", "randomize"}


class WorkflowError(ValueError):
    """A workflow that does not fit the registered nodes."""


def load(path: Path) -> dict[str, Any]:
    """Reads a saved workflow."""
    return json.loads(path.read_text(encoding="utf-8"))


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> Prompt:
    """Converts a saved workflow to API format, as the front end does when it queues it.

    Args:
        workflow: the front end's JSON, version 0.4: nodes with `widgets_values`, links as rows of six.
        object_info: the server's registered schemas.

    Raises:
        WorkflowError: an unknown node or input, a wrong number or kind of widget values, a link between other types
            than the schemas state, a required input without a value, muted nodes, a bypassed node with nothing to pass
            on, subgraphs.
    """
    links = {row[0]: row for row in workflow["links"]}
    bypassed = {node["id"]: node for node in workflow["nodes"] if node.get("mode", 0) == BYPASSED}
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in FRONT_END_ONLY}
    prompt: Prompt = {}
    for number, node in nodes.items():
        name = f"{node['type']} ({number})"
        if node["type"] not in object_info:
            raise WorkflowError(f"{name}: no such node is registered.")
        if node.get("mode", 0) == MUTED:
            raise WorkflowError(f"{name}: muted nodes are not supported.")
        if number in bypassed:
            continue
        inputs = _widget_values(name, node, object_info[node["type"]])
        schema = dict(_inputs(object_info[node["type"]]))
        for slot in node.get("inputs", ()):
            if slot["name"] not in schema:
                raise WorkflowError(f"{name}: no input {slot['name']!r} in the registered schema.")
            if slot.get("link") is None:
                continue
            _, source, source_slot, target, target_slot, _ = links[slot["link"]]
            if target != number or node["inputs"][target_slot]["name"] != slot["name"]:
                raise WorkflowError(f"{name}: link {slot['link']} does not end at {slot['name']!r}.")
            while source in bypassed:
                source, source_slot = _passed_on(bypassed[source], source_slot, links)
            if source not in nodes:
                raise WorkflowError(f"{name}: {slot['name']!r} comes from a node that is not there.")
            offered = object_info[nodes[source]["type"]]["output"][source_slot]
            wanted = schema[slot["name"]][0]
            if not _compatible(offered, wanted):
                raise WorkflowError(f"{name}: {slot['name']!r} takes {wanted}, but is linked to {offered}.")
            inputs[slot["name"]] = [str(source), source_slot]
        missing = [k for k in object_info[node["type"]]["input"].get("required", {}) if k not in inputs]
        if missing:
            raise WorkflowError(f"{name}: required inputs without a value or link: {', '.join(missing)}.")
        prompt[str(number)] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _passed_on(node: Mapping[str, Any], slot: int, links: Mapping[int, Sequence[Any]]) -> tuple[int, int]:
    """Where the output of a bypassed node comes from: its first linked input of the same type."""
    kind = node["outputs"][slot]["type"]
    for source in node["inputs"]:
        if source["type"] == kind and source.get("link") is not None:
            return links[source["link"]][1], links[source["link"]][2]
    raise WorkflowError(f"{node['type']} ({node['id']}): is bypassed, and no input of type {kind} is linked.")


def nodes_of(prompt: Mapping[str, Mapping[str, Any]], class_type: str) -> list[str]:
    """The ids of all nodes of a type, in order."""
    return [number for number, node in prompt.items() if node["class_type"] == class_type]


def edited(prompt: Prompt, changes: Mapping[str, Mapping[str, Any]]) -> Prompt:
    """A copy with some inputs replaced: node id → input name → value."""
    result = copy.deepcopy(prompt)
    for number, inputs in changes.items():
        result[number]["inputs"].update(inputs)
    return result


def _inputs(schema: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Mapping[str, Any]]]]:
    for group in ("required", "optional"):
        for name, spec in schema["input"].get(group, {}).items():
            yield name, (spec[0], spec[1] if len(spec) > 1 else {})


def _widget_values(name: str, node: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    values = node.get("widgets_values") or []
    if not isinstance(values, Sequence):
        raise WorkflowError(f"{name}: widgets_values must be a list.")
    rest, inputs = list(values), {}
    for key, (kind, options) in _inputs(schema):
        if not (isinstance(kind, list) or kind in WIDGET_TYPES) or options.get("forceInput"):
            continue
        if not rest:
            raise WorkflowError(f"{name}: no widget value for {key!r}.")
        inputs[key] = _checked(f"{name}: {key!r}", rest.pop(0), kind, options)
        # The front end puts a second widget behind a seed, and a button behind an uploaded file.
        control = options.get("control_after_generate", kind == "INT" and key in ("seed", "noise_seed"))
        if control and (not rest or rest.pop(0) not in CONTROL_VALUES):
            raise WorkflowError(f"{name}: no control_after_generate value behind {key!r}.")
        if any(options.get(f"{media}_upload") for media in ("image", "video", "audio")) and rest:
            rest.pop(0)
    if rest:
        raise WorkflowError(f"{name}: {len(rest)} widget values too many: {rest}.")
    return inputs


def _checked(where: str, value: Any, kind: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(kind, list) or kind == "COMBO":
        choices = kind if isinstance(kind, list) else options.get("options", ())
        # A choice of files depends on the server's disk, and the server checks it.
        if value not in choices and not Path(str(value)).suffix:
            raise WorkflowError(f"{where} is {value!r}, expected one of {', '.join(map(str, choices))}.")
        return value
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if not isinstance(value, types[kind]) or (kind != "BOOLEAN" and isinstance(value, bool)):
        raise WorkflowError(f"{where} is {value!r}, expected {kind}.")
    if kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        raise WorkflowError(f"{where} is {value}, expected {options.get('min')} to {options.get('max')}.")
    return value


def _compatible(offered: Any, wanted: Any) -> bool:
    if isinstance(offered, list) or isinstance(wanted, list):
        return offered == wanted
    return "*" in (offered, wanted) or bool(set(offered.split(",")) & set(wanted.split(",")))
