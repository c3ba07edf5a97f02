"""A network of another shape than Qwen-Image: two blocks of one stream without modulation, latents of 4 channels and
4D, tokens of one latent pixel. All that the pack is told of it is in this file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.files.checkpoint import Checkpoint, open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.component import Component
from qwenimage_lowvram.engine.models.network import Network
from qwenimage_lowvram.engine.models.recognition import require
from qwenimage_lowvram.engine.models.sorting import sort_blocks
from qwenimage_lowvram.engine.models.streamed_transformer import StreamedTransformer
from qwenimage_lowvram.engine.models.table import COMPONENTS
from qwenimage_lowvram.engine.models.transformer_parts import TransformerParts
from qwenimage_lowvram.engine.planning.footprint import TransformerFootprint
from qwenimage_lowvram.engine.planning.request import SamplingRequest
from qwenimage_lowvram.nodes.adapters.around_runs import as_patcher
from qwenimage_lowvram.nodes.adapters.run_conditions import entries_of
from qwenimage_lowvram.nodes.adapters.streamed_model import DiffusionModel, LowVRAMModel
from safetensors.torch import save_file
from torch import Tensor, nn

CHANNELS, WIDTH, PROMPT_WIDTH, BLOCKS, LATENT_PX = 4, 32, 12, 2, 8
TOY = Component("a toy transformer", "diffusion_models", example="toy.safetensors", signs=(r"^layers\.\d+\.mix\.",))
TABLE = (TOY, *COMPONENTS)


class ToyBlock(nn.Module):
    """Tokens see their mean, the prompt's mean and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(3 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor, prompt: Tensor, time: Tensor) -> Tensor:
        seen = torch.cat([tokens, prompt.mean(1, keepdim=True).expand_as(tokens) + time, tokens - tokens.mean(1)], -1)
        return tokens + self.out(torch.tanh(self.mix(seen)))


class ToyOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_in, self.prompt_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(PROMPT_WIDTH, WIDTH)
        self.image_out = nn.Linear(WIDTH, CHANNELS)


class WholeToy(ToyOutside):
    """The same as one module, as a card with room for everything runs it."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ToyBlock() for _ in range(BLOCKS))

    def forward(self, latent: Tensor, prompt: Tensor, sigma: Tensor) -> Tensor:
        tokens, prompt = self.image_in(latent.flatten(2).mT), self.prompt_in(prompt)
        for layer in self.layers:
            tokens = layer(tokens, prompt, sigma)
        return self.image_out(tokens).mT.reshape(latent.shape)


def write_toy(file: Path) -> WholeToy:
    torch.manual_seed(5)
    with torch.inference_mode(False):
        whole = WholeToy().requires_grad_(False)
        save_file(whole.state_dict(), file)
    return whole


@dataclass(frozen=True)
class ToyFootprint(TransformerFootprint):
    prompt_width: int = PROMPT_WIDTH

    def activation_bytes(self, request: SamplingRequest, chunk: int | None) -> int:
        tokens = request.branches * (request.image_tokens + request.prompt_tokens)
        return tokens * (10 * self.inner_dim + self.prompt_width) * self.element_bytes

    def step_flops(self, request: SamplingRequest) -> float:
        return 2.0 * request.branches * request.image_tokens * self.all_blocks * 8 * self.inner_dim**2


@dataclass
class ToyBranch:
    latent: Tensor  # (1, 4, H, W)
    prompt: Tensor
    timestep: float


@dataclass
class ToyState:
    img: Tensor
    prompt: Tensor
    time: Tensor

    @property
    def tokens(self) -> int:
        return self.img.shape[1]

    def move(self, device: torch.device) -> None:
        self.img, self.prompt, self.time = self.img.to(device), self.prompt.to(device), self.time.to(device)

    def run(self, index: int, block: nn.Module) -> None:
        self.img = block(self.img, self.prompt, self.time)

    def add_residuals(self, index: int) -> None:
        pass


class ToyTransformer(StreamedTransformer[ToyBranch, ToyState]):
    def __init__(self, file: Path, *, hardware: Hardware, others: Sequence[Hardware] = ()) -> None:
        checkpoint = open_checkpoint(file)
        parts = TransformerParts(toy_network(checkpoint), dtype=torch.float32, hardware=hardware, others=others)
        super().__init__(checkpoint, parts, dtype=torch.float32, hardware=hardware)

    def begin(self, branches: Sequence[ToyBranch], on_block: Callable[[int], None] | None) -> list[ToyState]:
        return [
            ToyState(
                self.outside.image_in(branch.latent.flatten(2).mT),
                self.outside.prompt_in(branch.prompt),
                torch.tensor(branch.timestep, device=self.hardware.device),
            )
            for branch in branches
        ]

    def finish(self, branch: ToyBranch, state: ToyState) -> Tensor:
        return self.answer_of(branch, state.img)

    def image_tokens(self, branch: ToyBranch, state: ToyState) -> Tensor:
        return state.img

    def answer_of(self, branch: ToyBranch, hidden: Tensor) -> Tensor:
        return self.outside.image_out(hidden).mT.reshape(branch.latent.shape)


def toy_network(checkpoint: Checkpoint) -> Network:
    require(checkpoint, TOY, TABLE)
    outside, blocks = sort_blocks(checkpoint, checkpoint.tensors, "layers.")
    return Network(
        where=str(checkpoint.path),
        outside=outside,
        blocks=blocks,
        block_prefix="layers.",
        inner_dim=WIDTH,
        make_outside=partial(_on_meta, ToyOutside),
        make_block=partial(_on_meta, ToyBlock),
        make_footprint=ToyFootprint,
    )


def _on_meta(kind: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind().eval()


# ComfyUI's side of it


class ToyFormat(comfy.latent_formats.LatentFormat):
    latent_channels = CHANNELS


class ToyConfig(comfy.supported_models_base.BASE):
    sampling_settings: ClassVar[dict[str, float]] = {"shift": 1.0, "multiplier": 1.0}
    latent_format = ToyFormat
    supported_inference_dtypes = (torch.float32,)


class ToyCall:
    patches = None
    identities = ()

    def __init__(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> None:
        self._x, self.timesteps, self._prompt = x, timestep, prompt

    @property
    def batch(self) -> int:
        return len(self._x)

    def branches(self, timesteps: Sequence[float]) -> list[ToyBranch]:
        prompts = self._prompt.expand(self.batch, -1, -1)
        return [ToyBranch(self._x[i : i + 1], prompts[i : i + 1], timesteps[i]) for i in range(self.batch)]

    def unpack(self, answer: Tensor) -> Tensor:
        return answer


class ToyDiffusion(DiffusionModel):
    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, transformer_options: Any = None, **_: Any
    ) -> Tensor:
        return self.answer(ToyCall(x, timestep, context), x, transformer_options or {})


class ToyModel(LowVRAMModel, comfy.model_base.BaseModel):
    DIFFUSION_MODEL = ToyDiffusion

    def __init__(self, transformer: ToyTransformer, *limits: Any) -> None:
        super().__init__(ToyConfig({"disable_unet_model_creation": True}), transformer, *limits)

    def check_run(self, conds: Any, noise: Tensor) -> None:
        if noise.ndim != 4:
            raise InvalidRequest(
                "A toy makes images (B, {channels}, H, W), not {shape}.",
                code="toy.wrong_shape",
                channels=CHANNELS,
                shape=list(noise.shape),
            )

    def request_of(self, conds: Any, noise: Tensor, sigmas: Tensor) -> SamplingRequest:
        prompts = [entry["cross_attn"] for entry in entries_of(conds)]
        return SamplingRequest(
            width=noise.shape[3] * LATENT_PX,
            height=noise.shape[2] * LATENT_PX,
            branches=len(prompts) * noise.shape[0],
            prompt_tokens=max(prompt.shape[1] for prompt in prompts),
            timesteps=len(sigmas) - 1,
            token_px=LATENT_PX,
        )


def toy_model(transformer: ToyTransformer, *limits: Any) -> Any:
    return as_patcher(ToyModel(transformer, *limits))


def served(other: Any) -> Any:
    """Of a family that has all but its transformer from another."""
    family = replace(other.family, transformer=TOY, parts=TransformerParts, open=ToyTransformer)
    return replace(other, family=family, image_model="toy", make_model=toy_model)
