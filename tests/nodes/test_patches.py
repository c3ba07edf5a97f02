"""Model patches and replaced blocks on our MODEL: against ComfyUI's own model on the same weights, or refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from control_files import write_diffsynth
from live_bytes import LiveBytes
from qwenimage_lowvram.engine.errors import DoesNotFit, Unsupported
from qwenimage_lowvram.engine.files.checkpoint import open_checkpoint
from qwenimage_lowvram.engine.models.qwen_image.transformer import QwenImageTransformer
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from qwenimage_lowvram.engine.planning.draft import least_bytes
from qwenimage_lowvram.engine.planning.request import Controls
from torch._subclasses.fake_tensor import FakeTensorMode

from .conftest import cond, empty_latent
from .test_model import STEPS, ksampler, references
from .test_native_editing import made_image, native_model, our_model
from .test_out_of_memory import FullMemory

Patch = Callable[..., Any]


@pytest.fixture(scope="module")
def native(small_pipeline: Path, comfy: Any) -> Any:
    return native_model(small_pipeline, Variant.QWEN_IMAGE)


@pytest.fixture(scope="module")
def vae(small_pipeline: Path, comfy: Any) -> Any:
    from qwenimage_lowvram.nodes.adapters.vae import make_vae

    return make_vae(open_checkpoint(small_pipeline / "vae"), dtype=torch.float32, limit_bytes=None)


@pytest.fixture(scope="module")
def load(small_pipeline: Path, comfy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """ComfyUI's ModelPatchLoader; it takes the real sizes for granted."""
    import folder_paths
    from comfy_extras import nodes_model_patch

    folder = tmp_path_factory.mktemp("model_patches")
    write_diffsynth(folder / "canny.safetensors", small_pipeline / "transformer")
    write_diffsynth(folder / "inpaint.safetensors", small_pipeline / "transformer", mask_channels=4, seed=31)
    folder_paths.add_model_folder_path("model_patches", str(folder))
    small = partial(nodes_model_patch.QwenImageBlockWiseControlNet, num_layers=4, dim=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes_model_patch, "QwenImageBlockWiseControlNet", small)
        yield lambda name: nodes_model_patch.ModelPatchLoader().load_model_patch(f"{name}.safetensors")[0]


@pytest.fixture
def diffsynth(load: Callable[[str], Any], vae: Any) -> Patch:
    """ComfyUI's 'Apply Qwen Image DiffSynth ControlNet'; the image is of another size than the latents."""

    def patch(model: Any, name: str = "canny", strength: float = 0.7, seed: int = 3, **options: Any) -> Any:
        from comfy_extras.nodes_model_patch import QwenImageDiffsynthControlnet

        image = options.pop("image", made_image(120, 72, seed))
        node = QwenImageDiffsynthControlnet()
        return node.diffsynth_controlnet(model, load(name), vae, image, strength, **options)[0]

    return patch


def _inpaint(patch: Patch, model: Any) -> Any:
    mask = torch.zeros(1, 72, 120)
    mask[:, 20:50, 30:90] = 1
    return patch(model, "inpaint", mask=mask)


CASES: dict[str, tuple[Callable[[Patch, Any], Any], Callable[[], tuple[Any, Any]], int]] = {
    "one": (lambda patch, model: patch(model), lambda: (cond(), cond(5, 2)), 1),
    "prompts of the same length": (lambda patch, model: patch(model), lambda: (cond(), cond(9, 2)), 1),
    "two": (lambda patch, model: patch(patch(model), strength=-0.4, seed=5), lambda: (cond(), cond(5, 2)), 1),
    "inpainting": (_inpaint, lambda: (cond(), cond(5, 2)), 1),
    "a reference": (
        lambda patch, model: patch(model),
        lambda: (cond(reference_latents=references((8, 8))), cond(5, 2)),
        1,
    ),
    "a batch": (lambda patch, model: patch(model), lambda: (cond(), cond(5, 2)), 2),
    "an image for each of a batch": (
        lambda patch, model: patch(model, image=torch.cat([made_image(120, 72, 1), made_image(120, 72, 2)])),
        lambda: (cond(), cond(5, 2)),
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_patched_image_is_that_of_comfyuis_own_model(case: str, model: Any, native: Any, diffsynth: Patch) -> None:
    patch, conds, batch = CASES[case]
    made, wanted = (ksampler(patch(diffsynth, m), *conds(), empty_latent(batch=batch)) for m in (model, native))
    assert (made - wanted).abs().max() < 1e-4
    assert (made - ksampler(model, *conds(), empty_latent(batch=batch))).abs().max() > 0.01
    report = model.model.last_report
    assert report.one_by_one == ""
    assert report.passes == STEPS


@pytest.mark.parametrize("area", [(4, 8, 0, 2), (8, 8, 0, 4)])
def test_a_patch_has_its_image_in_the_size_of_each_area(
    area: tuple[int, ...], model: Any, native: Any, diffsynth: Patch
) -> None:
    conds = cond() + cond(7, 3, area=area), cond(5, 2)
    made, wanted = (ksampler(diffsynth(m), *conds, empty_latent()) for m in (model, native))
    assert (made - wanted).abs().max() < 1e-4
    assert model.model.last_report.one_by_one == ""


@pytest.mark.parametrize(("area", "sizes"), [({}, 1), ({"area": (4, 8, 0, 2)}, 2)])
def test_the_patchs_image_is_encoded_before_the_run(
    area: dict[str, Any], sizes: int, model: Any, vae: Any, diffsynth: Patch
) -> None:
    patched = diffsynth(model)
    when = []
    encode = vae.encode

    def watch(image: torch.Tensor) -> Any:
        when.append(model.model.calls.run is None)
        return encode(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "encode", watch)
        ksampler(patched, cond() + cond(7, 3, **area), cond(5, 2), empty_latent())
    assert when == [True] * sizes


def test_a_model_patch_is_in_the_plan(
    model: Any, transformer: QwenImageTransformer, diffsynth: Patch, load: Any
) -> None:
    import folder_paths
    from qwenimage_lowvram.nodes.adapters.control_sizes import controls_of_files

    patched = diffsynth(model)
    ksampler(patched, cond(), cond(5, 2), empty_latent())
    request = model.model.last_report.plan.request
    assert request.controls.weights_bytes == load("canny").model_size() > 100_000
    assert request.controls.held_bytes > 0
    file = Path(folder_paths.get_full_path_or_raise("model_patches", "canny.safetensors"))
    plain = replace(request, controls=Controls())
    assert controls_of_files([], [file], plain, transformer.footprint, batch=1) == request.controls
    model.detach()
    least = model.model.limit_bytes = least_bytes(transformer.footprint, request)
    expected = ksampler(patched, cond(), cond(5, 2), empty_latent())
    assert model.model.last_report.plan.peak_bytes <= least
    model.model.limit_bytes = least - 1
    with pytest.raises(DoesNotFit, match="no model patch"):
        ksampler(patched, cond(), cond(5, 2), empty_latent())
    model.model.limit_bytes = None
    assert torch.equal(ksampler(patched, cond(), cond(5, 2), empty_latent()), expected)


def test_memory_that_runs_out_once_changes_no_patched_image(model: Any, diffsynth: Patch) -> None:
    patched = diffsynth(model)

    def sample() -> torch.Tensor:
        model.detach()
        result: torch.Tensor = ksampler(patched, cond(), cond(5, 2), empty_latent(), steps=2)
        return result

    expected = sample()
    with FullMemory(0, 0) as memory:
        sample()
    retried = 0
    for point in range(1, memory.operations, memory.operations // 60):
        try:
            with FullMemory(point, 1):
                made = sample()
        except torch.OutOfMemoryError:
            continue  # in ComfyUI's own operations around the run
        assert torch.equal(made, expected)
        retried += model.model.last_report.out_of_memory
    assert retried > 30


# other people's patches and replacements


def _add_a_little(args: dict[str, Any]) -> dict[str, Any]:
    args["img"] = args["img"] + 0.02 * (1 + args["block_index"]) * args["x"].mean()
    args["txt"] = 0.98 * args["txt"]
    return args


def _behind(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_double_block_patch(_add_a_little)
    return clone


def _instead(model: Any) -> Any:
    def halfway(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args)
        weight = args["vec"].mean() * 0.1 + args["pe"].mean()
        return {"img": (args["img"] + out["img"]) / 2 + weight, "txt": out["txt"]}

    clone = model.clone()
    clone.set_model_patch_replace(halfway, "dit", "double_block", 1)
    return clone


def _skip_layers(model: Any) -> Any:
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1,2", "1,2", 0.0)[0]


def _skip_layers_simple(model: Any) -> Any:
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple

    return SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, "1,2", "1,2")[0]


@pytest.mark.parametrize("variant", [Variant.QWEN_IMAGE, Variant.EDIT_2511], ids=lambda variant: variant.value)
@pytest.mark.parametrize("patch", [_behind, _instead, _skip_layers, _skip_layers_simple])
def test_what_is_done_around_blocks_is_done_as_comfyuis_own_model_does_it(
    patch: Callable[[Any], Any], variant: Variant, small_pipeline: Path
) -> None:
    conds = cond(reference_latents=references((8, 8))), cond(5, 2, reference_latents=references((8, 8)))
    ours = our_model(small_pipeline, variant)
    made, wanted = (
        ksampler(patch(model), *conds, empty_latent(batch=2)) for model in (ours, native_model(small_pipeline, variant))
    )
    assert (made - wanted).abs().max() < 1e-4
    assert (made - ksampler(ours, *conds, empty_latent(batch=2))).abs().max() > 0.01


def test_a_patch_that_may_keep_something_sees_one_call_after_another(model: Any) -> None:
    seen = []

    def watch(args: dict[str, Any]) -> dict[str, Any]:
        seen.append(args["block_index"])
        return args

    clone = model.clone()
    clone.set_model_double_block_patch(watch)
    ksampler(clone, cond(), cond(5, 2), empty_latent())
    assert seen == 2 * STEPS * [0, 1, 2, 3]
    assert "watch sees each call" in model.model.last_report.one_by_one


@pytest.mark.parametrize("name", ["vec", "pe"])
def test_what_a_block_does_not_take_from_others_is_refused(model: Any, name: str) -> None:
    def change(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return extra["original_block"](args | {name: 2 * args[name]})

    clone = model.clone()
    clone.set_model_patch_replace(change, "dit", "double_block", 1)
    with pytest.raises(Unsupported, match="A node that changes"):
        ksampler(clone, cond(), cond(5, 2), empty_latent())


def test_a_patch_of_the_real_size_takes_what_is_planned(comfy: Any) -> None:
    import comfy.ops
    from comfy_extras.nodes_model_patch import DiffSynthCnetPatch, QwenImageBlockWiseControlNet
    from qwenimage_lowvram.nodes.adapters.control_sizes import PATCH_WIDTHS

    with FakeTensorMode(), LiveBytes("cuda") as live:
        with torch.device("cuda"):
            blocks = QwenImageBlockWiseControlNet(num_layers=1, dim=3072, operations=comfy.ops.manual_cast)
        patch = DiffSynthCnetPatch.__new__(DiffSynthCnetPatch)
        patch.model_patch, patch.vae, patch.strength = SimpleNamespace(model=blocks), SimpleNamespace(), 0.7
        patch.vae.spacial_compression_encode = lambda: 8
        patch.encoded_image, patch.encoded_image_size = torch.empty(1, 6889, 3072, device="cuda"), (1328, 1328)
        x = torch.empty(1, 16, 1, 166, 166, device="cuda")
        img = torch.empty(1, 6889, 3072, device="cuda", dtype=torch.bfloat16)
        before = live.now
        live.reset_peak()
        patch({"x": x, "img": img, "block_index": 0})
        taken = live.peak - before
    planned = (PATCH_WIDTHS * 6889 + 3072) * 3072 * 2
    assert 0.7 * planned < taken <= planned
