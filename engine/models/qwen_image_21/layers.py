"""The modules of Qwen-Image-2.1's transformer: its block, and what stands before and behind the blocks. No layer has
a bias, and all blocks share one modulation.

Names of parameters are those of the files. What they compute is, operation by operation and in its order, what
diffusers' QwenImage21Transformer2DModel does (models/transformers/transformer_qwenimage21.py), so that results are the
same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...compute.chunk_sizes import NORM_TOKENS
from ...compute.half_products import joined, narrowed
from ...compute.stored_linear import halves
from ...compute.token_chunks import ChunkedTokens, chunk_bounds
from .tensors import CHANNELS, TransformerConfig

EPS = 1e-6
_TIME_CHANNELS, _TIME_FACTOR, _LONGEST_PERIOD = 256, 1000.0, 10000

Values = tuple[Tensor, ...]  # (1, N, heads, head_dim); of HalfAttention a factor (1,) too
KeysValues = tuple[Tensor, ...]  # keys (1, N, heads, head_dim), turned, then those of values


@dataclass(frozen=True)
class Run:
    """Neighbours among the queries, `start` to `stop`, that see the first `keys` keys; `mask`: those of them that each
    sees, (1, 1, queries or 1, keys) bool, None where all are seen."""

    start: int
    stop: int
    keys: int
    mask: Tensor | None = None

    def to(self, device: torch.device) -> "Run":
        return self if self.mask is None else Run(self.start, self.stop, self.keys, self.mask.to(device))


class HeadNorm(nn.Module):
    """RMSNorm over a head's dimensions, the mean square in fp32; then turned by the tokens' places."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """In place of x: queries or keys (1, N, heads, head_dim). rotary: complex (N, head_dim / 2); neighbours of a
        head make a complex number. A few tokens at a time: in fp32 they take twice as much."""
        for begin, end in chunk_bounds(x.shape[1], NORM_TOKENS):
            part = x[:, begin:end]
            variance = part.to(torch.float32, copy=True).pow_(2).mean(-1, keepdim=True)
            normed = (part * torch.rsqrt(variance + EPS)).to(part.dtype).mul_(self.weight)
            pairs = torch.view_as_complex(normed.float().unflatten(-1, (-1, 2)))
            part.copy_(torch.view_as_real(pairs.mul_(rotary[begin:end].unsqueeze(1))).flatten(3))
        return x


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self._heads = (config.heads, config.head_dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q, self.norm_k = HeadNorm(config.head_dim), HeadNorm(config.head_dim)

    def queries(self, x: Tensor, rotary: Tensor) -> Tensor:
        return self.norm_q(self.to_q(x).unflatten(-1, self._heads), rotary)

    def keys_values(self, x: Tensor, rotary: Tensor) -> KeysValues:
        return self.norm_k(self.to_k(x).unflatten(-1, self._heads), rotary), self.to_v(x).unflatten(-1, self._heads)

    def values_behind(self, before: Sequence[Values], own: Values) -> Values:
        return (_behind([values for (values,) in before], own[0]),)

    def seen(self, query: Tensor, keys: Tensor, values: Values, runs: Sequence[Run]) -> Tensor:
        """(1, N, heads, head_dim), before the last layer."""
        parts = [_attend(query, keys, values[0], run) for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class HalfAttention(Attention):
    """Of activations in fp32: queries, keys and values are held and computed with in fp16."""

    def queries(self, x: Tensor, rotary: Tensor) -> Tensor:
        return super().queries(x, rotary).to(torch.float16)

    def keys_values(self, x: Tensor, rotary: Tensor) -> KeysValues:
        keys = self.norm_k(self.to_k(x).unflatten(-1, self._heads), rotary).to(torch.float16)
        return keys, *narrowed(self.to_v(x).unflatten(-1, self._heads))

    def values_behind(self, before: Sequence[Values], own: Values) -> Values:
        return joined([(numbers, factor) for numbers, factor in (*before, own)], dim=1)

    def seen(self, query: Tensor, keys: Tensor, values: Values, runs: Sequence[Run]) -> Tensor:
        return super().seen(query, keys, values, runs) * values[1]


def _attend(query: Tensor, keys: Tensor, values: Tensor, run: Run) -> Tensor:
    parts = query[:, run.start : run.stop], keys[:, : run.keys], values[:, : run.keys]
    q, k, v = (part.permute(0, 2, 1, 3) for part in parts)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=run.mask).permute(0, 2, 1, 3)


class SwiGLU(nn.Module):
    """`gate_up` holds the rows of gate_layer and of proj where the file joins them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, wide = config.inner_dim, config.mlp_dim
        if config.joined:
            self.gate_up = nn.Linear(dim, 2 * wide, bias=False)
        else:
            self.gate_layer, self.proj = nn.Linear(dim, wide, bias=False), nn.Linear(dim, wide, bias=False)
        self.out = nn.Linear(wide, dim, bias=False)
        self._joined = config.joined

    def forward(self, x: Tensor) -> Tensor:
        gate, up = halves(self.gate_up, x) if self._joined else (self.gate_layer(x), self.proj(x))
        gated = F.silu(gate, inplace=True).mul_(up)
        del gate, up  # before there is the result
        return self.out(gated)


class Block(nn.Module):
    """One stream: attention over what stands before and itself, then the MLP.

    Of tokens (1, N, dim) at one timestep, whose `modulation` (1, 1, 4 * dim) holds two scales, each followed by its
    gate. `before`: keys and values of what stands before them in the sequence, which `runs` count with.
    """

    def __init__(self, config: TransformerConfig, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self._dim = (config.inner_dim,)
        self.attn = attention(config)
        self.img_mlp = ChunkedTokens(SwiGLU(config))

    def forward(
        self, hidden: Tensor, modulation: Tensor, rotary: Tensor, runs: Sequence[Run], before: Sequence[KeysValues]
    ) -> Tensor:
        x = self._scaled(hidden, modulation.chunk(4, dim=-1)[0])
        query, (keys, *own) = self.attn.queries(x, rotary), self.attn.keys_values(x, rotary)
        del x
        keys = _behind([k for k, *_ in before], keys)
        values = self.attn.values_behind([tuple(v) for _, *v in before], tuple(own))
        del own
        seen = self.attn.seen(query, keys, values, runs)
        del query, keys, values
        added = self.attn.to_out[0](seen.flatten(2, 3))
        del seen
        return self._finish(hidden, added, modulation)

    def with_keys_values(
        self, hidden: Tensor, modulation: Tensor, rotary: Tensor, runs: Sequence[Run], before: Sequence[KeysValues]
    ) -> tuple[Tensor, KeysValues]:
        """The same as `forward`, and the tokens' keys and values."""
        x = self._scaled(hidden, modulation.chunk(4, dim=-1)[0])
        query, own = self.attn.queries(x, rotary), self.attn.keys_values(x, rotary)
        del x
        keys = _behind([k for k, *_ in before], own[0])
        values = self.attn.values_behind([tuple(v) for _, *v in before], own[1:])
        seen = self.attn.seen(query, keys, values, runs)
        del query, keys, values
        added = self.attn.to_out[0](seen.flatten(2, 3))
        del seen
        return self._finish(hidden, added, modulation), own

    def keys_values(self, hidden: Tensor, modulation: Tensor, rotary: Tensor) -> KeysValues:
        """These alone."""
        return self.attn.keys_values(self._scaled(hidden, modulation.chunk(4, dim=-1)[0]), rotary)

    def _finish(self, hidden: Tensor, added: Tensor, modulation: Tensor) -> Tensor:
        _, gate, scale, mlp_gate = modulation.chunk(4, dim=-1)
        hidden = added.mul_(gate.tanh()).add_(hidden)
        added = self.img_mlp(self._scaled(hidden, scale))
        return added.mul_(mlp_gate.tanh()).add_(hidden)

    def _scaled(self, hidden: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(hidden, self._dim, eps=EPS).mul_(1 + scale)


def _behind(before: list[Tensor], own: Tensor) -> Tensor:
    return torch.cat([*before, own], dim=1) if before else own


class TextIn(nn.Module):
    """Prompt embeddings (1, L, prompt_dim) to tokens. The norm's weight is stored less 1."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.text_norm = nn.Module()
        self.text_norm.weight = nn.Parameter(torch.zeros(config.prompt_dim))
        self.in_layer = nn.Linear(config.prompt_dim, config.inner_dim, bias=False)
        self.out_layer = nn.Linear(config.inner_dim, config.inner_dim, bias=False)

    def forward(self, embeds: Tensor) -> Tensor:
        wide = embeds.float()
        root = torch.rsqrt(torch.mean(wide**2, dim=-1, keepdim=True) + EPS)
        normed = (wide * root * (self.text_norm.weight.float() + 1)).to(embeds.dtype)
        return self.out_layer(F.gelu(self.in_layer(normed), approximate="tanh"))


def time_frequencies() -> Tensor:
    """Of a timestep's embedding, (128,) in fp32, on the host."""
    half = _TIME_CHANNELS // 2
    return torch.exp(-math.log(_LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32) / half)


class TimeIn(nn.Module):
    """Timesteps (n,) in 0..1 to embeddings (n, dim): cosines and sines of the 128 `time_frequencies`, two layers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.linear_1 = nn.Linear(_TIME_CHANNELS, config.inner_dim, bias=False)
        self.timestep_embedder.linear_2 = nn.Linear(config.inner_dim, config.inner_dim, bias=False)

    def forward(self, timesteps: Tensor, frequencies: Tensor) -> Tensor:
        angles = (_TIME_FACTOR * timesteps.float())[:, None] * frequencies[None]
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(timesteps.dtype)
        layers = self.timestep_embedder
        return layers.linear_2(F.silu(layers.linear_1(waves)))


class Outside(nn.Module):
    """What stands before and behind the blocks."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self._dim = (dim,)
        self.time_text_embed = TimeIn(config)
        self.txt_in = TextIn(config)
        self.img_in = nn.Linear(CHANNELS, dim, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim, bias=False))
        self.norm_out = nn.Module()
        self.norm_out.linear = nn.Linear(dim, dim, bias=False)
        self.proj_out = nn.Linear(dim, CHANNELS, bias=False)

    def clocks(self, timestep: float, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The embeddings of `timestep` (sigma, 0..1) and of 0, (2, dim), and the blocks' modulation at each, (2, 4 *
        dim). `frequencies`: of `time_frequencies`, on the device. The timestep is rounded as the reference pipeline
        does it: times 1000 in `dtype`, then divided."""
        value = torch.full((1,), timestep, dtype=torch.float32, device=frequencies.device).mul(1000).to(dtype) / 1000
        embedding = self.time_text_embed(torch.cat([value, value.new_zeros(1)]), frequencies)
        return embedding, self.modulation(embedding)

    def velocity(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """(1, N, 64) of the image's tokens (1, N, dim) behind the last block; `embedding`: both of `clocks`."""
        scale = self.norm_out.linear(F.silu(embedding))[:1].unsqueeze(1)
        return self.proj_out(F.layer_norm(hidden, self._dim, eps=EPS).mul_(1 + scale))
