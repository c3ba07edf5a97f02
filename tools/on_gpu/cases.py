"""What is measured of a model's steps, most telling first. Values only; imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

GIB = 1024**3
# of ours, as files have them; the first ones are measured in more cases before the others come
FORMATS = ("bf16", "fp8", "int8", "nf4", "GGUF Q4_K")
NUNCHAKU = "nunchaku int4"
W4A8 = "asym_w4a8_int8"
KITCHEN = ("int8_convrot", "nvfp4", "convrot_w4a4", "mxfp8", W4A8)  # which comfy-kitchen quantizes
MORE_FORMATS = ("fp8 scaled", "GGUF Q8_0", *KITCHEN, NUNCHAKU, "fp4")
NATIVE = ("bf16", "fp8")
NATIVE_STORED = ("int8_convrot",)  # on which ComfyUI computes as stored, as ours does
# how ours may compute faster than by the plain path, with which each is compared, and in which formats
STORED, STORED_LORA = "on stored weights", "on stored weights, LoRA"
STORED_ATTENTION = "on stored weights, attention in 8 bits"
HALF, COMPILED = "products in fp16", "compiled blocks"
PLANNED, FIRST_BLOCK = "planned steps", "first block's rule"
FASTER: Mapping[str, tuple[str, ...]] = {
    STORED: ("int8", "int8_convrot", "fp8 scaled", "convrot_w4a4", W4A8, "nvfp4", "mxfp8", NUNCHAKU),
    STORED_LORA: ("int8_convrot", "convrot_w4a4"),
    STORED_ATTENTION: ("int8_convrot",),
    **dict.fromkeys((HALF, COMPILED, PLANNED, FIRST_BLOCK), ("bf16",)),
}
OURS, RESIDENT, GROUP_OFFLOAD, COMFYUI = "ours", "everything resident", "diffusers group offload", "ComfyUI"


@dataclass(frozen=True)
class Sizes:
    """Of a model and its images. sides: of square images in px. prompt_tokens: of the positive and the negative one.
    cards: what is emulated, GB as sold -> bytes. peer_blocks: run by a way that copies all weights; it takes so many
    times longer with `blocks`."""

    heads: int
    text_dim: int
    blocks: int
    peer_blocks: int
    sides: tuple[int, int]
    prompt_tokens: tuple[int, int]
    cards: Mapping[int, int]
    dtype: str = "bfloat16"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cards": {str(gb): nbytes for gb, nbytes in self.cards.items()}}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Sizes":
        cards = {int(gb): nbytes for gb, nbytes in given["cards"].items()}
        pairs = {name: tuple(given[name]) for name in ("sides", "prompt_tokens")}
        return cls(**{**given, **pairs, "cards": cards})


REAL = Sizes(24, 3584, 60, 12, (1024, 1328), (512, 9), {gb: gb * GIB for gb in (4, 8, 16)})
# a stand-in, for a CPU: 3.1 MB a block; both sides are as the real ones, an even and an odd number of patches
SMALL = Sizes(2, 64, 6, 4, (64, 80), (12, 5), {4: 15_000_000, 8: 22_000_000, 16: 60_000_000})


@dataclass(frozen=True)
class Case:
    """One way to run one step. card: GB; None: the whole device. guided: with both prompts; else one, as Lightning.
    how: a key of FASTER; empty: by the plain path."""

    way: str
    stored: str
    side: int
    guided: bool
    card: int | None
    how: str = ""

    def __str__(self) -> str:
        how = f", {self.how}" if self.how else ""
        card = "no limit" if self.card is None else f"{self.card} GB"
        return f"{self.stored}, {card}, {self.side}x{self.side}, {'guided' if self.guided else 'Lightning'}{how}"


def cases(sizes: Sizes) -> Iterator[Case]:
    """All of them, in the order of their value; next to each other what opens the same file. Of a stand-in, each way,
    format and how once."""
    return _first_of_each(_cases(sizes)) if sizes == SMALL else _cases(sizes)


def _first_of_each(cases: Iterator[Case]) -> Iterator[Case]:
    seen = set()
    for case in cases:
        if (case.way, case.stored, case.how) not in seen:
            seen.add((case.way, case.stored, case.how))
            yield case


def _cases(sizes: Sizes) -> Iterator[Case]:
    even, odd = sizes.sides
    first = [(8, even, True), (4, odd, True), (4, even, False)]
    settings = [(card, side, guided) for card in sizes.cards for side in (odd, even) for guided in (True, False)]
    rest = [setting for setting in settings if setting not in first]
    for side, guided in dict.fromkeys((side, guided) for _, side, guided in first):
        yield Case(RESIDENT, "bf16", side, guided, None)
    yield from _of(OURS, FORMATS, first)
    yield from _of(GROUP_OFFLOAD, ("bf16",), first)
    yield from _of(COMFYUI, NATIVE, first)
    for how, formats in FASTER.items():
        yield from _of(OURS, formats, first[:1], how)
    yield from _of(COMFYUI, NATIVE_STORED, first[:1])
    yield Case(RESIDENT, "bf16", odd, False, None)
    yield from _of(OURS, MORE_FORMATS, first[:1])
    yield from _of(OURS, FORMATS, rest)
    yield from _of(COMFYUI, NATIVE, rest)
    yield from _of(GROUP_OFFLOAD, ("bf16",), rest)
    yield from _of(OURS, MORE_FORMATS, [*first[1:], *rest])


def answer_name(case: Case, blocks: int) -> str:
    """Of the file that keeps what everything resident answers, of so many blocks."""
    return f"answer {case.stored} {case.side} {'guided' if case.guided else 'alone'} {blocks}.pt"


def _of(way: str, formats: tuple[str, ...], settings: list[tuple[int, int, bool]], how: str = "") -> Iterator[Case]:
    for stored in formats:
        for card, side, guided in settings:
            yield Case(way, stored, side, guided, card, how)
