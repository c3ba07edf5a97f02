"""What other nodes reach for in our MODEL works as in ComfyUI's own, or is refused by name: nothing is left out."""

import asyncio
import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwenimage_lowvram.engine.errors import InvalidRequest, Unsupported
from qwenimage_lowvram.engine.models.qwen_image.variants import Variant
from safetensors.torch import load_file
from torch import Tensor, nn

from .conftest import cond, empty_latent
from .test_lora import folder, lora, run, with_lora  # noqa: F401
from .test_model import ksampler
from .test_native_editing import native_model

File = Callable[..., Path]
ATTENTION = "optimized_attention_masked"


@pytest.fixture(scope="module")
def native(small_pipeline: Path, comfy: Any) -> Any:
    return native_model(small_pipeline, Variant.QWEN_IMAGE)


# LoRAs in bypass mode


def bypassed(model: Any, file: Path, strength: float) -> Any:
    import comfy.sd

    with torch.inference_mode(False):
        tensors = {f"diffusion_model.{name}": value for name, value in load_file(file).items()}
    return comfy.sd.load_bypass_lora_for_models(model, None, tensors, strength, 0.0)[0]


@pytest.mark.parametrize("kinds", [("blocks",), ("outside",), ("modulation",), ("blocks", "outside", "modulation")])
def test_a_lora_in_bypass_mode_is_that_of_the_other_loader(kinds: tuple[str, ...], model: Any, lora: File) -> None:  # noqa: F811
    file = lora(*kinds)
    made = run(bypassed(model, file, 0.8))
    assert torch.equal(made, run(with_lora(model, file, 0.8)))
    assert not torch.equal(made, run(model))


def test_two_loras_in_bypass_mode_are_both_there(model: Any, lora: File) -> None:  # noqa: F811
    first, second = lora("blocks"), lora("blocks", seed=1)
    made = run(bypassed(bypassed(model, first, 0.8), second, -0.4))
    assert torch.equal(made, run(with_lora(with_lora(model, first, 0.8), second, -0.4)))


def test_a_lora_in_bypass_mode_makes_the_image_of_comfyuis_own_model(model: Any, native: Any, lora: File) -> None:  # noqa: F811
    file = lora("blocks", "outside")
    ours, theirs = (run(bypassed(m, file, 0.5)) for m in (model, native))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


# what is refused by name, in the node that asks for it


def _compile_by_wrapper_of_another_name(model: Any) -> None:
    def swap(executor: Any, *args: Any, **kwargs: Any) -> Any:
        base = executor.class_obj
        given, base.diffusion_model = base.diffusion_model, nn.Identity()
        try:
            return executor(*args, **kwargs)
        finally:
            base.diffusion_model = given

    model.add_wrapper_with_key("apply_model", "another", swap)


def _compile_blocks(model: Any) -> None:
    blocks = model.get_model_object("diffusion_model").transformer_blocks
    for i, _ in enumerate(blocks):
        model.add_object_patch(f"diffusion_model.transformer_blocks.{i}", nn.Identity())


def _patched_forward(model: Any) -> None:
    attention = model.model.diffusion_model.transformer_blocks[0].attn
    model.add_object_patch("diffusion_model.transformer_blocks.0.attn.forward", lambda *args: attention)


def _inject(model: Any) -> None:
    from comfy.patcher_extension import PatcherInjection

    model.set_injections("mine", [PatcherInjection(lambda patcher: None, lambda patcher: None)])


def _inject_behind_the_back(model: Any) -> None:
    from comfy.patcher_extension import PatcherInjection

    model.injections["mine"] = [PatcherInjection(lambda patcher: None, lambda patcher: None)]


def _forward_of_a_teacache(model: Any) -> None:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.img_in(self.process_img(x)[0])

    network = model.model.diffusion_model
    model.add_callback("on_pre_run", lambda patcher: setattr(network, "_forward", forward.__get__(network)))


def _copy_to_param(model: Any) -> None:
    import comfy.utils

    comfy.utils.copy_to_param(model.model, QUERY, torch.zeros(64, 64))


QUERY = "diffusion_model.transformer_blocks.0.attn.to_q.weight"
REFUSED: dict[str, Callable[[Any], Any]] = {
    "compile under another name": _compile_by_wrapper_of_another_name,
    "compile blocks": _compile_blocks,
    "a whole other module": lambda model: model.add_object_patch("diffusion_model", nn.Identity()),
    "a layer": lambda model: model.add_object_patch("diffusion_model.img_in", nn.Identity()),
    "a forward": _patched_forward,
    "a patch behind the back": lambda model: model.object_patches.update({"diffusion_model.img_in": nn.Identity()}),
    "a dtype": lambda model: model.add_object_patch("manual_cast_dtype", torch.float16),
    "an object": lambda model: model.get_model_object("diffusion_model.transformer_blocks.0"),
    "an injection": _inject,
    "an injection behind the back": _inject_behind_the_back,
    "a hook on a layer": lambda model: model.model.diffusion_model.img_in.register_forward_hook(print),
    "a hook in a block": lambda model: model.model.diffusion_model.transformer_blocks[1].register_forward_hook(print),
    "setting a layer's forward": lambda model: setattr(model.model.diffusion_model.img_in, "forward", print),
    "all modules": lambda model: list(model.model.diffusion_model.named_modules()),
    "all weights": lambda model: next(model.model.diffusion_model.parameters()).device,
    "the number of blocks": lambda model: len(model.model.diffusion_model.transformer_blocks),
    "a method": lambda model: model.model.diffusion_model.process_img,
    "another forward": _forward_of_a_teacache,
    "a copy of the weights": copy.deepcopy,
    "weights in patches": lambda model: model.patches.update({"diffusion_model.img_in.weight": []}),
    "a layer in another's place": lambda model: setattr(model.model.diffusion_model, "img_in", nn.Identity()),
    "other positions": lambda model: setattr(model.model.diffusion_model, "pe_embedder", nn.Identity()),
    "other blocks": lambda model: setattr(model.model.diffusion_model, "transformer_blocks", nn.ModuleList()),
    "another patch size": lambda model: setattr(model.model.diffusion_model, "patch_size", 4),
    "a module's own compile": lambda model: model.model.diffusion_model.compile(backend="eager"),
    "half": lambda model: model.model.diffusion_model.half(),
    "to a dtype": lambda model: model.model.diffusion_model.to(torch.float16),
    "apply": lambda model: model.model.apply(lambda module: None),
    "children": lambda model: list(model.model.diffusion_model.children()),
    "all modules of the whole": lambda model: list(model.model.named_modules()),
    "all weights of the whole": lambda model: list(model.model.parameters()),
    "weights in place": lambda model: [weight.mul_(2) for weight in model.model.state_dict().values()],
    "weights copied over": _copy_to_param,
    "numbers of weights": lambda model: model.model.diffusion_model.state_dict()["img_in.weight"].cpu(),
    "saving weights": lambda model: pickle.dumps(model.model.state_dict()),
    "loading weights": lambda model: model.model.diffusion_model.load_state_dict({}, strict=False),
    "a module by its name": lambda model: model.model.diffusion_model.get_submodule("transformer_blocks.0"),
    "adding a module": lambda model: model.model.diffusion_model.add_module("norm_out", nn.Identity()),
    "a dtype by a method": lambda model: model.add_object_patch("get_dtype_inference", lambda: torch.float16),
    "a dtype behind the back": lambda model: setattr(model.model, "manual_cast_dtype", torch.float16),
    "only part of a weight": lambda model: model.add_patches({(QUERY, (0, 0, 2)): ("diff", (torch.ones(2, 64),))}),
    "a weight by a function": lambda model: model.add_patches({(QUERY, None, torch.neg): ("diff", (torch.ones(1),))}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_reaches_for_modules_is_refused_by_name(case: str, model: Any) -> None:
    guest = model.clone()

    def ask_and_sample() -> None:
        REFUSED[case](guest)
        run(guest)

    with pytest.raises(Unsupported, match="What to do") as refused:
        ask_and_sample()
    assert any(word in str(refused.value) for word in ("diffusion_model", "Compiling", "injects", "dtype", "weights"))
    model.model.diffusion_model.__dict__.pop("_forward", None)
    model.model.manual_cast_dtype = None
    assert torch.isfinite(run(model)).all()


@pytest.mark.parametrize("place", ["method", "attention"])
def test_what_is_replaced_in_comfyuis_own_code_is_named(
    place: str, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.ldm.qwen_image.model as own

    plain = run(model)
    assert "Another pack" not in caplog.text
    where, name = (own.QwenImageTransformer2DModel, "forward") if place == "method" else (own, ATTENTION)
    inner = getattr(where, name)

    @functools.wraps(inner)  # as decorators do, it says that it is ComfyUI's
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return 1.1 * inner(*args, **kwargs)

    monkeypatch.setattr(where, name, replaced)
    assert torch.equal(run(model), plain)
    assert f"Another pack has replaced {'QwenImageTransformer2DModel.forward' if place == 'method' else name}" in (
        caplog.text.replace(f"{own.__name__}.", "")
    )


def test_a_node_may_probe_for_other_models(model: Any, native: Any) -> None:
    for name in ("blocks", "double_blocks", "layers", "params", "dim", "joint_blocks"):
        assert not hasattr(model.model.diffusion_model, name)
        assert not hasattr(native.model.diffusion_model, name)
    for name in ("in_channels", "inner_dim", "patch_size", "dtype"):
        assert getattr(model.model.diffusion_model, name) == getattr(native.model.diffusion_model, name)


def test_a_hook_on_the_whole_model_sees_the_calls_of_comfyuis_own(model: Any, native: Any) -> None:
    made, seen = [], []
    for m in (model, native):
        calls: list[float] = []
        handle = m.model.diffusion_model.register_forward_hook(
            lambda module, args, out, calls=calls: calls.append(float(out.std())) or 1.01 * out
        )
        made.append(ksampler(m, cond(), cond(9, 2), empty_latent()))
        seen.append(calls)
        handle.remove()
    assert (made[0] - made[1]).abs().max() < 1e-4 * made[1].abs().max()
    assert min(seen[0]) > 0
    assert "sees each call" in model.model.last_report.one_by_one


# every node of ComfyUI that takes a MODEL and gives one


@pytest.fixture(scope="module")
def builtin(comfy: Any) -> dict[str, Any]:
    """ComfyUI's own nodes of that kind, by their ids."""
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return {
        name: node
        for name, node in nodes.NODE_CLASS_MAPPINGS.items()
        if "MODEL" in node.RETURN_TYPES and any(spec[0] == "MODEL" for spec in specs(node).values())
    }


def specs(node: Any) -> dict[str, Any]:
    inputs = node.INPUT_TYPES()
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


# of other models, which need weights or conditions of theirs; ComfyUI's own Qwen-Image has no use for them either
OF_OTHER_MODELS = (
    "AnimaLLLiteApply", "ARVideoI2V", "HypernetworkLoader", "LTXVReferenceAudio", "SUPIRApply",
    "TripoSplatSamplingPreview", "USOStyleReference", "WanInfiniteTalkToVideo", "WanUni3CControlnetApply",
    "ZImageFunControlnet",
)  # fmt: skip
# with files of their own: LoRAs here and in test_lora, the DiffSynth ControlNet in test_patches; compilation, which
# takes long, in test_compiling
TESTED_APART = ("LoraLoader", "LoraLoaderModelOnly", "LoraLoaderBypass", "LoraLoaderBypassModelOnly", "LoraModelLoader",
                "QwenImageDiffsynthControlnet", "TorchCompileModel")  # fmt: skip
# values at which a node does something, where its defaults do nothing
TELLING: dict[str, dict[str, Any]] = {
    "CFGNorm": {"strength": 0.7},
    "CFGOverride": {"cfg": 1.5, "start_percent": 0.0, "end_percent": 1.0},
    "EasyCache": {"reuse_threshold": 5.0, "start_percent": 0.0, "end_percent": 1.0},
    "Epsilon Scaling": {"scaling_factor": 1.1},
    "LazyCache": {"reuse_threshold": 5.0, "start_percent": 0.0, "end_percent": 1.0},
    "ModelSamplingFlux": {"max_shift": 3.0, "base_shift": 0.5, "width": 2048, "height": 2048},
    "ModelNoiseScale": {"noise_scale": 1.5},
    "RenormCFG": {"cfg_trunc": 100.0, "renorm_cfg": 0.5},
    "ScaleROPE": {"scale_x": 2.0, "shift_y": 1.0},
    "SkipLayerGuidanceDiT": {"double_layers": "1, 2", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "1, 2", "start_percent": 0.0, "end_percent": 1.0},
    "TemporalScoreRescaling": {"tsr_k": 0.5, "tsr_sigma": 2.0},
    "UNetSelfAttentionMultiply": {"q": 2.0},
    "UNetCrossAttentionMultiply": {"q": 2.0},
}


# they change the image, as on ComfyUI's own model
WORKING = (
    "APG", "CFGNorm", "CFGOverride", "CFGZeroStar", "EasyCache", "Epsilon Scaling", "FreSca", "LatentApplyOperationCFG",
    "LazyCache", "Mahiro", "ModelSamplingAuraFlow", "ModelSamplingFlux", "ModelSamplingLTXV", "ModelSamplingSD3",
    "PerpNeg", "RenormCFG", "RescaleCFG", "SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple", "TCFG",
    "TemporalScoreRescaling", "VideoLinearCFGGuidance", "VideoTriangleCFGGuidance",
)  # fmt: skip
REFUSED_NODES = (
    "FluxKVCache", "HyperTile", "ModelComputeDtype", "ModelMergeQwenImage", "ModelMergeSimple", "NAGuidance",
    "PatchModelAddDownscale", "PerturbedAttentionGuidance", "ScaleROPE", "SelfAttentionGuidance", "TomePatchModel",
)  # fmt: skip


def apply_node(node: Any, name: str, model: Any) -> Any:
    """The MODEL that the node gives, at telling values or its defaults."""
    given: dict[str, Any] = {}
    for key, spec in specs(node).items():
        options = spec[1] if len(spec) > 1 else {}
        kind = spec[0]
        if kind == "MODEL":
            given[key] = model
        elif "default" in options:
            given[key] = options["default"]
        elif kind == "LATENT":
            given[key] = empty_latent()
        elif kind == "CONDITIONING":
            given[key] = cond(7, 5)
        elif kind == "LATENT_OPERATION":
            given[key] = lambda latent, **_: 1.1 * latent
        elif isinstance(kind, list):
            given[key] = kind[0]
        elif options.get("options"):
            given[key] = options["options"][0]
    given |= TELLING.get(name, {})
    work = node.execute if hasattr(node, "define_schema") else getattr(node(), node.FUNCTION)
    result = work(**given)
    return result[list(node.RETURN_TYPES).index("MODEL")]


def outcome(node: Any, name: str, model: Any) -> Tensor | Exception:
    try:
        return ksampler(apply_node(node, name, model), cond(), cond(9, 2), empty_latent())
    except Exception as error:
        return error


def test_every_node_of_comfyui_works_as_on_its_own_model_or_is_refused_by_name(
    builtin: dict[str, Any], model: Any, native: Any
) -> None:
    plain = ksampler(native, cond(), cond(9, 2), empty_latent())
    wrong, found = [], {}
    for name, node in builtin.items():
        if name in (*OF_OTHER_MODELS, *TESTED_APART):
            continue
        ours = outcome(node, name, model)
        if isinstance(ours, Unsupported | InvalidRequest):
            found[name] = "refused"
            continue
        theirs = outcome(node, name, native)
        if isinstance(theirs, Exception):
            found[name] = "fails on ComfyUI's own model"
        elif isinstance(ours, Exception):
            found[name] = wrong.append(f"{name}: {ours!r}") or "fails"
        elif not torch.allclose(ours, theirs, atol=1e-3 * float(theirs.abs().max())):
            found[name] = wrong.append(f"{name}: differs by {(ours - theirs).abs().max()}") or "differs"
        else:
            found[name] = "does nothing to either" if torch.equal(theirs, plain) else "works"
    assert not wrong
    assert {name for name in WORKING if found.get(name) != "works"} == set()
    assert {name for name in REFUSED_NODES if found.get(name) != "refused"} == set()
