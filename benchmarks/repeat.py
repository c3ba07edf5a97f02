"""Ten images one after the other, as people make them: seeds, then prompts, then LoRA strengths. Ours and ComfyUI's.

    python dev.py bench repeat

Both draw the same images from the same small files (random weights, fp32, on the CPU), each in a process of its own,
with files that the operating system has in its cache: ours under a limit that leaves part of the blocks streamed (read
at every step, on a CPU from the file), ComfyUI's own classes with everything in RAM; both with the tokenizer's files
that ComfyUI ships (those of a pipeline folder take transformers a second longer). Texts are encoded again where they
changed, as ComfyUI runs a graph. Where the latents of an image differ by more than 1e-4 of the largest, the benchmark
ends with an error.

Bytes are weights read from the files, per image: the encoder's, the modulation's and those of the blocks without
modulation. ComfyUI's are read when it loads, in its first image, with the embedding matrix and the vision tower;
ours reads rows of that matrix, which are not counted. `held_bytes` are weights kept from image to image, ComfyUI's
copies of those that a LoRA changes and our modulation table included. `first_step_seconds` is from the text to the end
of the first step, `seconds` to the latents; the first image's include opening or loading the files. `peak_bytes` is
what resident memory grew by since before that, tokenizer and mapped files included; it is sampled, and what the
allocator keeps counts. What is done once per process or machine, imports and our look at the machine's speeds, comes
before all.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from devtools.bench import load
from devtools.comfyui import require_comfyui
from devtools.server import prepare_base
from lora_files import make_parts, write_lora
from qwenimage_lowvram.engine.caches.prompt_cache import PromptCache
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.lora.lora_file import match, open_lora
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from qwenimage_lowvram.engine.models.qwen_image.prompts import PromptTokenizer
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.draft import least_bytes, most_bytes
from qwenimage_lowvram.engine.planning.request import SamplingRequest
from small_checkpoint import TOKENIZER_IN_COMFYUI, TextSize, make_pipeline
from torch import Tensor

CPU = torch.device("cpu")
STEPS, CFG = 4, 3.0
SIDE = 128
NEGATIVE = "blurry"
TOLERANCE = 1e-4  # of the largest number of an image's latents
SAMPLE_SECONDS = 0.002
PROMPT_TOKENS = 64  # that the limit is reckoned for
LIMIT = 0.7  # of the way from the least memory that does to all that is of use
# of the first half of the blocks: some of those that stay on the device are not changed
LORA_LAYERS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.2")
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of the transformer
TOOLS = Path(__file__).parents[1] / "tools"
NATIVE_ENCODER = Path(__file__).parents[1] / "tests" / "nodes" / "native_encoder.py"


@dataclass(frozen=True)
class Image:
    """What a person asks for, and what of it is not as in the image before."""

    changed: str
    seed: int
    prompt: str
    strength: float | None = None


_FIRST, _SECOND, _THIRD = "a red circle on white", "two blue squares, one above the other", "a green star at night"
IMAGES = (
    Image("first", 1, _FIRST),
    Image("seed", 2, _FIRST),
    Image("seed", 3, _FIRST),
    Image("seed", 4, _FIRST),
    Image("prompt", 4, _SECOND),
    Image("prompt", 4, _THIRD),
    Image("prompt, the first again", 4, _FIRST),
    Image("LoRA, strength 1", 4, _FIRST, 1.0),
    Image("LoRA, strength 0.5", 4, _FIRST, 0.5),
    Image("LoRA, strength 0.8", 4, _FIRST, 0.8),
)
QUICK_IMAGES = (
    Image("first, LoRA, strength 1", 1, _FIRST, 1.0),
    Image("seed", 2, _FIRST, 1.0),
    Image("LoRA, strength 0.5", 2, _FIRST, 0.5),
)


def rows(quick: bool) -> list[dict[str, Any]]:
    images = QUICK_IMAGES if quick else IMAGES
    path = os.pathsep.join([str(TOOLS / "alias"), str(TOOLS)])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_files(folder, quick)
        made, latents = {}, {}
        for who in ("ours", "comfyui"):
            print(f"{who}: {len(images)} images", flush=True)
            command = [sys.executable, __file__, who, folder, str(len(images))]
            subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
            made[who] = json.loads((folder / f"{who}.json").read_text(encoding="utf-8"))
            latents[who] = torch.load(folder / f"{who}.pt")
    differences = compare(latents["ours"], latents["comfyui"])
    for row, difference in zip(made["ours"], differences, strict=True):
        row["difference"] = difference
    return [*made["ours"], *made["comfyui"]]


def compare(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    """The largest difference of each image, against its largest number. Exits where one is above TOLERANCE."""
    differences = [
        float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, theirs, strict=True)
    ]
    for number, difference in enumerate(differences, 1):
        if not difference <= TOLERANCE:  # NaN is none of it
            raise SystemExit(
                f"Picture {number} is not ComfyUI's: the latents differ by {difference:.1e} of the largest, "
                f"{TOLERANCE:.0e} is allowed. No figures are given for images that are not the same."
            )
    return differences


def _write_files(folder: Path, quick: bool) -> None:
    layers, heads, head_dim = (6, 2, 32) if quick else (8, 8, 64)
    text = TextSize() if quick else TextSize(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=512)
    make_pipeline(folder / "pipeline", layers=layers, heads=heads, head_dim=head_dim, text=text, full_tokenizer=True)
    shapes = open_checkpoint(folder / "pipeline" / "transformer").tensors
    names = [f"transformer_blocks.{i}.{layer}" for i in range(layers // 2) for layer in LORA_LAYERS]
    parts = {name: make_parts("lora", shapes[f"{name}.weight"].shape, seed=number) for number, name in enumerate(names)}
    write_lora(folder / "style.safetensors", parts)


class _Contender(ABC):
    """Text encoder and MODEL, made from the files in `folder`."""

    clip: Any
    model: Any

    @classmethod
    @abstractmethod
    def prepare(cls, folder: Path) -> None:
        """What a process or a machine does once, and is not measured: imports, and our look at the machine's speeds."""

    @abstractmethod
    def encode(self, prompt: str) -> tuple[Any, Any]:
        """Positive and negative CONDITIONING."""

    @abstractmethod
    def tokenizer_folder(self) -> str:
        """The name of the folder that its tokenizer was read from."""

    @abstractmethod
    def with_lora(self, file: Path, strength: float) -> Any:
        """A MODEL."""

    @abstractmethod
    def read(self) -> dict[str, int]:
        """Bytes of weights that were read since the last call, and that are held now."""


class _Ours(_Contender):
    @classmethod
    def prepare(cls, folder: Path) -> None:
        import diffusers.models.transformers.transformer_qwenimage  # noqa: F401
        import tokenizers  # noqa: F401
        import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
        from qwenimage_lowvram.nodes.adapters import clip, model  # noqa: F401
        from qwenimage_lowvram.nodes.adapters.known_speeds import known_speeds

        file = folder / "pipeline" / "transformer" / WEIGHTS
        known_speeds(Hardware.detect(CPU), torch.float32, file).get()

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from qwenimage_lowvram.nodes.adapters.clip import LowVRAMCLIP
        from qwenimage_lowvram.nodes.adapters.model import make_model

        hardware = Hardware.detect(CPU)
        pipeline = folder / "pipeline"
        encoder = TextEncoder(open_checkpoint(pipeline / "text_encoder"), dtype=torch.float32, hardware=hardware)
        kept = PromptCache(folder / "prompts")
        self._tokenizer_folder = require_comfyui() / TOKENIZER_IN_COMFYUI
        self.clip = LowVRAMCLIP(encoder, PromptTokenizer(self._tokenizer_folder), None, kept=kept)
        transformer = QwenImageTransformer(
            open_checkpoint(pipeline / "transformer"), dtype=torch.float32, hardware=hardware
        )
        request = SamplingRequest(SIDE, SIDE, 2, PROMPT_TOKENS)
        least, most = (bound(transformer.footprint, request) for bound in (least_bytes, most_bytes))
        self.model = make_model(transformer, int(least + LIMIT * (most - least)))
        self._encoder_before = 0

    def encode(self, prompt: str) -> tuple[Any, Any]:
        positive, negative = self.clip.encode_prompts([prompt, NEGATIVE])
        return positive, negative

    def tokenizer_folder(self) -> str:
        return self._tokenizer_folder.name

    def with_lora(self, file: Path, strength: float) -> Any:
        patched = self.model.clone()
        patched.add_lora(match(open_lora(file), self.model.model.transformer.weights), strength)
        return patched

    def read(self) -> dict[str, int]:
        report, transformer = self.model.model.last_report, self.model.model.transformer
        encoder = self.clip.encoder.fetched_bytes - self._encoder_before
        self._encoder_before += encoder
        table = STEPS * transformer.footprint.row_bytes
        return {
            "encoder_bytes": encoder,
            "modulation_bytes": report.modulation_bytes,
            "block_bytes": report.fetched_bytes,
            "held_bytes": transformer.loaded_bytes + table,
            "resident_blocks": len(report.plan.resident),
            "fetched_blocks": report.fetched_blocks,
        }


class _ComfyUI(_Contender):
    @classmethod
    def prepare(cls, folder: Path) -> None:
        import comfy.supported_models
        import comfy.text_encoders.qwen_image  # noqa: F401

        load(NATIVE_ENCODER)

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        native = load(NATIVE_ENCODER)
        # its small sizes are patched into ComfyUI's constants as long as it is used
        encoder, tokenizer = stack.enter_context(native.native_encoder(folder / "pipeline"))
        self.clip = native.as_clip(encoder, tokenizer)
        self.model = _native_model(folder / "pipeline" / "transformer")
        self._encoder = sum(p.nbytes for p in encoder.parameters())
        named = list(self.model.model.diffusion_model.named_parameters())
        self._transformer = sum(p.nbytes for _, p in named)
        self._modulation = sum(p.nbytes for name, p in named if "_mod." in name)
        in_blocks = sum(p.nbytes for name, p in named if name.startswith("transformer_blocks."))
        self._unread = self._encoder, self._modulation, in_blocks - self._modulation
        self._negative: Any = None

    def encode(self, prompt: str) -> tuple[Any, Any]:
        if self._negative is None:  # a node of its own in the graph, whose text never changes
            self._negative = self._encode(NEGATIVE)
        return self._encode(prompt), self._negative

    def _encode(self, text: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def tokenizer_folder(self) -> str:
        return Path(self.clip.tokenizer.qwen25_7b.tokenizer.name_or_path).name

    def with_lora(self, file: Path, strength: float) -> Any:
        import comfy.sd
        import comfy.utils

        tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
        return comfy.sd.load_lora_for_models(self.model, None, tensors, strength, 0)[0]

    def read(self) -> dict[str, int]:
        encoder, modulation, blocks = self._unread
        self._unread = 0, 0, 0
        copies = sum(entry.weight.nbytes for entry in self.model.backup.values())
        return {
            "encoder_bytes": encoder,
            "modulation_bytes": modulation,
            "block_bytes": blocks,
            "held_bytes": self._encoder + self._transformer + copies,
        }


def _native_model(folder: Path) -> Any:
    """ComfyUI's own MODEL at the size of the files."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
    settings = {"image_model": "qwen_image", "in_channels": 64, **{name: given[name] for name in names}}
    config = comfy.supported_models.QwenImage(settings)
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.QwenImage(config, device=CPU)
    weights = comfy.utils.load_torch_file(str(folder / WEIGHTS), safe_load=True)
    model.diffusion_model.load_state_dict(weights)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def _draw(who: str, folder: Path, images: tuple[Image, ...]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """A row and latents (1, 16, 1, H, W) of each image."""
    kind = {"ours": _Ours, "comfyui": _ComfyUI}[who]
    kind.prepare(folder)
    made: list[dict[str, Any]] = []
    latents = []
    with ExitStack() as stack, _watched() as peak:
        base = peak.bytes
        start = time.perf_counter()
        contender = kind(folder, stack)
        conds: tuple[Any, Any] = (None, None)
        prompt = None
        for image in images:
            if image.prompt != prompt:
                conds, prompt = contender.encode(image.prompt), image.prompt
            model = contender.model
            if image.strength is not None:
                model = contender.with_lora(folder / "style.safetensors", image.strength)
            sampled, first_step = _sample(model, *conds, image.seed)
            end = time.perf_counter()
            made.append(
                {
                    "who": who,
                    "case": f"{len(made) + 1}: {image.changed}",
                    "seconds": end - start,
                    "first_step_seconds": first_step - start,
                    "peak_bytes": peak.bytes - base,
                    "tokenizer": contender.tokenizer_folder(),
                    **contender.read(),
                }
            )
            latents.append(sampled)
            peak.reset()
            start = time.perf_counter()
    return made, latents


def _sample(model: Any, positive: Any, negative: Any, seed: int) -> tuple[Tensor, float]:
    """Latents, and the moment at which the first step was done."""
    import comfy.sample

    empty = torch.zeros(1, 16, 1, SIDE // 8, SIDE // 8)
    steps_done: list[float] = []
    latents = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, seed),
        STEPS,
        CFG,
        "euler",
        "simple",
        positive,
        negative,
        empty,
        callback=lambda *_: steps_done.append(time.perf_counter()),
        disable_pbar=True,
        seed=seed,
    )
    return latents.clone(), steps_done[0]


class _Peak:
    """The most resident memory of this process since the last reset."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.bytes = 0
        self.look()

    def look(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss)

    def reset(self) -> None:
        self.bytes = self._process.memory_info().rss


@contextmanager
def _watched() -> Iterator[_Peak]:
    """Looks every SAMPLE_SECONDS, in a thread."""
    peak, done = _Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _child(who: str, folder: Path, count: int) -> None:
    """Draw in this process and leave rows and latents in `folder`. ComfyUI's own folders lie there too."""
    comfyui, base = require_comfyui(), folder / "base"
    prepare_base(base)
    # this file's folder is on the path of its own process, where it has nothing to give
    sys.path[:] = [str(comfyui), *(entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent)]
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, str(base)
    import comfy.sample
    import comfy.sd  # noqa: F401 - both before memory is looked at first

    images = next(some for some in (IMAGES, QUICK_IMAGES) if len(some) == count)
    with torch.inference_mode():
        made, latents = _draw(who, folder, images)
    torch.save(latents, folder / f"{who}.pt")
    (folder / f"{who}.json").write_text(json.dumps(made), encoding="utf-8")


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
