"""The model files that the workflows name: where each comes from, where it belongs, and how large it is."""

from dataclasses import dataclass

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class ModelFile:
    """A file of a models folder. size: as a note says it; empty where nobody has said it. about: what else to know."""

    name: str
    folder: str
    source: str  # on the hub: repository, revision and folder
    size: str = ""
    about: str = ""

    @property
    def url(self) -> str:
        return f"{HUB}/{self.source}/{self.name}"

    @property
    def link(self) -> str:
        return f"[{self.name}]({self.url})"

    @property
    def entry(self) -> dict[str, str]:
        """As the page reads it for its download button."""
        return {"name": self.name, "url": self.url, "directory": self.folder}

    @property
    def line(self) -> str:
        """As a note lists it."""
        size = f", {self.size}" if self.size else ""
        return f"- models/{self.folder}/ {self.link}{size}{self.about}"


def _of(folder: str, root: str, name: str, size: str = "", about: str = "") -> ModelFile:
    """A file of Comfy-Org's repositories, which have a folder for each of ComfyUI's."""
    return ModelFile(name, folder, f"{root}/{folder}", size, about)


_QWEN = "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
_EDIT = "Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files"
_LAYERED = "Comfy-Org/Qwen-Image-Layered_ComfyUI/resolve/main/split_files"
_QWEN_21 = "Comfy-Org/Qwen-Image-2.1/resolve/main"
_LIGHTNING = "lightx2v/Qwen-Image-Lightning/resolve/main"
_TRANSFORMERS, _ENCODERS, _VAES = "diffusion_models", "text_encoders", "vae"

FP8 = _of(_TRANSFORMERS, _QWEN, "qwen_image_fp8_e4m3fn.safetensors", "20.4 GB")
BF16 = _of(_TRANSFORMERS, _QWEN, "qwen_image_bf16.safetensors", "40.9 GB")
FP8_SCALED = ModelFile("qwen_image_fp8_e4m3fn_scaled.safetensors", _TRANSFORMERS, f"{_LIGHTNING}/Qwen-Image", "20.4 GB")
EDIT_2511 = _of(_TRANSFORMERS, _EDIT, "qwen_image_edit_2511_fp8mixed.safetensors", "about 20 GB")
EDIT_2511_GGUF = ModelFile(
    "qwen-image-edit-2511-Q4_K_M.gguf",
    _TRANSFORMERS,
    "unsloth/Qwen-Image-Edit-2511-GGUF/resolve/main",
    "about 13 GB",
    "; the page shows no download button for GGUF, so follow the link",
)
EDIT_2509 = ModelFile(
    "qwen_image_edit_2509_fp8_e4m3fn_scaled.safetensors",
    _TRANSFORMERS,
    f"{_LIGHTNING}/Qwen-Image-Edit-2509",
    "20.4 GB",
)
LAYERED = _of(_TRANSFORMERS, _LAYERED, "qwen_image_layered_fp8mixed.safetensors", "about 20 GB")
QWEN_21 = _of(_TRANSFORMERS, _QWEN_21, "qwen_image_2.1_int8_convrot.safetensors", "7.3 GB")
TURBO_21 = _of(_TRANSFORMERS, _QWEN_21, "qwen_image_2.1_turbo_int8_convrot.safetensors", "7.3 GB")

ENCODER = _of(_ENCODERS, _QWEN, "qwen_2.5_vl_7b_fp8_scaled.safetensors", "9.4 GB")
ENCODER_21 = _of(_ENCODERS, _QWEN_21, "qwen3vl_8b_int8_convrot.safetensors", "9.4 GB")
SMALL_ENCODER_21 = _of(
    _ENCODERS,
    _QWEN_21,
    "qwen3vl_8b_w4a8.safetensors",
    "6.3 GB",
    "; read with comfy-kitchen 0.2.27 or newer (ComfyUI 0.33 has it, 0.30 does not); without it choose "
    f"{ENCODER_21.link}, 9.4 GB, which takes as little of the card",
)

VAE = _of(_VAES, _QWEN, "qwen_image_vae.safetensors", "0.25 GB")
LAYERED_VAE = _of(_VAES, _LAYERED, "qwen_image_layered_vae.safetensors", "0.25 GB")
VAE_21 = _of(_VAES, _QWEN_21, "qwen_image_2.1_vae_bf16.safetensors", "0.68 GB")

LIGHTNING = ModelFile("Qwen-Image-Lightning-8steps-V2.0-bf16.safetensors", "loras", _LIGHTNING, "0.85 GB")
LIGHTNING_2509 = ModelFile(
    "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
    "loras",
    f"{_LIGHTNING}/Qwen-Image-Edit-2509",
    "0.85 GB",
)
LIGHTNING_2511 = ModelFile(
    "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors",
    "loras",
    "lightx2v/Qwen-Image-Edit-2511-Lightning/resolve/main",
    "0.85 GB",
)
