"""Lay a workflow's images out on one square: what goes in, an arrow, what comes out, words above and below."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE_PX, MARGIN_PX, GAP_PX = 640, 36, 12
TOP_PX, BOTTOM_PX = 124, 552  # of the images' part
GROUND, INK, FAINT = (22, 24, 29), (240, 242, 245), (150, 156, 166)
ACCENTS = {4: (86, 168, 240), 6: (70, 200, 220), 8: (84, 226, 186), 10: (190, 220, 80), 12: (250, 190, 80)}
LARGEST_ACCENT = (160, 100, 245)
CHECKERS = ((70, 74, 82), (104, 109, 118))

Picture = Image.Image
Colour = tuple[int, ...]


def poster(
    card_gb: int, kind: str, given: Sequence[Picture], made: Sequence[Picture], words: str, foot: str
) -> Picture:
    """The thumbnail. given: what is shown to the model, none for text; made: what it made."""
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), GROUND)
    draw = ImageDraw.Draw(image)
    accent = ACCENTS.get(card_gb, LARGEST_ACCENT)
    draw.text((MARGIN_PX, 30), f"{card_gb} GB", font=_font(64), fill=accent)
    for line, text in enumerate(kind.split("\n")):
        draw.text((SIDE_PX - MARGIN_PX, 36 + 30 * line), text, font=_font(24), fill=INK, anchor="ra")
    _pictures(image, draw, given, made, accent)
    for line, text in enumerate(_wrapped(words, 58)[:2]):
        draw.text((SIDE_PX / 2, BOTTOM_PX + 8 + 24 * line), text, font=_font(19), fill=INK, anchor="ma")
    draw.text((SIDE_PX / 2, SIDE_PX - 14), foot, font=_font(13), fill=FAINT, anchor="ms")
    return image


def checkered(image: Picture) -> Picture:
    """A transparent image upon checkers."""
    size = image.size[0]
    cells = (np.indices((8, 8)).sum(0) % 2).astype(bool)
    ground = np.where(cells[..., None], CHECKERS[0], CHECKERS[1]).astype(np.uint8)
    made = Image.fromarray(ground).resize((size, size), Image.Resampling.NEAREST).convert("RGBA")
    made.alpha_composite(image)
    return made.convert("RGB")


def veiled(image: Picture, left: float, top: float, right: float, bottom: float) -> Picture:
    """The image with a part painted over, as the mask editor shows it; edges in parts of its sides."""
    width, height = image.size
    over = Image.new("RGBA", image.size)
    box = [left * width, top * height, right * width - 1, bottom * height - 1]
    ImageDraw.Draw(over).rectangle(box, fill=(20, 20, 20, 175))
    return Image.alpha_composite(image.convert("RGBA"), over).convert("RGB")


def _pictures(
    image: Picture,
    draw: ImageDraw.ImageDraw,
    given: Sequence[Picture],
    made: Sequence[Picture],
    accent: Colour,
) -> None:
    height, middle = BOTTOM_PX - TOP_PX, (TOP_PX + BOTTOM_PX) // 2
    if not given:
        _fitted(image, draw, made[0], (SIDE_PX - height) // 2, TOP_PX, height, accent)
        return
    each = {1: 236, 2: 150}.get(len(given), 132)
    _stack(image, draw, given, MARGIN_PX, middle, each, FAINT)
    arrow = MARGIN_PX + each + 14
    tip = arrow + 40
    draw.line([(arrow, middle), (tip, middle)], fill=INK, width=5)
    draw.polygon([(tip + 8, middle), (tip - 10, middle - 12), (tip - 10, middle + 12)], fill=INK)
    left = tip + 22
    if len(made) == 1:
        side = min(SIDE_PX - MARGIN_PX - left, height)
        _fitted(image, draw, made[0], left, middle - side // 2, side, accent)
        return
    side = (SIDE_PX - MARGIN_PX - left - GAP_PX) // 2
    for number, picture in enumerate(made):
        row, at = divmod(number, 2)
        rows = math.ceil(len(made) / 2)
        top = middle - (rows * side + (rows - 1) * GAP_PX) // 2 + row * (side + GAP_PX)
        _fitted(image, draw, picture, left + at * (side + GAP_PX), top, side, accent)


def _stack(
    image: Picture,
    draw: ImageDraw.ImageDraw,
    given: Sequence[Picture],
    left: int,
    middle: int,
    side: int,
    rim: Colour,
) -> None:
    top = middle - (len(given) * side + (len(given) - 1) * GAP_PX) // 2
    for number, picture in enumerate(given):
        _fitted(image, draw, picture, left, top + number * (side + GAP_PX), side, rim)


def _fitted(
    image: Picture, draw: ImageDraw.ImageDraw, picture: Picture, left: int, top: int, side: int, rim: Colour
) -> None:
    """The picture in a square of `side`, its shape kept."""
    scale = side / max(picture.size)
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    shown = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = left + (side - width) // 2, top + (side - height) // 2
    image.paste(shown, (left, top))
    draw.rectangle([left - 2, top - 2, left + width + 1, top + height + 1], outline=rim, width=2)


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
