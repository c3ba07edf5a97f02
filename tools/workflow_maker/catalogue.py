"""Every bundled workflow, in the order of the template browser, and the text of its note.

A title begins with what people look for: the browser's search weighs how near the beginning it finds a text, and knows
nothing else of an extension's workflows. Their order is that of the names, where it sorts them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import stated_plans
from qwenimage_lowvram.engine.files import known_files as files
from qwenimage_lowvram.engine.planning.cards import typical_limit_bytes
from qwenimage_lowvram.engine.planning.request import GIB

from . import graphs, texts, texts_zh
from .files import line, link
from .parts import GUIDED, LIGHTNING_4, LIGHTNING_8, Files, Steps

COFFEE = (
    'A coffee shop entrance with a chalkboard sign that reads "Qwen Coffee, 2 dollars a cup", a neon light beside it '
    'showing "通义千问", warm morning light, photo'
)
SIGN = 'Replace the text on the sign with "Qwen Coffee, open", keep everything else'
SIGN_21 = 'Replace the text on the sign of <image1> with "Qwen Coffee, open", keep everything else'
TOGETHER = "The person of Picture 1 and the dog of Picture 2 sit together in the room of Picture 3"
TOGETHER_21 = "The person of <image1> and the dog of <image2> sit together in the room of <image3>"
PAINTING = (
    "A watercolor painting of a quiet street in the old town, warm morning light, visible brush strokes on rough paper"
)
VASE = "A wooden table in a bright kitchen, on it a blue ceramic vase with sunflowers, soft daylight, photo"
LAKE = "A wide view of a mountain lake at dawn, a wooden pier, forest on both shores, mist over the water, photo"
BICYCLE = (
    'A red vintage bicycle leans against a white wall, a window with flowers behind it, "Qwen Cafe" on the sign above'
)
NO_BACKGROUND = "Remove the background, and output a PNG image"

TEXT = Files(files.FP8, files.ENCODER, files.VAE)
LIGHTNING = Files(files.FP8_SCALED, files.ENCODER, files.VAE, files.LIGHTNING)
EDIT_2511 = Files(files.EDIT_2511, files.ENCODER, files.VAE, files.LIGHTNING_2511)
EDIT_2511_GGUF = Files(
    files.EDIT_2511_GGUF, files.ENCODER, files.VAE, files.LIGHTNING_2511, variant="Qwen-Image-Edit-2511"
)
EDIT_2509 = Files(files.EDIT_2509, files.ENCODER, files.VAE, files.LIGHTNING_2509)
LAYERED = Files(files.LAYERED, files.ENCODER, files.LAYERED_VAE)
QWEN_21 = Files(files.QWEN_21, files.ENCODER_21, files.VAE_21)
TURBO_21 = Files(files.TURBO_21, files.SMALL_ENCODER_21, files.VAE_21)

Graph = dict[str, Any]


@dataclass(frozen=True)
class Workflow:
    """A bundled graph. kind: makes it. how: lines of its note under that heading; more: paragraphs at the end."""

    title: str
    card_gb: int
    files: Files
    steps: Steps
    prompt: str
    kind: Callable[[graphs.Made, str], Graph]
    how: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    saved: str = "qwen_image"
    licence: str = ""
    bf16: str = field(default="", repr=False)  # paragraph with {stay} and {streamed} of that file as it is stored

    def stem(self, number: int) -> str:
        return f"{number:02} - Low VRAM {self.card_gb} GB - {self.title}"

    def graph(self) -> Graph:
        """The graph with its note. The plan that the note states is that of the graph."""
        made = graphs.Made(
            f"{self.title} on {self.card_gb} GB", self.files, self.limit_gb, self.steps, self.prompt, self.saved
        )
        plain = self.kind(made, "")
        return self.kind(made, self.note(plain))

    @property
    def limit_gb(self) -> float:
        return round(typical_limit_bytes(self.card_gb) / GIB, 1)

    def note(self, graph: Graph) -> str:
        listed = "\n".join(line(file) for file in self.files.all)
        shown = [f"## {self.title}, {self.card_gb} GB", f"**Files**\n\n{listed}"]
        if self.how:
            shown.append("**How**\n\n" + "\n".join(f"- {each}" for each in self.how))
        stated = stated_plans.Stated.of(graph)
        shown.append(stated_plans.HEADING + "\n".join(stated.lines()))
        shown += [texts.PANEL, *self.more]
        bf16 = {}
        if self.bf16:
            plan = stated_plans.plan_of(graph, transformer=files.BF16.name)
            bf16 = {"file": link(files.BF16), "stay": len(plan.resident), "streamed": plan.streamed}
            shown.append(self.bf16.format(**bf16))
        begin = [self.licence] if self.licence else []
        return "\n\n".join([*begin, *shown, "---", *self._chinese(stated, bf16)])

    def _chinese(self, stated: stated_plans.Stated, bf16: Mapping[str, Any]) -> list[str]:
        """The note once more, but for the list of files."""
        said = texts_zh.CHINESE
        shown = [f"## {said[self.title]}，{self.card_gb} GB"]
        if self.licence:
            shown.append(said[self.licence])
        shown.append("**文件**：见上面的列表，放入其中所写的文件夹。")
        if self.how:
            shown.append("**用法**\n\n" + "\n".join(f"- {said[each]}" for each in self.how))
        shown.append(stated_plans.CHINESE_HEADING + "\n".join(stated.chinese()))
        shown += [said[text] for text in (texts.PANEL, *self.more)]
        return [*shown, said[self.bf16].format(**bf16)] if self.bf16 else shown


def workflows() -> Iterator[tuple[str, Workflow]]:
    """Each with its file's name, without the ending."""
    for number, workflow in enumerate(_ALL, start=1):
        yield workflow.stem(number), workflow


def _text(card_gb: int, *, side: int = 1328) -> Workflow:
    return Workflow(
        "Qwen-Image", card_gb, TEXT, GUIDED, COFFEE, partial(graphs.from_text, side=side),
        more=(texts.SIZES, texts.CFG_1), bf16=texts.BF16_ON_16 if card_gb == 16 else "",
    )  # fmt: skip


def _lightning(card_gb: int, *, side: int = 1328) -> Workflow:
    return Workflow(
        "Lightning in 8 steps", card_gb, LIGHTNING, LIGHTNING_8, COFFEE, partial(graphs.from_text, side=side),
        more=(texts.GRID, texts.SIZES), bf16=texts.BF16_ON_16 if card_gb == 16 else "",
    )  # fmt: skip


def _edit_2511(card_gb: int, images: int) -> Workflow:
    one = images == 1
    return Workflow(
        "Edit an image, Edit-2511 in 4 steps" if one else "Edit with three images, Edit-2511 in 4 steps",
        card_gb, EDIT_2511, LIGHTNING_4, SIGN if one else TOGETHER, partial(graphs.edit, images=images),
        how=(texts.IMAGE_TO_EDIT if one else texts.IMAGES_TO_EDIT, texts.ONE_GRID),
        more=(texts.GUIDED_EDIT, texts.MORE_GGUF), saved="qwen_image_edit",
    )  # fmt: skip


def _edit_2509(images: int) -> Workflow:
    one = images == 1
    return Workflow(
        "Edit an image, Edit-2509 in 4 steps" if one else "Edit with three images, Edit-2509 in 4 steps",
        8, EDIT_2509, LIGHTNING_4, SIGN if one else TOGETHER, partial(graphs.edit, images=images),
        how=(texts.IMAGE_TO_EDIT if one else texts.IMAGES_TO_EDIT, texts.ONE_GRID),
        more=(texts.GUIDED_EDIT, texts.SCALED_2509), saved="qwen_image_edit",
    )  # fmt: skip


_ON_8 = partial(Workflow, card_gb=8)
_LICENCE, _TURBO_LICENCE = (f"{model} {texts.LICENCE_21}" for model in ("Qwen-Image-2.1", "Qwen-Image-2.1-Turbo"))
_TURBO_8 = Steps(8, 1, "2.1-Turbo, 8 steps")
_STEPS_21 = Steps(25, 1)

_ALL = (
    _text(4, side=1024),
    *(_text(card_gb) for card_gb in (6, 8, 10, 12, 16)),
    _lightning(4, side=1024),
    *(_lightning(card_gb) for card_gb in (8, 16)),
    *(_edit_2511(card_gb, images) for images in (1, 3) for card_gb in (4, 6, 8)),
    Workflow(
        texts.GGUF_TITLE, 4, EDIT_2511_GGUF, LIGHTNING_4, SIGN, partial(graphs.edit, images=1),
        how=(texts.IMAGE_TO_EDIT, texts.ONE_GRID), more=(texts.GUIDED_EDIT, texts.GGUF_2511), saved="qwen_image_edit",
    ),
    _edit_2509(1),
    _edit_2509(3),
    _ON_8(
        "Image to image", files=TEXT, steps=Steps(20, 4, denoise=0.6), prompt=PAINTING, kind=graphs.image_to_image,
        how=(texts.NEW_IMAGE, texts.DENOISE, texts.SCALED, texts.VARIATIONS),
    ),
    _ON_8(
        "Inpaint", files=TEXT, steps=GUIDED, prompt=VASE, kind=graphs.inpaint,
        how=(texts.PAINT, texts.SOFT_EDGE, texts.LAID_OVER, texts.DENOISE_1, texts.NOTHING_PAINTED),
    ),
    _ON_8(
        "Outpaint", files=TEXT, steps=GUIDED, prompt=LAKE, kind=graphs.outpaint,
        how=(texts.PAD, texts.FEATHERING, texts.PREPARED, texts.LAID_ROUND, texts.HALF_A_SIDE),
    ),
    _ON_8(
        "Take an image apart into layers", files=LAYERED, steps=Steps(50, 4), prompt=BICYCLE, kind=graphs.layers,
        how=(texts.LAYERS, texts.LAYERS_NUMBER, texts.LAYERS_SIZE), saved="qwen_layers",
    ),
    Workflow(
        "Qwen-Image-2.1-Turbo", 4, TURBO_21, _TURBO_8, COFFEE, partial(graphs.from_text, side=1024),
        more=(texts.TURBO_STEPS, texts.SIZES_21, texts.TRANSPARENT_21), saved="qwen_image_2.1_turbo",
        licence=_TURBO_LICENCE,
    ),
    Workflow(
        "Edit an image, Qwen-Image-2.1-Turbo", 4, TURBO_21, _TURBO_8, SIGN_21, partial(graphs.edit, images=1),
        how=(texts.IMAGE_21, texts.ONE_GRID_21, texts.KEPT_21), more=(texts.TURBO_STEPS,),
        saved="qwen_image_2.1_turbo", licence=_TURBO_LICENCE,
    ),
    _ON_8(
        "Qwen-Image-2.1", files=QWEN_21, steps=_STEPS_21, prompt=COFFEE, kind=partial(graphs.from_text, side=1024),
        more=(texts.STEPS_21, texts.SIZES_21, texts.TRANSPARENT_21), saved="qwen_image_2.1", licence=_LICENCE,
    ),
    _ON_8(
        "Edit with three images, Qwen-Image-2.1", files=QWEN_21, steps=_STEPS_21, prompt=TOGETHER_21,
        kind=partial(graphs.edit, images=3), how=(texts.IMAGES_21, texts.ONE_GRID_21, texts.KEPT_21),
        more=(texts.STEPS_21,), saved="qwen_image_2.1", licence=_LICENCE,
    ),
    _ON_8(
        "Remove a background, Qwen-Image-2.1", files=QWEN_21, steps=_STEPS_21, prompt=NO_BACKGROUND,
        kind=graphs.cut_out, how=(texts.CUT_OUT, texts.OWN_PIXELS, texts.KEPT_21), more=(texts.STEPS_21,),
        saved="qwen_image_2.1", licence=_LICENCE,
    ),
)  # fmt: skip
