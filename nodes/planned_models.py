"""What Memory Plan plans with: the sizes of three models as the loader would open them. Reads headers alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from ..engine.caches.requantized_weights import RequantizedWeights
from ..engine.compute.attention_kernels import FUSED
from ..engine.compute.compilation import CompileSettings
from ..engine.compute.linear_choice import DECODED, Computing, LinearChoice
from ..engine.compute.stored_products import StoredProduct
from ..engine.errors import DoesNotFit, InvalidRequest
from ..engine.files.checkpoint import Checkpoint
from ..engine.hardware import Hardware
from ..engine.lora.lora_file import LoraFile, match_model
from ..engine.lora.weight_patches import lora_patches
from ..engine.models.family import Family
from ..engine.models.transformer_parts import TransformerParts
from ..engine.planning.branch_split import Card as FurtherCard
from ..engine.planning.draft import least_bytes, least_ram_bytes
from ..engine.planning.footprint import TextEncoderFootprint, TransformerFootprint, VAEFootprint
from ..engine.planning.forecast import TYPICAL, Speeds
from ..engine.planning.format_choice import choose_format
from ..engine.planning.request import Limits, PromptTokens
from ..engine.planning.stages import ImageModels, ImageRequest, plan_image
from ..engine.reports.charts import Card
from ..engine.runs.dtype_choice import encoder_dtype
from ..engine.told import Told
from . import devices
from .adapters.attention import planned_attention
from .adapters.known_speeds import known_speeds
from .adapters.limits import free_ram, headroom_bytes
from .adapters.linear_layers import linear_for
from .cache_folder import weight_cache_folder
from .display_names import AUTO
from .dtypes import compute_dtype, transformer_dtype, vae_dtype
from .inputs import at_input
from .sources import Sources
from .weight_cache import AS_STORED, FASTEST, check_weight_format
from .weight_formats import TYPICAL_REQUEST, advice_of, versions_of

# a card with memory of its own, for machines that have none
CARD = Hardware(torch.device("cpu"), streams=False, pinned=False, prefetch=False, host_device=False)


@dataclass(frozen=True)
class PlanSettings:
    """Of the loader's inputs, those that a plan depends on; its values. device: of the transformer."""

    weight_format: str
    dtype: str
    compute: Computing
    compile: bool = False
    variant: str = AUTO
    attention: str = AUTO
    device: str = AUTO


@dataclass(frozen=True)
class _Version:
    """A transformer in one format: as it computes, and on decoded weights, by which formats are chosen."""

    weight_format: str
    footprint: TransformerFootprint
    decoded: TransformerFootprint
    speeds: Speeds | None  # of this machine, where they are known
    speeds_on: Callable[[torch.device], Speeds | None]  # of its further cards


@dataclass(frozen=True)
class PlannedModels:
    """The sizes of three models, read from headers; the transformer's in each format that may be chosen. member: of
    the family, that the transformer is."""

    family: Family
    member: Any
    text_encoder: TextEncoderFootprint
    versions: dict[str, _Version]
    others: dict[str, TransformerFootprint]  # what it could be in, where it stays as stored
    vae: VAEFootprint
    prompts: PromptTokens
    speeds: Speeds | None  # of decoded weights
    model: str  # what a person calls it

    @classmethod
    def open(
        cls, sources: Sources, settings: PlanSettings, layers: int, images: int, loras: Sequence[LoraFile] = ()
    ) -> "PlannedModels":
        """For images in so many layers, and shown so many, of a transformer with these LoRAs. Raises what the loader
        and `match_model` raise, and InvalidRequest."""
        transformer_file, text_file, vae_file = sources.open(settings.variant)
        family = sources.family
        with at_input("weight_format"):
            check_weight_format(transformer_file, settings.weight_format)
        member = sources.member(transformer_file, settings.variant)
        with at_input("layers"):
            _check_layers(transformer_file, member.makes_layers, layers)
        with at_input("reference_pictures"):
            _check_images(transformer_file, family.most_images, images)
        card = _card(settings.device)
        products = transformer_dtype(_choice(settings.dtype, transformer_file, card), transformer_file, card)
        text_dtype = compute_dtype(_choice(settings.dtype, text_file, card), text_file, card.device)
        image_dtype = vae_dtype(_choice(settings.dtype, vae_file, card), vae_file, card.device)

        attending = planned_attention(settings.attention, transformer_file, card, products)

        def parts(version: Checkpoint, linear: LinearChoice = DECODED) -> TransformerParts:
            made = family.parts(version, dtype=products, hardware=card, linear=linear)
            made.attending = attending
            if loras:
                made.patch(lora_patches([(match_model(lora, made), 1.0) for lora in loras]))
            return made

        stored = settings.weight_format in (AUTO, AS_STORED)
        versions = _versions(transformer_file, settings.weight_format)
        return cls(
            family,
            member,
            family.encoder(text_file, dtype=encoder_dtype(text_dtype), hardware=card).footprint,
            {
                name: _version(parts, transformer_file, version, products, card, settings)
                for name, version in versions.items()
            },
            {name: parts(version).footprint for name, version in versions_of(transformer_file).items()}
            if stored
            else {},
            family.empty_vae(vae_file, dtype=image_dtype).footprint,
            family.prompts,
            remembered_speeds(card, products, transformer_file),
            parts(transformer_file).model,
        )

    @property
    def any_footprint(self) -> TransformerFootprint:
        """Of one of the formats: for what they have in common."""
        return next(iter(self.versions.values())).footprint

    @property
    def measured(self) -> bool:
        """Whether forecasts are by this machine's speeds."""
        return all(version.speeds for version in self.versions.values())

    @property
    def speeds_text(self) -> str:
        return "speeds of this machine" if self.measured else "typical speeds (this machine has not been measured yet)"

    @property
    def headroom_bytes(self) -> int:
        """What stays free of a card; as when it runs, that follows the largest block."""
        blocks = [version.footprint.slot_bytes for version in self.versions.values()]
        return headroom_bytes(max(*blocks, self.text_encoder.slot_bytes))

    def free_ram_bytes(self, request: ImageRequest) -> int:
        """What is free now; the least that is needed is granted, as when it runs."""
        least = max(least_ram_bytes(version.footprint, request.sampling) for version in self.versions.values())
        return max(free_ram(), least)

    def card(
        self,
        request: ImageRequest,
        name: str,
        capacity_bytes: int,
        limit_bytes: int,
        ram_bytes: int | None,
        others: Sequence[tuple[torch.device, int]] = (),
        speeds: Speeds | None = None,
    ) -> Card:
        """`others`: this machine's further cards, and what a model may hold there. speeds: of another machine."""
        limits = Limits(limit_bytes, ram_bytes)
        decoded = {name: version.decoded for name, version in self.versions.items()}
        weight_format = next(iter(decoded))
        if len(decoded) > 1:
            weight_format = choose_format(decoded, TYPICAL_REQUEST, limits, speeds or self.speeds or TYPICAL).name
        version = self.versions[weight_format]
        footprint = version.footprint
        if footprint.compiled and limit_bytes < least_bytes(footprint, request.sampling):
            footprint = replace(footprint, compiled="")  # MLPs are then computed in chunks, as when it runs
        models = ImageModels(self.text_encoder, footprint, self.vae)
        speeds = speeds or version.speeds or TYPICAL
        further = [FurtherCard(str(device), limit, version.speeds_on(device) or speeds) for device, limit in others]
        try:
            plan = plan_image(models, request, limits, speeds, further)
        except DoesNotFit as error:
            return Card(name, capacity_bytes, limit_bytes, None, weight_format, error)
        return Card(name, capacity_bytes, limit_bytes, plan, weight_format)

    def held_in(self, weight_format: str) -> str:
        """The numbers that blocks are held in, of a card's weight_format."""
        return self.versions[weight_format].weight_format

    def faster_format(self, limit_bytes: int, ram_bytes: int | None, speeds: Speeds | None = None) -> str:
        """A sentence where another format would be much faster; else an empty text. speeds: of another machine."""
        if len(self.others) < 2:
            return ""
        limits = Limits(limit_bytes, ram_bytes)
        return advice_of(choose_format(self.others, TYPICAL_REQUEST, limits, speeds or self.speeds or TYPICAL))

    def computed(self, request: ImageRequest, cards: Sequence[Card]) -> list[Told]:
        """What is not computed step by step on decoded weights, a line each."""
        plans = [(card.weight_format, card.plan.sampling) for card in cards if card.plan is not None]
        told = [
            Told("{format}: {computing}", code="memory_plan.computed", format=name, computing=plan.computing)
            for name, plan in plans
            if plan.computing
        ]
        told += [
            Told("attention {kernel}", code="memory_plan.attention", kernel=plan.attention)
            for _, plan in plans
            if not plan.attention.startswith(FUSED.name)  # torch's own goes without saying
        ]
        cache = request.step_cache
        if cache is not None:
            not_measured = cache.not_measured(self.model, request.sampling)
            advice = f" {not_measured}" if not_measured else ""
            told.append(
                Told("not exact: {steps}.{advice}", code="memory_plan.step_cache", steps=str(cache), advice=advice)
            )
        return list({str(line): line for line in told}.values())


def remembered_speeds(
    card: Hardware, dtype: torch.dtype, transformer: Checkpoint, product: StoredProduct | None = None
) -> Speeds | None:
    """What this machine is known to do; None where it has no card, or nothing has been measured yet."""
    if card.device.type == "cpu":
        return None
    return known_speeds(card, dtype, transformer.largest_file, product).remembered()


def _card(choice: str) -> Hardware:
    """The one that is chosen, as far as sizes go: nothing is brought there."""
    here = devices.hardware_of(devices.device_of(choice, comfy.model_management.get_torch_device()))
    return CARD if here.host_device else replace(here, streams=False, pinned=False, prefetch=False)


def _choice(dtype: str, file: Checkpoint, card: Hardware) -> str:
    """Of the loader's dtype: auto is, where there is no card here, that of a card of today."""
    if dtype != AUTO or card.device.type != "cpu":
        return dtype
    return "fp32" if file.full_precision else "bf16"


def _version(
    parts_of: Callable[..., TransformerParts],
    source: Checkpoint,
    version: Checkpoint,
    dtype: torch.dtype,
    card: Hardware,
    settings: PlanSettings,
) -> _Version:
    """parts_of: a file, and what its linear layers compute on."""
    decoded = parts = parts_of(version)
    linear = linear_for(settings.compute, version, [card], dtype, as_stored=version is source)
    if linear != DECODED:
        parts = parts_of(version, linear)
    compiled = CompileSettings(exact=settings.compute is not Computing.FAST).kind if settings.compile else ""
    footprint = parts.footprint
    if not footprint.in_half:  # which is not compiled
        footprint = replace(footprint, compiled=compiled)
    product = parts.stored_product

    def speeds_on(device: torch.device) -> Speeds | None:
        return remembered_speeds(devices.hardware_of(device), dtype, source, product)

    speeds = remembered_speeds(card, dtype, source, product)
    return _Version(decoded.weight_format, footprint, decoded.footprint, speeds, speeds_on)


def _check_layers(transformer: Checkpoint, layered: bool, layers: int) -> None:
    """Raise InvalidRequest where the model makes layers and none are asked for, or the other way round."""
    if layered != (layers > 0):
        makes, ask = ("layers", "1 or more") if layered else ("whole images", "0")
        raise InvalidRequest(
            "{file} makes {makes}, but {layers} layers are asked for.\n\nWhat to do: set layers to {needed}.",
            code="plan.wrong_layers",
            file=transformer.path,
            makes=makes,
            layers=layers,
            needed=ask,
        )


def _check_images(transformer: Checkpoint, most: int, images: int) -> None:
    """Raise InvalidRequest for more images than the model is shown."""
    if images > most:
        raise InvalidRequest(
            "{file} can be shown at most {most} images, but {images} are asked for.\n\nWhat to do: set the number of "
            "reference images to {most} or less.",
            code="plan.too_many_images",
            file=transformer.path,
            most=most,
            images=images,
        )


def _versions(source: Checkpoint, weight_format: str) -> dict[str, Checkpoint]:
    if weight_format == FASTEST:
        return versions_of(source)
    if weight_format in (AUTO, AS_STORED):
        return {AS_STORED: source}
    weights = RequantizedWeights.of(source, weight_format, weight_cache_folder())
    return {weight_format: source if weights is None else weights.checkpoint(data_start=0)}
