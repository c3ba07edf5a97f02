"""Qwen-Image-2.1's transformer computes what diffusers' class does. Collected where diffusers has that class (0.42)."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from branches_21 import BRANCHES, make_branch, with_slots
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache, QwenImage21KVLayerCache
from diffusers.models.transformers.transformer_qwenimage21 import apply_rotary_emb_qwen as turn
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_dimensions, calculate_shift
from qwenimage_lowvram.engine.compute.step_schedules import Measured, StepSchedule
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image_21.branch import Branch
from qwenimage_lowvram.engine.models.qwen_image_21.schedule import sigmas_21
from qwenimage_lowvram.engine.models.qwen_image_21.sizes import by_area
from qwenimage_lowvram.engine.models.qwen_image_21.transformer import QwenImage21Transformer
from qwenimage_lowvram.engine.runs.step_predictions import StepPredictions
from small_transformer_21 import random_weights, write_file, write_folder
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
Model = Callable[[torch.dtype], tuple[Any, Path, Path]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """`model(dtype)` -> diffusers' transformer, its folder, and the same as a file of ComfyUI's."""
    made: dict[torch.dtype, tuple[Any, Path, Path]] = {}

    def make(dtype: torch.dtype) -> tuple[Any, Path, Path]:
        if dtype not in made:
            folder = tmp_path_factory.mktemp("small")
            weights = {name: weight.to(dtype) for name, weight in random_weights().items()}
            write_folder(folder / "transformer", weights)
            write_file(folder / "comfyui.safetensors", weights)
            whole = QwenImage21Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()
            made[dtype] = whole, folder / "transformer", folder / "comfyui.safetensors"
        return made[dtype]

    return make


def arguments(branch: Branch) -> dict[str, Any]:
    """Of diffusers' forward, as its pipeline gives them."""
    embeds, slots, mask = with_slots(branch.prefix)
    shapes = [(1, h, w) for h, w in (*branch.prefix.shapes, branch.shape)]
    return {
        "hidden_states": torch.cat([*branch.prefix.references, branch.tokens], dim=1),
        "encoder_hidden_states": embeds,
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([branch.timestep]).mul(1000).to(embeds.dtype) / 1000,
        "img_shapes": [shapes],
        "img_mask": torch.cat([slots, slots.new_ones(1, branch.tokens.shape[1] // 4)], dim=1),
        "return_dict": False,
    }


@torch.no_grad()
def at_once(model: Any, branch: Branch, **cache: Any) -> Tensor:
    return model(**arguments(branch), **cache)[0][:, -branch.tokens.shape[1] :]


@torch.no_grad()
def in_parts(model: Any, branch: Branch) -> Tensor:
    """diffusers' own modules on one stretch after another: up to the last reference, the text behind it, the image."""
    given = arguments(branch)
    dtype, shapes = branch.tokens.dtype, given["img_shapes"][0]
    slots = given["img_mask"][0]
    is_image = torch.repeat_interleave(slots, torch.where(slots, 4, 1))
    ids, _ = model.build_token_metadata(is_image, shapes)
    rotary = model.pos_embed(shapes, is_image, torch.device("cpu"))
    temb = model.time_text_embed(torch.cat([given["timestep"], given["timestep"].new_zeros(1)]), branch.tokens)
    modulation = model.modulation(temb)
    count = branch.tokens.shape[1]
    text = given["encoder_hidden_states"][:, ~slots[: given["encoder_hidden_states"].shape[1]]]
    is_prefix_image = is_image[: len(ids) - count].nonzero()
    split = int(is_prefix_image[-1]) + 1 if len(is_prefix_image) else 0
    ends = sorted({0, split, len(ids) - count, len(ids)})
    valid = torch.ones(1, len(ids), dtype=torch.bool)
    if given["encoder_hidden_states_mask"] is not None:
        valid[:, ~is_image] = given["encoder_hidden_states_mask"][:, ~slots[: given["encoder_hidden_states"].shape[1]]]
    hidden = []
    for start, end in pairwise(ends):
        own = is_image[start:end]
        tokens = torch.empty(1, end - start, model.inner_dim, dtype=dtype)
        if not own.all():
            before = int((~is_image[:start]).sum())
            tokens[:, ~own] = model.txt_in(text[:, before : before + int((~own).sum())])
        if own.any():
            images = given["hidden_states"] if start < len(ids) - count else branch.tokens
            tokens[:, own] = model.img_in(images[:, : int(own.sum())])
        hidden.append(tokens)
    for block in model.transformer_blocks:
        cache = QwenImage21KVLayerCache()
        cache.store(*(torch.empty(1, 0, 4, 32, dtype=dtype) for _ in range(2)))
        for i, (start, end) in enumerate(pairwise(ends)):
            row = modulation[:1] if end == len(ids) else modulation[1:]
            normed, _ = block._modulate(block.img_norm1(hidden[i]), row.chunk(2, -1)[0], None)
            mask, segments = None, None
            if i == 0 and end == split:
                segments = runs(ids[:end])
            elif end < len(ids):
                ones = torch.ones(end - start, end, dtype=torch.bool)
                mask = ones.tril(start)[None, None]
            known = valid[:, None, None, :end]
            if not valid.all() and segments is None:
                mask = known if mask is None else mask & known
            hidden[i] = block(
                hidden_states=hidden[i],
                modulation=row,
                rotary_emb=rotary[start:end],
                attention_mask=mask,
                layer_cache=cache if i else None,
                kv_cache_mode="cached" if i else None,
                segments=segments,
            )
            key = block.attn.norm_k(block.attn.to_k(normed).unflatten(-1, (4, 32)))
            key, value = turn(key, rotary[start:end], use_real=False), block.attn.to_v(normed).unflatten(-1, (4, 32))
            cache.store(torch.cat([cache.k, key], dim=1), torch.cat([cache.v, value], dim=1))
    return model.proj_out(model.norm_out(hidden[-1], temb, torch.ones(count, dtype=torch.bool)))


def runs(ids: Tensor) -> list[tuple[int, int, bool]]:
    cuts = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1]), len(ids)]
    return [(a, b, bool(ids[a] < 0)) for a, b in pairwise(cuts)]


def run(transformer: QwenImage21Transformer, branches: list[Branch], *, slots: int = 2) -> list[Tensor]:
    with transformer.session(slots=slots) as session:
        return session.forward(branches)


@pytest.mark.parametrize("layout", ["folder", "file"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BRANCHES)
def test_operation_by_operation_it_is_diffusers_own(
    case: str, dtype: torch.dtype, layout: str, model: Model, cpu: Hardware
) -> None:
    whole, folder, file = model(dtype)
    path = folder if layout == "folder" else file
    transformer = QwenImage21Transformer(open_checkpoint(path), dtype=dtype, hardware=cpu)
    branches = BRANCHES[case](dtype)
    expected = [in_parts(whole, branch) for branch in branches]
    assert all(0.1 < e.float().std() < 10 for e in expected)
    for resident in [(), (1, 3), tuple(range(5))]:
        transformer.load(resident)
        for ours, theirs in zip(run(transformer, branches), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", BRANCHES)
def test_it_is_diffusers_forward_but_for_the_order_of_sums(case: str, model: Model, cpu: Hardware) -> None:
    whole, folder, _ = model(torch.float32)
    transformer = QwenImage21Transformer(open_checkpoint(folder), dtype=torch.float32, hardware=cpu)
    transformer.load(())
    branches = BRANCHES[case](torch.float32)
    for ours, branch in zip(run(transformer, branches), branches, strict=True):
        assert (ours - at_once(whole, branch)).abs().max() < 2e-5


def test_the_second_step_is_diffusers_own_with_its_cache(model: Model, cpu: Hardware) -> None:
    whole, folder, _ = model(torch.float32)
    transformer = QwenImage21Transformer(open_checkpoint(folder), dtype=torch.float32, hardware=cpu)
    transformer.load(())
    cache = QwenImage21KVCache(5)
    at_once(whole, make_branch(9, references=2), kv_cache=cache, kv_cache_mode="extract")
    second = make_branch(9, references=2, timestep=0.4)
    expected = at_once(whole, second, kv_cache=cache, kv_cache_mode="cached")
    assert (run(transformer, [second])[0] - expected).abs().max() < 2e-5


@pytest.mark.parametrize("tokens", [1024, 4096, 16384, 16512])
def test_the_schedule_is_the_reference_pipelines(tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        max_image_seq_len=8192,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 40, 40), mu=calculate_shift(tokens, 256, 8192, 0.5, 0.9))
    assert (sigmas_21(40, tokens) - scheduler.sigmas).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(1920, 1080), (640, 960), (1000, 1000), (3000, 1100)])
def test_references_have_the_reference_pipelines_sizes(size: tuple[int, int]) -> None:
    assert by_area(size, 1024 * 1024) == calculate_dimensions(1024 * 1024, size[0] / size[1])[:2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_predicted_step_is_diffusers_own_behind_its_blocks(dtype: torch.dtype, model: Model, cpu: Hardware) -> None:
    whole, folder, _ = model(dtype)
    transformer = QwenImage21Transformer(open_checkpoint(folder), dtype=dtype, hardware=cpu)
    transformer.load(())
    steps = [make_branch(9, dtype=dtype, references=1, timestep=t) for t in (0.9, 0.7, 0.4)]
    inputs: list[Tensor] = []
    seen = whole.norm_out.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    for step in steps[:2]:
        in_parts(whole, step)
    seen.remove()
    extrapolated = inputs[1] + (inputs[1] - inputs[0]) / 2 * 3  # of steps 0 and 2, for 5
    timesteps = arguments(steps[2])["timestep"]
    temb = whole.time_text_embed(torch.cat([timesteps, timesteps.new_zeros(1)]), extrapolated)
    is_image = torch.ones(extrapolated.shape[1], dtype=torch.bool)
    predictions = StepPredictions(
        StepSchedule("of a test", 6, (0, 2), Measured("", 0, 0)), [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    )
    with transformer.session(slots=2) as session, torch.no_grad():
        for step in steps[:2]:
            hidden: list[Tensor] = []
            session.forward([step], keep=hidden.extend)
            predictions.done(step.timestep, {0: hidden[0]}, ())
        (predicted,) = predictions.predict([0], 0.4)
        assert predicted is not None
        assert torch.equal(predicted, extrapolated)
        (made,) = session.answers_of([steps[2]], [predicted])
        assert torch.equal(made, whole.proj_out(whole.norm_out(extrapolated, temb, is_image)))
