"""What containers, limits and the page file leave of the host's memory, on trees and libraries that stand in for
systems that are not here."""

import copy
import ctypes
import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from qwenimage_lowvram.engine import host_ram
from qwenimage_lowvram.engine.hardware import PINNED_PART, Hardware
from qwenimage_lowvram.engine.host_ram import HostRam, RamBound, cgroup_bounds, resource_bounds, windows_bounds
from qwenimage_lowvram.engine.out_of_memory import OutOfMemory, OutOfRam, Short, ran_out, reason, shortage

GB = 10**9
NEVER = 9223372036854771712  # what version 1 calls no limit


def group_v2(
    folder: Path, limit: int | str, used: int = 0, active: int = 0, inactive: int = 0, high: str = "max"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile 5\nactive_file {active}\ninactive_file {inactive}\nshmem 3\n")


def group_v1(folder: Path, limit: int, used: int = 0, cache: int = 0, above: int = NEVER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"active_file 7\ninactive_file 7\nhierarchical_memory_limit {above}\n"
        f"total_active_file {cache // 2}\ntotal_inactive_file {cache // 2}\n"
    )


def bounds(root: Path, membership: str) -> list[tuple[int, int]]:
    (root / "membership").write_text(membership)
    return [(bound.total_bytes, bound.available_bytes) for bound in cgroup_bounds(root, root / "membership")]


def test_a_container_of_version_2_bounds_memory_and_its_page_cache_is_free(tmp_path: Path) -> None:
    group_v2(tmp_path, 32 * GB, used=30 * GB, active=4 * GB, inactive=16 * GB)
    assert bounds(tmp_path, "0::/\n") == [(32 * GB, 22 * GB)]


def test_the_groups_above_bound_as_well(tmp_path: Path) -> None:
    group_v2(tmp_path / "slice", 16 * GB, used=10 * GB)
    group_v2(tmp_path / "slice/service", "max", used=9 * GB)
    group_v2(tmp_path / "slice/service/leaf", 64 * GB, used=8 * GB)
    assert bounds(tmp_path, "0::/slice/service/leaf\n") == [(64 * GB, 56 * GB), (16 * GB, 6 * GB)]


def test_a_group_that_is_slowed_down_bounds_as_one_that_is_killed(tmp_path: Path) -> None:
    group_v2(tmp_path / "a", 64 * GB, used=GB, high=str(8 * GB))
    assert bounds(tmp_path, "0::/a\n") == [(8 * GB, 7 * GB)]


def test_a_container_that_sees_only_itself_is_found_under_the_name_that_the_host_gives_it(tmp_path: Path) -> None:
    group_v1(tmp_path / "memory", 32 * GB, used=20 * GB, cache=12 * GB)
    group_v1(tmp_path / "memory/inner", 8 * GB, used=GB)
    assert bounds(tmp_path, "4:memory:/docker/0123\n0::/\n") == [(32 * GB, 24 * GB)]
    assert bounds(tmp_path, "4:memory:/docker/0123/inner\n") == [(8 * GB, 7 * GB), (32 * GB, 24 * GB)]
    assert bounds(tmp_path, "4:memory:/../../other\n") == [(32 * GB, 24 * GB)]


def test_version_1_tells_of_limits_above_that_cannot_be_seen(tmp_path: Path) -> None:
    group_v1(tmp_path / "memory", NEVER)
    group_v1(tmp_path / "memory/jobs/7", NEVER, used=2 * GB, above=6 * GB)
    assert bounds(tmp_path, "9:cpu,memory:/jobs/7\n") == [(6 * GB, 4 * GB)]


@pytest.mark.parametrize("membership", ["", "nonsense", "0::/\n", "4:memory:/gone/away\n", "\xff:\n"])
def test_no_group_or_an_odd_file_bounds_nothing(membership: str, tmp_path: Path) -> None:
    group_v2(tmp_path, "max", used=GB)
    (tmp_path / "memory.high").write_text("a lot\n")
    assert bounds(tmp_path, membership) == []
    assert cgroup_bounds(tmp_path / "none", tmp_path / "none") == []


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group_v2(tmp_path, 8 * GB, used=9 * GB)
    assert bounds(tmp_path, "0::/\n") == [(8 * GB, 0)]


def test_the_tightest_bound_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ram = HostRam((RamBound("the system", 256 * GB, 200 * GB), RamBound("a group", 32 * GB, 12 * GB)))
    assert (ram.total_bytes, ram.available_bytes, ram.tightest.name) == (32 * GB, 12 * GB, "a group")
    now = HostRam.now()
    assert now.bounds[0].total_bytes == psutil.virtual_memory().total
    assert 0 < now.available_bytes <= now.total_bytes <= psutil.virtual_memory().total
    monkeypatch.setattr(host_ram, "cgroup_bounds", lambda: [RamBound("a group", 4 * GB, GB)])
    assert HostRam.now().total_bytes == 4 * GB
    assert Hardware.detect(torch.device("cpu")).pinned_limit_bytes == int(4 * GB * PINNED_PART)


LIMITED = """
import resource, sys
kind, limit = getattr(resource, sys.argv[1]), int(sys.argv[2])
from qwenimage_lowvram.engine.host_ram import HostRam
before = HostRam.now()
resource.setrlimit(kind, (limit, limit))
now = HostRam.now()
assert now.total_bytes == limit and now.tightest.name == sys.argv[1], now
first = now.available_bytes
block = bytearray(200_000_000)
second = HostRam.now().available_bytes
assert 150_000_000 < first - second < 300_000_000, (first, second)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel does not keep to them")
@pytest.mark.parametrize(("name", "limit"), [("RLIMIT_AS", 14 * GB), ("RLIMIT_DATA", 9 * GB)])
def test_the_limits_of_a_process_count(name: str, limit: int) -> None:
    subprocess.run([sys.executable, "-c", LIMITED, name, str(limit)], check=True, env=os.environ)


def test_without_the_module_resource_there_are_no_such_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert resource_bounds() == []


class Kernel32:
    """Windows' library, as far as it is asked: free pages to commit, and a job's limits."""

    def __init__(self, flags: int | None) -> None:
        self.flags = flags

    def GlobalMemoryStatusEx(self, status: Any) -> int:
        assert status._obj.length == 64  # else Windows refuses
        status._obj.total_page_file, status._obj.avail_page_file = 24 * GB, 5 * GB
        return 1

    def QueryInformationJobObject(self, job: Any, kind: int, info: Any, size: int, _: Any) -> int:
        assert (job, kind, size) == (None, 9, 144 if ctypes.sizeof(ctypes.c_void_p) == 8 else 112)
        if self.flags is None:
            return 0
        info._obj.flags, info._obj.process_memory, info._obj.job_memory = self.flags, 4 * GB, 8 * GB
        return 1


@pytest.mark.parametrize(
    ("flags", "found"),
    [(None, [24]), (0, [24]), (0x2000, [24]), (0x100, [24, 4]), (0x200, [24, 8]), (0x300, [24, 4, 8])],
)
def test_the_page_file_and_job_objects_of_windows_count(flags: int | None, found: list[int]) -> None:
    made = windows_bounds(Kernel32(flags))
    assert [bound.total_bytes // GB for bound in made] == found
    assert made[0].available_bytes == 5 * GB
    assert all(0 < bound.total_bytes - bound.available_bytes < 4 * GB for bound in made[1:])


def windows_error() -> OSError:
    error = OSError(22, "The paging file is too small for this operation to complete")
    error.winerror = 1455  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), Short.DEVICE),
        (torch.OutOfMemoryError(""), Short.DEVICE),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), Short.DEVICE),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"), Short.DEVICE),
        (RuntimeError("HIP out of memory."), Short.DEVICE),
        (RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), Short.DEVICE),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Short.DEVICE),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), Short.HOST),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), Short.HOST),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), Short.DEVICE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), Short.HOST),
        (RuntimeError("Invalid buffer size: 20.00 GiB"), Short.DEVICE),
        (RuntimeError("Could not allocate tensor with 8 bytes. There is not enough GPU video memory!"), Short.DEVICE),
        (MemoryError(), Short.HOST),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Short.HOST),
        (windows_error(), Short.HOST),
        (RuntimeError("The paging file is too small for this operation to complete. (os error 1455)"), Short.HOST),
        (RuntimeError(""), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError(errno.EIO, "Input/output error"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_what_ran_out_is_told_by_any_library_s_error(error: BaseException, short: Short | None) -> None:
    assert shortage(error) is short
    assert reason(error)
    assert "\n" not in reason(error)


def test_errors_that_name_each_other_as_causes_are_looked_at_once() -> None:
    first, second = RuntimeError("one"), RuntimeError("two")
    first.__cause__, second.__cause__ = second, first
    assert shortage(first) is None
    assert reason(first) == "one"


def test_an_error_without_words_is_called_by_its_name() -> None:
    assert reason(MemoryError()) == "MemoryError"
    assert reason(RuntimeError("\n \n")) == "RuntimeError"
    assert reason(RuntimeError("\n what\nmore")) == "what"
    assert issubclass(OutOfMemory, torch.OutOfMemoryError)


def test_running_out_says_of_what_by_its_code() -> None:
    error = ran_out("while it ran", Short.HOST, "full")
    assert isinstance(error, OutOfRam)
    assert error.code == "memory.ram_ran_out"
    assert error.values["when"] == "while it ran"
    assert error.values["total_gib"] > 0
    assert isinstance(ran_out("while it ran", Short.DEVICE, "full"), OutOfMemory)


@pytest.mark.parametrize("short", Short)
def test_copies_of_running_out_keep_code_and_values(short: Short) -> None:
    error = ran_out("while it ran", short, "full")
    for again in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is type(error)
        assert again.as_dict() == error.as_dict()


def test_windows_error_1455_is_about_the_page_file() -> None:
    assert "the page file is too small. Enlarge it" in reason(windows_error())
