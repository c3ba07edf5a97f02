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
                    "tooltip": "The diffusion model: a file from models/diffusion_models (bf16, fp16, fp32, fp8, fp8 "
                    "scaled, GGUF), a pipeline folder from models/diffusers (bitsandbytes nf4, fp4 and int8 too), or "
                    "an all-in-one file from models/checkpoints. Qwen-Image-2.1 and 2.1-Turbo are for non-commercial "
                    "use (Qwen Research License)."
                },
            ),
            "text_encoder": (
                model_choices.component_choices("text_encoders"),
                {
                    "tooltip": "The text encoder, from models/text_encoders: Qwen2.5-VL-7B, or Qwen3-VL-8B for "
                    "Qwen-Image-2.1. 'from the folder' takes the one in the pipeline folder or all-in-one file chosen "
                    "above."
                },
            ),
            "vae": (
                model_choices.component_choices("vae"),
                {
                    "tooltip": "The VAE, from models/vae: qwen_image_vae (qwen_image_layered_vae for "
                    "Qwen-Image-Layered, qwen_image_2.1_vae for Qwen-Image-2.1). 'from the folder' works as above."
                },
            ),
            "dtype": (
                ["auto", *DTYPES],
                {
                    "default": "auto",
                    "tooltip": "Compute precision. auto uses bf16; on cards without it (GTX 16, RTX 20), fp16 or "
                    "fp32, whichever is faster there; for fp32 files, fp32. fp16 is used only for matrix products, "
                    "which are scaled so that they do not overflow; activations and the text encoder stay in fp32.",
                },
            ),
            "weight_format": (
                list(WEIGHT_FORMATS),
                {
                    "default": AUTO,
                    "tooltip": "How weights are held and streamed. auto keeps them as stored. fp8, int8, nf4 and fp4 "
                    "quantize the blocks of a bf16, fp16 or fp32 file when it is first loaded, and keep the result on "
                    "disk (27.2 GB become 13.6 GB in fp8 or int8, 7.6 GB in nf4 or fp4). fastest picks int8 or nf4 if "
                    "that makes a step more than 10% faster on this machine, so the image depends on the machine; the "
                    "choice is made when this node runs, and kept until one of its inputs or files changes.",
                },
            ),
            "vram_limit_gb": (
                "FLOAT",
                {
                    "default": 0.0,
                    "min": 0.0,
                    "max": 1024.0,
                    "step": 0.1,
                    "tooltip": "The most memory on the card that encoding, sampling and decoding may use, in GB as "
                    "cards are sold (GiB). 0 uses what is free when the node runs.",
                },
            ),
            "timesteps": (
                [rounding.value for rounding in TimestepRounding],
                {
                    "default": TimestepRounding.FP32.value,
                    "advanced": True,
                    "tooltip": "How timesteps are rounded. fp32 keeps them exact, as ComfyUI does. diffusers rounds "
                    "them as the diffusers pipeline does in bf16, so that images can be compared with it.",
                },
            ),
        },
        "optional": {
            "variant": (
                list(VARIANTS),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "Which Qwen-Image model the transformer is. auto recognises it by its mark, its folder "
                    "or its name. Choose the model yourself for a renamed file, and for Edit-2511 GGUF files that "
                    "lack the mark.",
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
                    "blocks are read from the file at every step. 0 uses what is free, minus a reserve.",
                },
            ),
            "transformer_device": (
                devices.choices_for_blocks(),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "Where images are sampled. auto is ComfyUI's device. all cards uses all of them, "
                    "within the VRAM limit of each: either the prompts and images of a step are divided among them, "
                    "or the blocks are, whichever is faster.",
                },
            ),
            "text_encoder_device": (
                devices.choices(),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "Where prompts are encoded. auto is ComfyUI's device for text encoders.",
                },
            ),
            "vae_device": (
                devices.choices(),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "Where images are decoded. auto is ComfyUI's device for VAEs.",
                },
            ),
            "positions": (
                [positions.value for positions in Positions],
                {
                    "default": Positions.COMFYUI.value,
                    "advanced": True,
                    "tooltip": "How image positions are counted if a side has an odd number of 16 px patches (1328 "
                    "has 83) or a reference is longer than the image. comfyui gives the same image as ComfyUI's own "
                    "loader, diffusers the same as the diffusers pipeline.",
                },
            ),
            "attention": (
                list(CHOICES),
                {
                    "default": AUTO,
                    "advanced": True,
                    "tooltip": "The attention kernel of the transformer. auto uses PyTorch's, or the one that "
                    "ComfyUI was started with (such as --use-flash-attention). sage and comfy_kitchen_int8 quantize: "
                    "they are faster and give a different image. A kernel that does not work here is refused.",
                },
            ),
            "step_cache": (
                list(STEP_CACHES),
                {
                    "default": OFF,
                    "advanced": True,
                    "tooltip": "Skips computing some steps, which gives a different image. planned_28, planned_20 "
                    "(twice as fast) and planned_12 compute that many of 40 steps and predict the others, for which "
                    "nothing is read. They were measured with Qwen-Image-2.1 at 1024x1024 without guidance: 20 steps "
                    "come close to all 40, 12 change things in the image. first_block ends a step after block 0 if "
                    "that block's output has hardly changed.",
                },
            ),
            "compute": (
                [computing.value for computing in Computing],
                {
                    "default": Computing.AS_COMFYUI.value,
                    "advanced": True,
                    "tooltip": "How the transformer's linear layers compute. On a card, auto multiplies the stored "
                    "numbers of some files, as ComfyUI itself does: ComfyUI's int8, w4a4 and w4a8 files, scaled fp8 "
                    "files (RTX 40 and newer), and nvfp4 and mxfp8 files (RTX 50 and newer); everything else is "
                    "exact. exact uses decoded weights, which gives a different image for those files. fast "
                    "multiplies the stored numbers wherever weights are in these formats, also through weight_format, "
                    "and in nunchaku's int4 (RTX 30 and newer); the plan and the report then say 'not exact'.",
                },
            ),
            "compile": (
                "BOOLEAN",
                {
                    "default": False,
                    "advanced": True,
                    "tooltip": "Compiles the transformer's blocks with torch.compile, once for all blocks, steps and "
                    "seeds; the first run takes longer. The compiled code is used only if it gives the same bits, or, "
                    "with compute fast, if it rounds just a little differently; if it cannot be used, the log and the "
                    "report say why.",
                },
            ),
        },
    }
