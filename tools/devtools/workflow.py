"""Turn a graph as the page saves it into a prompt as the server takes it. Pure: graph and node descriptions in."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from .subgraphs import BOUNDARY, FlatGraph, Link, fed_inputs, shown_widgets

Graph = Mapping[str, Any]
ObjectInfo = Mapping[str, Any]

_NOTES = ("Note", "MarkdownNote")
_WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_MUTED, _BYPASSED = 2, 4  # LiteGraph's modes "never" and "bypass"


class CannotConvert(ValueError):
    """The graph has something that this converter does not do; the message names the node."""


def to_prompt(graph: Graph, object_info: ObjectInfo) -> dict[str, dict[str, Any]]:
    """The prompt of a graph (format 0.4), subgraphs unpacked: what the page's graphToPrompt sends, without titles.

    Notes are left out, muted nodes too; bypassed nodes hand their input of the same type through.
    Raises CannotConvert for group nodes, primitives and nodes that the server does not have.
    """
    flat = FlatGraph()
    flat.add(graph, {each["id"]: each for each in (graph.get("definitions") or {}).get("subgraphs") or ()})
    prompt = {}
    for node in sorted(flat.nodes.values(), key=lambda node: node.get("order", 0)):
        if node["type"] in (*_NOTES, "Reroute", BOUNDARY) or node.get("mode", 0) in (_MUTED, _BYPASSED):
            continue
        if node["type"] not in object_info:
            raise CannotConvert(f"The server has no node {node['type']!r} (node {node['id']}).")
        values: dict[str, Any] = _widget_values(node, object_info[node["type"]])
        values |= {name: value for (owner, name), value in flat.values.items() if owner == node["id"]}
        for entry in node["inputs"]:
            source = _follow(entry["link"], flat)
            if source is not None:
                values[entry["name"]] = [source.source, source.slot]
        prompt[node["id"]] = {"class_type": node["type"], "inputs": values}
    return prompt


def set_widgets(graph: Graph, object_info: ObjectInfo, class_type: str, **values: Any) -> dict[str, Any]:
    """A copy of the graph in which every node of `class_type` has these widget values, those inside subgraphs too; a
    value that a subgraph's own node shows is set there. One that was saved before the node had all of its widgets gets
    the others' defaults, as in the page."""
    changed: dict[str, Any] = copy.deepcopy(dict(graph))
    names = list(widget_names(object_info[class_type]))
    unknown = [name for name in values if name not in names]
    if unknown:
        raise CannotConvert(
            f"{class_type} has no widget {', '.join(unknown)}; it has {', '.join(filter(None, names))}."
        )
    definitions = {each["id"]: each for each in (changed.get("definitions") or {}).get("subgraphs") or ()}
    for node in [*changed["nodes"], *(node for inside in definitions.values() for node in inside["nodes"])]:
        if node["type"] == class_type:
            saved = node["widgets_values"]
            saved += [_default(object_info[class_type], name) for name in names[len(saved) :]]
            for name, value in values.items():
                node["widgets_values"][names.index(name)] = value
    for node in changed["nodes"]:
        if node["type"] in definitions:
            _set_shown(node, definitions[node["type"]], class_type, values)
    return changed


def _set_shown(node: dict[str, Any], inside: Mapping[str, Any], class_type: str, values: Mapping[str, Any]) -> None:
    """Set what a subgraph's node shows of the widgets of `class_type` inside of it."""
    kinds = {each["id"]: each["type"] for each in inside["nodes"]}
    for position, name in enumerate(shown_widgets(inside)):
        fed = {kinds[place]: inner for place, inner in fed_inputs(inside, name)}
        if fed.get(class_type) in values:
            node["widgets_values"][position] = values[fed[class_type]]


def widget_names(node_info: Mapping[str, Any]) -> Iterator[str | None]:
    """Names of a node's widgets in the order of `widgets_values`; None for a control_after_generate entry."""
    for group in ("required", "optional"):
        inputs = node_info["input"].get(group) or {}
        for name in (node_info.get("input_order") or {}).get(group) or inputs:
            kind, options = _spec(inputs[name])
            if options.get("forceInput") or not (isinstance(kind, list) or kind in _WIDGET_TYPES):
                continue
            yield name
            if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
                yield None


def _default(node_info: Mapping[str, Any], name: str | None) -> Any:
    """Of a widget; None for a control_after_generate entry."""
    specs = (group[name] for group in node_info["input"].values() if name in group)
    kind, options = _spec(next(specs, (None,)))
    return options.get("default", kind[0] if isinstance(kind, list) and kind else None)


def choices(object_info: ObjectInfo, class_type: str, name: str) -> list[str]:
    """What a combo input offers."""
    groups = object_info[class_type]["input"]
    kind, options = _spec(next(group[name] for group in groups.values() if name in group))
    return list(kind) if isinstance(kind, list) else list(options.get("options") or ())


def _widget_values(node: Mapping[str, Any], node_info: Mapping[str, Any]) -> dict[str, Any]:
    saved = node.get("widgets_values") or []
    if isinstance(saved, Mapping):
        return {name: saved[name] for name in widget_names(node_info) if name is not None and name in saved}
    names = list(widget_names(node_info))
    values = [*saved, *(_default(node_info, name) for name in names[len(saved) :])]  # inputs that came later
    return {name: value for name, value in zip(names, values, strict=False) if name is not None}


def _follow(link_id: str | None, flat: FlatGraph) -> Link | None:
    """The link that really feeds an input, through reroutes, boundaries and bypassed nodes; None where nothing does."""
    while link_id is not None:
        link = flat.links[link_id]
        node = flat.nodes[link.source]
        if node["type"] == "PrimitiveNode":
            raise CannotConvert(f"Node {node['id']} is a primitive. Type its value into the widget instead.")
        if node.get("mode", 0) == _MUTED:
            return None
        if node["type"] == "Reroute":
            link_id = node["inputs"][0]["link"]
        elif node["type"] == BOUNDARY:
            link_id = node["inputs"][link.slot]["link"]
        elif node.get("mode", 0) == _BYPASSED:
            link_id = _bypass(node, link)
        else:
            return link
    return None


def _bypass(node: Mapping[str, Any], link: Link) -> str | None:
    """Which of a bypassed node's input links stands for its output: the same position first, then the same type."""
    inputs = node["inputs"]
    kind = node["outputs"][link.slot]["type"]
    ordered = inputs[link.slot : link.slot + 1] + inputs
    return next((entry["link"] for entry in ordered if entry["type"] == kind), None)


def _spec(spec: Any) -> tuple[Any, Mapping[str, Any]]:
    return spec[0], (spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {})
