"""Let all calls that ComfyUI wants to make at one timestep share one visit of the blocks: record, run, replay."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

KEY = "qwen_lowvram"


class Lockstep:
    """Stands between ComfyUI's batching of conditions and the transformer.

    ComfyUI's function runs twice: first its calls are recorded and answered with zeros, then all of them run
    together, then it runs again and gets the results in the same order. Its own weighting, areas and masks are
    untouched.
    """

    def __init__(self) -> None:
        self._recorded: list[Any] | None = None
        self._results: list[Tensor] | None = None
        self.running = False  # all calls of an evaluation, together

    @property
    def recording(self) -> bool:
        return self._recorded is not None

    @property
    def active(self) -> bool:
        """Calls are being recorded or replayed, not run."""
        return self._recorded is not None or self._results is not None

    def call(self, arguments: Any, run: Callable[[list[Any]], list[Tensor]], zeros: Callable[[], Tensor]) -> Tensor:
        """One call of the model: recorded, replayed, or run alone where nothing is recording."""
        if self._recorded is not None:
            self._recorded.append(arguments)
            return zeros()
        if self._results is not None:
            return self._results.pop(0)
        return run([arguments])[0]

    def together(
        self,
        execute: Callable[[], Any],
        run: Callable[[list[Any]], list[Tensor]],
        *,
        recorded_once: Callable[[], None] = lambda: None,
    ) -> Any:
        """Run `execute` with its calls of the model made together by `run`. `recorded_once`: called behind the
        recording; takes back what that has changed elsewhere."""
        try:
            self._recorded = []
            execute()
            recorded_once()
            recorded, self._recorded = self._recorded, None
            self.running = True
            self._results = run(recorded) if recorded else []  # none where no prompt is active at this step
            answer = execute()
            if self._results:
                raise RuntimeError(f"{len(self._results)} of {len(recorded)} recorded calls were not made again")
            return answer
        finally:
            self._recorded = self._results = None
            self.running = False
