"""What the loader asks a person for: files, and how they are held and computed with."""

from typing import Any

from ..engine.compute.attention_choice import CHOICES
from ..engine.compute.linear_choice import Computing
from ..engine.compute.step_schedules import OFF, STEP_CACHES
from ..engine.models.qwen_image.positions import Positions
from ..engine.models.qwen_image.transformer import TimestepRounding
from . import devices, model_choices
from .display_names import AUTO
from .dtypes import DTYPES
from .sources import VARIANTS
from .weight_cache import WEIGHT_FORMATS


def loader_inputs() -> dict[str, Any]:
    """As INPUT_TYPES has them: what is here now. Names and their order only grow."""
    return {
        "required": {
            "transformer": (
                model_choices.transformer_choices(),
                {
                    "tooltip": "A file of models/diffusion_models (bf16, fp16, fp32, fp8, fp8 scaled, GGUF), a "
                    "pipeline folder of models/diffusers (bitsandbytes nf4, fp4 and int8 too), or an all-in-one "
                    "file of models/checkpoints. Qwen-Image-2.1 and 2.1-Turbo are for non-commercial use (Qwen "
                    "Research License)."
                },
            ),
            "text_encoder": (
                model_choices.component_choices("text_encoders"),
                {
                    "tooltip": "From models/text_encoders: Qwen2.5-VL-7B, for Qwen-Image-2.1 Qwen3-VL-8B; 'from "
                    "the folder': that of the pipeline folder, or of the all-in-one file, that is chosen above."
                },
            ),
            "vae": (
                model_choices.component_choices("vae"),
                {
                    "tooltip": "From models/vae: qwen_image_vae (qwen_image_layered_vae for Qwen-Image-Layered, "
                    "qwen_image_2.1_vae for Qwen-Image-2.1); 'from the folder' as above."
                },
            ),
            "dtype": (
                ["auto", *DTYPES],
                {
                    "default": "auto",
                    "tooltip": "What is computed in. auto: bf16; on cards without it (GTX 16, RTX 20) fp16 or fp32, "
                    "whichever is faster there; fp32 for fp32 files. fp16: products alone, scaled so that they do not "
                    "overflow, between activations in fp32; the text encoder in fp32.",
                },
            ),
            "weight_format": (
                list(WEIGHT_FORMATS),
                {
                    "default": AUTO,
                    "tooltip": "How weights are held and streamed. auto: as stored. fp8, int8, nf4 and fp4 "
                    "quantize the blocks of a bf16, fp16 or fp32 file at the first load and keep them on the disk "
                    "(27.2 GB become 13.6 in fp8 or int8, 7.6 in nf4 or fp4). fastest: int8 or nf4 where that "
                    "makes a step over 10 % faster on this machine, so the image depends on the machine. Chosen "
                    "when this node runs, and kept until an input or a file of it changes.",
                },
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
                    "pipeline rounds them in bf16, to compare images with it.",
                },
            ),
        },
        "optional": {
            "variant": (
                list(VARIANTS),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "Which member of the family the transformer is. auto: by its mark, its folder or "
                    "its name. Choose it for a renamed file, and for Edit-2511 in GGUF files without its mark.",
                },
            ),
            "ram_limit_gb": (
                "FLOAT",
                {
                    "default": 0.0,
                    "min": 0.0,
                    "max": 4096.0,
                    "step": 0.1,
                    "tooltip": "The most RAM that the model's blocks and buffers may take, in GB (GiB); the other "
                    "blocks are read from the file at every step. 0: what is free, but for a reserve.",
                },
            ),
            "transformer_device": (
                devices.choices_for_blocks(),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "Where images are sampled. auto: ComfyUI's device. all cards: blocks stay on all "
                    "of them, within the VRAM limit of each, and activations are handed on.",
                },
            ),
            "text_encoder_device": (
                devices.choices(),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "Where prompts are encoded. auto: ComfyUI's device for text encoders.",
                },
            ),
            "vae_device": (
                devices.choices(),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "Where images are decoded. auto: ComfyUI's device for VAEs.",
                },
            ),
            "positions": (
                [positions.value for positions in Positions],
                {
                    "default": Positions.COMFYUI.value,
                    "advanced": True,
                    "tooltip": "How image positions are counted where a side has an odd number of 16 px patches "
                    "(1328 has 83) or a reference is longer than the image. comfyui: the same image as ComfyUI's "
                    "own loader makes. diffusers: the same as the diffusers pipeline.",
                },
            ),
            "attention": (
                list(CHOICES),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "The kernel that computes attention in the transformer. auto: PyTorch's, or what "
                    "ComfyUI was started with (--use-flash-attention and the like). sage and comfy_kitchen_int8 "
                    "quantize: faster, and another image. A kernel that does not work here is refused.",
                },
            ),
            "step_cache": (
                list(STEP_CACHES),
                {
                    "default": OFF,
                    "advanced": True,
                    "tooltip": "Steps that are not computed, which makes another image. planned: 28, 20 (twice as "
                    "fast) or 12 of 40 are computed, the others predicted from them, and nothing is fetched for "
                    "those; measured on Qwen-Image-2.1 at 1024x1024 without guidance, where 20 are close to "
                    "all and 12 change things. first_block: a step ends behind block 0 where that has hardly "
                    "changed.",
                },
            ),
            "compute": (
                [computing.value for computing in Computing],
                {
                    "default": Computing.AS_COMFYUI.value,
                    "advanced": True,
                    "tooltip": "On what the transformer's linear layers compute. auto: on a card, ComfyUI's int8, "
                    "w4a4 and w4a8 files, from RTX 40 on its scaled fp8 files, and from RTX 50 on its nvfp4 and mxfp8 "
                    "files, as ComfyUI itself computes them; everything else exact. exact: on decoded weights, "
                    "another image for those files. fast: wherever weights are in those formats, with weight_format "
                    "too; plan and report say 'not exact'.",
                },
            ),
            "compile": (
                "BOOLEAN",
                {
                    "default": False,
                    "advanced": True,
                    "tooltip": "The transformer's blocks by code that torch.compile makes once for all of them, steps "
                    "and seeds; the first run takes longer. Used where it computes the same bits, with compute fast "
                    "also where it rounds a little differently; where it cannot be, log and report say why.",
                },
            ),
        },
    }
