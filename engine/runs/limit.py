"""A limit of a device's memory as a person set it, and the words for what does not fit within it. Plans nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import DoesNotFit
from ..texts import size_text


@dataclass(frozen=True)
class Limit:
    """nbytes: the most that a stage may hold on its device; None: what is free when it begins. name: of the setting.
    place: where it is set, in quotes; empty where the name says it."""

    nbytes: int | None = None
    name: str = "limit_bytes"
    place: str = ""

    @contextmanager
    def naming(self, device: torch.device, budget_bytes: int) -> Iterator[None]:
        """What does not fit within says of which limit it is short. budget_bytes: what came of the limit, which is less
        where so much is not free."""
        try:
            yield
        except DoesNotFit as error:
            raise error.saying(
                f"{error}\n{self._sentence(device, budget_bytes)}",
                limit=self.name,
                place=self.place,
                set_bytes=self.nbytes,
                free_bytes=budget_bytes,
                device=device,
            ) from error

    def _sentence(self, device: torch.device, budget_bytes: int) -> str:
        free = f"{size_text(budget_bytes)} are free on {device}"
        if self.nbytes is None:
            return f"No limit is set: {free}. Close other programs that use it."
        if budget_bytes < self.nbytes:
            return f"Of {self.name} ({size_text(self.nbytes)}), {free}: other programs or models use the rest."
        return f"The limit is {self.name}{f' in {self.place}' if self.place else ''}."
