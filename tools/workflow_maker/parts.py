"""The parts that workflows share: loader, prompt, sampler, decoder, note, each with its size and the room below it."""

from dataclasses import dataclass, field
from typing import Any

from qwenimage_lowvram.engine.files.known_files import KnownFile

from .canvas import Canvas, Node, column
from .files import entry

# pixels below a node that stay free for the texts of a run; and for the sampler's preview as well
TEXTS_PX, PREVIEW_PX = 170, 400
NOTE_LEFT, GAP = -500, 60
FILES_WIDTH, PROMPT_WIDTH, SAMPLE_WIDTH, IMAGE_WIDTH, SOURCE_WIDTH = 400, 420, 340, 480, 320
SCALE, OFFSET = 0.6, (610, 200)  # how a graph is seen first


@dataclass(frozen=True)
class Files:
    """What the loader reads, and a LoRA for it."""

    transformer: KnownFile
    text_encoder: KnownFile
    vae: KnownFile
    lora: KnownFile | None = None
    variant: str = "auto"

    @property
    def all(self) -> list[KnownFile]:
        return [self.transformer, *([self.lora] if self.lora else []), self.text_encoder, self.vae]


@dataclass(frozen=True)
class Steps:
    """How the sampler samples."""

    steps: int
    cfg: int
    preset: str = "as set"
    scheduler: str = "qwen_image"
    denoise: float = 1


GUIDED = Steps(20, 4)
LIGHTNING_8 = Steps(8, 1, "Lightning, 8 steps", "lightning")
LIGHTNING_4 = Steps(4, 1, "Lightning, 4 steps", "lightning")


@dataclass
class Chain:
    """A graph that grows from left to right: files, prompt, sampler, image; before them perhaps images."""

    canvas: Canvas
    left: int = 0
    steps: int = 0
    frames: list[tuple[str, tuple[Node, ...]]] = field(default_factory=list)

    def place(self, title: str, width: int, *nodes: Node) -> None:
        """The next column, a step with that title."""
        self.steps += 1
        column(self.left, *nodes)
        self.left += width + GAP
        self.canvas.group(f"Step {self.steps}: {title}", *nodes)


def loader(canvas: Canvas, files: Files, vram_limit_gb: float) -> list[Node]:
    """The loader, and Load LoRA below it where there is one; the first gives CLIP and VAE, the last the MODEL."""
    names = {"transformer": files.transformer.name, "text_encoder": files.text_encoder.name, "vae": files.vae.name}
    node = canvas.add(
        "QwenLowVRAMLoader", 1, (FILES_WIDTH, 560), room=TEXTS_PX, dtype="auto", weight_format="auto",
        vram_limit_gb=vram_limit_gb, variant=files.variant, **names,
    )  # fmt: skip
    node.properties["models"] = [entry(file) for file in (files.transformer, files.text_encoder, files.vae)]
    if files.lora is None:
        return [node]
    lora = canvas.add(
        "QwenLowVRAMLoadLora", 8, (FILES_WIDTH, 160), room=TEXTS_PX, lora_name=files.lora.name, strength=1
    )
    lora.properties["models"] = [entry(files.lora)]
    canvas.link(node, "MODEL", lora, "model")
    return [node, lora]


def model_of(nodes: list[Node]) -> tuple[Node, str]:
    """Which node gives the MODEL, and by which output."""
    return nodes[-1], "MODEL" if len(nodes) == 1 else "model"


def prompts(canvas: Canvas, files: Node, positive: str) -> Node:
    node = canvas.add(
        "QwenLowVRAMEncodePrompts", 2, (PROMPT_WIDTH, 260), room=TEXTS_PX, positive=positive, negative=" "
    )
    canvas.link(files, "CLIP", node, "clip")
    return node


def edit_prompt(canvas: Canvas, files: Node, images: list[Node], positive: str) -> Node:
    node = canvas.add(
        "QwenLowVRAMEncodeEditPrompt", 2, (PROMPT_WIDTH, 540), room=TEXTS_PX, positive=positive, negative=" "
    )
    canvas.link(files, "CLIP", node, "clip")
    canvas.link(files, "VAE", node, "vae")
    for number, image in enumerate(images, start=1):
        canvas.link(image, "IMAGE", node, f"image{number}")
    canvas.leave_free(node, "image", least=3)
    return node


def sampler(canvas: Canvas, model: tuple[Node, str], conditions: Node, latent: tuple[Node, str], how: Steps) -> Node:
    node = canvas.add(
        "QwenLowVRAMSample", 4, (SAMPLE_WIDTH, 520), room=PREVIEW_PX, steps=how.steps, cfg=how.cfg,
        scheduler=how.scheduler, denoise=how.denoise, preset=how.preset,
    )  # fmt: skip
    canvas.link(*model, node, "model")
    canvas.link(conditions, "positive", node, "positive")
    canvas.link(conditions, "negative", node, "negative")
    canvas.link(*latent, node, "latent_image")
    return node


def decoder(canvas: Canvas, sample: Node, files: Node) -> Node:
    node = canvas.add("QwenLowVRAMDecode", 5, (IMAGE_WIDTH, 110), room=TEXTS_PX)
    canvas.link(sample, "LATENT", node, "samples")
    canvas.link(files, "VAE", node, "vae")
    return node


def save(canvas: Canvas, image: Node, prefix: str, number: int = 6) -> Node:
    node = canvas.add("SaveImage", number, (IMAGE_WIDTH, 540), prefix, room=TEXTS_PX)
    canvas.link(image, "IMAGE", node, "images")
    return node


def load_image(canvas: Canvas, number: int = 10) -> Node:
    return canvas.add("LoadImage", number, (SOURCE_WIDTH, 360), "example.png", "image", room=TEXTS_PX)


def note(canvas: Canvas, text: str) -> Node:
    node = canvas.note(7, (420, 780), "Read me", text)
    node.at = (NOTE_LEFT, 0)
    return node


def seen(canvas: Canvas) -> dict[str, Any]:
    """The finished graph."""
    return canvas.as_json(scale=SCALE, offset=OFFSET)
