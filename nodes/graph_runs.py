"""Read from a graph what it is about to make, before anything of it runs: as far as its widgets and files tell.

A prompt is what the page sends to /prompt: node id -> {"class_type", "inputs"}, whose values are widgets' values or
links [node id, output]. It comes from anybody: whatever does not fit is not known, and never an error.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..engine.models.qwen_image_21.sizes import PIXELS, by_area
from .sample import PRESETS

LOADER, ENCODE, ENCODE_EDIT = "QwenLowVRAMLoader", "QwenLowVRAMEncodePrompts", "QwenLowVRAMEncodeEditPrompt"
# ComfyUI's loaders, by class: the input that names the file, and its folder
FILE_LOADERS = {
    "UNETLoader": ("unet_name", "diffusion_models"),
    "UnetLoaderGGUF": ("unet_name", "diffusion_models"),
    "CLIPLoader": ("clip_name", "text_encoders"),
    "CLIPLoaderGGUF": ("clip_name", "text_encoders"),
    "VAELoader": ("vae_name", "vae"),
}
# nodes whose conditioning has no image
_OF_TEXT = (ENCODE, "CLIPTextEncode", "ConditioningZeroOut")
_CONDITIONS, _LATENTS = ("positive", "negative", "condition"), ("samples", "latent")  # what inputs are called
_SAME_LATENT = ("SetLatentNoiseMask", "RepeatLatentBatch")  # nodes that keep its size
_TOKEN_BYTES = 3  # of UTF-8 to a token of a prompt, about
_TEMPLATE_TOKENS = 40
_LARGEST = 1e9  # of numbers that a widget can have

Prompt = Mapping[str, Mapping[str, Any]]
Size = tuple[int, int]  # (width, height) in px


@dataclass(frozen=True)
class LinkedPart:
    """A CLIP or VAE that a node has from a loader. node, kind: the node's id and class. input: "clip" or "vae".
    loader: the loader's class, ours or one of FILE_LOADERS. file: what it names, ours of the transformer."""

    node: str
    kind: str
    input: str
    loader: str
    file: str


@dataclass(frozen=True)
class GraphRun:
    """A sampler and the loader that its model comes from, by their ids, and what is asked of them.

    settings: the loader's values, None for what nothing tells. size: (width, height) in px, None where nothing
    tells; exact: it is so to the pixel, the batch too, and guided is certain; guided: true where nothing tells.
    prompts: ids of all nodes that the prompts need. loras: files of models/loras whose strength is not 0, by their
    names. controlnets, patches: of models/controlnet and models/model_patches, once for each node that applies one.
    uncounted: what the graph adds whose file it does not tell. text_only: its prompts come from nodes that show a
    model no image. parts: that its prompts, its latents and the decoding of what it makes are linked to.
    """

    loader: str
    sampler: str
    settings: Mapping[str, Any] = field(hash=False)
    size: Size | None
    exact: bool
    batch: int
    steps: int
    guided: bool
    images: int
    layers: int
    prompt_tokens: int
    prompts: frozenset[str] = frozenset()
    loras: tuple[str, ...] = ()
    controlnets: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()
    text_only: bool = False
    parts: tuple[LinkedPart, ...] = ()


def runs_of(prompt: Prompt, image_size: Callable[[str], Size | None]) -> list[GraphRun]:
    """Every sampler whose model is one of our loaders'. `image_size`: of what LoadImage names."""
    graph = _Graph(prompt, image_size)
    return [run for node in prompt if (run := graph.run_of(node)) is not None]


class _Graph:
    def __init__(self, prompt: Prompt, image_size: Callable[[str], Size | None]) -> None:
        self._prompt, self._image_size = prompt, image_size

    def run_of(self, sampler: str) -> GraphRun | None:
        if "latent_image" not in self._inputs(sampler):
            return None
        guider = self.behind(sampler, "guider") or sampler
        models = list(self._chain(guider, "model"))
        if not models or self._kind(models[-1]) != LOADER:
            return None
        latent = self._latent(sampler, "latent_image")
        ends = [self.behind(guider, name) for name in ("positive", "conditioning", "cond1", "cond2", "negative")]
        before = list(dict.fromkeys(node for end in ends if end is not None for node in self._before(end)))
        conditions = list(self._through(_CONDITIONS, *filter(None, ends)))
        edits = [node for node in conditions if self._kind(node) == ENCODE_EDIT]
        steps, guided = self._steps(sampler, guider)
        nets = [self._file(node, "control_net", "control_net_name") for node in before if self._applies_a_net(node)]
        patches = [self._file(node, "model_patch", "name") for node in models if "model_patch" in self._inputs(node)]
        named = [self._value(node, "lora_name") for node in models if "lora" in self._kind(node).lower()]
        added = (("LoRA", named), ("ControlNet", nets), ("model patch", patches))
        return GraphRun(
            models[-1],
            sampler,
            {name: self._value(models[-1], name) for name in self._inputs(models[-1])},
            latent.size,
            latent.exact and guided is not None,
            latent.batch,
            steps,
            guided is not False,
            max((self._images(node) for node in edits), default=0),
            latent.layers,
            _TEMPLATE_TOKENS + max(map(self._text_tokens, before), default=0),
            frozenset(before),
            tuple(filter(None, map(self._lora, models))),
            tuple(filter(None, nets)),
            tuple(filter(None, patches)),
            tuple(name for name, files in added if None in files),
            any(ends[:-1]) and all(self._kind(node) in _OF_TEXT for node in conditions),
            tuple(self._parts([*conditions, *self._through(_LATENTS, sampler), *self._decoders(sampler)])),
        )

    def behind(self, node: str, name: str) -> str | None:
        """The node that an input is linked to."""
        value = self._inputs(node).get(name)
        if isinstance(value, list) and len(value) == 2 and str(value[0]) in self._prompt:
            return str(value[0])
        return None

    def _kind(self, node: str) -> str:
        return str(self._prompt[node].get("class_type"))

    def _inputs(self, node: str) -> Mapping[str, Any]:
        inputs = self._prompt[node].get("inputs")
        return inputs if isinstance(inputs, Mapping) else {}

    def _value(self, node: str, name: str, depth: int = 8) -> Any:
        """Of a widget, or of the primitive that is linked to it."""
        value = self._inputs(node).get(name)
        if not isinstance(value, list):
            return value
        source = self.behind(node, name)
        return self._value(source, "value", depth - 1) if source and depth else None

    def _number(self, node: str, name: str) -> int:
        """0 where it is not known."""
        return int(self._real(node, name) or 0)

    def _real(self, node: str, name: str) -> float | None:
        """None where it is not known, or no node takes it."""
        value = self._value(node, name)
        return value if isinstance(value, int | float) and abs(value) <= _LARGEST else None

    def _chain(self, node: str, name: str) -> Iterator[str]:
        """Nodes that an input's value passes through, to the one that it comes from."""
        seen: set[str] = set()
        source = self.behind(node, name)
        while source is not None and source not in seen:
            yield source
            seen.add(source)
            source = self.behind(source, name)

    def _before(self, node: str) -> Iterator[str]:
        """A node, and all nodes that it needs."""
        seen, waiting = set(), [node]
        while waiting:
            if (here := waiting.pop()) in seen:
                continue
            seen.add(here)
            yield here
            waiting += [found for name in self._inputs(here) if (found := self.behind(here, name)) is not None]

    def _through(self, carriers: tuple[str, ...], *nodes: str) -> Iterator[str]:
        """Nodes, and those that come to them by inputs whose names begin so."""
        seen, waiting = set(), [*nodes]
        while waiting:
            if (here := waiting.pop()) in seen:
                continue
            seen.add(here)
            yield here
            if self._kind(here) in (ENCODE, ENCODE_EDIT):
                continue  # whose positive and negative are texts
            links = [self.behind(here, name) for name in self._inputs(here) if name.startswith(carriers)]
            waiting += [source for source in links if source is not None]

    def _decoders(self, sampler: str) -> Iterator[str]:
        """Nodes with a VAE for what the sampler makes, maybe through nodes that change latents, and not through others
        that sample; what nothing takes is not decoded."""
        taken = {source for node in self._prompt for name in self._inputs(node) if (source := self.behind(node, name))}
        return (node for node in taken if self.behind(node, "vae") and sampler in self._chain(node, "samples"))

    def _parts(self, nodes: list[str]) -> Iterator[LinkedPart]:
        for node in dict.fromkeys(nodes):
            for name in ("clip", "vae"):
                for source in list(self._chain(node, name))[-1:]:
                    kind = self._kind(source)
                    widget = "transformer" if kind == LOADER else FILE_LOADERS.get(kind, ("", ""))[0]
                    file = self._value(source, widget) if widget else None
                    if isinstance(file, str):
                        yield LinkedPart(node, self._kind(node), name, kind, file)

    def _lora(self, node: str) -> str | None:
        name = self._value(node, "lora_name")
        off = any(self._value(node, strength) == 0 for strength in ("strength", "strength_model"))
        return name if isinstance(name, str) and not off else None

    def _applies_a_net(self, node: str) -> bool:
        inputs = self._inputs(node)
        applies = "control_net" in inputs and ("positive" in inputs or "conditioning" in inputs)
        return applies and self._value(node, "strength") != 0

    def _file(self, node: str, link: str, widget: str, depth: int = 8) -> str | None:
        """That a loader behind the link names, maybe through nodes that pass it on; None where none does."""
        source = self.behind(node, link)
        if source is None or not depth:
            return None
        name = self._value(source, widget)
        return name if isinstance(name, str) else self._file(source, link, widget, depth - 1)

    def _steps(self, sampler: str, guider: str) -> tuple[int, bool | None]:
        """How many, and whether they are guided; None where that is not known before the run."""
        preset = self._value(sampler, "preset")
        chosen = PRESETS.get(preset) if isinstance(preset, str) else None
        if chosen is not None:
            return chosen[0], False
        sigmas = self.behind(sampler, "sigmas")
        counted = self._number(sigmas or sampler, "steps")
        written = self._value(sigmas, "sigmas") if sigmas else None
        if isinstance(written, str):
            counted = len(written.replace(",", " ").split()) - 1
        scales = [self._real(guider, name) for name in self._inputs(guider) if name.startswith("cfg")]
        if any(scale is not None and scale > 1 for scale in scales):
            return max(1, counted), True
        return max(1, counted), None if None in scales else False

    def _text_tokens(self, node: str) -> int:
        """Of the longest text on a node, which is not read as the text encoder reads it."""
        texts = [value for value in self._inputs(node).values() if isinstance(value, str)]
        return max((len(text.encode("utf-8", "replace")) // _TOKEN_BYTES for text in texts), default=0)

    def _images(self, node: str) -> int:
        return sum(name.startswith("image") and self.behind(node, name) is not None for name in self._inputs(node))

    def _latent(self, node: str, name: str, depth: int = 32) -> "_Latent":
        source = self.behind(node, name)
        if source is None or not depth:
            return _Latent(None, False, 1, 0)
        if self._kind(source) == ENCODE_EDIT:
            asked, batch = self._size_on(source), max(1, self._number(source, "batch_size"))
            return _Latent(asked or self._edited(source), asked is not None, batch, 0)
        if self._size_on(source):
            batch, layers = self._number(source, "batch_size"), self._number(source, "layers")
            return _Latent(self._size_on(source), True, max(1, batch), layers)
        if self.behind(source, "pixels"):
            return _Latent(self._image(source, "pixels"), False, 1, 0)
        found = self._latent(source, "samples", depth - 1)
        repeated = self._number(source, "amount")
        exact = found.exact and self._kind(source) in _SAME_LATENT
        return replace(found, exact=exact, batch=found.batch * max(1, repeated))

    def _size_on(self, node: str) -> Size | None:
        size = self._side(node, "width"), self._side(node, "height")
        return size if min(size) > 0 else None

    def _side(self, node: str, name: str) -> int:
        """Of a widget, or measured of an image by GetImageSize; 0 where it is not known."""
        source = self.behind(node, name)
        if source is None or self._kind(source) != "GetImageSize":
            return self._number(node, name)
        size, output = self._image(source, "image"), self._inputs(node)[name][1]
        return size[output] if size and output in (0, 1) else 0

    def _edited(self, node: str) -> Size | None:
        size = self._image(node, "image1")
        pixels = self._real(node, "megapixels")
        return _of_area(size, pixels) if size and pixels is not None else size

    def _image(self, node: str, name: str, depth: int = 32) -> Size | None:
        source = self.behind(node, name)
        if source is None or not depth:
            return None
        if self._kind(source) == "LoadImage":
            file = self._value(source, "image")
            return self._image_size(file) if isinstance(file, str) else None
        inner = self._image(source, "image", depth - 1)
        pixels = self._real(source, "megapixels")
        if pixels is not None:
            return _of_area(inner, pixels) if inner else None
        if "width" in self._inputs(source):
            return self._size_on(source)
        padded = [self._number(source, side) for side in ("left", "top", "right", "bottom")]
        return (inner[0] + padded[0] + padded[2], inner[1] + padded[1] + padded[3]) if inner else None


@dataclass(frozen=True)
class _Latent:
    size: Size | None
    exact: bool
    batch: int
    layers: int


def _of_area(size: Size, megapixels: float) -> Size:
    """The size that an image is brought to, about; 0 keeps its own."""
    return by_area(size, megapixels * PIXELS if megapixels > 0 else size[0] * size[1])
