"""ControlNets beside our MODEL: ComfyUI's own loader and nodes, against ComfyUI's own model on the same weights."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from control_files import write_fun, write_instantx
from diffusers import QwenImageTransformer2DModel
from live_bytes import LiveBytes
from native_sizes import teach_transformer
from qwenimage_lowvram.engine.compute.linear_choice import Computing, choose_linear
from qwenimage_lowvram.engine.compute.stored_linear import StoredLinear
from qwenimage_lowvram.engine.errors import DoesNotFit, Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.hardware import Hardware
from qwenimage_lowvram.engine.models.qwen_image.positions import Positions
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from qwenimage_lowvram.engine.planning.block_split import secondary_bytes
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.request import Controls, SamplingRequest
from qwenimage_lowvram.engine.texts import size_text
from safetensors.torch import load_file, save_file
from split_files import write_split_files
from torch._subclasses.fake_tensor import FakeTensorMode

from .conftest import cond, empty_latent
from .test_devices import CARD
from .test_model import STEPS, ksampler, one_by_one, references
from .test_native_editing import made_image, native_model, our_model
from .test_out_of_memory import FullMemory

SIZE = 256, 256
MANY = 20  # layers: each residual is for three blocks
Apply = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def files(small_pipeline: Path, comfy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controlnet")
    write_instantx(folder / "union.safetensors", small_pipeline / "transformer", layers=MANY)
    write_instantx(folder / "other.safetensors", small_pipeline / "transformer", layers=2, seed=21)
    write_instantx(folder / "inpaint.safetensors", small_pipeline / "transformer", layers=2, mask_channels=4)
    write_fun(folder / "fun.safetensors", small_pipeline / "transformer")
    return folder


@pytest.fixture(scope="module")
def load(files: Path, comfy: Any) -> Iterator[Callable[[str], Any]]:
    """ComfyUI's ControlNetLoader; each file once."""
    import comfy.model_detection
    import folder_paths

    import nodes

    folder_paths.add_model_folder_path("controlnet", str(files))
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = nodes.ControlNetLoader().load_controlnet(f"{name}.safetensors")[0]
        return loaded[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_detection, "detect_unet_config", comfy.model_detection.detect_unet_config)
        teach_transformer()
        yield load


@pytest.fixture(scope="module")
def vae(small_pipeline: Path, comfy: Any) -> Any:
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    return make_vae(open_checkpoint(small_pipeline / "vae"), dtype=torch.float32, limit_bytes=None)


@pytest.fixture(scope="module")
def native(small_pipeline: Path, comfy: Any) -> Any:
    return native_model(small_pipeline, Variant.QWEN_IMAGE)


@pytest.fixture
def apply(load: Callable[[str], Any], vae: Any) -> Apply:
    """ComfyUI's 'Apply ControlNet' on both prompts; the hint is of another size than the image."""

    def apply(positive: Any, negative: Any, net: str = "union", seed: int = 3, **options: Any) -> tuple[Any, Any]:
        import nodes

        settings = {"strength": 0.8, "start_percent": 0.0, "end_percent": 1.0, "image": made_image(120, 72, seed)}
        node = nodes.ControlNetApplyAdvanced()
        result: tuple[Any, Any] = node.apply_controlnet(positive, negative, load(net), vae=vae, **(settings | options))
        return result

    return apply


def both(model: Any, native: Any, conds: tuple[Any, Any], latent: Any = None, *args: Any, **options: Any) -> Any:
    """Our latents, after comparing them with those of ComfyUI's own model."""
    latent = empty_latent() if latent is None else latent
    made = ksampler(model, *conds, latent, *args, **options)
    wanted = ksampler(native, *conds, latent, *args, **options)
    assert wanted.std() > 0.5
    assert (made - wanted).abs().max() < 1e-4
    return made


def inpainting(apply: Apply, load: Any, vae: Any) -> tuple[Any, Any]:
    from comfy_extras.nodes_controlnet import ControlNetInpaintingAliMamaApply

    mask = torch.zeros(1, 72, 120)
    mask[:, 20:50, 30:90] = 1
    node = ControlNetInpaintingAliMamaApply
    return node.execute(cond(), cond(5, 2), load("inpaint"), vae, made_image(120, 72), mask, 0.9, 0.0, 1.0).result


def halves(apply: Apply, net: str) -> tuple[Any, Any]:
    """The left part of the image with one prompt and control, the right part with others."""
    left, _ = apply(cond(7, 3, area=(8, 8, 0, 0)), cond(5, 2), net=net)
    right, _ = apply(cond(9, 4, area=(8, 8, 0, 4)), cond(5, 2), net=net, seed=9)
    return left + right, cond(5, 2)


CASES: dict[str, Callable[[Apply], tuple[Any, Any]]] = {
    "prompts of different length": lambda apply: apply(cond(), cond(5, 2)),
    "prompts of the same length": lambda apply: apply(cond(), cond(9, 2)),
    "the positive prompt alone": lambda apply: (apply(cond(), cond(5, 2))[0], cond(5, 2)),
    "the beginning alone": lambda apply: apply(cond(), cond(5, 2), end_percent=0.5),
    "the end alone": lambda apply: apply(cond(), cond(5, 2), start_percent=0.5),
    "two nets": lambda apply: apply(*apply(cond(), cond(5, 2)), net="other", seed=4, strength=0.5),
    "two nets, one after the other": lambda apply: apply(
        *apply(cond(), cond(5, 2), end_percent=0.5), net="other", start_percent=0.5
    ),
    "the same net twice": lambda apply: apply(*apply(cond(), cond(5, 2)), seed=4),
    "a reference": lambda apply: apply(cond(reference_latents=references((8, 8))), cond(5, 2)),
    "an area": lambda apply: apply(cond() + cond(7, 3, area=(4, 8, 0, 2)), cond(5, 2)),
    "halves with an image each": lambda apply: halves(apply, "other"),
    "Fun": lambda apply: apply(cond(), cond(5, 2), net="fun"),
    "Fun on halves": lambda apply: halves(apply, "fun"),
    "Fun behind Union": lambda apply: apply(*apply(cond(), cond(5, 2)), net="fun"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_controlled_image_is_that_of_comfyuis_own_model(case: str, model: Any, native: Any, apply: Apply) -> None:
    conds = CASES[case](apply)
    made = both(model, native, conds)
    assert (made - ksampler(model, cond(), cond(5, 2), empty_latent())).abs().max() > 0.01
    report = model.model.last_report
    assert report.one_by_one == ""
    assert report.passes == STEPS


@pytest.mark.parametrize("net", ["other", "fun"])
def test_one_controlnet_serves_the_image_and_an_area_of_its_height(
    net: str, model: Any, native: Any, apply: Apply
) -> None:
    """ComfyUI's own, which keeps a hint for any width, needs one for each."""
    part = cond(7, 3, area=(8, 8, 0, 4))
    made = ksampler(model, *apply(cond() + part, cond(5, 2), net=net), empty_latent())
    (whole, negative), (alone, _) = apply(cond(), cond(5, 2), net=net), apply(part, cond(5, 2), net=net)
    wanted = ksampler(native, whole + alone, negative, empty_latent())
    assert wanted.std() > 0.5
    assert (made - wanted).abs().max() < 1e-4


def test_inpainting_is_that_of_comfyuis_own_model(model: Any, native: Any, apply: Apply, load: Any, vae: Any) -> None:
    both(model, native, inpainting(apply, load, vae))


def test_a_batch_takes_one_hint_for_all_or_one_for_each(model: Any, native: Any, apply: Apply) -> None:
    images = torch.cat([made_image(120, 72, seed) for seed in range(2)])
    for_all, for_each = (
        both(model, native, apply(cond(), cond(9, 2), image=image), empty_latent(batch=2))
        for image in (images[:1], images)
    )
    assert (for_all[0] - for_each[0]).abs().max() < 1e-5
    assert (for_all[1] - for_each[1]).abs().max() > 0.01


def test_calls_one_by_one_are_controlled_the_same(model: Any, native: Any, apply: Apply) -> None:
    for net, length in (("union", 5), ("union", 9), ("fun", 9)):  # of one length, ComfyUI batches both prompts
        conds = apply(cond(), cond(length, 2), net=net)
        together = both(model, native, conds)
        alone = ksampler(one_by_one(model), *conds, empty_latent())
        assert "wrapper" in model.model.last_report.one_by_one
        assert (together - alone).abs().max() < 1e-5


def test_a_wrapper_that_skips_calls_is_controlled_the_same(model: Any, native: Any, apply: Apply) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    cached = (EasyCacheNode.execute(m, 0.2, 0.15, 0.95, False)[0] for m in (model, native))
    both(*cached, apply(cond(), cond(5, 2)), steps=6)
    assert model.model.last_report.one_by_one == ""


def test_the_sampler_may_give_the_negative_prompt_the_same_net(
    model: Any, native: Any, load: Any, vae: Any, apply: Apply
) -> None:
    positive, _ = apply(cond(), cond(5, 2))
    positive[0][1]["control_apply_to_uncond"] = True  # as the older 'Apply ControlNet' does it
    made = both(model, native, (positive, cond(5, 2)))
    assert (made - both(model, native, apply(cond(), cond(5, 2)))).abs().max() < 1e-5
    held = model.model.last_report.plan.request.controls.held_bytes
    ksampler(model, positive, cond(5, 2), empty_latent())
    assert model.model.last_report.plan.request.controls.held_bytes == held


def test_blocks_on_a_second_device_are_controlled_too(small_pipeline: Path, native: Any, apply: Apply) -> None:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    transformer = QwenImageTransformer(
        open_checkpoint(small_pipeline / "transformer"),
        dtype=torch.float32,
        hardware=CARD,
        others=[replace(CARD, device=torch.device("cpu:0"))],
    )
    conds = apply(cond(), cond(5, 2), net="other")
    ksampler(model := make_model(transformer, None), *conds, empty_latent())
    request = model.model.last_report.plan.request
    model.model.limit_bytes = least_bytes(transformer.footprint, request) + transformer.footprint.slot_bytes
    both(model, native, conds)
    (secondary,) = model.model.last_report.plan.secondaries
    alone = replace(request, controls=Controls())  # which run on the first device
    assert secondary.peak_bytes == secondary_bytes(transformer.footprint, alone, len(secondary.blocks))


def test_the_sample_node_and_custom_samplers_are_controlled_too(model: Any, native: Any, apply: Apply) -> None:
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import BasicScheduler, CFGGuider, RandomNoise, SamplerCustomAdvanced
    from qwenimage_lowvram.nodes.sample import QwenLowVRAMSample

    conds = apply(cond(), cond(5, 2))

    def custom(model: Any) -> torch.Tensor:
        guider = CFGGuider.execute(model, *conds, 3.0)[0]
        sigmas = BasicScheduler.execute(model, "simple", STEPS, 1.0)[0]
        noise, sampler = RandomNoise.execute(5)[0], comfy.samplers.sampler_object("euler")
        result: torch.Tensor = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, empty_latent())[0][
            "samples"
        ]
        return result

    assert (custom(model) - custom(native)).abs().max() < 1e-4
    out = QwenLowVRAMSample().sample(model, *conds, empty_latent(), 5, STEPS, 3.0, "euler", "simple", 1.0, False)
    wanted = ksampler(native, *conds, empty_latent(), seed=5)
    assert (out["result"][0]["samples"] - wanted).abs().max() < 1e-4


def test_a_controlnet_computes_once_for_each_condition_and_step(model: Any, load: Any, apply: Apply) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = load("union").control_model.register_forward_hook(count)
    try:
        ksampler(model, *apply(cond(), cond(5, 2)), empty_latent())
    finally:
        handle.remove()
    assert passes == 2 * STEPS


@pytest.mark.parametrize(("area", "sizes"), [({}, 1), ({"area": (4, 8, 0, 2)}, 2), ({"area": (8, 6, 0, 0)}, 2)])
def test_its_image_is_encoded_before_the_run(
    area: dict[str, Any], sizes: int, model: Any, vae: Any, apply: Apply
) -> None:
    when = []
    encode = vae.encode

    def watch(image: torch.Tensor) -> Any:
        when.append(model.model.calls.run is None)
        return encode(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "encode", watch)
        positive, negative = apply(cond() + cond(7, 3, **area), cond(5, 2))
        ksampler(model, positive, negative, empty_latent())
    assert when == [True] * sizes


class Interrupted(Exception):
    pass


def interrupt(model: Any, conds: tuple[Any, Any]) -> None:
    import comfy.sample

    def stop(*_: Any) -> None:
        raise Interrupted

    noise = torch.randn(1, 16, 1, 8, 12)
    with pytest.raises(Interrupted):
        comfy.sample.sample(
            model, noise, 4, 3.0, "euler", "simple", *conds, torch.zeros_like(noise), callback=stop, seed=1
        )


@pytest.mark.parametrize("net", ["other", "fun"])
def test_an_interrupted_run_leaves_no_image_for_the_next(net: str, model: Any, native: Any, apply: Apply) -> None:
    conds = apply(cond(), cond(5, 2), net=net)
    interrupt(model, conds)
    both(model, native, conds, empty_latent(128, 64))
    interrupt(
        model, pair := apply(cond(), cond(5, 2), net=net, image=torch.cat([made_image(120, 72, s) for s in (1, 2)]))
    )
    both(model, native, pair, empty_latent(batch=2))


@pytest.mark.parametrize("way", ["together", "one by one"])
def test_memory_that_runs_out_in_a_controlnet_is_planned_anew(way: str, model: Any, apply: Apply) -> None:
    conds = apply(cond(), cond(5, 2), net="other")
    sampled = model if way == "together" else one_by_one(model)
    expected = ksampler(sampled, *conds, empty_latent())
    passes = 0

    def run_out(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = conds[0][0][1]["control"].control_model.register_forward_pre_hook(run_out)
    try:
        assert torch.equal(ksampler(sampled, *conds, empty_latent()), expected)
    finally:
        handle.remove()
    assert model.model.last_report.out_of_memory == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fun_controlnet_may_be_of_another_dtype(
    dtype: torch.dtype, model: Any, native: Any, apply: Apply, files: Path
) -> None:
    name = f"fun_{str(dtype).removeprefix('torch.')}"
    weights = {key: weight.to(dtype) for key, weight in load_file(files / "fun.safetensors").items()}
    save_file(weights, files / f"{name}.safetensors")
    conds = apply(cond(), cond(5, 2), net=name)
    assert conds[0][0][1]["control"].control_model.dtype == dtype
    both(model, native, conds)


# memory


def controlled(model: Any, conds: tuple[Any, Any]) -> SamplingRequest:
    """What the last run planned for."""
    ksampler(model, *conds, empty_latent(*SIZE))
    request: SamplingRequest = model.model.last_report.plan.request
    assert request.controls
    return request


@pytest.mark.parametrize("net", ["union", "inpaint", "fun"])
def test_what_is_read_of_its_file_is_what_a_run_plans(
    net: str, model: Any, apply: Apply, load: Any, vae: Any, files: Path
) -> None:
    from qwenimage_lowvram.nodes.adapters.control_sizes import controls_of_files

    request = controlled(model, inpainting(apply, load, vae) if net == "inpaint" else apply(cond(), cond(9, 2), net))
    plain = replace(request, controls=Controls())
    read = controls_of_files([files / f"{net}.safetensors"], [], plain, model.model.transformer.footprint, batch=1)
    assert read.held_bytes == request.controls.held_bytes
    assert read.weights_bytes == pytest.approx(request.controls.weights_bytes, rel=0.01)
    assert read.working_bytes == pytest.approx(request.controls.working_bytes, rel=0.05)


@contextmanager
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def fake_net(kind: str) -> Any:
    """A ControlNet of the real size on a card that is not there."""
    import comfy.controlnet
    import comfy.ldm.qwen_image.controlnet as controlnet
    import comfy.ops

    options = {"device": "cuda", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}
    if kind == "union":
        return comfy.controlnet.ControlNet(controlnet.QwenImageControlNetModel(num_layers=5, **options))
    return comfy.controlnet.QwenFunControlNet(controlnet.QwenImageFunControlNetModel(**options))


@pytest.mark.parametrize("kind", ["union", "fun"])
@pytest.mark.parametrize(("width", "height", "batch"), [(1328, 1328, 1), (1664, 928, 2), (512, 512, 1)])
def test_a_pass_of_a_controlnet_of_the_real_size_takes_what_is_planned(
    kind: str, width: int, height: int, batch: int, comfy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.ldm.qwen_image.model as qwen
    from comfy.ldm.modules.attention import attention_pytorch
    from qwenimage_lowvram.nodes.adapters.borrowed_base import BorrowedBase
    from qwenimage_lowvram.nodes.adapters.control_memory import sizes_of

    monkeypatch.setattr(qwen, "optimized_attention_masked", attention_pytorch)  # as on a card
    tokens = batch * (width // 16) * (height // 16)
    with bfloat16_by_default(), FakeTensorMode(), LiveBytes("cuda") as live:
        net = fake_net(kind)
        with torch.device("cuda"):
            base = QwenImageTransformer2DModel(num_layers=0)
        inputs = {
            "x": torch.empty(batch, 16, 1, height // 8, width // 8, device="cuda", dtype=torch.bfloat16),
            "timesteps": torch.empty(batch, device="cuda", dtype=torch.bfloat16),
            "context": torch.empty(batch, 512, 3584, device="cuda", dtype=torch.bfloat16),
            "base_model": BorrowedBase(128, (16, 56, 56), base),
        }
        before = live.now
        hint = torch.empty_like(inputs["x"])
        live.reset_peak()
        answer = net.control_model(hint=hint, **inputs)
        held, peak = live.now - before, live.peak - before
        del answer
    planned = sizes_of(net).held_bytes(tokens)
    assert 0.8 * planned < held <= planned
    planned += sizes_of(net).working_bytes(tokens + batch * 512)
    assert 0.7 * planned < peak <= planned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_fun_net_borrows_layers_that_compute_on_stored_weights(
    dtype: torch.dtype, small_pipeline: Path, tmp_path: Path, comfy: Any
) -> None:
    from qwenimage_lowvram.nodes.adapters.borrowed_base import BorrowedBase

    hardware = Hardware.detect(torch.device("cpu"))
    names = write_split_files(small_pipeline, tmp_path, dtype="int8_convrot", outside=True)
    transformer = QwenImageTransformer(
        open_checkpoint(tmp_path / "diffusion_models" / names.transformer),
        dtype=torch.bfloat16,
        hardware=hardware,
        linear=choose_linear(Computing.FAST, [hardware], torch.bfloat16),
    )
    outside, x = transformer.outside, torch.randn(1, 5, 64)
    base = BorrowedBase(16, (4, 6, 6), outside)
    with torch.no_grad():
        made, wanted = base.img_in(x.to(dtype)), outside.img_in(x.bfloat16())
        moment = base.time_text_embed(torch.full((1,), 0.7), x.to(dtype))
    assert isinstance(outside.img_in, StoredLinear)
    assert made.dtype == moment.dtype == dtype
    assert ((made - wanted).norm() / wanted.norm()).item() < (0.02 if dtype != torch.bfloat16 else 1e-9)


def test_conditions_that_comfyui_adds_for_areas_are_planned(model: Any, apply: Apply) -> None:
    """For each area of the positive prompt the negative one is computed too, with the same ControlNet."""
    passes: list[int] = []
    conds = halves(apply, "other")
    control = conds[0][0][1]["control"].control_model
    handle = control.register_forward_hook(lambda *call: passes.append(len(call[2]["x"])), with_kwargs=True)
    asked = []
    together = model.model.calls.run_together
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.model.calls, "run_together", lambda calls: asked.append(len(calls)) or together(calls))
            ksampler(model, *conds, empty_latent())
    finally:
        handle.remove()
    request = model.model.last_report.plan.request
    assert set(asked) == {request.branches} == {5}
    assert len(passes) == 4 * STEPS  # those of the two halves
    half = ksampler(model, *apply(cond(), cond(5, 2), net="other"), empty_latent(64, 64))
    assert half.shape[-1] == 8
    assert request.controls.held_bytes == 2 * model.model.last_report.plan.request.controls.held_bytes


def test_without_guidance_the_negative_prompts_control_is_not_planned(model: Any, apply: Apply) -> None:
    conds = apply(cond(), cond(5, 2), net="other")
    held = []
    for cfg in (3.0, 1.0):
        ksampler(model, *conds, empty_latent(), cfg=cfg)
        held.append(model.model.last_report.plan.request.controls.held_bytes)
    assert held[0] == 2 * held[1] > 0


def test_one_by_one_no_pass_of_a_controlnet_is_larger_than_planned(model: Any, apply: Apply) -> None:
    """ComfyUI would batch prompts of the same length."""
    passes: list[int] = []
    conds = apply(cond(), cond(9, 2))
    control = conds[0][0][1]["control"].control_model
    handle = control.register_forward_hook(lambda *call: passes.append(len(call[2]["x"])), with_kwargs=True)
    try:
        ksampler(one_by_one(model), *conds, empty_latent())
    finally:
        handle.remove()
    assert passes == [1] * 2 * STEPS


def test_a_controlnet_is_named_in_plan_report_and_refusal(
    model: Any, transformer: QwenImageTransformer, apply: Apply, load: Any
) -> None:
    conds = apply(cond(), cond(5, 2))
    request = controlled(model, conds)
    weights = load("union").control_model_wrapped.model_size()
    assert request.controls.weights_bytes == weights
    words = f"(weights {size_text(weights)})"
    report = model.model.last_report
    assert f"ControlNets and model patches {size_text(weights + request.controls.held_bytes)} {words}" in str(
        report.plan
    )
    assert "beside the transformer: ControlNets and model patches" in str(report)
    model.detach()
    fetched = transformer.store.fetched_blocks
    model.model.limit_bytes = least_bytes(transformer.footprint, request) - 1
    with pytest.raises(DoesNotFit, match="no ControlNet and no model patch") as refusal:
        ksampler(model, *conds, empty_latent(*SIZE))
    assert words in str(refusal.value)
    assert transformer.store.fetched_blocks == fetched
    ksampler(model, cond(), cond(5, 2), empty_latent(*SIZE))
    assert model.model.last_report.plan.request.controls == Controls()


def test_memory_that_runs_out_once_changes_no_controlled_image(model: Any, apply: Apply) -> None:
    conds = apply(cond(), cond(5, 2), net="other")

    def sample() -> torch.Tensor:
        model.detach()
        return ksampler(model, *conds, empty_latent(), steps=2)

    expected = sample()
    with FullMemory(0, 0) as memory:
        sample()
    retried = 0
    for point in range(1, memory.operations, memory.operations // 24):
        try:
            with FullMemory(point, 1):
                made = sample()
        except (torch.OutOfMemoryError, DoesNotFit):
            continue  # in ComfyUI's own operations around the run, or in the VAE
        assert torch.equal(made, expected)
        retried += model.model.last_report.out_of_memory
    assert retried > 12


def test_a_controlnet_on_the_card_stays_there_and_is_counted_once(
    load: Any, comfy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management
    from qwenimage_lowvram.nodes.adapters.limits import headroom_bytes, stage_bytes

    card, free, size = torch.device("meta"), 900 << 20, 300 << 20
    patcher = load("union").control_model_wrapped
    monkeypatch.setattr(patcher, "load_device", card)
    monkeypatch.setattr(patcher, "loaded_size", lambda: size)
    asked: list[bool] = []
    monkeypatch.setattr(management.LoadedModel, "model_unload", lambda *_: asked.append(True) or True)
    monkeypatch.setattr(management.LoadedModel, "is_dead", lambda _: False)
    monkeypatch.setattr(management, "current_loaded_models", [management.LoadedModel(patcher)])
    monkeypatch.setattr(
        management, "get_free_memory", lambda *_, torch_free_too=False: (free, 0) if torch_free_too else free
    )
    monkeypatch.setattr(management, "soft_empty_cache", lambda *_: None)
    assert stage_bytes(card, None, 2 << 30, beside=[patcher]) == free + size - headroom_bytes()
    assert stage_bytes(card, 500 << 20, 2 << 30, beside=[patcher]) == 500 << 20
    assert not asked
    assert stage_bytes(card, None, 2 << 30) == free - headroom_bytes()
    assert asked


# what is refused


def test_a_controlnet_for_another_width_is_refused(model: Any, apply: Apply, load: Any) -> None:
    conds = apply(cond(), cond(5, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load("union").control_model, "inner_dim", 3072)
        with pytest.raises(Unsupported, match="3072 wide where the model is 64"):
            ksampler(model, *conds, empty_latent())


def test_a_controlnet_beside_layers_is_refused(apply: Apply) -> None:
    from qwenimage_lowvram.nodes.adapters.controlnets import check_controls

    positive, _ = apply(cond(), cond(5, 2))
    entries = {"positive": [positive[0][1]], "negative": None}
    check_controls(entries, 64, 1)
    with pytest.raises(Unsupported, match="A ControlNet together with layers"):
        check_controls(entries, 64, 3)


def test_a_controlnet_on_another_device_is_refused(model: Any, apply: Apply, load: Any) -> None:
    conds = apply(cond(), cond(5, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load("union").control_model_wrapped, "load_device", torch.device("meta"))
        with pytest.raises(Unsupported, match="QwenImageControlNetModel on meta together with a transformer on cpu"):
            ksampler(model, *conds, empty_latent())


@pytest.mark.parametrize("net", ["union", "fun"])
def test_a_controlnet_that_is_kept_keeps_no_model(net: str, make_transformer: Any, apply: Apply) -> None:
    from qwenimage_lowvram.nodes.adapters.model import make_model

    conds = apply(cond(), cond(5, 2), net=net)
    model = make_model(make_transformer(), None)
    ksampler(model, *conds, empty_latent(), steps=1)
    gone = weakref.ref(model.model.transformer)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert conds[0][0][1]["control"] is not None


def test_a_run_that_fails_leaves_no_model_with_a_controlnet(model: Any, apply: Apply, load: Any) -> None:
    conds = apply(cond(), cond(5, 2), net="fun")
    with FullMemory(400, 10**9), pytest.raises(torch.OutOfMemoryError):
        ksampler(model, *conds, empty_latent())
    assert "base_model" not in conds[0][0][1]["control"].extra_args


def test_a_refused_run_leaves_no_model_and_no_image_with_a_chain(make_transformer: Any, apply: Apply) -> None:
    from qwenimage_lowvram.nodes.adapters import around_runs
    from qwenimage_lowvram.nodes.adapters.controlnets import chain
    from qwenimage_lowvram.nodes.adapters.model import make_model

    conds = apply(*apply(cond(), cond(5, 2), net="fun"), net="other")
    plan, plans = around_runs.plan_sampling, 0

    def refuse_the_second(*args: Any, **options: Any) -> Any:
        nonlocal plans
        plans += 1
        if plans == 2:
            raise DoesNotFit("The VAE has taken the room.", code="test.no_room")
        return plan(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(around_runs, "plan_sampling", refuse_the_second)
        with pytest.raises(DoesNotFit):
            ksampler(model := make_model(make_transformer(), None), *conds, empty_latent())
    for net in chain(conds[0][0][1]["control"]):
        assert net.cond_hint is None
        assert net.extra_args.get("base_model") is None
    gone = weakref.ref(model.model.transformer)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("size", [(14, 22), (14, 6), (18, 18)], ids=str)
@pytest.mark.parametrize("case", ["prompts of different length", "two nets", "a reference", "Fun behind Union"])
def test_a_controlled_image_of_odd_counts_of_patches_is_comfyuis_own(
    case: str, size: tuple[int, int], small_pipeline: Path, native: Any, apply: Apply
) -> None:
    model = our_model(small_pipeline, Variant.QWEN_IMAGE, Positions.COMFYUI)
    both(model, native, CASES[case](apply), {"samples": torch.zeros(1, 16, 1, *size)})
