"""One set of tiny models for all scenarios, and the bits that each scenario has to end in."""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import bnb_in_place  # noqa: F401  # what bitsandbytes does on a GPU
import pytest
import torch
from torch import Tensor

from . import seams
from .device import SimulatedGPU
from .rig import Scenario, expected, findings
from .tiny_models import TinyModels


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModels]:
    models = TinyModels(tmp_path_factory.mktemp("simulated_gpu"))
    models.open("bf16")  # which imports diffusers
    gc.collect()
    gc.freeze()  # each run ends with a collection: of its own objects
    yield models
    gc.unfreeze()


@pytest.fixture(scope="session")
def wanted(tiny_models: TinyModels) -> Callable[..., Sequence[Tensor]]:
    """`wanted(scenario, **options)` -> its result on the CPU; computed once."""
    known: dict[str, Sequence[Tensor]] = {}

    def compute(scenario: Callable[..., list[Tensor]], **options: Any) -> Sequence[Tensor]:
        key = f"{scenario.__name__} {options}"
        if key not in known:
            known[key] = expected(partial(scenario, **options), tiny_models)
        return known[key]

    return compute


@pytest.fixture
def check(tiny_models: TinyModels, wanted: Callable[..., Sequence[Tensor]]) -> Callable[..., list[str]]:
    """`check(scenario, schedule, seed=0, changes={}, **options)` -> what is wrong with it on a simulated GPU."""

    def run(
        scenario: Callable[..., list[Tensor]],
        schedule: str,
        *,
        seed: int = 0,
        changes: dict[str, Any] | None = None,
        stop_at_race: bool = False,
        **options: Any,
    ) -> list[str]:
        gpu = SimulatedGPU(schedule, seed, stop_at_race=stop_at_race)
        one: Scenario = partial(scenario, **options)
        return findings(one, tiny_models, wanted(scenario, **options), gpu, **(changes or {}))

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny kernels take longer on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _nothing_stays() -> Iterator[None]:
    """Tests that come after these in the same process find torch as it was."""
    yield
    assert not seams.kept_stand_ins()
