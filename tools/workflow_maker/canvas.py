"""A graph as the page saves it (format 0.4): nodes, links, groups and subgraphs. Knows no model and no text."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TITLE_PX = 30  # of a node, above its position
GROUP_COLOR = "#3f789e"
_MARGIN_PX, _GROUP_TITLE_PX = 20, 50  # of a group, around its nodes
_INPUT, _OUTPUT = -10, -20  # ids of a subgraph's ends
_END_PX = 220  # from the first of them to the nodes
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_NAMES = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/qwenimage-lowvram/ComfyUI-QwenImage-LowVRAM")

# sockets of ComfyUI's own nodes: inputs, outputs; "?" marks an input that may stay free
_CORE: dict[str, tuple[str, str]] = {
    "DifferentialDiffusion": ("model:MODEL", "MODEL:MODEL"),
    "EmptyQwenImageLayeredLatentImage": ("", "LATENT:LATENT"),
    "EmptySD3LatentImage": ("", "LATENT:LATENT"),
    "GetImageSize": ("image:IMAGE", "width:INT height:INT batch_size:INT"),
    "GrowMask": ("mask:MASK", "MASK:MASK"),
    "ImageBlur": ("image:IMAGE", "IMAGE:IMAGE"),
    "ImageCompositeMasked": ("destination:IMAGE source:IMAGE mask?:MASK", "IMAGE:IMAGE"),
    "ImagePadForOutpaint": ("image:IMAGE", "IMAGE:IMAGE MASK:MASK"),
    "ImageScaleToTotalPixels": ("image:IMAGE", "IMAGE:IMAGE"),
    "ImageToMask": ("image:IMAGE", "MASK:MASK"),
    "JoinImageWithAlpha": ("image:IMAGE alpha:MASK", "IMAGE:IMAGE"),
    "LoadImage": ("", "IMAGE:IMAGE MASK:MASK"),
    "MarkdownNote": ("", ""),
    "MaskToImage": ("mask:MASK", "IMAGE:IMAGE"),
    "ReferenceLatent": ("conditioning:CONDITIONING latent?:LATENT", "CONDITIONING:CONDITIONING"),
    "SaveImage": ("images:IMAGE", "images:IMAGE"),
    "SetLatentNoiseMask": ("samples:LATENT mask:MASK", "LATENT:LATENT"),
    "VAEEncode": ("pixels:IMAGE vae:VAE", "LATENT:LATENT"),
}


@dataclass
class Node:
    """A node that is being placed. room: pixels below it that stay free for what a run shows on it."""

    id: int
    kind: str
    size: tuple[int, int]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    values: list[Any]
    properties: dict[str, Any]
    at: tuple[int, int] = (0, 0)
    room: int = 0
    title: str = ""
    colors: dict[str, str] = field(default_factory=dict)

    def as_json(self, order: int) -> dict[str, Any]:
        given: dict[str, Any] = {"id": self.id, "type": self.kind, "pos": list(self.at), "size": list(self.size)}
        given |= {"flags": {}, "order": order, "mode": 0, "inputs": self.inputs, "outputs": self.outputs}
        given |= {"title": self.title} if self.title else {}
        return given | {"properties": self.properties, "widgets_values": self.values, **self.colors}


class Canvas:
    """Nodes with links between them: a graph, or the inside of a subgraph.

    canvas.add("VAEEncode", 12, (210, 46)); canvas.link(image, "IMAGE", encode, "pixels")
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Node] = []
        self._links: list[list[Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._subgraphs: list[dict[str, Any]] = []

    def add(self, kind: str, number: int, size: tuple[int, int], *values: Any, room: int = 0, **named: Any) -> Node:
        """A node of that class. Values of ComfyUI's own nodes in their order; of ours by name, else their defaults."""
        inputs, outputs, properties = _sockets(kind)
        given = _values(kind, named) if kind in _ours() else list(values)
        node = Node(number, kind, size, inputs, outputs, given, properties, room=room)
        self.nodes.append(node)
        return node

    def note(self, number: int, size: tuple[int, int], title: str, text: str) -> Node:
        node = self.add("MarkdownNote", number, size, text)
        node.title, node.properties = title, {}
        node.colors = {"color": "#432", "bgcolor": "#653"}
        return node

    def link(self, source: Node, output: str, target: Node, name: str) -> None:
        """From an output to an input; one that has a widget becomes an input for it."""
        slot, out = next((i, each) for i, each in enumerate(source.outputs) if each["name"] == output)
        entry = next((each for each in target.inputs if each["name"] == name), None)
        if entry is None:
            entry = {"name": name, "type": out["type"], "widget": {"name": name}, "link": None}
            target.inputs.append(entry)
        number = self._connect(source.id, slot, target.id, target.inputs.index(entry), out["type"])
        entry["link"] = number
        out["links"] = [*(out["links"] or ()), number]

    def leave_free(self, node: Node, pattern: str, least: int) -> None:
        """Show only as many of the inputs `pattern`1, `pattern`2, ... as the page does: one behind the last linked."""
        numbered = [entry for entry in node.inputs if entry["name"].rstrip("0123456789") == pattern]
        linked = max((i + 2 for i, entry in enumerate(numbered) if entry["link"] is not None), default=1)
        for entry in numbered[max(least, linked) :]:
            node.inputs.remove(entry)

    def subgraph(self, number: int, size: tuple[int, int], inside: "Inside", *, room: int = 0) -> Node:
        """A node that stands for the canvas `inside`; its widgets are those that `inside` hands out."""
        self._subgraphs.append(inside.definition())
        sockets = [end for end in inside.entrances if not end.widget]
        inputs = [{"name": end.name, "type": end.kind, "link": None} for end in sockets]
        outputs = [{"name": end.name, "type": end.kind, "links": None} for end in inside.exits]
        values = [end.value for end in inside.entrances if end.widget]
        node = Node(number, inside.identity, size, inputs, outputs, values, {"previewExposures": []}, room=room)
        self.nodes.append(node)
        return node

    def group(self, title: str, *nodes: Node) -> None:
        """A titled frame around the nodes, and around the room below them."""
        left = min(node.at[0] for node in nodes) - _MARGIN_PX
        top = min(node.at[1] for node in nodes) - TITLE_PX - _GROUP_TITLE_PX
        right = max(node.at[0] + node.size[0] for node in nodes) + _MARGIN_PX
        bottom = max(node.at[1] + node.size[1] + node.room for node in nodes) + _MARGIN_PX
        bounding = [left, top, right - left, bottom - top]
        number = len(self._groups) + 1
        self._groups.append({"id": number, "title": title, "bounding": bounding, "color": GROUP_COLOR, "flags": {}})

    def as_json(self, *, scale: float, offset: tuple[int, int]) -> dict[str, Any]:
        """The graph, seen at `scale` with `offset`."""
        graph: dict[str, Any] = {"id": _uuid(self.name), "revision": 0}
        graph |= {"last_node_id": max(node.id for node in self.nodes), "last_link_id": self._last_link()}
        graph |= {"nodes": self._placed(), "links": self._links, "groups": self._groups}
        if self._subgraphs:
            graph["definitions"] = {"subgraphs": self._subgraphs}
        view = {"ds": {"scale": scale, "offset": list(offset)}}
        return graph | {"config": {}, "extra": view, "version": 0.4}

    def _last_link(self) -> int:
        """Of the graph and its subgraphs, as the page counts them."""
        return max([len(self._links), *(len(inside["links"]) for inside in self._subgraphs)])

    def _connect(self, source: int, output: int, target: int, entry: int, kind: str) -> int:
        number = len(self._links) + 1
        self._links.append([number, source, output, target, entry, kind])
        return number

    def _placed(self) -> list[dict[str, Any]]:
        order = execution_order([node.id for node in self.nodes], [(link[1], link[2], link[3]) for link in self._links])
        return [node.as_json(order.index(node.id)) for node in self.nodes]


@dataclass
class End:
    """An input or output of a subgraph. widget: it is a value on the subgraph's node, not a socket."""

    name: str
    kind: str
    links: list[int] = field(default_factory=list)
    widget: bool = False
    value: Any = None


class Inside(Canvas):
    """The inside of a subgraph, with inputs that lead into it and outputs that lead out."""

    def __init__(self, name: str, of: str) -> None:
        super().__init__(name)
        self.identity = _uuid(f"{of}: {name}")
        self.entrances: list[End] = []
        self.exits: list[End] = []

    def enter(self, name: str, kind: str, *targets: tuple[Node, str], value: Any = None) -> None:
        """An input that feeds those inputs; with a value it is a widget."""
        end = End(name, kind, widget=value is not None, value=value)
        self.entrances.append(end)
        for target, target_name in targets:
            entry = next((each for each in target.inputs if each["name"] == target_name), None)
            if entry is None:
                entry = {"name": target_name, "type": kind, "widget": {"name": target_name}, "link": None}
                target.inputs.append(entry)
            entry["link"] = self._connect(_INPUT, len(self.entrances) - 1, target.id, target.inputs.index(entry), kind)
            end.links.append(entry["link"])

    def leave(self, name: str, source: Node, output: str) -> None:
        """An output that an output of a node inside feeds."""
        slot, out = next((i, each) for i, each in enumerate(source.outputs) if each["name"] == output)
        number = self._connect(source.id, slot, _OUTPUT, len(self.exits), out["type"])
        out["links"] = [*(out["links"] or ()), number]
        self.exits.append(End(name, out["type"], [number]))

    def definition(self) -> dict[str, Any]:
        left = min(node.at[0] for node in self.nodes)
        right = max(node.at[0] + node.size[0] for node in self.nodes)
        count = max(node.id for node in self.nodes)
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        state = {"lastGroupId": 0, "lastNodeId": count, "lastLinkId": len(self._links), "lastRerouteId": 0}
        given: dict[str, Any] = {"id": self.identity, "version": 1, "state": state, "revision": 0, "config": {}}
        given |= {"name": self.name, "inputNode": _end_node(_INPUT, left - _END_PX, self.entrances)}
        given |= {"outputNode": _end_node(_OUTPUT, right + _MARGIN_PX * 3, self.exits)}
        given |= {"inputs": self._ends(self.entrances, "in"), "outputs": self._ends(self.exits, "out"), "widgets": []}
        given |= {"nodes": self._placed(), "groups": [], "extra": {}}
        return given | {"links": [dict(zip(names, link, strict=True)) for link in self._links]}

    def _ends(self, ends: Sequence[End], way: str) -> list[dict[str, Any]]:
        return [
            {"id": _uuid(f"{self.identity} {way} {end.name}"), "name": end.name, "type": end.kind, "linkIds": end.links}
            for end in ends
        ]


def _end_node(number: int, left: int, ends: Sequence[End]) -> dict[str, Any]:
    return {"id": number, "bounding": [left, 0, 128, 28 + 20 * (len(ends) + 1)]}


def column(left: int, *nodes: Node, top: int = 0) -> None:
    """Place nodes one below the other, each with its room."""
    for node in nodes:
        node.at = (left, top)
        top += node.size[1] + node.room + TITLE_PX + _MARGIN_PX


def execution_order(nodes: Sequence[int], links: Sequence[tuple[int, int, int]]) -> list[int]:
    """In which the page numbers nodes: one after all that feed it, first those that nothing feeds. links: source, its
    output, target, in the order of their making."""
    within = [link for link in links if link[0] in nodes and link[2] in nodes]  # not those of a subgraph's ends
    waiting = {node: sum(target == node for _, _, target in within) for node in nodes}
    ready = [node for node in nodes if not waiting[node]]
    for node in ready:
        for _, _, target in sorted((link for link in within if link[0] == node), key=lambda link: link[1]):
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    return ready


@cache
def _ours() -> dict[str, Any]:
    text = (ROOT / "tests" / "data" / "object_info.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@cache
def _project() -> dict[str, str]:
    """What lets the page offer to install the pack: the registry's name and version, and the repository."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    said = dict(line.split(" = ", 1) for line in text if " = " in line)
    repository = said["Repository"].strip('"').removeprefix("https://github.com/")
    return {"cnr_id": said["name"].strip('"'), "ver": said["version"].strip('"'), "aux_id": repository}


def _sockets(kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Inputs, outputs and properties of a new node."""
    properties: dict[str, Any] = {"Node name for S&R": kind}
    if kind in _ours():
        info = _ours()[kind]
        inputs = [(entry["name"], entry["type"], entry["group"] == "optional") for entry in info["inputs"]]
        inputs = [entry for entry in inputs if entry[1] not in _WIDGETS]
        outputs = [(entry["name"], entry["type"]) for entry in info["outputs"]]
        properties |= _project()
    else:
        names, made = _CORE[kind]
        pairs = [entry.split(":") for entry in names.split()]
        inputs = [(name.removesuffix("?"), of, name.endswith("?")) for name, of in pairs]
        outputs = [(name, of) for name, of in (entry.split(":") for entry in made.split())]
    shown = [
        {"name": name, **({"shape": 7} if optional else {}), "type": of, "link": None} for name, of, optional in inputs
    ]
    return shown, [{"name": name, "type": of, "links": None} for name, of in outputs], properties


def _values(kind: str, named: Mapping[str, Any]) -> list[Any]:
    """Of one of our nodes' widgets; a seed has one more, what happens to it after a run."""
    widgets = [entry for entry in _ours()[kind]["inputs"] if entry["type"] in _WIDGETS]
    unknown = set(named) - {entry["name"] for entry in widgets}
    assert not unknown, f"{kind} has no {unknown}"
    values: list[Any] = []
    for entry in widgets:
        values.append(named[entry["name"]] if entry["name"] in named else entry["default"])
        if entry["name"] == "seed":
            values.append("randomize")
    return values


def _uuid(name: str) -> str:
    return str(uuid.uuid5(_NAMES, name))
