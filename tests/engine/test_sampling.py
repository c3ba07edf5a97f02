"""Schedule, guidance and packing are the reference pipeline's own."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from qwenimage_lowvram.engine.errors import InvalidRequest
from qwenimage_lowvram.engine.models.qwen_image.latents import pack, patch_norm, patches_of, shape_in_patches, unpack
from qwenimage_lowvram.engine.models.qwen_image.schedule import layered_sigmas, lightning_sigmas, qwen_sigmas, true_cfg

# Qwen-Image's scheduler_config.json
SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 8192, "max_shift": 0.9,
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "stochastic_sampling": False,
    "time_shift_type": "exponential", "use_beta_sigmas": False, "use_dynamic_shifting": True,
    "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip
SIZES = [(1328, 1328), (1664, 928), (928, 1664), (1024, 1024), (512, 512), (2048, 2048), (16, 16)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_sigmas(steps: int, tokens: int) -> torch.Tensor:
    """As QwenImagePipeline.__call__ sets its scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", [2, 4, 20, 50])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_sigmas_are_the_reference_schedulers(width: int, height: int, steps: int) -> None:
    tokens = (width // 16) * (height // 16)
    sigmas = qwen_sigmas(steps, tokens)
    assert sigmas.dtype is torch.float32
    assert sigmas.shape == (steps + 1,)
    # the reference rounds to fp32 in every step of its arithmetic
    assert (sigmas - reference_sigmas(steps, tokens)).abs().max() <= torch.finfo(torch.float32).eps
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize(("side", "shift"), [(640, 2.5), (1024, 4.0), (256, 1.0)])
def test_sigmas_for_layers_are_those_of_the_reference_pipelines_mu(side: int, shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER | {"time_shift_type": "linear", "shift_terminal": None})
    times = np.linspace(1.0, 0, steps + 1)[:-1]  # as QwenImageLayeredPipeline.__call__ has them
    scheduler.set_timesteps(sigmas=times, mu=shift)
    sigmas = layered_sigmas(steps, (side // 16) ** 2)
    assert (sigmas - scheduler.sigmas).abs().max() <= torch.finfo(torch.float32).eps
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lightning_sigmas_are_its_own_schedulers(steps: int, comfy: ModuleType) -> None:
    import comfy.samplers

    # https://github.com/ModelTC/Qwen-Image-Lightning: both shifts log 3, nothing at the end
    shift = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER | shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), mu=math.log(3))
    sigmas = lightning_sigmas(steps)
    assert sigmas.shape == (steps + 1,)
    assert (sigmas - scheduler.sigmas).abs().max() <= 2 * torch.finfo(torch.float32).eps
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=3.0)
    assert (sigmas - comfy.samplers.calculate_sigmas(sampling, "simple", steps)).abs().max() < 1e-6


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_one_step_goes_from_noise_to_image(width: int, height: int) -> None:
    # the reference divides zero by zero there
    assert qwen_sigmas(1, (width // 16) * (height // 16)).tolist() == [1, 0]


@pytest.mark.parametrize("denoise", [1.0, 0.99, 0.75, 0.5, 0.31, 0.1, 0.01])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_denoise_means_what_it_does_in_comfyui(steps: int, denoise: float, comfy: ModuleType) -> None:
    import comfy.samplers

    class Recorder(comfy.samplers.KSampler):
        """ComfyUI's own sampler settings, with our schedule in the place of one of its own."""

        def calculate_sigmas(self, steps: int) -> torch.Tensor:
            return qwen_sigmas(steps, 4096)

    sampler = Recorder.__new__(Recorder)
    sampler.device = torch.device("cpu")
    sampler.set_steps(steps, denoise)
    ours = qwen_sigmas(steps, 4096, denoise=denoise)
    assert torch.equal(ours, sampler.sigmas)
    assert ours.shape == (steps + 1,)


@pytest.mark.parametrize(("steps", "denoise"), [(0, 1.0), (-1, 1.0), (20, 0.0), (20, -0.5)])
def test_no_steps_are_refused(steps: int, denoise: float) -> None:
    with pytest.raises(InvalidRequest, match=r"steps|denoise"):
        qwen_sigmas(steps, 4096, denoise=denoise)


@pytest.mark.parametrize("scale", [1.0, 2.5, 4.0])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (14, 6)])
def test_guidance_is_the_pipelines_formula_on_its_tokens(height: int, width: int, scale: float) -> None:
    cond, uncond = random(2, 16, 1, height, width), random(2, 16, 1, height, width, seed=1)
    # QwenImagePipeline.__call__, on packed tokens
    noise_pred, neg_noise_pred = pack(cond), pack(uncond)
    comb_pred = neg_noise_pred + scale * (noise_pred - neg_noise_pred)
    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
    wanted = unpack(comb_pred * (cond_norm / noise_norm), height, width)
    assert torch.allclose(true_cfg(cond, uncond, scale, rescale=True), wanted, atol=2e-6, rtol=1e-6)
    assert torch.equal(true_cfg(cond, uncond, scale, rescale=False), unpack(comb_pred, height, width))


def test_rescaled_guidance_does_not_change_with_the_scale_of_both() -> None:
    cond, uncond = random(1, 16, 1, 8, 8), random(1, 16, 1, 8, 8, seed=1)
    plain = true_cfg(cond, uncond, 4.0, rescale=True)
    scaled = true_cfg(cond * 0.25, uncond * 0.25, 4.0, rescale=True)
    assert torch.allclose(scaled, plain * 0.25, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (166, 166), (2, 2)])
def test_packing_is_the_pipelines_and_unpacking_its_inverse(height: int, width: int, batch: int) -> None:
    latents = random(batch, 16, 1, height, width)
    tokens = pack(latents)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, batch, 16, height, width))
    assert torch.equal(unpack(tokens, height, width), latents)
    theirs = QwenImagePipeline._unpack_latents(tokens, height * 8, width * 8, 8)
    assert torch.equal(unpack(tokens, height, width), theirs)
    assert shape_in_patches(latents) == (1, height // 2, width // 2)


def test_the_norm_of_a_patch_is_that_of_its_token() -> None:
    latents = random(2, 16, 1, 8, 12)
    norms = pack(latents).norm(dim=-1)  # (B, N)
    wanted = unpack(norms[..., None].expand(-1, -1, 4).contiguous(), 8, 12)
    assert torch.allclose(patch_norm(latents), wanted, rtol=1e-6)
    assert torch.equal(patch_norm(latents[..., :6, :10]), patch_norm(latents)[..., :6, :10])
    cut = latents[..., :7, :11].clone()
    latents[..., 7, :] = latents[..., 11] = 0
    assert torch.equal(patch_norm(cut), patch_norm(latents)[..., :7, :11])


def test_patches_cover_latents_of_any_size() -> None:
    assert patches_of(torch.empty(1, 16, 3, 7, 12)) == patches_of(torch.Size([8, 11])) == (4, 6)
