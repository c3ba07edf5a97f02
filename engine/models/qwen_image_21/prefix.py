"""What stands before an image in its sequence: a prompt and its reference images, which see no image that is made.

It is computed in two stretches, each alone: up to the last reference, which is the same for every prompt about the
same images, and the text behind. Neither sees the timestep (it stands at 0), the seed, or the size of what is made.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .positions import Piece, Shape, behind, pieces_of, tokens_of


@dataclass(frozen=True, eq=False)
class Stretch:
    """Neighbours in a sequence behind `before` tokens, from position `start` on.

    text: (1, L, prompt_dim) of all text in `pieces`; images: (1, N, 64) of all their images, one after another; either
    may be None. seen: (1, before + tokens) bool of the sequence so far, None where all is seen. key: the same for what
    computes the same keys and values.
    """

    key: str
    pieces: tuple[Piece, ...]
    text: Tensor | None
    images: Tensor | None
    before: int
    start: int
    seen: Tensor | None

    @property
    def tokens(self) -> int:
        return sum(map(tokens_of, self.pieces))


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt and its references.

    text: prompt embeddings (1, L, prompt_dim) without the images' slots. references: normalised latents as tokens
    (1, height * width, 64), with `shapes` (height, width); `slots`: before which of the text's tokens each stands.
    mask: (1, L) bool, False for text that nothing sees (padding), None where all is seen. keys: of up to the last
    reference and of the text behind, where somebody knows them without reading the contents.
    """

    text: Tensor
    references: tuple[Tensor, ...] = ()
    shapes: tuple[Shape, ...] = ()
    slots: tuple[int, ...] = ()
    mask: Tensor | None = None
    keys: tuple[str, str] | None = None

    @property
    def end(self) -> int:
        """The position behind it."""
        return behind(self._pieces)

    @property
    def tokens(self) -> int:
        return sum(map(tokens_of, self._pieces))

    @cached_property
    def seen(self) -> Tensor | None:
        """(1, tokens) bool of all its tokens, None where all are seen. Looks at no number: the mask may lie on a
        device that is busy."""
        if self.mask is None:
            return None
        text = iter(self.mask.bool().split([piece for piece in self._pieces if isinstance(piece, int)], dim=1))
        ones = [self.mask.new_ones(1, tokens_of(piece), dtype=torch.bool) for piece in self._pieces]
        parts = [next(text) if isinstance(piece, int) else one for piece, one in zip(self._pieces, ones, strict=True)]
        return torch.cat(parts, dim=1)

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """One or two, in their order; none where there is nothing. Reads the contents where no keys are given."""
        pieces, split = self._pieces, self.slots[-1] if self.slots else 0
        images = [i for i, piece in enumerate(pieces) if not isinstance(piece, int)]
        last = images[-1] + 1 if images else 0
        made: list[Stretch] = []
        key = ""
        for number, (own, text) in enumerate(
            [(pieces[:last], self.text[:, :split]), (pieces[last:], self.text[:, split:])]
        ):
            if not own:
                continue
            before, start = sum(map(tokens_of, pieces[: last * number])), behind(pieces[: last * number])
            tokens = torch.cat(self.references, dim=1) if self.references and not number else None
            seen = None if self.seen is None else self.seen[:, : before + sum(map(tokens_of, own))]
            key = self.keys[number] if self.keys is not None else _key(key, own, [text, tokens, seen])
            made.append(Stretch(key, tuple(own), text if text.shape[1] else None, tokens, before, start, seen))
        return tuple(made)

    @cached_property
    def _pieces(self) -> list[Piece]:
        return pieces_of(self.text.shape[1], self.slots, self.shapes)


def _key(before: str, pieces: Sequence[Piece], contents: Iterable[Tensor | None]) -> str:
    digest = hashlib.blake2b(f"{before} {list(pieces)}".encode(), digest_size=16)
    for tensor in contents:
        digest.update(b" ")
        if tensor is not None:
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
