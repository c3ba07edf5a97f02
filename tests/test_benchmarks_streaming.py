"""What `python dev.py bench streaming` counts, at each framework's own onload call: ours are 2.9 times fewer bytes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import full_size
import pytest
import torch
from devtools import bench
from diffusers import QwenImageTransformer2DModel
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.models.qwen_image.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from random_blocks import REAL_BLOCKS, Stored, repeat_blocks, write_transformer
from streaming_contenders import CONTENDERS, NotHere, counted_groups
from streaming_job import Job, Moved, Tier, forget_files
from streaming_row import measure
from torch._subclasses.fake_tensor import FakeTensorMode

STEPS = 20
LAYERS, HEADS, TEXT_DIM = 3, 2, 32


def make_job(tmp_path: Path, who: str, tier: Tier = Tier.DISK, stored: Stored = Stored.BF16) -> Job:
    folder, scratch = tmp_path / stored.value, tmp_path / f"{who} {tier.value}"
    if not folder.exists():
        write_transformer(folder, layers=LAYERS, heads=HEADS, text_dim=TEXT_DIM, stored=stored)
    scratch.mkdir(parents=True)
    return Job(
        who=who,
        tier=tier,
        folder=folder,
        scratch=scratch,
        blocks=LAYERS,
        width=64,
        height=64,
        vram_bytes=25_000_000,  # of sixty blocks, two slots and few that stay
        ram_bytes=None,
        steps=STEPS,
        rounds=2,
    )


def bytes_of_group_offloading(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the real model per guided step, as diffusers' own hooks bring it; its tensors are fake ones."""
    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: None)  # it cannot give fake tensors back
    bf16 = partial(torch.empty, dtype=torch.bfloat16)
    moved = Moved()
    with FakeTensorMode(), torch.no_grad(), counted_groups(moved, Tier.RAM):
        torch.set_default_dtype(torch.bfloat16)  # nor can fake parameters be cast
        try:
            model = QwenImageTransformer2DModel(num_layers=REAL_BLOCKS)
        finally:
            torch.set_default_dtype(torch.float32)
        apply_group_offloading(
            model, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
        for _ in ("positive", "negative"):
            model(
                hidden_states=bf16(1, 64, 64),
                encoder_hidden_states=bf16(1, 8, 3584),
                timestep=bf16(1),
                img_shapes=[[(1, 8, 8)]],
            )
    return moved.blocks + moved.others


def bytes_of_ours() -> tuple[int, int]:
    """Of the real model with no block resident: per guided step, and once for all timesteps."""
    with FakeTensorMode(), torch.inference_mode():
        transformer = QwenImageTransformer(
            full_size.transformer_checkpoint(),
            dtype=torch.bfloat16,
            hardware=full_size.fake_gpu(),
            source=full_size.EmptySource,
        )
        transformer.load(())
        transformer.modulation.announce([1 - i / STEPS for i in range(STEPS)])
        empty = partial(torch.empty, device="cuda", dtype=torch.bfloat16)
        branch = Branch(empty(1, 64, 64), ((1, 8, 8),), empty(1, 8, 3584), None, 1.0)
        with transformer.session(slots=2) as session:
            session.forward([branch, branch])
        row = transformer.footprint.row_bytes
        return transformer.store.copied_bytes + row, transformer.modulation.fetched_bytes


def test_of_the_real_model_a_guided_step_moves_2_9_times_fewer_bytes_than_group_offloading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    per_step, once = bytes_of_ours()
    theirs = bytes_of_group_offloading(monkeypatch)
    assert theirs == 2 * sum(entry.nbytes for entry in full_size.transformer_checkpoint().tensors.values())
    assert STEPS * theirs >= 2.9 * (STEPS * per_step + once)


def test_every_way_makes_the_same_prediction_and_moves_what_it_should(tmp_path: Path) -> None:
    figures, predictions = {}, {}
    for tier in Tier:
        for who in ("resident", "ours", "diffusers group offload", "accelerate sequential"):
            job = make_job(tmp_path, who, tier)
            figures[who, tier], predictions[who, tier] = measure(job)
    for prediction in predictions.values():
        assert torch.equal(prediction, predictions["resident", Tier.RAM])
    tensors = open_checkpoint(tmp_path / "bf16").tensors
    outside = sum(entry.nbytes for name, entry in tensors.items() if "blocks" not in name)
    blocks = (sum(entry.nbytes for entry in tensors.values()) - outside) * REAL_BLOCKS // LAYERS
    modulation = sum(entry.nbytes for name, entry in tensors.items() if "_mod." in name) * REAL_BLOCKS // LAYERS
    for tier in Tier:
        assert figures["resident", tier]["bytes_moved"] == 0
        for peer in ("diffusers group offload", "accelerate sequential"):
            assert figures[peer, tier]["bytes_moved"] == 2 * (blocks + outside)
        rows = REAL_BLOCKS * 12 * HEADS * 128 * 2
        ours = figures["ours", tier]
        assert ours["once_bytes"] == modulation
        assert ours["bytes_moved"] == pytest.approx(blocks - modulation + rows + modulation / STEPS, abs=1)
    assert figures["accelerate sequential", Tier.RAM]["read_bytes"] == 0
    assert figures["accelerate sequential", Tier.DISK]["read_bytes"] == 2 * blocks


def test_int8_blocks_run_and_move_half(tmp_path: Path) -> None:
    plain, _ = measure(make_job(tmp_path, "ours"))
    int8, prediction = measure(make_job(tmp_path / "int8", "ours", stored=Stored.INT8))
    assert torch.isfinite(prediction).all()
    assert int8["once_bytes"] == plain["once_bytes"]
    matrices = [plain["bytes_moved"] - plain["once_bytes"] / STEPS, int8["bytes_moved"] - int8["once_bytes"] / STEPS]
    assert 0.5 < matrices[1] / matrices[0] < 0.55


@pytest.mark.skipif(torch.cuda.is_available(), reason="mmgp runs there")
def test_a_peer_that_needs_cuda_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotHere, match="needs CUDA"), CONTENDERS["mmgp"](make_job(tmp_path, "mmgp")):
        pass


def test_repeated_blocks_are_the_file_s_over_and_over(tmp_path: Path) -> None:
    write_transformer(tmp_path, layers=2, heads=1, text_dim=16)
    checkpoint = open_checkpoint(tmp_path)
    repeated = repeat_blocks(checkpoint, 5)
    for name, entry in repeated.tensors.items():
        if name.startswith("transformer_blocks."):
            _, index, rest = name.split(".", 2)
            assert entry == checkpoint.tensors[f"transformer_blocks.{int(index) % 2}.{rest}"]
    assert {name.split(".")[1] for name in repeated.tensors if name.startswith("transformer_blocks.")} == set("01234")


def test_a_job_survives_its_way_to_another_process(tmp_path: Path) -> None:
    job = make_job(tmp_path, "ours")
    assert Job.from_json(job.to_json()) == job
    forget_files(replace(job, scratch=tmp_path))
    assert open_checkpoint(job.folder).nbytes


def test_bytes_moved_stands_in_the_table_in_gb() -> None:
    assert bench.table([{"who": "ours", "bytes_moved": 27_870_000_000}]).splitlines()[1].endswith("27.870")
