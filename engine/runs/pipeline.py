"""A whole image without ComfyUI, also of images to change: opens a model's files, and encodes, samples and decodes
within limits.

with Pipeline.open(Path("models/Qwen-Image"), vram_limit_bytes=4 * GIB) as pipeline:
    images = pipeline.make("a cat that holds a sign", width=1328, height=1328, seed=1)
    print(pipeline.report)
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..caches.prompt_cache import PromptCache
from ..compute.attention_choice import AUTO, CHOICES, choose_attention
from ..compute.compilation import CompileSettings
from ..compute.context_parallel import Ranks
from ..compute.linear_choice import Computing, linear_of
from ..compute.step_schedules import OFF, StepCache, step_cache_of
from ..errors import InvalidRequest, Unsupported
from ..files.checkpoint import Checkpoint
from ..hardware import FLOATS, Hardware
from ..lora.lora_file import match_model, open_lora
from ..lora.weight_patches import lora_patches
from ..models.shown_images import NONE_SHOWN, ShownImages
from ..planning.request import GIB
from ..reports.image_report import ImageReport
from ..reports.memory_report import MemoryReport
from .decode import VaeRun
from .devices import best_device, computes_bf16, device_name
from .dtype_choice import auto_dtype, encoder_dtype, half_is_faster
from .encode import EncodeRun
from .known_speeds import KnownSpeeds
from .known_trials import KnownTrials
from .limit import Limit
from .opened_files import OpenedFiles
from .ranks import together
from .sample import EulerSampler
from .surroundings import Alone
from .timeline import Timeline

__all__ = ["GIB", "Pipeline"]


class Pipeline:
    """One model on one device, for whole images of prompts.

    Guarantees: each stage keeps the limits, and what does not fit is refused before anything is loaded; the image is
    that of the nodes, and of a card with room for everything. Between images, blocks stay on the device as far as the
    limit allows; `close` gives them back.
    """

    def __init__(
        self,
        files: OpenedFiles,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vram_limit_bytes: int | None = None,
        ram_limit_bytes: int | None = None,
        cache: Path | None = None,
        on_progress: Callable[[Mapping[str, Any]], None] = lambda progress: None,
        check: Callable[[], None] = lambda: None,
        attention: str = AUTO,
        compute: str = Computing.EXACT.value,
        compile: bool = False,
        loras: Sequence[tuple[Path, float]] = (),
        ranks: Ranks | None = None,
        **of_network: Any,
    ) -> None:
        """Reads headers, the tokenizer, the VAE and the transformer's weights outside of its blocks.

        device None: the first card, else the CPU. dtype None: bf16 where the device has it and the file is not in fp32;
        fp16: of the transformer's products, with activations in fp32, and of the VAE. A limit of None: what is free.
        cache: a folder for encoded prompts and measured speeds; None keeps neither. on_progress: told a few times a
        second what is done, as `Surroundings.tell` has it. check: called before each block and tile, and may raise,
        which ends the run. attention: the transformer's kernel, of `attention_choice.CHOICES`. compute: on what the
        transformer's linear layers compute, a value of `linear_choice.Computing`. compile: blocks by code that
        torch.compile makes once, which has to compute the same bits unless compute is "fast". loras: files and their
        strengths, in order. ranks: the processes that make each image together, of which this is one, on the device of
        theirs. of_network: what the family's transformer takes beside these. Raises Unsupported for a kernel that does
        not work here, and where the processes cannot share an image of this model.
        """
        if ranks is not None:
            files.family.require_ranks(files.transformer, files.variant, ranks.count)
            if compile:
                raise Unsupported(
                    "Compiled blocks cannot exchange tokens with other processes.\n\nWhat to do: leave compile off.",
                    code="ranks.compiled",
                )
            device, of_network = ranks.device, {**of_network, "ranks": ranks}
        self._ranks = ranks
        if dtype is not None and dtype not in FLOATS:
            raise InvalidRequest(
                "dtype is {dtype!r}; torch.bfloat16, torch.float16 or torch.float32 is needed, or None.",
                code="run.wrong_dtype",
                dtype=str(dtype),
            )
        if attention not in CHOICES:
            raise InvalidRequest(
                "attention is {attention!r}; it must be one of {choices}.",
                code="run.wrong_attention",
                attention=str(attention),
                choices=list(CHOICES),
            )
        if compute not in {computing.value for computing in Computing}:
            raise InvalidRequest(
                "compute is {compute!r}; it must be one of {choices}.",
                code="run.wrong_compute",
                compute=str(compute),
                choices=[computing.value for computing in Computing],
            )
        self._device = best_device() if device is None else torch.device(device)
        self._hardware = hardware = Hardware.detect(self._device)
        # the host has one memory, which both bound
        ram_too = {"ram_limit_bytes": ram_limit_bytes} if hardware.host_device else {}
        self._limit, self._ram_limit = _tightest(vram_limit_bytes=vram_limit_bytes, **ram_too), ram_limit_bytes
        self._dtype = dtype
        self._cache = cache
        self._chosen = {
            "model": f"of {files.transformer.largest_file.stat().st_size} bytes",
            "list of LoRAs": [(file.stat().st_size, strength) for file, strength in loras],
        }
        dtypes = [
            encoder_dtype(self._dtype_of(files.text_encoder)),
            self._dtype_of_transformer(files.transformer),
            self._dtype_of(files.vae),
        ]
        family = files.family
        self._member: Any = files.variant
        self._images_of = family.from_prompts
        self._tokenizer = family.tokenizer(files.tokenizer)
        self._encoder = family.encoder(files.text_encoder, dtype=dtypes[0], hardware=hardware)
        self._transformer = family.open(
            files.transformer,
            dtype=dtypes[1],
            hardware=hardware,
            variant=files.variant,
            linear=linear_of(Computing(compute), files.transformer, [hardware], dtypes[1]),
            **of_network,
        )
        self._transformer.patch(
            lora_patches([(match_model(open_lora(file), self._transformer), strength) for file, strength in loras])
        )
        if compile:
            self._transformer.compile_by(CompileSettings(exact=self._transformer.exact))
        tried = self._trials("attention.json")
        self._transformer.attend_by(choose_attention(attention, [hardware], dtypes[1], tried=tried))
        self._vae = family.read_vae(files.vae, dtypes[2])
        self._kept = None if cache is None else PromptCache(cache / "prompts")
        self._speeds = KnownSpeeds(
            hardware,
            dtypes[1],
            files.transformer.largest_file,
            file=None if cache is None else cache / "speeds.json",
            device_name=device_name(self._device),
            product=self._transformer.stored_product,
        )
        self._on_progress, self._check = on_progress, check
        self._images = 0
        self._sampling: MemoryReport | None = None
        self.timeline = Timeline(lambda: self._images)

    @classmethod
    def open(cls, folder: Path, **settings: Any) -> "Pipeline":
        """Of a pipeline folder; settings as above. Of single files: `Pipeline(OpenedFiles.of(...))`."""
        return cls(OpenedFiles.of_folder(folder), **settings)

    def make(self, prompt: str, negative: str = " ", **settings: Any) -> Tensor:
        """(batch, height, width, 3) in fp32, 0 to 1. settings, and what is raised: of `make_latents`. Of several
        processes each would decode."""
        return self.decode(self.make_latents(prompt, negative, **settings))

    def make_latents(
        self,
        prompt: str,
        negative: str = " ",
        *,
        width: int,
        height: int,
        seed: int,
        steps: int = 20,
        cfg: float = 4.0,
        batch: int = 1,
        step_cache: str | StepCache = OFF,
        images: Sequence[Tensor] = (),
        megapixels: float = 1.0,
    ) -> Tensor:
        """What `decode` then makes an image of. cfg 1: without the negative prompt, which halves the computing.
        step_cache: of `step_schedules.STEP_CACHES`, or a table; all but "off" make another image than all steps do.
        images, megapixels: to change, as `show` takes them. Of several processes each calls it with the same, and has
        the whole: one of them decodes.

        Raises InvalidRequest and DoesNotFit.
        """
        self._images += 1  # whatever an image before this one came to
        self._require_size(width, height, batch)
        self._vae_run().require_decodes(height, width)  # before minutes are spent on sampling
        if (schedule := step_cache_of(step_cache)) is not None:
            schedule.require_steps(steps)
        shown = self.show(images, width=width, height=height, megapixels=megapixels) if images else NONE_SHOWN
        prompts = self.encode([prompt, negative] if cfg > 1 else [prompt], shown)
        size = {"width": width, "height": height, "seed": seed, "steps": steps, "batch": batch}
        return self.sample(prompts, **size, cfg=cfg, step_cache=step_cache, shown=shown)

    def show(self, images: Sequence[Tensor], *, width: int, height: int, megapixels: float = 1.0) -> ShownImages:
        """Images (1, H, W, 3) in 0..1, one to three, of which one of that size in px is to be made; each is shown in so
        many megapixels, 0: in its own. Of the node Encode Edit Prompt the same.

        Raises InvalidRequest, DoesNotFit, and Unsupported for a model that is not shown images here.
        """
        shown = self._images_of.show(images, self._member, (width, height), megapixels)
        try:
            raw = [self._vae_run().encode(pixels, out_device=torch.device("cpu")) for pixels in shown.pixels]
        finally:
            self._move_vae(torch.device("cpu"))
        return replace(shown, latents=tuple(self._images_of.normalised(latent) for latent in raw))

    def encode(self, prompts: Sequence[str], shown: ShownImages = NONE_SHOWN) -> list[Tensor]:
        """(1, length, dim) in fp32 on the host, of each prompt about what is `shown`; all in one visit of the text
        encoder. Raises InvalidRequest for an Edit model that is shown nothing."""
        if self._member.needs_images and not shown.in_prompts:
            raise InvalidRequest(
                "{variant} changes images, but none was given. Give it images, or use Qwen-Image or Qwen-Image-2512.",
                code="run.needs_an_image",
                variant=self._member.value,
            )
        run = EncodeRun(self._encoder, self._tokenizer, self.timeline, self._beside(), self._limit, self._kept)
        return run.encode([self._images_of.prompt(self._tokenizer, prompt, shown) for prompt in prompts])

    def sample(
        self,
        prompts: Sequence[Tensor],
        *,
        width: int,
        height: int,
        seed: int,
        steps: int = 20,
        cfg: float = 4.0,
        batch: int = 1,
        step_cache: str | StepCache = OFF,
        shown: ShownImages = NONE_SHOWN,
    ) -> Tensor:
        """Latents of the family's shape in fp32 on the host, by the reference's schedule; prompts: what `encode` gave,
        the positive one and, where cfg is above 1, the negative one; shown: what `show` did."""
        self._require_size(width, height, batch)
        cache = step_cache_of(step_cache)
        asked = {
            **self._chosen,
            "attention kernel": self._kernel,
            "number of prompts or tokens": [prompt.shape[1] for prompt in prompts],
            "size, or batch": (width, height, batch),
            "list of images": [image.digest for image in shown.in_prompts],
            "size of images": [list(latent.shape) for latent in shown.latents],
            "seed": seed,
            "number of steps": steps,
            "cfg": cfg,
            "step_cache": cache,
        }
        images = self._images_of
        noise = torch.randn(images.noise_shape(batch, width, height), generator=torch.Generator().manual_seed(seed))
        run = EulerSampler(
            self._transformer,
            images,
            self._speeds,
            self.timeline,
            Alone(self._transformer, (), self._on_progress, self._check),
            self._limit,
            self._ram_limit,
            cache,
            shown.latents,
        )
        with together(self._ranks, asked, cache):
            sampled = run.sample(prompts, noise, images.sigmas(self._transformer, steps, noise), cfg=cfg)
            self._sampling = sampled.report
        return sampled.latents

    def decode(self, latents: Tensor) -> Tensor:
        """(batch, height, width, 3) in fp32, 0 to 1, on the host. Ends the image: the report begins anew after it."""
        try:
            return self._vae_run().decode(latents, out_device=torch.device("cpu"))
        finally:
            self._move_vae(torch.device("cpu"))
            self._images += 1

    @property
    def report(self) -> ImageReport:
        """What the last image took, stage by stage, beside what was planned. Prints itself."""
        machine = {
            "device": device_name(self._device),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        return ImageReport(self.timeline.reports, self._sampling, machine)

    def close(self) -> None:
        """Give back what stays on the device and in host memory between images."""
        self._transformer.unload()
        self._transformer.store.leave_host()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _beside(self) -> Alone:
        """Of stages whose model leaves the device: the transformer's resident blocks may have to."""
        return Alone(None, (self._transformer,), self._on_progress, self._check)

    def _vae_run(self) -> VaeRun:
        return VaeRun(
            self._vae,
            self._hardware,
            lambda room: self._move_vae(self._device),
            timeline=self.timeline,
            surroundings=self._beside(),
            limit=self._limit,
        )

    def _move_vae(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._vae.to(device)

    def _dtype_of(self, file: Checkpoint) -> torch.dtype:
        if self._dtype is not None:
            return self._dtype
        return torch.float32 if file.full_precision or not computes_bf16(self._device) else torch.bfloat16

    def _dtype_of_transformer(self, file: Checkpoint) -> torch.dtype:
        if self._dtype is not None:
            return self._dtype
        return auto_dtype(
            file,
            has_bf16=computes_bf16(self._device),
            device=self._device,
            half_is_faster=lambda: half_is_faster(
                self._hardware, device_name(self._device), self._trials("products.json")
            ),
        )

    def _trials(self, name: str) -> KnownTrials:
        return KnownTrials(None if self._cache is None else self._cache / name)

    @property
    def _kernel(self) -> str:
        """By which the blocks attend: of torch's variants, whichever works on the device."""
        attending = self._transformer.attending
        own = attending is None or attending.attend is None
        return "torch's own" if own else self._transformer.attention.name

    def _require_size(self, width: int, height: int, batch: int) -> None:
        side_px = self._images_of.side_px
        if width % side_px or height % side_px or min(width, height, batch) < 1:
            raise InvalidRequest(
                "{batch} images of {width}x{height} px cannot be made. Use a batch of 1 or more, and a width and a "
                "height that are multiples of {side_px}.",
                code="run.wrong_size",
                batch=batch,
                width=width,
                height=height,
                side_px=side_px,
            )


def _tightest(**limits: int | None) -> Limit:
    """Of several limits of one memory, by their names."""
    given = {name: nbytes for name, nbytes in limits.items() if nbytes is not None}
    name = min(given, key=lambda name: given[name], default=next(iter(limits)))
    return Limit(given.get(name), name)
