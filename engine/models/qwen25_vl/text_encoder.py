"""Qwen2.5-VL as text encoder: tokens to embeddings, layer by layer from the file. Keeps nothing after it answers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...compute.attention import attention_by, kernel_of
from ...compute.chunk_sizes import TEXT_MLP_TOKENS
from ...compute.token_chunks import ChunkedTokens
from ...errors import InvalidRequest, WrongModel
from ...files.checkpoint import Checkpoint, TensorEntry
from ...formats import StoredParam, raw_layout, stored_param
from ...hardware import Hardware
from ...planning.footprint import TextEncoderFootprint
from ...streaming import (
    BlockFiles,
    BlockSource,
    FileSource,
    StoredBlock,
    StreamedBlocks,
    TensorReader,
    VisitsBlocks,
    read_params,
    store_block,
)
from .image_prompts import IMAGE, require_places, token_positions
from .tensors import sort_text_encoder
from .vision_tower import SeenImage, VisionTower

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLTextConfig


class TextEncoder(VisitsBlocks):
    """The language model of Qwen2.5-VL without its head; its vision tower is opened where images are to be seen.

    Guarantees: all prompts are encoded in one visit of each layer; on the device lie at most `slots` layers and the
    prompts' activations; of the embedding matrix only the rows of the tokens at hand are read; nothing stays on the
    device, and no file open, when `encode` returns or raises.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
    ) -> None:
        """Reads headers only. Raises WrongModel, DamagedFile or MissingFile."""
        tensors = sort_text_encoder(checkpoint)
        self.identity = checkpoint.identity
        self._checkpoint = checkpoint
        self.dtype = dtype
        self.hardware = hardware
        self._where = str(checkpoint.path)
        self._config = _hf_config(tensors.config)
        self._embedding = stored_param("embed_tokens.weight", tensors.outside, self._where)
        _require_single_rows(self._embedding)
        self._source, self._outside = source, tensors.outside
        self._norm_shape = {"norm.weight": (self._config.hidden_size,)}
        store_block(self._norm_shape, self._outside, dtype, self._where)
        make_layer = partial(_empty_layer, self._config)  # which, unlike a method, holds no reference to this encoder
        files = BlockFiles(tensors.layers, make_layer, dtype, f"{self._where}, layer", source)
        self._blocks = StreamedBlocks(files.open(hardware))
        self.footprint = TextEncoderFootprint(
            layers=len(self._blocks),
            **self._blocks.nbytes,
            hidden_size=self._config.hidden_size,
            intermediate_size=self._config.intermediate_size,
            chunk_tokens=TEXT_MLP_TOKENS,
            head_dim=self._config.hidden_size // self._config.num_attention_heads,
            element_bytes=dtype.itemsize,
            attention=kernel_of(hardware, dtype, shared_keys=True),
            shared_keys=self._config.num_attention_heads // self._config.num_key_value_heads,
        )

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    def vision_tower(self) -> VisionTower:
        """What sees images for this encoder. Reads headers only; raises MissingFile or WrongModel."""
        return VisionTower(self._checkpoint, dtype=self.dtype, hardware=self.hardware, source=self._source)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        images: Sequence[Sequence[SeenImage]] = (),
        slots: int = 2,
        on_layer: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Token ids of each prompt -> its last hidden states after the final norm, (1, length, hidden), float32 on
        the host.

        `images`: those of each prompt, which stand in the places of IMAGE; empty where no prompt shows any.
        `on_layer` is called before each layer with its index, and may raise. Raises InvalidRequest for an empty list
        of tokens, an id that the vocabulary does not have, or other images than there are places; DamagedFile where
        a file of the encoder has changed since it was opened.
        """
        shown = images or [()] * len(prompts)
        states = self._embed(prompts, shown)
        norm = self._norm()
        rotary = _network().Qwen2_5_VLRotaryEmbedding(self._config).to(self.hardware.device)
        positions = [
            self._rotary(rotary, state, token_positions(ids, seen))
            for state, ids, seen in zip(states, prompts, shown, strict=True)
        ]
        with self._blocks.visit(slots, on_layer) as layers, attention_by(self.footprint.attention):
            for _, layer in layers:
                for i, position in enumerate(positions):
                    states[i] = _hidden_states(
                        layer(states[i], attention_mask=None, position_embeddings=position, use_cache=False)
                    )
        self._checkpoint.require_unchanged()  # before anything of it is kept
        return [norm(state).float().cpu() for state in states]

    def _rotary(self, rotary: nn.Module, state: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(state, positions.unsqueeze(1).to(state.device))  # (3, 1, length)

    def _embed(self, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[SeenImage]]) -> list[Tensor]:
        vocab, _ = self._embedding.shape
        for ids, seen in zip(prompts, images, strict=True):
            if not ids:
                raise InvalidRequest(
                    "A prompt has no tokens. Write something, or leave the template on.", code="prompt.no_tokens"
                )
            require_places(ids, len(seen))
            strange = next((token for token in ids if token != IMAGE and not 0 <= token < vocab), None)
            if strange is not None:
                raise InvalidRequest(
                    "Token {token} is beyond the {rows} rows of {where}: the tokenizer belongs to another model. Use "
                    "the pipeline's own tokenizer.",
                    code="prompt.unknown_token",
                    token=strange,
                    rows=vocab,
                    where=self._where,
                )
        rows = _EmbeddingRows(self._embedding, self.dtype)
        try:
            embedded = [_with_images(rows, ids, seen) for ids, seen in zip(prompts, images, strict=True)]
            return [embeds.unsqueeze(0).to(self.hardware.device) for embeds in embedded]
        finally:
            rows.close()

    def _norm(self) -> nn.Module:
        """The final norm, read from the file, on the device."""
        read = read_params(self._outside, self._norm_shape, self.dtype, self._where, self._source)
        norm = _norm_class()(self._config.hidden_size, eps=self._config.rms_norm_eps)
        norm.weight = nn.Parameter(read["norm.weight"].to(self.hardware.device), requires_grad=False)
        return norm


def _empty_layer(config: "Qwen2_5_VLTextConfig") -> nn.Module:
    with torch.device("meta"):
        layer = _network().Qwen2_5_VLDecoderLayer(config, 0).eval()
    layer.mlp = ChunkedTokens(layer.mlp, TEXT_MLP_TOKENS)
    return layer


def _network() -> Any:
    """transformers' modules of Qwen2.5-VL, imported when an encoder is opened: it takes seconds."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    return modeling_qwen2_5_vl


def _norm_class() -> type[nn.Module]:
    """transformers before 5.2 has the norm under the name of the network that it was copied from."""
    network = _network()
    found: type[nn.Module] = getattr(network, "Qwen2_5_VLRMSNorm", None) or network.Qwen2RMSNorm
    return found


def _hidden_states(output: Any) -> Tensor:
    """transformers 4 returns a tuple from a layer, transformers 5 the tensor."""
    return output[0] if isinstance(output, tuple) else output


def _with_images(rows: "_EmbeddingRows", ids: Sequence[int], seen: Sequence[SeenImage]) -> Tensor:
    """(length, hidden) in the compute dtype, on the host: rows of tokens, and images in their places."""
    text = iter(rows.gather([token for token in ids if token != IMAGE]).split(1))
    images = iter(image.embeds.to(rows.dtype) for image in seen)
    return torch.cat([next(images if token == IMAGE else text) for token in ids])


def _hf_config(config: Any) -> "Qwen2_5_VLTextConfig":
    from transformers import Qwen2_5_VLTextConfig

    # transformers 4 warns of a rope_theta among these, transformers 5 puts it there itself
    rope = {"type": "default", "rope_type": "default", "mrope_section": list(config["mrope_section"])}
    own = ("rope_theta", "mrope_section")
    result = Qwen2_5_VLTextConfig(
        **{key: value for key, value in config.items() if key not in own},
        bos_token_id=None,
        eos_token_id=None,
        rope_theta=config["rope_theta"],
        rope_scaling=rope,
    )
    result._attn_implementation = "sdpa"
    return result


def _require_single_rows(matrix: StoredParam) -> None:
    """Raise WrongModel for a matrix whose rows cannot be decoded one by one."""
    if matrix.tile_rows > 1:
        raise WrongModel(
            "{file}: the embeddings are stored in {codec}, whose scales belong to {rows} rows together. Use a text "
            "encoder whose embeddings are in bf16, fp8 or int8.",
            code="text_encoder.embeddings_by_tiles",
            file=matrix.parts[0].file,
            codec=matrix.codec,
            rows=matrix.tile_rows,
        )


class _EmbeddingRows:
    """Reads single rows of an embedding matrix from its file."""

    def __init__(self, matrix: StoredParam, dtype: torch.dtype) -> None:
        self._reader = TensorReader()
        self._parts, self._codec, self.dtype = matrix.parts, matrix.decoder, dtype

    def gather(self, ids: Sequence[int]) -> Tensor:
        """(len(ids), hidden) in the compute dtype, on the host."""
        unique = sorted(set(ids))
        stored = [self._rows(self._parts[0], unique)]
        for scale in self._parts[1:]:
            per_row = len(scale.shape) > 0 and scale.shape[0] == self._parts[0].shape[0] > 1
            stored.append(self._rows(scale, unique) if per_row else self._whole(scale))
        out = torch.empty(len(unique), self._parts[0].shape[1], dtype=self.dtype)
        self._codec.decode_into(out, stored)
        position = {token: i for i, token in enumerate(unique)}
        return out[[position[token] for token in ids]]

    def close(self) -> None:
        self._reader.close()

    def _rows(self, entry: TensorEntry, rows: Sequence[int]) -> Tensor:
        width = entry.nbytes // entry.shape[0]
        dtype, shape = raw_layout(entry)
        out = torch.empty(len(rows), width, dtype=torch.uint8)
        for i, row in enumerate(rows):
            self._reader.read_into(entry, memoryview(out[i].numpy()), skip=row * width)
        return out.view(dtype).view(len(rows), *shape[1:])

    def _whole(self, entry: TensorEntry) -> Tensor:
        dtype, shape = raw_layout(entry)
        out = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._reader.read_into(entry, memoryview(out.numpy()))
        return out.view(dtype).view(shape)
