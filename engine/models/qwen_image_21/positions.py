"""Where the tokens of a sequence stand, and what each sees: rotary factors, and runs of text and images. No weights.

A text token has its position in the sequence on all three axes. An image has the position that text has reached as its
frame, and its rows and columns are centred on 0; text goes on as far behind it as its longer side has tokens
(diffusers' QwenImage21Rope; ComfyUI places images of sides in multiples of 32 px alike).
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from ...errors import InvalidRequest
from .layers import Run

Shape = tuple[int, int]  # height, width of an image in tokens
Piece = int | Shape  # so many tokens of text, or an image

# of the rotary tables, which begin at -_BELOW
POSITIONS, _BELOW = 8192, 1024
_THETA = 10000


def pieces_of(tokens: int, slots: Sequence[int], shapes: Sequence[Shape]) -> list[Piece]:
    """Text of so many tokens, before token `slots[i]` of which image i stands; images of one place in their order.

    Raises InvalidRequest where places and images do not belong together.
    """
    if len(slots) != len(shapes) or list(slots) != sorted(slots) or any(not 0 <= slot <= tokens for slot in slots):
        raise InvalidRequest(
            "{images} reference images have the places {slots} in a prompt of {tokens} tokens; each needs its own, in "
            "order. Encode the prompt together with its images.",
            code="prompt_21.wrong_slots",
            images=len(shapes),
            slots=list(slots),
            tokens=tokens,
        )
    pieces: list[Piece] = []
    at = 0
    for slot, shape in zip(slots, shapes, strict=True):
        pieces += [slot - at, shape] if slot > at else [shape]
        at = slot
    return [*pieces, tokens - at] if tokens > at else pieces


def tokens_of(piece: Piece) -> int:
    return piece if isinstance(piece, int) else prod(piece)


def behind(pieces: Sequence[Piece], start: int = 0) -> int:
    """The position that follows pieces which begin at `start`."""
    return start + sum(piece if isinstance(piece, int) else max(piece) for piece in pieces)


def runs_of(pieces: Sequence[Piece], before: int, seen: Tensor | None, device: torch.device) -> list[Run]:
    """What each piece sees, behind `before` tokens: all that stands before it, text no further than itself, images
    themselves. `seen`: (1, tokens) bool, of all tokens from the sequence's first on; None: all."""
    runs, start = [], 0
    for piece in pieces:
        stop = start + tokens_of(piece)
        keys, mask = before + stop, None
        if isinstance(piece, int):
            earlier = torch.ones(piece, before + start, dtype=torch.bool, device=device)
            own = torch.ones(piece, piece, dtype=torch.bool, device=device).tril()
            mask = torch.cat([earlier, own], dim=1)[None, None]
        if seen is not None:
            known = seen[:, None, None, :keys].to(device)
            mask = known if mask is None else mask & known
        runs.append(Run(start, stop, keys, mask))
        start = stop
    return runs


class RotaryTables:
    """Factors of every position, by axis: frames, rows, columns. On the host."""

    def __init__(self, axes: Sequence[int]) -> None:
        positions = torch.cat([torch.arange(POSITIONS), torch.arange(_BELOW).flip(0) * -1 - 1])
        self._tables = [_factors(positions, axis) for axis in axes]

    def factors(self, pieces: Sequence[Piece], start: int = 0) -> Tensor:
        """Of each token (tokens, head_dim / 2). Raises InvalidRequest for positions beyond the tables."""
        end = behind(pieces, start)
        longest = max((max(piece) for piece in pieces if not isinstance(piece, int)), default=0)
        if end > POSITIONS or longest > 2 * _BELOW:
            raise InvalidRequest(
                "Prompt and reference images reach position {end}, and their longest side is {longest_px} px; the "
                "model has {positions} positions of 16 px, and images of up to {most_px} px. Use fewer or smaller "
                "images, or shorten the prompt.",
                code="prompt_21.too_long",
                end=end,
                longest_px=longest * 16,
                positions=POSITIONS,
                most_px=2 * _BELOW * 16,
            )
        places = torch.cat([torch.empty(0, 3, dtype=torch.long), *_places(pieces, start)])
        return torch.cat([table[places[:, i]] for i, table in enumerate(self._tables)], dim=-1)


def _factors(positions: Tensor, dims: int) -> Tensor:
    angles = torch.outer(positions, 1.0 / torch.pow(_THETA, torch.arange(0, dims, 2).to(torch.float32).div(dims)))
    return torch.polar(torch.ones_like(angles), angles)


def _places(pieces: Sequence[Piece], start: int) -> Iterator[Tensor]:
    """(tokens, 3) of each piece; negative ones count from the tables' end."""
    for piece in pieces:
        if isinstance(piece, int):
            yield torch.arange(start, start + piece)[:, None].expand(piece, 3)
        else:
            height, width = piece
            rows = torch.arange(height) - (height - height // 2)
            columns = torch.arange(width) - (width - width // 2)
            frame = torch.tensor(start)
            yield torch.stack(
                [axis.expand(height, width).flatten() for axis in (frame, rows[:, None], columns[None])], dim=1
            )
        start = behind([piece], start)
