"""What a run is told of memory where nothing but our own models surrounds it; speeds without a file; limits' names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qwenimage_lowvram.engine.errors import DoesNotFit
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.host_ram import HostRam, RamBound
from qwenimage_lowvram.engine.planning.forecast import Speeds
from qwenimage_lowvram.engine.runs.free_memory import HEADROOM_BYTES, check_room
from qwenimage_lowvram.engine.runs.known_speeds import KnownSpeeds
from qwenimage_lowvram.engine.runs.limit import Limit
from qwenimage_lowvram.engine.runs.surroundings import Alone

CPU = torch.device("cpu")
MIB = 1024**2
FREE = 1000 * MIB


class Blocks:
    """A model on the device, which gives back whole blocks of 10 MiB."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    @property
    def loaded_bytes(self) -> int:
        return self.blocks * 10 * MIB

    def shrink(self, nbytes: int) -> int:
        given = min(self.blocks, -(-nbytes // (10 * MIB)))
        self.blocks -= given
        return given * 10 * MIB


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`free(*models)`: the machine has FREE beside what these hold."""

    def set_free(*models: Blocks) -> None:
        whole = FREE + sum(model.loaded_bytes for model in models)

        def now() -> HostRam:
            left = whole - sum(model.loaded_bytes for model in models)
            return HostRam((RamBound("the system", 64 * FREE, left),))

        monkeypatch.setattr(HostRam, "now", now)

    return set_free


def test_what_the_runs_own_model_holds_is_its_to_use(free: Callable[..., None]) -> None:
    own = Blocks(5)
    free(own)
    assert Alone(own).device_bytes(CPU, None, 1) == FREE - HEADROOM_BYTES + 50 * MIB
    assert Alone(own).device_bytes(CPU, 300 * MIB, 1) == 300 * MIB
    assert own.blocks == 5


def test_what_stays_free_has_room_for_the_largest_block(free: Callable[..., None]) -> None:
    free()
    small, large = HEADROOM_BYTES - MIB, HEADROOM_BYTES + MIB
    assert Alone().device_bytes(CPU, None, 1, small) == FREE - HEADROOM_BYTES
    assert Alone().device_bytes(CPU, None, 1, large) == FREE - large
    assert Alone().device_bytes(CPU, 300 * MIB, 1, large) == 300 * MIB


def test_others_leave_as_far_as_a_limit_or_the_machine_needs_it(free: Callable[..., None]) -> None:
    other = Blocks(30)
    free(other)
    assert Alone(None, [other]).device_bytes(CPU, 400 * MIB, 95 * MIB) == 100 * MIB
    assert other.blocks == 30  # 300 MiB and 95 are within the limit
    assert Alone(None, [other]).device_bytes(CPU, 400 * MIB, 175 * MIB) == 180 * MIB
    assert other.blocks == 22
    wanted = FREE + 80 * MIB - HEADROOM_BYTES + 15 * MIB  # with what 8 blocks gave back
    assert Alone(None, [other]).device_bytes(CPU, None, wanted) == wanted + 5 * MIB
    assert other.blocks == 20
    assert Alone(None, [other]).device_bytes(CPU, 50 * MIB, 1000 * MIB) == 50 * MIB
    assert other.blocks == 0


@pytest.mark.slow
def test_speeds_without_a_file_are_measured_once(cpu: Hardware, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"\0" * 1_000_000)
    room: list[int] = []
    speeds = KnownSpeeds(cpu, torch.float32, model, file=None, device_name="cpu", make_room=room.append)
    assert speeds.remembered() is None
    first = speeds.get()
    assert speeds.get() == first == speeds.remembered()
    assert room == []  # the host's own memory needs none
    speeds.put(Speeds(1.0, 2.0, 3.0))
    assert speeds.get() == Speeds(1.0, 2.0, 3.0)
    assert sorted(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (Limit(), r"No limit is set: 5\.0 MiB are free on cpu\."),
        (Limit(9 * MIB, "x"), r"Of x \(9\.0 MiB\), 5\.0 MiB are free on cpu: other programs"),
        (Limit(5 * MIB, "x"), r"The limit is x\.$"),
        (Limit(5 * MIB, "x", "'Load'"), r"The limit is x in 'Load'\.$"),
    ],
    ids=["none", "not free", "by name", "by place"],
)
def test_the_limit_that_is_short_is_named(limit: Limit, said: str) -> None:
    with pytest.raises(DoesNotFit, match=f"(?s)^It needs more.*{said}") as caught, limit.naming(CPU, 5 * MIB):
        raise DoesNotFit("It needs more.", code="test.needs_more", need_bytes=7 * MIB)
    assert caught.value.code == "test.needs_more"
    set_to = {"limit": limit.name, "place": limit.place, "set_bytes": limit.nbytes, "device": "cpu"}
    assert caught.value.values == {"need_bytes": 7 * MIB, "free_bytes": 5 * MIB, **set_to}


def test_what_the_host_has_no_room_for_is_refused_with_a_way_out(free: Callable[..., None]) -> None:
    free()
    check_room(FREE, "A table", "Use fewer steps.")
    with pytest.raises(
        DoesNotFit, match=r"A table needs 0\.98 GiB of RAM, but 0\.98 GiB are free\.\nUse fewer steps\."
    ):
        check_room(FREE + 1, "A table", "Use fewer steps.")
