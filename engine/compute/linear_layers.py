"""What linear layers that compute on stored weights take beside them. Values; imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerScratch:
    """Of a layer: bytes for each token that is multiplied at a time, of which there are `most` at the most (None: all),
    and beside these. before_bytes: what it takes before any token is multiplied, and has given back by then. widest:
    how many numbers a token has before it or behind it, whichever are more."""

    token_bytes: int
    fixed_bytes: int
    most: int | None
    before_bytes: int = 0
    widest: int = 0

    def bytes(self, tokens: int) -> int:
        """Beside what goes in and comes out."""
        together = tokens if self.most is None else min(tokens, self.most)
        return max(self.before_bytes, self.fixed_bytes + together * self.token_bytes)


@dataclass(frozen=True)
class LinearLayers:
    """Those of a model's blocks. text: the numbers that are multiplied, and by whom; empty where all weights are
    decoded. scratch: of each kind of those that are not. of_all_tokens: some of them are to be given all tokens, so
    that no MLP may take a few at a time."""

    text: str = ""
    scratch: frozenset[LayerScratch] = frozenset()
    of_all_tokens: bool = False

    @classmethod
    def of(
        cls, names: Iterable[str], scratch: Iterable[LayerScratch], *, of_all_tokens: bool = False
    ) -> "LinearLayers":
        return cls(" and ".join(sorted(set(names))), frozenset(scratch), of_all_tokens)

    def scratch_bytes(self, tokens: int, widest: int | None = None) -> int:
        """The most that any of them takes; of those that are no wider than `widest`, such as attention's."""
        layers = (layer for layer in self.scratch if widest is None or layer.widest <= widest)
        return max((layer.bytes(tokens) for layer in layers), default=0)


DECODED_LAYERS = LinearLayers()
