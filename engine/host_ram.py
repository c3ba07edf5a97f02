"""How much of the host's memory this process may have: the system's, and what containers and limits leave of it.

Every bound is read anew at each call. A source that cannot be read sets no bound. Decides nothing.
"""

import ctypes
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# what cgroup v1 and RLIM_INFINITY call "no limit" is near 2^63
UNLIMITED = 1 << 60
# of Windows' job objects (winnt.h)
EXTENDED_LIMITS = 9
PROCESS_MEMORY, JOB_MEMORY = 0x100, 0x200


@dataclass(frozen=True)
class RamBound:
    """One thing that bounds this process: `available_bytes` is what it leaves now of its `total_bytes`."""

    name: str
    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class HostRam:
    """All bounds at one moment; the system's own is always among them."""

    bounds: tuple[RamBound, ...]

    @classmethod
    def now(cls) -> "HostRam":
        """The system, its containers, this process's own limits, and Windows' commit limit and job objects."""
        memory = psutil.virtual_memory()
        system = RamBound("the system", int(memory.total), int(memory.available))
        return cls((system, *cgroup_bounds(), *resource_bounds(), *windows_bounds()))

    @property
    def total_bytes(self) -> int:
        """The most that this process can ever have."""
        return min(bound.total_bytes for bound in self.bounds)

    @property
    def available_bytes(self) -> int:
        """What it can still have."""
        return min(bound.available_bytes for bound in self.bounds)

    @property
    def tightest(self) -> RamBound:
        """What leaves the least."""
        return min(self.bounds, key=lambda bound: bound.available_bytes)


def cgroup_bounds(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list[RamBound]:
    """The limits of the process's control groups and of all groups above them that can be seen, of version 2 and 1.

    Page cache of files counts as free: the kernel gives it back before a group runs out.
    """
    found = []
    for controllers, path in _memberships(membership):
        if controllers == "":
            for mount in (root, root / "unified"):
                found += [_bound_v2(group) for group in _levels(mount, path)]
        elif "memory" in controllers.split(","):
            found += [_bound_v1(group) for group in _levels(root / "memory", path)]
    return [bound for bound in found if bound is not None]


def _memberships(file: Path) -> Iterator[tuple[str, PurePosixPath]]:
    """(controllers, path) of each hierarchy; version 2 has no controllers."""
    for line in _text(file).splitlines():
        _, colon, rest = line.partition(":")
        controllers, second, path = rest.partition(":")
        if colon and second:
            yield controllers, PurePosixPath(path)


def _levels(mount: Path, path: PurePosixPath) -> list[Path]:
    """The group's folder and those above it, up to the mount.

    Inside a container the mount may begin in the middle of the path that the kernel names, or at its end.
    """
    names = [name for name in path.parts if name not in ("/", "..")]
    for first in range(len(names)):
        group = mount.joinpath(*names[first:])
        if group.is_dir():
            return [mount.joinpath(*names[first:last]) for last in range(len(names), first - 1, -1)]
    return [mount]


def _bound_v2(group: Path) -> RamBound | None:
    limits = [_number(_text(group / name)) for name in ("memory.max", "memory.high")]
    return _bound(group, limits, _number(_text(group / "memory.current")), _stat(group), "")


def _bound_v1(group: Path) -> RamBound | None:
    stat = _stat(group)
    limits = [_number(_text(group / "memory.limit_in_bytes")), stat.get("hierarchical_memory_limit")]
    return _bound(group, limits, _number(_text(group / "memory.usage_in_bytes")), stat, "total_")


def _bound(
    group: Path, limits: list[int | None], used: int | None, stat: dict[str, int], prefix: str
) -> RamBound | None:
    total = min((limit for limit in limits if limit is not None and limit < UNLIMITED), default=None)
    if total is None:
        return None
    cache = sum(stat.get(f"{prefix}{kind}", stat.get(kind, 0)) for kind in ("active_file", "inactive_file"))
    return RamBound(f"control group {group}", total, max(0, total - max(0, (used or 0) - cache)))


def _stat(group: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(group / "memory.stat").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def resource_bounds() -> list[RamBound]:
    """RLIMIT_AS and RLIMIT_DATA (`ulimit -v`, `ulimit -d`) of this process; nothing where the system has none."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return []
    used = psutil.Process().memory_info()
    found = []
    for name, taken in (("RLIMIT_AS", used.vms), ("RLIMIT_DATA", getattr(used, "data", used.rss))):
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY and 0 <= soft < UNLIMITED:
            found.append(RamBound(name, soft, max(0, soft - taken)))
    return found


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX (sysinfoapi.h)."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total_phys", ctypes.c_uint64),
        ("avail_phys", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("avail_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("avail_virtual", ctypes.c_uint64),
        ("avail_extended_virtual", ctypes.c_uint64),
    )


class _JobLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION (winnt.h)."""

    _fields_ = (
        ("process_user_time", ctypes.c_int64),
        ("job_user_time", ctypes.c_int64),
        ("flags", ctypes.c_uint32),
        ("least_working_set", ctypes.c_size_t),
        ("most_working_set", ctypes.c_size_t),
        ("active_processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority", ctypes.c_uint32),
        ("scheduling", ctypes.c_uint32),
        ("io_counters", ctypes.c_uint64 * 6),
        ("process_memory", ctypes.c_size_t),
        ("job_memory", ctypes.c_size_t),
        ("peak_process_memory", ctypes.c_size_t),
        ("peak_job_memory", ctypes.c_size_t),
    )


def windows_bounds(kernel32: Any = None) -> list[RamBound]:
    """What Windows can still commit (RAM and page file), and the limits of the job that the process is in.

    `kernel32`: the system's library; a stand-in for tests. Nothing on other systems.
    """
    if kernel32 is None:
        if os.name != "nt":
            return []
        kernel32 = _kernel32()
    found = []
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        found.append(RamBound("the page file", int(status.total_page_file), int(status.avail_page_file)))
    job = _JobLimits()
    if kernel32.QueryInformationJobObject(None, EXTENDED_LIMITS, ctypes.byref(job), ctypes.sizeof(job), None):
        used = psutil.Process().memory_info()
        committed = int(getattr(used, "private", used.rss))
        for flag, limit in ((PROCESS_MEMORY, job.process_memory), (JOB_MEMORY, job.job_memory)):
            if job.flags & flag:
                found.append(RamBound("the job object", int(limit), max(0, int(limit) - committed)))
    return found


def _kernel32() -> Any:
    if sys.platform != "win32":
        raise OSError("kernel32 is a library of Windows")
    library = ctypes.WinDLL("kernel32", use_last_error=True)
    # a handle is as wide as a pointer: without types, ctypes would pass 32 bits of it
    library.QueryInformationJobObject.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
    )
    return library
