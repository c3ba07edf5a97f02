"""Plan a whole image, stage by stage, from what three models take. Integers in, an ImagePlan out; imports no torch.

Guarantees: no stage's predicted peak on the device is above the limit, and sampling keeps that of host memory; what is
refused does not fit.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

from ..compute.step_schedules import StepCache
from ..errors import InvalidRequest
from ..texts import size_text
from .branch_split import Card
from .draft import step_bytes
from .footprint import TextEncoderFootprint, Tiles, TransformerFootprint, VAEFootprint
from .forecast import TYPICAL, Speeds, convolution_seconds, forecast_visit
from .memory_plan import MemoryPlan
from .request import NO_CONTROLS, Controls, Limits, PromptTokens, SamplingRequest
from .run_forecast import load_seconds
from .several_cards import plan_on_cards
from .text_encoder import plan_text_encoder, text_encoder_peak_bytes


class Stage(Enum):
    """What happens to an image, in this order."""

    ENCODE = "encode"
    LOAD = "load"
    MODULATION = "modulation"
    SAMPLING = "sampling"
    DECODE = "decode"


@dataclass(frozen=True)
class StagePlan:
    """What a stage holds at its worst moment.

    On the device: weights_bytes that stay there throughout, passing_bytes of buffers that weights pass through and are
    decoded in, activation_bytes of everything else. In host memory: ram_bytes, beside the models as they were opened;
    where the device is the host, device bytes included. seconds: of the first image, nothing of which is in the file
    cache; again_seconds: of another seed. None where no forecast is made.
    """

    stage: Stage
    weights_bytes: int
    passing_bytes: int
    activation_bytes: int
    ram_bytes: int
    seconds: float | None = None
    again_seconds: float | None = None

    @property
    def peak_bytes(self) -> int:
        """On the device."""
        return self.weights_bytes + self.passing_bytes + self.activation_bytes

    def __repr__(self) -> str:
        seconds = "" if self.seconds is None else f", {self.seconds:.1f} s"
        return f"{self.stage.value}: {size_text(self.peak_bytes)}, RAM {size_text(self.ram_bytes)}{seconds}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "stage": self.stage.value, "peak_bytes": self.peak_bytes}


@dataclass(frozen=True)
class ImageRequest:
    """width, height in px. batch: images at a time. guided: with a negative prompt. prompt_tokens: of each prompt,
    without its template. references: images of about a megapixel that an editing model is shown. layers: that each
    image is taken apart into, as Qwen-Image-Layered does; it is shown the image, and makes it once more beside
    them. 0: whole images. step_cache: which steps are computed; None: all. controls: what runs beside the transformer.
    prompts: of the network that makes them."""

    width: int
    height: int
    batch: int
    guided: bool
    steps: int
    prompt_tokens: int
    references: int = 0
    layers: int = 0
    step_cache: StepCache | None = None
    controls: Controls = NO_CONTROLS
    prompts: PromptTokens = field(kw_only=True)

    def __post_init__(self) -> None:
        if min(self.batch, self.steps, self.prompt_tokens) < 1 or self.layers < 0:
            raise InvalidRequest(
                "{request} cannot be made: batch, steps and prompt tokens have to be 1 or more.",
                code="plan.nothing_to_do",
                request=self,
            )
        if self.layers and self.references:
            raise InvalidRequest(
                "{request} cannot be made: no model both edits images and takes them apart. Ask for one of the two.",
                code="plan.edits_and_layers",
                request=self,
            )

    @property
    def frames(self) -> int:
        """Of each image's latent."""
        return self.layers + 1

    @property
    def images(self) -> int:
        """That are decoded."""
        return self.batch * self.frames

    @property
    def sampling(self) -> SamplingRequest:
        branches = self.batch * (2 if self.guided else 1)
        request = SamplingRequest(
            self.width,
            self.height,
            branches,
            self._kept_tokens,
            timesteps=self.steps,
            frames=self.frames,
            controls=self.controls,
            prompts=2 if self.guided else 1,
            step_cache=self.step_cache,
        )
        shown = request.frame_tokens if self.layers else self.references * self.prompts.reference
        return replace(request, reference_tokens=shown)

    @property
    def encoded_tokens(self) -> tuple[int, int]:
        """Of both prompts, as the text encoder sees them; the negative one is encoded even where it is not used."""
        template = self.prompts.before_edit if self.references else self.prompts.before
        return (template + self._kept_tokens + self.references * self.prompts.slots,) * 2

    @property
    def _kept_tokens(self) -> int:
        return self.prompt_tokens + self.prompts.behind + self.references * self.prompts.seen

    def __str__(self) -> str:
        guided = "guided" if self.guided else "without guidance"
        steps = f"{self.steps} step{'s' if self.steps != 1 else ''}"
        shown = f", {self.references} to change" if self.references else ""
        layers = f", {self.layers} layer{'s' if self.layers != 1 else ''}" if self.layers else ""
        return f"{self.width}x{self.height}{shown}{layers}, batch {self.batch}, {guided}, {steps}"


@dataclass(frozen=True)
class ImageModels:
    """The sizes of all that an image passes through."""

    text_encoder: TextEncoderFootprint
    transformer: TransformerFootprint
    vae: VAEFootprint


@dataclass(frozen=True)
class ImagePlan:
    """The stages of an image under given limits. prompt_seconds: of an image with another prompt about the
    same images, after the first."""

    request: ImageRequest
    sampling: MemoryPlan
    tiles: Tiles
    stages: tuple[StagePlan, ...]
    prompt_seconds: float

    @property
    def limits(self) -> Limits:
        return self.sampling.limits

    @property
    def peak_bytes(self) -> int:
        """On the device, of all stages."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def ram_bytes(self) -> int:
        """In host memory, of all stages."""
        return max(stage.ram_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of the first image, everything read from the files for the first time."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def again_seconds(self) -> float:
        """Of the next image, with another seed."""
        return sum(stage.again_seconds or 0.0 for stage in self.stages)

    def stage(self, stage: Stage) -> StagePlan:
        return next(plan for plan in self.stages if plan.stage is stage)

    def __repr__(self) -> str:
        widest = max(self.stages, key=lambda stage: stage.peak_bytes)
        tiles = "whole" if self.tiles.is_whole else f"in {len(self.tiles)} tiles"
        ram = "" if self.limits.ram_bytes is None else f" of {size_text(self.limits.ram_bytes)}"
        return (
            f"ImagePlan({self.request}: peak {size_text(self.peak_bytes)} of {size_text(self.limits.vram_bytes)} in "
            f"{widest.stage.value}, RAM {size_text(self.ram_bytes)}{ram}; {self.sampling.forecast}, "
            f"first image in {self.seconds:.0f} s, another seed in {self.again_seconds:.0f} s, another prompt in "
            f"{self.prompt_seconds:.0f} s; decoded {tiles})"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        forecast = self.sampling.forecast
        return {
            "request": asdict(self.request),
            "limits": asdict(self.limits),
            "stages": [stage.as_dict() for stage in self.stages],
            "resident_blocks": len(self.sampling.resident),
            "held_blocks": len(self.sampling.held),
            "blocks_from_file": self.sampling.from_file,
            "vae_tiles": len(self.tiles),
            "seconds_per_step": forecast.seconds,
            "bound": forecast.bound.value,
            "seconds_first_image": self.seconds,
            "seconds_another_seed": self.again_seconds,
            "seconds_another_prompt": self.prompt_seconds,
            "text": str(self),
        }


def plan_image(
    models: ImageModels,
    request: ImageRequest,
    limits: Limits,
    speeds: Speeds = TYPICAL,
    others: Sequence[Card] = (),
) -> ImagePlan:
    """The plan of an image that is the first one of its models. limits, speeds: of the first device, on which all but
    sampling happens; `others`: further ones. Raises DoesNotFit for the first stage that does not fit, or
    InvalidRequest."""
    sampling = plan_on_cards(models.transformer, request.sampling, limits, speeds, others)
    device_bytes, host = limits.vram_bytes, models.transformer.host
    if host and limits.ram_bytes is not None:
        device_bytes = min(device_bytes, limits.ram_bytes)
    slots = plan_text_encoder(models.text_encoder, request.encoded_tokens, device_bytes)
    kept = models.transformer.outside_bytes
    tiles = models.vae.plan_decode(request.height, request.width, device_bytes - kept - models.vae.weights_bytes)
    encoding = encode_stage(models.text_encoder, request.encoded_tokens, slots, speeds)
    # resident blocks leave for the tiles, and for another prompt, one after another; the weights outside of them stay
    room = device_bytes - kept - models.vae.weights_bytes - tiles.peak_bytes
    stay = _staying(models.transformer, sampling, room)
    stay_encoding = min(stay, _staying(models.transformer, sampling, device_bytes - kept - encoding.peak_bytes))
    kept += stay * models.transformer.resident_block_bytes
    images = request.images * request.width * request.height * models.vae.pixel_bytes
    decoding = models.vae.decode_flops(request.height, request.width, tiles.work) * request.images
    loading, loading_again = (
        load_seconds(models.transformer, len(sampling.resident) - count, speeds) for count in (stay, stay_encoding)
    )
    stages = (
        encoding,
        replace(load_stage(models.transformer, sampling), again_seconds=loading),
        modulation_stage(models.transformer, sampling),
        sampling_stage(models.transformer, sampling),
        decode_stage(
            tiles,
            weights_bytes=kept + models.vae.weights_bytes,
            ram_bytes=images + (kept if host else sampling.ram_peak_bytes - sampling.ring_bytes),
            host=host,
            seconds=convolution_seconds(decoding, speeds),
        ),
    )
    again = sum(stage.again_seconds or 0.0 for stage in stages)
    # what blocks keep of the prompt is made anew in the first step; those that make it in every step are counted there
    made = 1 - sampling.kept.remade / max(1, sampling.kept.blocks)
    anew = made * models.transformer.kept_again_flops(request.sampling) / speeds.flops
    another = again + loading_again - loading + (encoding.seconds or 0.0) + anew
    return ImagePlan(request, sampling, tiles, stages, another)


def _staying(footprint: TransformerFootprint, plan: MemoryPlan, room: int) -> int:
    """How many of the resident blocks have room there."""
    return min(len(plan.resident), max(0, room) // footprint.resident_block_bytes)


def encode_stage(
    footprint: TextEncoderFootprint, lengths: Sequence[int], slots: int, speeds: Speeds | None = None
) -> StagePlan:
    """`lengths`: tokens of each prompt, template included; every layer is read from the file, which kept prompts need
    not. No forecast without `speeds`."""
    peak = text_encoder_peak_bytes(footprint, lengths, slots)
    passing = slots * footprint.slot_bytes + footprint.staging_bytes + footprint.scratch_bytes
    seconds = None
    if speeds is not None:
        seconds = forecast_visit(footprint, footprint.layers, tokens=sum(lengths), slots=slots, speeds=speeds).seconds
    answers = 4 * sum(lengths) * footprint.hidden_size  # fp32
    ram = footprint.ring_bytes + answers + (peak if footprint.host else 0)
    return StagePlan(Stage.ENCODE, 0, passing, peak - passing, ram, seconds, 0.0)


def load_stage(footprint: TransformerFootprint, plan: MemoryPlan) -> StagePlan:
    """Resident blocks come from the file; ControlNets and model patches come as well, and are counted as weights."""
    weights = plan.resident_bytes + plan.request.controls.weights_bytes
    ram = footprint.ring_bytes + (weights if footprint.host else 0)
    return StagePlan(Stage.LOAD, weights, 0, 0, ram, plan.run.load_seconds, 0.0)


def modulation_stage(footprint: TransformerFootprint, plan: MemoryPlan) -> StagePlan:
    """One pass over the modulation weights, for all timesteps of a run; nothing is held in host memory yet."""
    weights = plan.resident_bytes + plan.request.controls.weights_bytes
    passing = plan.modulation_peak_bytes - weights - footprint.row_bytes
    ram = plan.ram_peak_bytes - len(plan.held) * footprint.stored_bytes
    seconds = plan.run.modulation_seconds
    return StagePlan(Stage.MODULATION, weights, passing, footprint.row_bytes, ram, seconds, 0.0)


def sampling_stage(footprint: TransformerFootprint, plan: MemoryPlan) -> StagePlan:
    """All steps. In the first one, blocks that will be held in host memory come from the file too."""
    controls, run = plan.request.controls, plan.run
    weights = plan.resident_bytes + controls.weights_bytes
    activations = step_bytes(footprint, plan.request, plan.activation_bytes)
    return StagePlan(
        Stage.SAMPLING,
        weights,
        plan.sampling_peak_bytes - weights - activations,
        activations,
        plan.ram_peak_bytes,
        run.first_step_seconds + (run.computed - 1) * run.step_seconds,
        run.again_seconds,
    )


def decode_stage(
    tiles: Tiles, *, weights_bytes: int, ram_bytes: int, host: bool, seconds: float | None = None
) -> StagePlan:
    """weights_bytes: of all that lies on the device; ram_bytes: what else than the tiles lies in host memory."""
    ram = ram_bytes + (tiles.peak_bytes if host else 0)
    return StagePlan(Stage.DECODE, weights_bytes, 0, tiles.peak_bytes, ram, seconds, seconds)
