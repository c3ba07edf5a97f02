"""Model files that the pack knows by name: where each comes from, where it belongs, and how large it is. Data alone.

The revision is the repositories' `main`; no commit and no sha256 of theirs is known here, so that what a hub says of a
file when it is fetched is what it is checked against.
"""

from dataclasses import dataclass

HUB = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"  # of the whole hub, under the same paths


@dataclass(frozen=True)
class KnownFile:
    """A file of one of ComfyUI's models folders. gb: as its hub shows it, 0 where nobody has said it."""

    name: str
    folder: str
    repository: str
    path: str  # in the repository
    gb: float = 0
    rounded: bool = False  # gb is known to about a GB
    revision: str = "main"
    sha256: str = ""  # empty: not known

    @property
    def url(self) -> str:
        return self.url_at(HUB)

    @property
    def mirror_url(self) -> str:
        return self.url_at(MIRROR)

    @property
    def is_non_commercial(self) -> bool:
        """Qwen-Image-2.1: Qwen Research License."""
        return self.repository == _QWEN_21

    @property
    def size(self) -> str:
        """As a person reads it; empty where it is not known."""
        return _size(self.gb, self.rounded)

    def url_at(self, endpoint: str) -> str:
        return f"{endpoint}/{self.repository}/resolve/{self.revision}/{self.path}"


@dataclass(frozen=True)
class KnownFolder:
    """A pipeline folder: a whole repository, below models/diffusers. gb: of what of it is needed, 0 where not known."""

    name: str
    repository: str
    gb: float = 0
    rounded: bool = False  # gb is known to about a GB
    revision: str = "main"
    folder: str = "diffusers"
    is_non_commercial: bool = False

    @property
    def url(self) -> str:
        return f"{HUB}/{self.repository}"

    @property
    def mirror_url(self) -> str:
        return f"https://modelscope.cn/models/{self.repository}"

    @property
    def size(self) -> str:
        return _size(self.gb, self.rounded)


def _size(gb: float, rounded: bool) -> str:
    return f"{'about ' if rounded else ''}{gb:g} GB" if gb else ""


_QWEN, _QWEN_21 = "Comfy-Org/Qwen-Image_ComfyUI", "Comfy-Org/Qwen-Image-2.1"
_EDIT, _LAYERED = "Comfy-Org/Qwen-Image-Edit_ComfyUI", "Comfy-Org/Qwen-Image-Layered_ComfyUI"
_LIGHTNING, _LIGHTNING_2511 = "lightx2v/Qwen-Image-Lightning", "lightx2v/Qwen-Image-Edit-2511-Lightning"
_TRANSFORMERS, _ENCODERS, _VAES, _LORAS = "diffusion_models", "text_encoders", "vae", "loras"


def _of(folder: str, repository: str, name: str, gb: float = 0, *, rounded: bool = False) -> KnownFile:
    """A file of Comfy-Org's repositories, which have a folder for each of ComfyUI's."""
    above = "" if repository == _QWEN_21 else "split_files/"
    return KnownFile(name, folder, repository, f"{above}{folder}/{name}", gb, rounded)


def _lora(repository: str, path: str, gb: float = 0) -> KnownFile:
    return KnownFile(path.rpartition("/")[2], _LORAS, repository, path, gb)


FP8 = _of(_TRANSFORMERS, _QWEN, "qwen_image_fp8_e4m3fn.safetensors", 20.4)
BF16 = _of(_TRANSFORMERS, _QWEN, "qwen_image_bf16.safetensors", 40.9)
FP8_SCALED = KnownFile(
    "qwen_image_fp8_e4m3fn_scaled.safetensors",
    _TRANSFORMERS,
    _LIGHTNING,
    "Qwen-Image/qwen_image_fp8_e4m3fn_scaled.safetensors",
    20.4,
)
EDIT_2511 = _of(_TRANSFORMERS, _EDIT, "qwen_image_edit_2511_fp8mixed.safetensors", 20, rounded=True)
EDIT_2511_GGUF = KnownFile(
    "qwen-image-edit-2511-Q4_K_M.gguf",
    _TRANSFORMERS,
    "unsloth/Qwen-Image-Edit-2511-GGUF",
    "qwen-image-edit-2511-Q4_K_M.gguf",
    13,
    rounded=True,
)
EDIT_2509 = KnownFile(
    "qwen_image_edit_2509_fp8_e4m3fn_scaled.safetensors",
    _TRANSFORMERS,
    _LIGHTNING,
    "Qwen-Image-Edit-2509/qwen_image_edit_2509_fp8_e4m3fn_scaled.safetensors",
    20.4,
)
LAYERED = _of(_TRANSFORMERS, _LAYERED, "qwen_image_layered_fp8mixed.safetensors", 20, rounded=True)
QWEN_21 = _of(_TRANSFORMERS, _QWEN_21, "qwen_image_2.1_int8_convrot.safetensors", 7.3)
TURBO_21 = _of(_TRANSFORMERS, _QWEN_21, "qwen_image_2.1_turbo_int8_convrot.safetensors", 7.3)

ENCODER = _of(_ENCODERS, _QWEN, "qwen_2.5_vl_7b_fp8_scaled.safetensors", 9.4)
ENCODER_21 = _of(_ENCODERS, _QWEN_21, "qwen3vl_8b_int8_convrot.safetensors", 9.4)
SMALL_ENCODER_21 = _of(_ENCODERS, _QWEN_21, "qwen3vl_8b_w4a8.safetensors", 6.3)

VAE = _of(_VAES, _QWEN, "qwen_image_vae.safetensors", 0.25)
LAYERED_VAE = _of(_VAES, _LAYERED, "qwen_image_layered_vae.safetensors", 0.25)
VAE_21 = _of(_VAES, _QWEN_21, "qwen_image_2.1_vae_bf16.safetensors", 0.68)

LIGHTNING = _lora(_LIGHTNING, "Qwen-Image-Lightning-8steps-V2.0-bf16.safetensors", 0.85)
LIGHTNING_2509 = _lora(
    _LIGHTNING, "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors", 0.85
)
LIGHTNING_2511 = _lora(_LIGHTNING_2511, "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors", 0.85)

# what the bundled workflows do not name, and ComfyUI's own templates do, or their notes
_MORE = (
    _of(_TRANSFORMERS, _QWEN, "qwen_image_2512_fp8_e4m3fn.safetensors", 20.4),
    _of(_TRANSFORMERS, _QWEN, "qwen_image_2512_bf16.safetensors", 40.9),
    _of(_TRANSFORMERS, _EDIT, "qwen_image_edit_fp8_e4m3fn.safetensors", 20.4),
    _of(_TRANSFORMERS, _EDIT, "qwen_image_edit_2509_fp8_e4m3fn.safetensors", 20.4),
    _of(_TRANSFORMERS, _EDIT, "qwen_image_edit_2511_bf16.safetensors", 40.9),
    _of(_TRANSFORMERS, _EDIT, "qwen_image_edit_2511_int8_convrot.safetensors", 20, rounded=True),
    _of(_TRANSFORMERS, _LAYERED, "qwen_image_layered_bf16.safetensors", 40.9),
    _of(_TRANSFORMERS, _QWEN_21, "qwen_image_2.1_bf16.safetensors", 14.2),
    _of(_TRANSFORMERS, _QWEN_21, "qwen_image_2.1_turbo_bf16.safetensors", 14.2),
    _lora(_LIGHTNING, "Qwen-Image-Lightning-4steps-V1.0.safetensors"),
    _lora(_LIGHTNING, "Qwen-Image-Lightning-8steps-V1.0.safetensors"),
    _lora(_LIGHTNING, "Qwen-Image-Edit-Lightning-4steps-V1.0-bf16.safetensors"),
    _lora(_LIGHTNING, "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors", 0.85),
    _lora("lightx2v/Qwen-Image-2512-Lightning", "Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors"),
)
KNOWN_FILES = (
    FP8, BF16, FP8_SCALED, EDIT_2511, EDIT_2511_GGUF, EDIT_2509, LAYERED, QWEN_21, TURBO_21, ENCODER, ENCODER_21,
    SMALL_ENCODER_21, VAE, LAYERED_VAE, VAE_21, LIGHTNING, LIGHTNING_2509, LIGHTNING_2511, *_MORE,
)  # fmt: skip
KNOWN_FOLDERS = (
    KnownFolder("Qwen-Image", "Qwen/Qwen-Image", 57.7),
    KnownFolder("Qwen-Image-2512", "Qwen/Qwen-Image-2512", 58, rounded=True),
    KnownFolder("Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2509", 58, rounded=True),
    KnownFolder("Qwen-Image-Edit-2511", "Qwen/Qwen-Image-Edit-2511", 58, rounded=True),
    KnownFolder("Qwen-Image-Layered", "Qwen/Qwen-Image-Layered", 58, rounded=True),
)


def known(folder: str, name: str) -> KnownFile | KnownFolder | None:
    """What is known of a file, or a pipeline folder, by its own name, wherever below the models folder it stands."""
    last = name.replace("\\", "/").rpartition("/")[2]
    listed: tuple[KnownFile | KnownFolder, ...] = KNOWN_FOLDERS if folder == "diffusers" else KNOWN_FILES
    return next((each for each in listed if (each.folder, each.name) == (folder, last)), None)
