"""A model many times larger than the RAM limit runs within it, image after image, and makes the same numbers."""

import json
import os
import subprocess
import sys
from itertools import accumulate
from math import prod, sqrt
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parents[2] / "tools"
LAYERS, HEADS, TEXT_DIM = 53, 7, 64
LIMIT_BYTES = 500_000_000
IMAGES, STEPS = 10, 3

# One process for each limit: what it holds is its own. Prints the growth of anonymous memory after each image, its
# peak, and a digest of each image's latents.
CHILD = f"""
import hashlib, json, sys, threading, time
from pathlib import Path
import psutil, torch
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.planning.memory import plan_memory
from qwenimage_lowvram.engine.planning.request import Limits, SamplingRequest
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer

torch.set_num_threads(2)
process = psutil.Process()

def anonymous():
    if sys.platform == "linux":
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024
    return process.memory_info().rss

def images(file, ram_bytes, count, on_image):
    transformer = QwenImageTransformer(
        open_checkpoint(Path(file)), dtype=torch.bfloat16, hardware=Hardware.detect(torch.device("cpu"))
    )
    request = SamplingRequest(64, 64, 2, 9, timesteps={STEPS})
    plan = plan_memory(transformer.footprint, request, Limits(64 * 1024**3, ram_bytes))
    sigmas = [1 - i / {STEPS} for i in range({STEPS} + 1)]
    digests = []
    for image in range(count):
        generator = torch.Generator().manual_seed(image)
        prompts = [torch.randn(1, n, {TEXT_DIM}, generator=generator).bfloat16() for n in (9, 5)]
        x = torch.randn(1, 16, 64, generator=generator)
        transformer.load(plan.resident, plan.held)
        transformer.modulation.announce(sigmas[:-1])
        with transformer.session(slots=plan.slots, ring=plan.ring, mlp_chunk_tokens=plan.mlp_chunk_tokens) as session:
            for now, then in zip(sigmas, sigmas[1:]):
                branches = [Branch(x.bfloat16(), ((1, 4, 4),), prompt, None, now) for prompt in prompts]
                positive, negative = session.forward(branches, more=then > 0)
                x = x + (then - now) * (negative + 3 * (positive - negative)).float()
        digests.append(hashlib.sha256(x.numpy().tobytes()).hexdigest())
        on_image()
    assert torch.isfinite(x).all()
    return plan, digests

with torch.inference_mode():
    images(sys.argv[2], None, 1, lambda: None)
    before, peak, after, done = anonymous(), 0, [], threading.Event()

    def watch():
        global peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    ram = int(sys.argv[3]) or None
    plan, digests = images(sys.argv[1], ram, int(sys.argv[4]), lambda: after.append(anonymous() - before))
    done.set()
    watcher.join()
print(json.dumps(
    {{"growth": after, "peak": peak - before, "resident": len(plan.resident), "planned": plan.ram_peak_bytes,
      "digests": digests}}
))
"""


def write_model(file: Path, *, layers: int, heads: int) -> int:
    """A transformer in bf16 whose blocks all have the same random weights; returns the bytes of a block."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            num_layers=layers, num_attention_heads=heads, attention_head_dim=128, joint_attention_dim=TEXT_DIM
        )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ends = list(accumulate(prod(shape) * 2 for shape in shapes.values()))
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [end - prod(shape) * 2, end]}
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, bytes] = {}
    with file.open("wb") as stream:
        raw = json.dumps(header).encode()
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape in shapes.items():
            key = name.split(".", 2)[-1] if name.startswith("transformer_blocks.") else name
            if key not in drawn:
                scale = 0.3 / sqrt(shape[-1]) if len(shape) > 1 else 0.02
                weight = torch.randn(shape, generator=generator) * scale + (1 if "norm" in key else 0)
                drawn[key] = weight.bfloat16().view(torch.uint8).numpy().tobytes()
            stream.write(drawn[key])
    return sum(prod(shape) * 2 for name, shape in shapes.items() if name.startswith("transformer_blocks.0."))


def sample(file: Path, tiny: Path, *, ram_bytes: int, images: int) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, file, tiny, str(ram_bytes), str(images)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TOOLS / "alias", TOOLS)))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_3_gb_model_runs_in_half_a_gb_of_ram_for_ten_images(tmp_path: Path) -> None:
    large, tiny = tmp_path / "large.safetensors", tmp_path / "tiny.safetensors"
    assert write_model(large, layers=LAYERS, heads=HEADS) <= 60_000_000
    assert large.stat().st_size >= 3_000_000_000
    write_model(tiny, layers=2, heads=1)

    limited = sample(large, tiny, ram_bytes=LIMIT_BYTES, images=IMAGES)
    assert limited["planned"] <= LIMIT_BYTES
    assert 0 < limited["resident"] < LAYERS / 2
    assert limited["peak"] < LIMIT_BYTES
    first, *_, last = limited["growth"][1:]  # the first image fills what is kept
    assert last < first + 10_000_000

    free = sample(large, tiny, ram_bytes=0, images=2)
    assert free["resident"] == LAYERS
    assert free["peak"] > 3 * LIMIT_BYTES
    assert len(set(limited["digests"])) == IMAGES
    assert limited["digests"][:2] == free["digests"]
