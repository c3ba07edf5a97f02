"""What the embeddings of a prompt follow from, to the last bit: the name that they are kept under. Holds no tensor."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


def _code_version() -> str:
    """A digest of the engine's own sources: an embedding of another version is never taken for one of this."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


CODE_VERSION = _code_version()  # when the code is imported: the files may be another version's later


@dataclass(frozen=True)
class PromptKey:
    """Equal keys have equal embeddings, bit for bit.

    encoder: Checkpoint.identity, which stands for the weights and their format. tokens: the prompt's within its
    template. arithmetic: as `arithmetic_of` gives it. images: a digest of each image that the prompt shows.
    """

    encoder: str
    dtype: torch.dtype
    tokens: tuple[int, ...]
    arithmetic: str
    images: tuple[str, ...] = ()
    code: str = CODE_VERSION

    @property
    def text(self) -> str:
        return json.dumps({**asdict(self), "dtype": str(self.dtype)}, sort_keys=True)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]


def arithmetic_of(device: torch.device) -> str:
    """What decides the last bits of a result on that device: the libraries, the chip, and torch's settings for it."""
    import transformers  # here: its version is of interest once prompts are encoded, and by then it is there

    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device.type == "cpu":
        backends = torch.backends.mkldnn
        chip = f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        settings = [f"fp32 {_fp32_precision(backends)}"]
    elif device.type == "cuda":
        backends = torch.backends.cuda
        chip = f"cuda {torch.cuda.get_device_name(device)}"
        settings = [f"fp32 {_fp32_precision(backends)}", *(name for name, on in _cuda_switches().items() if on)]
    else:
        chip = f"xpu {torch.xpu.get_device_name(device)}" if device.type == "xpu" else device.type
        settings = [f"fp32 {torch.get_float32_matmul_precision()}"]
    return ", ".join([libraries, chip, *settings])


def _fp32_precision(backends: object) -> str:
    """torch before 2.9 has one setting for all; later ones raise where it is asked for after the new one was set."""
    matmul = getattr(backends, "matmul", None)
    return str(getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision())


def _cuda_switches() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {
        "fp16 accumulation": getattr(cuda.matmul, "allow_fp16_accumulation", False),  # torch 2.7
        "fp16 reduction": bool(cuda.matmul.allow_fp16_reduced_precision_reduction),
        "bf16 reduction": bool(cuda.matmul.allow_bf16_reduced_precision_reduction),
        "fp16 and bf16 reduction in math attention": cuda.fp16_bf16_reduction_math_sdp_allowed(),
        "flash attention": cuda.flash_sdp_enabled(),
        "memory-efficient attention": cuda.mem_efficient_sdp_enabled(),
        "cudnn attention": cuda.cudnn_sdp_enabled(),
        "math attention": cuda.math_sdp_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
