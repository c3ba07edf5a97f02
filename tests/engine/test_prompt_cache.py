"""Prompts that were encoded once are read from the disk, bit for bit; nothing else ever is, and no disk ends a run."""

import ast
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devtools.cache import REPOSITORY
from qwenimage_lowvram.engine.caches import prompt_key
from qwenimage_lowvram.engine.caches.prompt_cache import LIMIT_BYTES, Cleared, PromptCache
from qwenimage_lowvram.engine.caches.prompt_key import PromptKey, arithmetic_of
from qwenimage_lowvram.engine.errors import CacheError
from qwenimage_lowvram.engine.files import atomic_files
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen25_vl.text_encoder import TextEncoder
from safetensors import safe_open
from safetensors.torch import save_file

KEY = PromptKey("0123456789abcdef", torch.bfloat16, (151644, 8948, 198), "torch 2, cpu", code="this version")
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "qwen_lowvram" / "prompts")


def a_tensor(seed: int = 0, *, length: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, length, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def a_key(number: int) -> PromptKey:
    return replace(KEY, tokens=(number,))


def same_bits(ours: torch.Tensor | None, given: torch.Tensor) -> bool:
    """Shape, dtype, device and every bit, those of NaN and -0.0 too."""
    return (
        ours is not None
        and (ours.shape, ours.dtype, ours.device, ours.stride()) == (given.shape, given.dtype, CPU, given.stride())
        and torch.equal(ours.view(torch.uint8), given.view(torch.uint8))
    )


def files_in(cache: PromptCache) -> list[Path]:
    return sorted(cache.folder.iterdir()) if cache.folder.exists() else []


def bytes_in(cache: PromptCache) -> int:
    return sum(path.stat().st_size for path in files_in(cache))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return found


# what is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_kept_comes_back_bit_for_bit(
    dtype: torch.dtype, cache: PromptCache, caplog: pytest.LogCaptureFixture
) -> None:
    given = a_tensor(dtype=dtype)
    given[0, 0, :4] = torch.tensor([-0.0, 0.0, 1e-8, 60000.0])
    assert cache.get(KEY) is None
    cache.put(KEY, given)
    assert same_bits(PromptCache(cache.folder).get(KEY), given)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_numbers_of_a_16_bit_encoder_take_16_bits_and_come_back_in_fp32(
    dtype: torch.dtype, cache: PromptCache
) -> None:
    given = a_tensor(length=512, dtype=dtype).float()
    given[0, 0, 0] = -0.0
    cache.put(KEY, given)
    assert bytes_in(cache) < 0.6 * given.nbytes
    assert same_bits(cache.get(KEY), given)


@pytest.mark.parametrize("numbers", [[-1.0, 1e-45], [1.0, 1.0 + 2**-23], [65504.0, 2**-30]])
def test_fp32_numbers_that_no_16_bits_hold_are_not_rounded(numbers: list[float], cache: PromptCache) -> None:
    given = torch.tensor(numbers).view(1, 1, 2)
    cache.put(KEY, given)
    assert same_bits(cache.get(KEY), given)


def test_a_part_of_a_larger_tensor_is_kept_as_that_part(cache: PromptCache) -> None:
    whole = a_tensor(length=9)
    cache.put(KEY, whole[:, 2:6, ::2])
    assert same_bits(cache.get(KEY), whole[:, 2:6, ::2].contiguous())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_accident_of_the_computation_is_not_kept(number: float, cache: PromptCache) -> None:
    given = a_tensor()
    given[0, 1, 1] = number
    cache.put(KEY, given)
    assert cache.get(KEY) is None
    assert files_in(cache) == []


@pytest.mark.parametrize(
    "other",
    [
        {"encoder": "0123456789abcdee"},
        {"dtype": torch.float16},
        {"tokens": (151644, 8948, 199)},
        {"tokens": (151644, 8948)},
        {"arithmetic": "torch 2, cuda"},
        {"images": ("a digest",)},
        {"code": "another version"},
    ],
    ids=str,
)
def test_whatever_is_different_is_another_entry(other: dict[str, Any], cache: PromptCache) -> None:
    cache.put(KEY, a_tensor(0))
    assert cache.get(replace(KEY, **other)) is None
    cache.put(replace(KEY, **other), a_tensor(1))
    assert same_bits(cache.get(KEY), a_tensor(0))
    assert same_bits(cache.get(replace(KEY, **other)), a_tensor(1))


def test_every_part_of_the_key_is_in_its_text() -> None:
    assert set(json.loads(KEY.text)) == {"encoder", "dtype", "tokens", "arithmetic", "images", "code"}


def test_the_arithmetic_names_the_libraries_the_chip_and_the_settings() -> None:
    before = arithmetic_of(CPU)
    assert f"torch {torch.__version__}, transformers " in before
    assert f"cpu {torch.backends.cpu.get_cpu_capability()}, " in before
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(threads + 1)
        assert arithmetic_of(CPU) != before
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("medium")
        assert arithmetic_of(CPU) != before
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_a_changed_line_of_code_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(REPOSITORY / "engine", engine, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(prompt_key, "__file__", str(engine / "caches" / "prompt_key.py"))
    before = prompt_key._code_version()
    for name in ("models/qwen25_vl/text_encoder.py", "formats/scaled_fp8.py"):
        with (engine / name).open("a") as file:
            file.write("# changed\n")
        after = prompt_key._code_version()
        assert after != before
        before = after


def test_nothing_is_read_or_written_by_pickle(cache: PromptCache) -> None:
    cache.put(KEY, a_tensor())
    (file,) = files_in(cache)
    with safe_open(file, framework="pt") as entry:
        assert list(entry.keys()) == ["embeddings"]
        assert entry.metadata()["key"] == KEY.text
    for name in ("caches/prompt_cache", "caches/prompt_key", "files/atomic_files"):
        tree = ast.parse((REPOSITORY / "engine" / f"{name}.py").read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not imported & {"pickle", "shelve", "marshal", "joblib"}
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "torch.save", "eval", "exec"}


# what a damaged file does


def put_one(cache: PromptCache) -> tuple[Path, torch.Tensor]:
    given = a_tensor(length=2)
    cache.put(KEY, given)
    (file,) = files_in(cache)
    return file, given


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(
    cache: PromptCache, caplog: pytest.LogCaptureFixture
) -> None:
    file, given = put_one(cache)
    whole = file.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found = cache.get(KEY)
        if found is None:
            (warning,) = warnings_of(caplog)
            assert f"{file} is damaged" in warning
            assert not file.exists()
        else:
            assert same_bits(found, given)
            unnoticed.append(place)
    header = int.from_bytes(whole[:8], "little")
    assert not [place for place in unnoticed if place >= 8 + header]
    assert len(unnoticed) < 20  # spaces of the header


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:5],
        lambda whole: whole[:60],
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: bytes(len(whole)),
        lambda whole: b"\x80\x02" + whole[2:],
        lambda whole: b"not a file of ours",
    ],
)
def test_a_cut_or_overwritten_file_is_removed_and_made_again(
    damage: Callable[[bytes], bytes], cache: PromptCache, caplog: pytest.LogCaptureFixture
) -> None:
    file, given = put_one(cache)
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get(KEY) is None
    (warning,) = warnings_of(caplog)
    assert "encoded again" in warning
    assert not file.exists()
    cache.put(KEY, given)
    assert same_bits(cache.get(KEY), given)


def test_the_file_of_another_prompt_under_this_name_is_not_believed(
    cache: PromptCache, caplog: pytest.LogCaptureFixture
) -> None:
    file, _ = put_one(cache)
    other = replace(KEY, tokens=(1, 2, 3))
    renamed = file.with_name(f"{other.digest}.safetensors")
    file.rename(renamed)
    assert cache.get(other) is None
    assert len(warnings_of(caplog)) == 1
    assert not renamed.exists()
    assert cache.get(KEY) is None
    assert warnings_of(caplog) == []


def test_a_foreign_file_under_this_name_is_not_believed(cache: PromptCache, caplog: pytest.LogCaptureFixture) -> None:
    file, given = put_one(cache)
    with safe_open(file, framework="pt") as entry:
        metadata = entry.metadata()
    for tensors, header in [
        ({"embeddings": given}, {}),
        ({"embeddings": given, "another": given.clone()}, metadata),
        ({"embeddings": given + 1}, metadata),
        ({"embeddings": given.view(1, 1, 32)}, metadata),
        ({"embeddings": given.view(torch.int32)}, metadata),
        ({"embeddings": given.to(torch.float8_e4m3fn)}, metadata),
        ({"embeddings": given}, metadata | {"dtype": "BF16"}),
        ({"embeddings": given}, metadata | {"dtype": "no dtype"}),
        ({"embeddings": given}, metadata | {"checksum": "0" * 64}),
    ]:
        save_file(tensors, file, metadata=header)
        assert cache.get(KEY) is None
        assert len(warnings_of(caplog)) == 1
    save_file({"embeddings": given}, file, metadata=metadata)
    assert same_bits(cache.get(KEY), given)


def test_a_file_that_may_not_be_read_is_a_warning(
    cache: PromptCache,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    forbid: Callable[[Path], None],
) -> None:
    file, given = put_one(cache)
    file.unlink()
    file.mkdir()
    assert cache.get(KEY) is None
    assert len(warnings_of(caplog)) == 1
    file.rmdir()
    cache.put(KEY, given)
    forbid(file)
    assert cache.get(KEY) is None
    (warning,) = warnings_of(caplog)
    assert "Permission denied" in warning
    monkeypatch.undo()
    assert same_bits(cache.get(KEY), given)


# how much is kept


def entry_bytes(cache: PromptCache) -> int:
    cache.put(a_key(0), a_tensor())
    (file,) = files_in(cache)
    size = file.stat().st_size
    file.unlink()
    return size


def used(cache: PromptCache, number: int, second: int) -> None:
    os.utime(cache.folder / f"{a_key(number).digest}.safetensors", (second, second))


def kept(cache: PromptCache) -> set[int]:
    names = {path.stem for path in files_in(cache)}
    return {number for number in range(40) if a_key(number).digest in names}


def test_the_entry_that_was_not_used_for_longest_goes_first(cache: PromptCache) -> None:
    cache.limit_bytes = 3 * entry_bytes(cache)
    for number in range(3):
        cache.put(a_key(number), a_tensor(number))
        used(cache, number, 1000 + number)
    assert cache.get(a_key(0)) is not None  # used now
    cache.put(a_key(3), a_tensor(3))
    assert kept(cache) == {0, 2, 3}
    used(cache, 2, 2000)
    used(cache, 3, 1999)
    cache.put(a_key(4), a_tensor(4))
    assert kept(cache) == {0, 2, 4}
    assert cache.entries()[0].path.stem == a_key(2).digest


def test_the_folder_never_grows_beyond_its_limit(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:  # the moment before the new file takes its place
        seen.append(bytes_in(cache))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    cache.limit_bytes = 7000
    for number in range(30):
        cache.put(a_key(number), a_tensor(number, length=1 + 7 * number % 40))
        assert same_bits(cache.get(a_key(number)), a_tensor(number, length=1 + 7 * number % 40))
        seen.append(bytes_in(cache))
    assert 4000 < max(seen) <= 7000
    assert len(seen) == 60


def test_an_entry_larger_than_the_limit_removes_nothing(cache: PromptCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.limit_bytes = 3 * entry_bytes(cache)
    cache.put(a_key(0), a_tensor(0))
    cache.put(a_key(1), a_tensor(1, length=100))
    (warning,) = warnings_of(caplog)
    assert "not kept" in warning
    assert kept(cache) == {0}


def test_files_of_others_are_not_counted_and_stay(cache: PromptCache) -> None:
    cache.limit_bytes = 2 * entry_bytes(cache)
    others = [
        cache.folder / name for name in ("mine.safetensors", "notes.txt", "theirs.part", f"{'0' * 31}.safetensors")
    ]
    for other in others:
        other.write_bytes(bytes(cache.limit_bytes))
    for number in range(4):
        cache.put(a_key(number), a_tensor(number))
    assert len(kept(cache)) == 2
    assert len(cache.clear().removed) == 2
    assert set(files_in(cache)) == set(others)
    assert cache.clear() == Cleared((), ())


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a link"])
def test_what_is_no_file_under_an_entrys_name_is_skipped_and_stays(
    kind: str, cache: PromptCache, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "a pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("Windows has no pipes among its files")
    cache.limit_bytes = 2 * entry_bytes(cache)
    aside = cache.folder.parent / "elsewhere"
    aside.write_bytes(bytes(10))
    make = {"a folder": Path.mkdir, "a pipe": getattr(os, "mkfifo", None), "a link": lambda at: at.symlink_to(aside)}
    file = cache.folder / f"{a_key(9).digest}.safetensors"
    part = cache.folder / f"{a_key(9).digest}.01234567.safetensors.part"
    for path in (file, part):
        make[kind](path)
    os.utime(file, (1, 1), follow_symlinks=False)  # the first to go, if it were an entry
    for number in range(4):
        cache.put(a_key(number), a_tensor(number))
    assert warnings_of(caplog) == []
    assert kept(cache) == {2, 3, 9}
    assert cache.get(a_key(9)) is None
    cache.put(a_key(9), a_tensor(9))
    assert all("not a plain file" in warning for warning in warnings_of(caplog))
    cache.clear()
    assert set(files_in(cache)) == {file, part}
    assert cache.odd_names() == sorted([file.name, part.name])
    assert aside.read_bytes() == bytes(10)


def test_clearing_prompts_goes_on_after_one_that_cannot_be_removed(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        cache.put(a_key(number), a_tensor(number))
        used(cache, number, 1000 + number)
    held, unlink = cache.folder / f"{a_key(1).digest}.safetensors", Path.unlink

    def refused(path: Path, **options: Any) -> None:
        if path == held:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refused)
    cleared = cache.clear()
    assert len(cleared.removed) == 2
    assert [(entry.path, why) for entry, why in cleared.failed] == [(held, "The process cannot access the file")]
    assert kept(cache) == {1}


def test_a_usual_prompt_fits_a_thousand_times_and_the_longest_a_hundred_times(cache: PromptCache) -> None:
    def file_bytes(tokens: int) -> int:
        return 2 * tokens * 3584 + 4096  # header included

    cache.put(KEY, torch.randn(1, 94, 3584).bfloat16().float())
    assert bytes_in(cache) < file_bytes(94) < LIMIT_BYTES / 1000
    cache.put(KEY, torch.randn(1, 1024 + 34, 3584).bfloat16().float())
    assert bytes_in(cache) < file_bytes(1024 + 34) < LIMIT_BYTES / 100


def test_a_folder_that_is_not_there_is_empty_and_not_made(cache: PromptCache) -> None:
    assert cache.get(KEY) is None
    assert cache.entries() == []
    assert cache.clear() == Cleared((), ())
    assert not cache.folder.exists()


# a disk that fails


@pytest.mark.parametrize("at", ["the write", "the flush", "the replacing"])
def test_a_full_disk_costs_a_warning_and_leaves_nothing(
    at: str, cache: PromptCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache.put(a_key(1), a_tensor(1))
    claim = atomic_files._claim

    def claim_full(path: Path) -> Any:
        part, stream = claim(path)
        stream.close()
        return part, FullFile(part)

    if at == "the write":
        monkeypatch.setattr(atomic_files, "_claim", claim_full)
    else:
        monkeypatch.setattr(os, {"the flush": "fsync", "the replacing": "replace"}[at], full)
    cache.put(KEY, a_tensor())
    (warning,) = warnings_of(caplog)
    assert "not kept" in warning
    assert "No space left" in warning
    assert cache.get(KEY) is None
    assert kept(cache) == {1}
    assert len(files_in(cache)) == 1
    monkeypatch.undo()
    cache.put(KEY, a_tensor())
    assert same_bits(cache.get(KEY), a_tensor())


class FullFile:
    """A file on a disk that is full."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def write(self, data: bytes) -> int:
        self._stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "models").write_text("a file")
    cache = PromptCache(tmp_path / "models" / "prompts")
    cache.put(KEY, a_tensor())
    (warning,) = warnings_of(caplog)
    assert str(cache.folder) in warning
    assert cache.get(KEY) is None
    with pytest.raises(CacheError, match="cannot be read"):
        cache.entries()
    with pytest.raises(CacheError, match="cannot be cleared"):
        cache.clear()


def test_an_entry_that_another_process_holds_is_not_replaced(
    cache: PromptCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, a_tensor())

    def refused(*args: object) -> None:
        raise PermissionError(errno.EACCES, "The process cannot access the file")  # as on Windows

    monkeypatch.setattr(os, "replace", refused)
    cache.put(KEY, a_tensor())
    assert warnings_of(caplog) == []
    assert same_bits(cache.get(KEY), a_tensor())
    assert len(files_in(cache)) == 1


# several processes

CHILD = """
import os, sys
from dataclasses import replace
from pathlib import Path
import torch
from qwenimage_lowvram.engine.caches.prompt_cache import PromptCache
from qwenimage_lowvram.engine.caches.prompt_key import PromptKey

folder, limit, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
cache = PromptCache(folder, limit)
key = PromptKey("0123456789abcdef", torch.bfloat16, (151644, 8948, 198), "torch 2, cpu", code="this version")
def tensor(number):
    return torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(number))
if mode == "killed":
    def stop(descriptor):
        print("written", flush=True)
        sys.stdin.readline()
    os.fsync = stop
    cache.put(key, tensor(0))
print("ready", flush=True)
sys.stdin.readline()
for turn in range(150):
    number = turn % 12
    found = cache.get(replace(key, tokens=(number,)))
    if found is not None and not torch.equal(found, tensor(number)):
        sys.exit("another tensor")
    if found is None:
        cache.put(replace(key, tokens=(number,)), tensor(number))
"""


@pytest.fixture
def child(cache: PromptCache) -> Any:
    """`child(limit_bytes, mode)` -> a process with the same folder, which waits for a line before it begins."""
    children: list[subprocess.Popen[str]] = []

    def start(limit_bytes: int, mode: str = "plain") -> "subprocess.Popen[str]":
        paths = os.pathsep.join(str(REPOSITORY / path) for path in ("tools/alias", "tools"))
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(cache.folder), str(limit_bytes), mode],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(process)
        return process

    yield start
    for process in children:
        process.kill()
        process.communicate()


def wait_for(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n"


@pytest.mark.slow
@pytest.mark.parametrize("entries", [5, 40])
def test_two_processes_at_once_read_nothing_wrong_and_keep_the_limit(
    entries: int, child: Any, cache: PromptCache
) -> None:
    limit = entries * entry_bytes(cache)
    children = [child(limit), child(limit)]
    for process in children:
        wait_for(process, "ready")
    for process in children:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in children:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    assert bytes_in(cache) <= limit
    assert len(kept(cache)) == len(files_in(cache)) > 0
    assert entries == 5 or kept(cache) == set(range(12))
    for number in kept(cache):
        assert same_bits(cache.get(a_key(number)), a_tensor(number))


def test_what_processes_that_write_at_once_have_too_much_goes(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.limit_bytes = 2 * entry_bytes(cache)
    other = PromptCache(cache.folder, cache.limit_bytes)
    cache.put(a_key(0), a_tensor(0))
    used(cache, 0, 1000)
    claim = atomic_files._claim

    def claim_later(path: Path) -> Any:  # both have found room before either has written
        monkeypatch.undo()
        other.put(a_key(1), a_tensor(1))
        used(cache, 1, 2000)
        return claim(path)

    monkeypatch.setattr(atomic_files, "_claim", claim_later)
    cache.put(a_key(2), a_tensor(2))
    assert kept(cache) == {1, 2}


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_is_believed_or_stays(child: Any, cache: PromptCache) -> None:
    process = child(LIMIT_BYTES, "killed")
    wait_for(process, "written")
    assert cache.get(KEY) is None
    assert cache.entries() == []
    cache.put(a_key(1), a_tensor(1))
    assert len(files_in(cache)) == 2  # its process lives
    process.kill()
    process.wait()
    assert cache.get(KEY) is None
    cache.put(a_key(2), a_tensor(2))
    assert kept(cache) == {1, 2}
    assert len(files_in(cache)) == 2


# with the encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kept_result_is_the_encoders_own(
    dtype: torch.dtype, small_pipeline: Path, cache: PromptCache, cpu: Hardware
) -> None:
    encoder = TextEncoder(open_checkpoint(small_pipeline / "text_encoder"), dtype=dtype, hardware=cpu)
    prompts = [[5, 6, 7, 8], list(range(90))]
    keys = [PromptKey(encoder.identity, dtype, tuple(ids), arithmetic_of(CPU)) for ids in prompts]
    for key, state in zip(keys, encoder.encode(prompts), strict=True):
        cache.put(key, state)
    again = TextEncoder(open_checkpoint(small_pipeline / "text_encoder"), dtype=dtype, hardware=cpu)
    for ids, key in zip(prompts, keys, strict=True):
        (alone,) = again.encode([ids], slots=1)
        assert same_bits(cache.get(key), alone)
