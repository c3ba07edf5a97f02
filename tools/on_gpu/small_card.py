"""A card that is smaller than the real one, for whoever runs there, by a ballast; and what is taken beside it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .card import NotTried

WATCH_SECONDS = 0.01


class Watched:
    """peak_bytes: the most that was taken on the device, contexts and other programs included, ballast not."""

    def __init__(self, device: torch.device, ballast_bytes: int) -> None:
        self.ballast_bytes = ballast_bytes
        self._device = device
        self._done = threading.Event()
        self.peak_bytes = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            free, total = torch.cuda.mem_get_info(self._device)
            self.peak_bytes = max(self.peak_bytes, total - free - self.ballast_bytes)
            if self._done.wait(WATCH_SECONDS):
                return


@contextmanager
def small_card(device: torch.device, card_bytes: int | None) -> Iterator[Watched | None]:
    """Within it the device has `card_bytes` for all that runs there, contexts included; None: all that it has.

    torch gets no more than what was free before, too: on Windows a driver lends RAM where a card is full. Elsewhere
    than on a GPU nothing happens. Raises NotTried where the device is smaller.
    """
    if device.type != "cuda":
        yield None
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    ballast_bytes = 0 if card_bytes is None else total - card_bytes
    if ballast_bytes < 0 or ballast_bytes > free:
        raise NotTried(f"the device has {total / 1024**3:.1f} GB, {free / 1024**3:.1f} GB of them free")
    ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device=device)
    torch.cuda.set_per_process_memory_fraction(free / total)
    torch.cuda.reset_peak_memory_stats(device)
    watched = Watched(device, ballast_bytes)
    try:
        yield watched
    finally:
        watched.stop()
        torch.cuda.set_per_process_memory_fraction(1.0)
        del ballast
        torch.cuda.empty_cache()
