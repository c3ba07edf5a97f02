"""What is asked for and what is allowed: the values that a plan is made from. Imports no torch."""

from dataclasses import dataclass, replace
from math import ceil

from ..compute.link import TYPICAL_LINK, Link
from ..compute.step_schedules import StepCache
from ..errors import InvalidRequest
from ..texts import size_text

GIB = 1024**3
TOKEN_PX = 16  # of most models: a token is 2x2 latent pixels of 8x8 image pixels


@dataclass(frozen=True)
class Limits:
    """The most that may be held on the device, and in host memory beside what the process had before.

    Where the device is the host, both bound the same memory. ram_bytes None: as much as there are weights.
    """

    vram_bytes: int
    ram_bytes: int | None = None

    def __str__(self) -> str:
        ram = "" if self.ram_bytes is None else f" and {size_text(self.ram_bytes)} of RAM"
        return f"{size_text(self.vram_bytes)}{ram}"


@dataclass(frozen=True)
class Controls:
    """What ControlNets and model patches take on the device beside the transformer, in bytes.

    weights_bytes: stay there for the whole run. held_bytes: what they hand to the blocks, kept while those are visited.
    working_bytes: their own pass at its widest, made before the blocks are visited; fixed_bytes: of it, whatever the
    image's size. images: how many are made at a time.
    """

    weights_bytes: int = 0
    held_bytes: int = 0
    working_bytes: int = 0
    fixed_bytes: int = 0
    images: int = 1

    def __bool__(self) -> bool:
        return bool(self.weights_bytes or self.held_bytes or self.working_bytes)

    def scaled(self, part: float) -> "Controls":
        """For this part of the tokens."""
        working = self.fixed_bytes + ceil((self.working_bytes - self.fixed_bytes) * part)
        return replace(self, held_bytes=ceil(self.held_bytes * part), working_bytes=working)

    def __str__(self) -> str:
        return (
            f"ControlNets and model patches {size_text(self.weights_bytes + self.held_bytes)} "
            f"(weights {size_text(self.weights_bytes)})"
        )


NO_CONTROLS = Controls()


@dataclass(frozen=True)
class PromptTokens:
    """What a network's prompts have beside a person's words, in tokens.

    before: of the template, dropped after encoding; before_edit: of the template for images to change; behind: of
    both, kept. reference: of an image to change, for the transformer; seen: of the same in the prompt; slots: of it,
    too, but dropped after encoding.
    """

    before: int
    behind: int
    before_edit: int
    reference: int
    seen: int
    slots: int = 0


@dataclass(frozen=True)
class SamplingRequest:
    """What one step has to compute.

    width, height: of the image in px. branches: prompts times images that run through a block in turn.
    prompt_tokens: of the longest prompt. reference_tokens: of all reference images of a branch together.
    timesteps: how many the run has. frames: of the image's latent; one more than the layers it is taken apart into.
    controls: what runs beside the transformer, for this size and batch. token_px: pixels that a token covers along
    each side. prompts: how many different ones the branches have, 0: each its own. step_cache: which steps are
    computed; None: all. ranks: processes that make the image together, each on a part of its tokens, which they
    exchange over `link`. beside: further branches, which other devices compute at the same time.
    """

    width: int
    height: int
    branches: int
    prompt_tokens: int
    reference_tokens: int = 0
    timesteps: int = 50
    frames: int = 1
    controls: Controls = NO_CONTROLS
    token_px: int = TOKEN_PX
    prompts: int = 0
    step_cache: StepCache | None = None
    ranks: int = 1
    beside: int = 0
    link: Link = TYPICAL_LINK

    def __post_init__(self) -> None:
        if self.step_cache is not None:
            self.step_cache.require_steps(self.timesteps)
        step = self.token_px
        if self.width % step or self.height % step or min(self.width, self.height) < step:
            nearest = [max(step, round(n / step) * step) for n in (self.width, self.height)]
            raise InvalidRequest(
                "An image of {width}x{height} px cannot be made: width and height must be multiples of {step}. Use "
                "{near_width}x{near_height}.",
                code="plan.wrong_size",
                width=self.width,
                height=self.height,
                step=step,
                near_width=nearest[0],
                near_height=nearest[1],
            )

    @property
    def frame_tokens(self) -> int:
        return (self.width // self.token_px) * (self.height // self.token_px)

    @property
    def image_tokens(self) -> int:
        return self.frames * self.frame_tokens + self.reference_tokens

    @property
    def computed_steps(self) -> int:
        """At the most."""
        return self.timesteps if self.step_cache is None else self.step_cache.most_computed(self.timesteps)

    @property
    def distinct_prompts(self) -> int:
        return min(self.prompts, self.branches) or self.branches

    def with_branches(self, branches: int) -> "SamplingRequest":
        """The same with fewer images, or without guidance."""
        prompts = max(1, self.branches // self.controls.images)
        part = ceil(branches / prompts) / self.controls.images
        return replace(self, branches=branches, controls=self.controls.scaled(part))

    def with_those_beside(self) -> "SamplingRequest":
        """The whole one, of which this is one device's share."""
        return replace(self, branches=self.branches + self.beside, beside=0)

    def with_size(self, width: int, height: int) -> "SamplingRequest":
        smaller = replace(self, width=width, height=height)
        text = self.prompt_tokens
        part = (smaller.frame_tokens + text) / (self.frame_tokens + text)
        return replace(smaller, controls=self.controls.scaled(part))

    def __str__(self) -> str:
        frames = f", {self.frames} frames" if self.frames > 1 else ""
        ranks = f", one of {self.ranks} parts" if self.ranks > 1 else ""
        of_all = f" of {self.branches + self.beside}" if self.beside else ""
        ending = "es" if self.beside or self.branches != 1 else ""
        return f"{self.width}x{self.height}{frames}, {self.branches}{of_all} branch{ending}{ranks}"
