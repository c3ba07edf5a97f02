"""One image by two and by four processes over gloo: that of one process; and what is left when one is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from devtools.cache import REPOSITORY
from PIL import Image
from qwenimage_lowvram.engine.compute.context_parallel import RankLost, Ranks
from qwenimage_lowvram.engine.compute.link import TYPICAL_LINK
from qwenimage_lowvram.engine.errors import InvalidRequest, Unsupported
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from qwenimage_lowvram.engine.models.qwen_image_21.family import QWEN_IMAGE_21
from qwenimage_lowvram.engine.models.qwen_image_21.variants import Variant21
from qwenimage_lowvram.engine.runs.opened_files import OpenedFiles
from qwenimage_lowvram.engine.runs.pipeline import Pipeline
from qwenimage_lowvram.engine.runs.ranks import _told_to_end, ranks_of_torchrun
from ranks_worker import NEGATIVE, PROMPT, SIZE, made

EXAMPLE = REPOSITORY / "docs" / "examples" / "one_image_on_several_cards.py"
HEADS = 4


@pytest.fixture(scope="module")
def model(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline folder whose heads four processes can share."""
    from small_checkpoint import make_pipeline

    return make_pipeline(tmp_path_factory.mktemp("model") / "small", heads=HEADS, layers=3, comfyui=comfyui_path)


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, torch.Tensor]:
    """What one process makes."""
    with Pipeline.open(model, device="cpu") as pipeline:
        latents = made(pipeline)
        image = pipeline.make(PROMPT, NEGATIVE, **SIZE)
    return {**latents, "streamed": latents["guided"], "image": image[0]}


@pytest.fixture
def torchrun(model: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Starts that many of tools/ranks_worker.py, which write to `tmp_path`, temporary files to tmp_path/own."""
    (own := tmp_path / "own").mkdir()

    def start(count: int, *options: str) -> subprocess.CompletedProcess[str]:
        own_path = (str(REPOSITORY / folder) for folder in ("tools/alias", "tools"))
        path = os.pathsep.join([*own_path, *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(own), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += [str(REPOSITORY / "tools" / "ranks_worker.py"), str(tmp_path), str(model), str(EXAMPLE), *options]
        run = subprocess.run(
            command, env={**os.environ, **variables}, cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        print(run.stdout, run.stderr)
        return run

    return start


def require_made(folder: Path, count: int, alone: dict[str, torch.Tensor]) -> None:
    seen: list[dict[str, Any]] = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
    for told in seen:
        for name, latents in told["latents"].items():
            assert latents.shape == alone[name].shape
            assert (latents - alone[name]).abs().max() < 1e-4, name
            assert torch.equal(latents, seen[0]["latents"][name]), name
        assert told["errors"]["other seeds"].startswith("ranks.differ: ")
        assert "process 1 has another seed (1) than process 0 (0)" in told["errors"]["other seeds"]
        assert told["errors"]["a rule"].startswith("ranks.first_block: ")
        assert told["errors"]["fewer tokens"].startswith("ranks.too_few_tokens: ")
        assert f"one of {count} parts" in told["plan"]
        assert told["streamed"] > 0
        assert 1e6 < told["link"]["sent_bytes"] != TYPICAL_LINK.sent_bytes  # measured
        assert 0 < told["link"]["begin_seconds"] < 1
    assert not [path for path in (folder / "cache").rglob("*") if path.is_file()]  # its disk was full


def workers(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's processes are ended by signals")
def test_four_processes_make_the_image_of_one(
    torchrun: Callable[..., Any], alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = torchrun(4)
    assert run.returncode == 0, run.stderr
    require_made(tmp_path, 4, alone)
    with Image.open(tmp_path / "image.png") as image:  # the example's
        made = torch.tensor(list(image.tobytes())).view(*alone["image"].shape)
    assert (made - (alone["image"] * 255).round()).abs().max() <= 1
    assert not workers(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's processes are ended by signals")
def test_two_processes_make_it_too_and_where_one_is_killed_the_other_says_so_and_ends(
    torchrun: Callable[..., Any], alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    before = shared_memory()
    run = torchrun(2, "--kill")
    ended = time.time()
    assert run.returncode != 0
    require_made(tmp_path, 2, alone)
    seconds, _, words = (tmp_path / "lost 0").read_text().partition(" ")
    assert "Process 0 of 2 has lost another one, without which the image cannot be made" in words
    killed = float((tmp_path / "killed").read_text())
    assert float(seconds) - killed < 30
    assert ended - killed < 60
    assert words.splitlines()[0] in run.stderr
    assert not workers(tmp_path)
    assert shared_memory() <= before
    left = {file.name for file in (tmp_path / "own").iterdir()}
    assert not {name for name in left if not name.startswith("torchelastic_")}  # torchrun's own folder, for logs


def test_a_process_that_torchrun_ends_gives_back_what_it_holds_and_ends_once() -> None:
    before, given_back = signal.getsignal(signal.SIGTERM), []

    @contextmanager
    def held() -> Iterator[None]:
        try:
            yield
        finally:
            signal.raise_signal(signal.SIGTERM)  # another one changes nothing
            given_back.append("all")

    try:
        with pytest.raises(RankLost, match="torchrun ended this process"), _told_to_end(1, 2), held():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # nor does it while the process ends
    finally:
        signal.signal(signal.SIGTERM, before)
    assert given_back == ["all"]


@pytest.mark.parametrize("count", [3, 8])
def test_processes_that_cannot_share_the_heads_are_refused_before_anything_is_loaded(
    model: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    def load(*args: Any, **settings: Any) -> None:
        raise AssertionError("something is loaded")

    files = OpenedFiles.of_folder(model)
    monkeypatch.setattr("qwenimage_lowvram.engine.runs.pipeline.Hardware.detect", load)
    ranks = Ranks(0, count, torch.device("cpu"), None)
    with pytest.raises(InvalidRequest, match=r"model's 4 heads(.|\n)*start 2 or 4 processes"):
        Pipeline(files, ranks=ranks)
    with pytest.raises(Unsupported, match="leave compile off"):
        Pipeline(files, ranks=Ranks(0, 2, torch.device("cpu"), None), compile=True)


def test_models_whose_tokens_are_not_split_are_refused_by_name(model: Path) -> None:
    files = OpenedFiles.of_folder(model)
    with pytest.raises(Unsupported, match=r"Qwen-Image-2\.1 cannot make one image in 2 processes"):
        QWEN_IMAGE_21.require_ranks(files.transformer, Variant21.BASE, 2)
    with pytest.raises(Unsupported, match="Qwen-Image-Layered cannot make one image in 2 processes"):
        files.family.require_ranks(files.transformer, Variant.LAYERED, 2)


def test_without_torchrun_it_is_said_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InvalidRequest, match=r"torch.distributed.run --nproc-per-node=2"), ranks_of_torchrun():
        pass
