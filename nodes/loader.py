"""The node that opens a model: files and settings in, MODEL, CLIP and VAE out. Reads headers and small weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.text_encoders.qwen_image
import torch

from ..engine.checkpoint import Checkpoint, open_checkpoint
from ..engine.errors import InvalidRequest, QwenLowVRAMError
from ..engine.families import Component, require
from ..engine.hardware import Hardware
from ..engine.plan import GIB
from ..engine.prompts import PromptTokenizer
from ..engine.text_encoder import TextEncoder
from ..engine.transformer import QwenImageTransformer, TimestepRounding
from . import files
from .clip import LowVRAMCLIP
from .model import make_model
from .vae import make_vae
from .words import CATEGORY

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COMFYUI_TOKENIZER = Path(comfy.text_encoders.qwen_image.__file__).parent / "qwen25_tokenizer"


@dataclass(frozen=True)
class _Sources:
    """The three checkpoints and the tokenizer's folder that a person's choices stand for."""

    transformer: Path
    text_encoder: Path
    vae: Path
    tokenizer: Path

    @classmethod
    def of(cls, transformer: str, text_encoder: str, vae: str) -> "_Sources":
        folder = files.pipeline_folder(transformer) if files.is_folder(transformer) else None

        def component(kind: str, choice: str, subfolder: str) -> Path:
            if choice != files.FROM_FOLDER:
                return files.model_file(kind, choice)
            if folder is None:
                raise InvalidRequest(
                    f"{transformer} is a single file and has no {subfolder} beside it.\n\n"
                    f"What to do: choose a file from models/{kind}."
                )
            return folder / subfolder

        return cls(
            transformer=folder / "transformer" if folder else files.model_file("diffusion_models", transformer),
            text_encoder=component("text_encoders", text_encoder, "text_encoder"),
            vae=component("vae", vae, "vae"),
            tokenizer=folder / "tokenizer" if folder and text_encoder == files.FROM_FOLDER else COMFYUI_TOKENIZER,
        )

    def open(self) -> tuple[Checkpoint, Checkpoint, Checkpoint]:
        """Headers only. Raises where a file is missing, damaged, or not what its place needs."""
        opened = []
        for path, component in (
            (self.transformer, Component.TRANSFORMER),
            (self.text_encoder, Component.TEXT_ENCODER),
            (self.vae, Component.VAE),
        ):
            checkpoint = open_checkpoint(path)
            require(checkpoint, component)
            opened.append(checkpoint)
        return opened[0], opened[1], opened[2]


class QwenLowVRAMLoader:
    """Load Qwen-Image."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Opens Qwen-Image for a small card: the weights stay in their files and pass through the card block by "
        "block, each once per step, within the VRAM limit. The picture is the one a large card would make."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The transformer. Works with this pack's Sample and with ComfyUI's own samplers.",
        "The text encoder. Reads its layers from the file for each prompt and leaves the card at once.",
        "The image decoder and encoder.",
    )
    SEARCH_ALIASES = ("qwen image", "low vram", "load diffusion model", "offload")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "transformer": (
                    files.transformer_choices(),
                    {
                        "tooltip": "A file of models/diffusion_models (bf16, fp16, fp32, fp8, fp8 scaled, GGUF), or a "
                        "pipeline folder of models/diffusers (bitsandbytes nf4, fp4 and int8 too)."
                    },
                ),
                "text_encoder": (
                    files.component_choices("text_encoders"),
                    {"tooltip": "Qwen2.5-VL-7B from models/text_encoders, or the pipeline folder's own."},
                ),
                "vae": (
                    files.component_choices("vae"),
                    {"tooltip": "qwen_image_vae from models/vae, or the pipeline folder's own."},
                ),
                "dtype": (
                    ["auto", *DTYPES],
                    {
                        "default": "auto",
                        "tooltip": "What is computed in. auto: bf16 where the card has it, else fp32; fp32 for fp32 "
                        "files. fp16 can overflow to black pictures.",
                    },
                ),
                "weight_format": (
                    ["auto"],
                    {"default": "auto", "tooltip": "How weights are held and streamed. auto: as the file stores them."},
                ),
                "vram_limit_gb": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1024.0,
                        "step": 0.1,
                        "tooltip": "The most memory on the card that encoding, sampling and decoding may use, in "
                        "GB as cards are sold (GiB). 0: what is free when it runs.",
                    },
                ),
                "timesteps": (
                    [rounding.value for rounding in TimestepRounding],
                    {
                        "default": TimestepRounding.FP32.value,
                        "advanced": True,
                        "tooltip": "fp32: exact timesteps, as ComfyUI has them. diffusers: rounded as the diffusers "
                        "pipeline rounds them in bf16, to compare pictures with it.",
                    },
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, transformer: str, text_encoder: str, vae: str) -> bool | str:
        """Before the run: are the files there, whole, and each in its own place? Linked inputs are not known yet."""
        if None in (transformer, text_encoder, vae):
            return True
        try:
            _Sources.of(transformer, text_encoder, vae).open()
        except QwenLowVRAMError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, transformer: str, text_encoder: str, vae: str, **settings: Any) -> str:
        sources = _Sources.of(transformer, text_encoder, vae)
        tokenizer = [f"{file.name} {file.stat().st_mtime_ns}" for file in sorted(sources.tokenizer.iterdir())]
        return "/".join([*(checkpoint.identity for checkpoint in sources.open()), *tokenizer])

    def load(
        self,
        transformer: str,
        text_encoder: str,
        vae: str,
        dtype: str,
        weight_format: str,
        vram_limit_gb: float,
        timesteps: str,
    ) -> tuple[Any, Any, Any]:
        sources = _Sources.of(transformer, text_encoder, vae)
        transformer_file, text_file, vae_file = sources.open()
        management = comfy.model_management
        limit = round(vram_limit_gb * GIB) or None
        model = QwenImageTransformer(
            transformer_file,
            dtype=_compute_dtype(dtype, transformer_file, management.get_torch_device()),
            hardware=Hardware.detect(management.get_torch_device()),
            rounding=TimestepRounding(timesteps),
        )
        text_device = management.text_encoder_device()
        encoder = TextEncoder(
            text_file,
            dtype=_compute_dtype(dtype, text_file, text_device),
            hardware=Hardware.detect(text_device),
        )
        vae_dtype = _compute_dtype(dtype, vae_file, management.vae_device())
        return (
            make_model(model, limit),
            LowVRAMCLIP(encoder, PromptTokenizer(sources.tokenizer), limit),
            make_vae(vae_file, dtype=vae_dtype, limit_bytes=limit),
        )


def _compute_dtype(choice: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if choice != "auto":
        return DTYPES[choice]
    stored = {entry.dtype for entry in checkpoint.tensors.values() if len(entry.shape) > 1}
    if stored == {"F32"} or not comfy.model_management.should_use_bf16(device, prioritize_performance=False):
        return torch.float32
    return torch.bfloat16
