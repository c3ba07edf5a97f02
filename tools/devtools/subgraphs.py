"""Unpack the subgraphs of a saved graph: nodes and links as if each subgraph's nodes lay in the graph itself. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

BOUNDARY = "(boundary of a subgraph)"  # type of the nodes that stand for one: output slot n is what input n is fed
_OFF = (2, 4)  # LiteGraph's modes "never" and "bypass"


@dataclass(frozen=True)
class Link:
    source: str
    slot: int
    kind: str


@dataclass(frozen=True)
class FlatGraph:
    """Nodes by id, links by id. What lies in subgraph node 7 has ids such as 7:12, as the page sends them.

    values: what a subgraph's node says of widgets inside it, by node and name.
    """

    nodes: dict[str, Any] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    values: dict[tuple[str, str], Any] = field(default_factory=dict)

    def add(self, graph: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str = "") -> None:
        """The nodes and links of `graph`, and those of its subgraphs."""
        for link in map(_as_mapping, graph["links"]):
            source = f"{prefix}{link['origin_id']}"
            self.links[f"{prefix}{link['id']}"] = Link(source, link["origin_slot"], str(link["type"]))
        for node in graph["nodes"]:
            inputs = [{**entry, "link": _name(entry.get("link"), prefix)} for entry in node.get("inputs") or ()]
            flat = {**node, "id": f"{prefix}{node['id']}", "inputs": inputs}
            self.nodes[flat["id"]] = flat
            if node["type"] in definitions and node.get("mode", 0) not in _OFF:
                self._unpack(flat, definitions[node["type"]], definitions)

    def _unpack(self, node: Mapping[str, Any], inside: Mapping[str, Any], definitions: Mapping[str, Any]) -> None:
        prefix = f"{node['id']}:"
        outside = {entry["name"]: entry["link"] for entry in node["inputs"]}
        ends = {
            link["target_slot"]: _name(link["id"], prefix)
            for link in map(_as_mapping, inside["links"])
            if link["target_id"] == inside["outputNode"]["id"]
        }
        self.nodes[node["id"]] = _boundary(node["id"], (ends.get(slot) for slot in range(len(inside["outputs"]))))
        entrance = f"{prefix}{inside['inputNode']['id']}"
        self.nodes[entrance] = _boundary(entrance, (outside.get(entry["name"]) for entry in inside["inputs"]))
        self.add(inside, definitions, prefix)
        shown = node["properties"].get("proxyWidgets") or [("-1", name) for name in shown_widgets(inside)]
        for (owner, name), value in zip(shown, node.get("widgets_values") or (), strict=False):
            if value is None:
                continue
            for place in fed_inputs(inside, name) if owner == "-1" else [(owner, name)]:
                self.values[f"{prefix}{place[0]}", place[1]] = value


def shown_widgets(inside: Mapping[str, Any]) -> list[str]:
    """The inputs of a subgraph that its node shows as widgets, in their order: those that feed widgets."""
    widgets = {(node["id"], entry["name"]) for node in inside["nodes"] for entry in node["inputs"] if "widget" in entry}
    names = [entry["name"] for entry in inside["inputs"]]
    return [name for name in names if widgets & set(fed_inputs(inside, name))]


def fed_inputs(inside: Mapping[str, Any], name: str) -> list[tuple[Any, str]]:
    """Nodes and inputs that a subgraph's input of that name feeds."""
    links = {link for entry in inside["inputs"] if entry["name"] == name for link in entry["linkIds"]}
    return [
        (node["id"], entry["name"])
        for node in inside["nodes"]
        for entry in node.get("inputs") or ()
        if entry.get("link") in links
    ]


def _boundary(node_id: str, links: Iterable[str | None]) -> dict[str, Any]:
    return {"id": node_id, "type": BOUNDARY, "inputs": [{"link": link} for link in links]}


def _name(link: Any, prefix: str) -> str | None:
    return None if link is None else f"{prefix}{link}"


def _as_mapping(link: Any) -> Mapping[str, Any]:
    """A link as a mapping: the graph itself has them as lists, subgraphs as mappings."""
    if isinstance(link, Mapping):
        return link
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return dict(zip(names, link, strict=False))
