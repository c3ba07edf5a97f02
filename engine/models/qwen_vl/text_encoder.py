"""A Qwen-VL model as text encoder: tokens to embeddings, layer by layer from the file. Keeps nothing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...compute.attention import attention_by, kernel_of
from ...compute.chunk_sizes import TEXT_MLP_TOKENS
from ...compute.token_chunks import ChunkedTokens
from ...errors import InvalidRequest
from ...files.checkpoint import Checkpoint
from ...formats import stored_param
from ...hardware import Hardware
from ...planning.footprint import TextEncoderFootprint
from ...streaming import (
    BlockFiles,
    BlockSource,
    FileSource,
    StoredBlock,
    StreamedBlocks,
    VisitsBlocks,
    read_params,
    store_block,
)
from .embedding_rows import EmbeddingRows, require_single_rows
from .image_prompts import IMAGE, image_spans, require_places, token_positions
from .images import SeenImage
from .language_model import LanguageModel
from .vision_tower import VisionTower


class TextEncoder(VisitsBlocks, ABC):
    """A language model without its head; its vision tower is opened where images are to be seen.

    Guarantees: all prompts are encoded in one visit of each layer; on the device lie at most `slots` layers and the
    prompts' activations; of the embedding matrix only the rows of the tokens at hand are read; nothing stays on the
    device, and no file open, when `encode` returns or raises.
    """

    tower: ClassVar[type[VisionTower]]

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        hardware: Hardware,
        source: Callable[[Sequence[StoredBlock]], BlockSource] = FileSource,
    ) -> None:
        """Reads headers only. Raises WrongModel, DamagedFile or MissingFile."""
        model = self.language_model(checkpoint)
        self.identity = checkpoint.identity
        self._checkpoint = checkpoint
        self.dtype = dtype
        self.hardware = hardware
        self._where = str(checkpoint.path)
        self._model = model
        self._embedding = stored_param("embed_tokens.weight", model.outside, self._where)
        require_single_rows(self._embedding)
        self._source = source
        self._norm_shape = {"norm.weight": (model.hidden_size,)} if model.make_norm else {}
        store_block(self._norm_shape, model.outside, dtype, self._where)
        files = BlockFiles(model.layers, model.make_layer, dtype, f"{self._where}, layer", source)
        self._blocks = StreamedBlocks(files.open(hardware))
        self.footprint = TextEncoderFootprint(
            layers=len(self._blocks),
            **self._blocks.nbytes,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            chunk_tokens=TEXT_MLP_TOKENS,
            head_dim=model.head_dim,
            element_bytes=dtype.itemsize,
            attention=kernel_of(hardware, dtype, shared_keys=True),
            shared_keys=model.heads // model.key_heads,
            attention_states=model.attention_states,
        )

    @property
    def hidden_size(self) -> int:
        return self._model.hidden_size

    @staticmethod
    @abstractmethod
    def language_model(checkpoint: Checkpoint) -> LanguageModel:
        """Of an encoder's file. Reads headers only; raises WrongModel or DamagedFile."""

    def vision_tower(self) -> VisionTower:
        """What sees images for this encoder. Reads headers only; raises MissingFile or WrongModel."""
        return self.tower(self._checkpoint, dtype=self.dtype, hardware=self.hardware, source=self._source)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        images: Sequence[Sequence[SeenImage]] = (),
        slots: int = 2,
        on_layer: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Token ids of each prompt -> its last hidden states, after the final norm where the model has one here,
        (1, length, hidden), float32 on the host.

        `images`: those of each prompt, which stand in the places of IMAGE; empty where no prompt shows any.
        `on_layer` is called before each layer with its index, and may raise. Raises InvalidRequest for an empty list
        of tokens, an id that the vocabulary does not have, or other images than there are places; DamagedFile where
        a file of the encoder has changed since it was opened.
        """
        shown = images or [()] * len(prompts)
        states = self._embed(prompts, shown)
        norm = self._norm()
        rotary = self._model.make_rotary().to(self.hardware.device)
        positions = [
            self._rotary(rotary, state, token_positions(ids, seen))
            for state, ids, seen in zip(states, prompts, shown, strict=True)
        ]
        with self._blocks.visit(slots, on_layer) as layers, attention_by(self.footprint.attention):
            for index, layer in layers:
                for i, position in enumerate(positions):
                    states[i] = _hidden_states(
                        layer(states[i], attention_mask=None, position_embeddings=position, use_cache=False)
                    )
                    _add_deepstack(states[i], prompts[i], shown[i], index)
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
        rows = EmbeddingRows(self._embedding, self.dtype)
        try:
            embedded = [_with_images(rows, ids, seen) for ids, seen in zip(prompts, images, strict=True)]
            return [embeds.unsqueeze(0).to(self.hardware.device) for embeds in embedded]
        finally:
            rows.close()

    def _norm(self) -> nn.Module:
        """The final norm, read from the file, on the device; what changes nothing where the model has none here."""
        if self._model.make_norm is None:
            return nn.Identity()
        read = read_params(self._model.outside, self._norm_shape, self.dtype, self._where, self._source)
        norm = self._model.make_norm()
        norm.weight = nn.Parameter(read["norm.weight"].to(self.hardware.device), requires_grad=False)
        return norm


def in_chunks(layer: nn.Module) -> nn.Module:
    """The decoder layer with its MLP over a few tokens at a time, as the footprint counts it."""
    layer.mlp = ChunkedTokens(layer.mlp, TEXT_MLP_TOKENS)
    return layer


def _hidden_states(output: Any) -> Tensor:
    """Some layers of transformers 4 return a tuple, those of transformers 5 the tensor."""
    return output[0] if isinstance(output, tuple) else output


def _with_images(rows: EmbeddingRows, ids: Sequence[int], seen: Sequence[SeenImage]) -> Tensor:
    """(length, hidden) in the compute dtype, on the host: rows of tokens, and images in their places."""
    text = iter(rows.gather([token for token in ids if token != IMAGE]).split(1))
    images = iter(image.embeds.to(rows.dtype) for image in seen)
    return torch.cat([next(images if token == IMAGE else text) for token in ids])


def _add_deepstack(states: Tensor, ids: Sequence[int], seen: Sequence[SeenImage], layer: int) -> None:
    """To (1, length, hidden), in place: what the images add behind that layer, at their tokens."""
    spans = image_spans(ids, [image.height * image.width for image in seen])
    for (begin, end), image in zip(spans, seen, strict=True):
        if layer < len(image.deepstack):
            states[0, begin:end] += image.deepstack[layer].to(states.device, states.dtype)
