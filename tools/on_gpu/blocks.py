"""The job of measuring one case of ours or of diffusers', and of comparing its answer with everything resident."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from qwenimage_lowvram.engine.errors import DoesNotFit, MissingPackage
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.planning.forecast import Speeds
from torch import Tensor

from . import faster, ours, reference
from .block_files import BlockFiles
from .card import NotTried
from .cases import GROUP_OFFLOAD, OURS, RESIDENT, STORED_LORA, Case, Sizes, answer_name
from .deadline import Deadline
from .small_card import small_card
from .steps import SIGMA, Inputs, Ready, compared, guided, measured


@dataclass
class Bench:
    """The files, our open transformer (the last case's format), and the answers that others are compared with."""

    folder: Path
    sizes: Sizes
    device: torch.device
    speeds: Speeds | None = None
    _opened: dict[tuple[str, str], QwenImageTransformer] = field(default_factory=dict)

    @property
    def files(self) -> BlockFiles:
        return BlockFiles(self.folder, self.sizes, self.device)

    def measure(self, case: Case, deadline: Deadline) -> dict[str, Any]:
        wanted = None if case.way == RESIDENT else self._plain_answer(case) if case.how else self.answer(case)
        inputs = Inputs.of(case, self.sizes, self.device)
        if case.way == OURS:
            self.open(case)  # and its speeds, on the whole device
        elif case.way == GROUP_OFFLOAD:
            self.close()  # it takes as much page-locked memory
        with small_card(self.device, None if case.card is None else self.sizes.cards[case.card]) as watched:
            with self.way(case, inputs) as ready:
                row, made = measured(ready, self.sizes, self.device, deadline)
            del ready
        gc.collect()
        if watched is not None:
            row["allocated_bytes"] -= watched.ballast_bytes
            row["peak_bytes"] = watched.peak_bytes
        if wanted is None:
            self._keep(case, made)
            return row
        return row | compared(made, wanted)

    def way(self, case: Case, inputs: Inputs) -> AbstractContextManager[Ready]:
        if case.way == OURS:
            transformer = self.open(case)
            assert self.speeds is not None
            return ours.streamed(transformer, case, self.sizes, inputs, self.speeds)
        run = {RESIDENT: reference.resident, GROUP_OFFLOAD: reference.group_offload}[case.way]
        return run(self.files.open(case.stored), self._blocks(case), inputs, self.device)

    def open(self, case: Case) -> QwenImageTransformer:
        key = (case.stored, "" if case.how in faster.CACHES else case.how)
        if key not in self._opened:
            self.close()
            stored, how = key
            self._opened[key] = ours.open_transformer(
                self.files.open(stored), self.sizes, self.device, how, self.folder
            )
            if self.speeds is None:
                self.speeds = ours.measure_speeds(self._opened[key])
        return self._opened[key]

    def close(self) -> None:
        """Give back what our transformer holds in host memory."""
        for transformer in self._opened.values():
            transformer.unload()
            transformer.store.set_held(())
        self._opened.clear()
        gc.collect()

    def answer(self, case: Case) -> Tensor:
        """Of everything resident, in the same format; kept in a file, for jobs of other processes too."""
        file = self._file(case)
        if not file.exists():
            inputs = Inputs.of(case, self.sizes, self.device)
            checkpoint = self.files.open(case.stored)
            with reference.resident(checkpoint, self._blocks(case), inputs, self.device) as ready:
                self._keep(case, guided(ready.step(False)))
            del ready
            gc.collect()
        answer: Tensor = torch.load(file)
        return answer

    def _plain_answer(self, case: Case) -> Tensor:
        """What the plain path answers in the place of what is faster: everything resident, or our own where that cannot
        be asked for the same."""
        if case.how not in (*faster.CACHES, STORED_LORA):
            return self.answer(case)
        inputs = Inputs.of(case, self.sizes, self.device)
        transformer = self.open(replace(case, how=""))
        if case.how == STORED_LORA:
            faster.prepare(transformer, case.how, self.folder)
        sigma = faster.SIGMAS[-1] if case.how in faster.CACHES else SIGMA
        try:
            return guided(ours.plain_answer(transformer, inputs, sigma))
        finally:
            transformer.patch({})

    def _keep(self, case: Case, made: Tensor) -> None:
        torch.save(made, self._file(case))

    def _file(self, case: Case) -> Path:
        return self.folder / answer_name(case, self._blocks(case))

    def _blocks(self, case: Case) -> int:
        return self.sizes.peer_blocks if case.way == GROUP_OFFLOAD else self.sizes.blocks


def do(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row: of the case in `job`, within its seconds."""
    bench = _bench(job["folder"], job["device"], json.dumps(job["sizes"]))
    case = Case(**job["case"])
    yield told(lambda: bench.measure(case, Deadline(job["seconds"])))


def told(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it was not."""
    try:
        return {"status": "measured", **measure()}
    except NotTried as why:
        return {"status": "skipped", "why": str(why)}
    except (ImportError, MissingPackage) as error:
        return {"status": "skipped", "why": _first_line(error)}
    except DoesNotFit as error:
        return {"status": "does not fit", "why": _first_line(error)}
    except torch.OutOfMemoryError as error:
        return {"status": "out of memory", "why": _first_line(error)}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@cache
def _bench(folder: str, device: str, sizes: str) -> Bench:
    return Bench(Path(folder), Sizes.from_json(json.loads(sizes)), torch.device(device))
