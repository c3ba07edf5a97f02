"""The kinds of graph: from text, from images to change, from one image, under a mask, with a margin, into layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import parts
from .canvas import Canvas, Inside, Node, column
from .parts import Chain, Files, Steps

AREA_MEGAPIXELS = 1.68  # a square image of 1328x1328
LAYERED_MEGAPIXELS = 0.39  # 640x640
SETTINGS_WIDTH = 300


@dataclass(frozen=True)
class Made:
    """What all kinds are made of: the graph's name, its files, its card's limit, the sampler, the prompt, the name of
    what is saved."""

    name: str
    files: Files
    limit_gb: float
    steps: Steps
    prompt: str
    saved: str


def from_text(made: Made, note: str, *, side: int) -> dict[str, Any]:
    canvas = Canvas(made.name)
    chain = Chain(canvas)
    files = parts.loader(canvas, made.files, made.limit_gb)
    prompt = parts.prompts(canvas, files[0], made.prompt)
    size = canvas.add("EmptySD3LatentImage", 3, (parts.PROMPT_WIDTH, 130), side, side, 1, room=parts.TEXTS_PX)
    sample = parts.sampler(canvas, parts.model_of(files), prompt, (size, "LATENT"), made.steps)
    chain.place("Model files", parts.FILES_WIDTH, *files)
    chain.place("Prompt and size", parts.PROMPT_WIDTH, prompt, size)
    return _finished(chain, made, note, sample, files[0])


def edit(made: Made, note: str, *, images: int) -> dict[str, Any]:
    canvas = Canvas(made.name)
    chain = Chain(canvas)
    shown = [parts.load_image(canvas, 10 + number) for number in range(images)]
    files = parts.loader(canvas, made.files, made.limit_gb)
    prompt = parts.edit_prompt(canvas, files[0], shown, made.prompt)
    sample = parts.sampler(canvas, parts.model_of(files), prompt, (prompt, "latent"), made.steps)
    chain.place("Your images" if images > 1 else "Your image", parts.SOURCE_WIDTH, *shown)
    chain.place("Model files", parts.FILES_WIDTH, *files)
    chain.place("What to change", parts.PROMPT_WIDTH, prompt)
    return _finished(chain, made, note, sample, files[0])


def cut_out(made: Made, note: str) -> dict[str, Any]:
    """An edit that also saves the image's own pixels under the mask that the model made."""
    canvas = Canvas(made.name)
    chain = Chain(canvas)
    image = parts.load_image(canvas)
    files = parts.loader(canvas, made.files, made.limit_gb)
    prompt = parts.edit_prompt(canvas, files[0], [image], made.prompt)
    sample = parts.sampler(canvas, parts.model_of(files), prompt, (prompt, "latent"), made.steps)
    decode = parts.decoder(canvas, sample, files[0])
    drawn = parts.save(canvas, decode, f"{made.saved}_cutout")
    join = canvas.add("JoinImageWithAlpha", 13, (parts.IMAGE_WIDTH, 60), room=parts.TEXTS_PX)
    canvas.link(image, "IMAGE", join, "image")
    canvas.link(decode, "MASK", join, "alpha")
    own = parts.save(canvas, join, f"{made.saved}_own_pixels", 14)
    parts.note(canvas, note)
    chain.place("Your image", parts.SOURCE_WIDTH, image)
    chain.place("Model files", parts.FILES_WIDTH, *files)
    chain.place("What to change", parts.PROMPT_WIDTH, prompt)
    chain.place("Sample", parts.SAMPLE_WIDTH, sample)
    chain.place("The image as the model drew it", parts.IMAGE_WIDTH, decode, drawn)
    chain.place("Your own pixels, cut out", parts.IMAGE_WIDTH, join, own)
    return parts.seen(canvas)


def image_to_image(made: Made, note: str) -> dict[str, Any]:
    canvas = Canvas(made.name)
    chain = Chain(canvas)
    image = parts.load_image(canvas)
    scaled = canvas.add(
        "ImageScaleToTotalPixels", 11, (parts.SOURCE_WIDTH, 140), "lanczos", AREA_MEGAPIXELS, 16, room=parts.TEXTS_PX
    )
    canvas.link(image, "IMAGE", scaled, "image")
    files = parts.loader(canvas, made.files, made.limit_gb)
    prompt = parts.prompts(canvas, files[0], made.prompt)
    encoded = canvas.add("VAEEncode", 12, (parts.PROMPT_WIDTH, 60), room=parts.TEXTS_PX)
    canvas.link(scaled, "IMAGE", encoded, "pixels")
    canvas.link(files[0], "VAE", encoded, "vae")
    sample = parts.sampler(canvas, parts.model_of(files), prompt, (encoded, "LATENT"), made.steps)
    chain.place("Your image", parts.SOURCE_WIDTH, image, scaled)
    chain.place("Model files", parts.FILES_WIDTH, *files)
    chain.place("What the new image shows", parts.PROMPT_WIDTH, prompt, encoded)
    return _finished(chain, made, note, sample, files[0])


def inpaint(made: Made, note: str) -> dict[str, Any]:
    canvas = Canvas(made.name)
    chain = Chain(canvas)
    image = parts.load_image(canvas)
    files = parts.loader(canvas, made.files, made.limit_gb)
    prompt = parts.prompts(canvas, files[0], made.prompt)
    prepared = canvas.subgraph(30, (parts.PROMPT_WIDTH, 230), _image_and_mask(made.name), room=parts.TEXTS_PX)
    _feed(canvas, prepared, image, image, files)
    sample = parts.sampler(canvas, (prepared, "model"), prompt, (prepared, "latent"), made.steps)
    chain.place("Your image and mask", parts.SOURCE_WIDTH, image)
    chain.place("Model files", parts.FILES_WIDTH, *files)
    chain.place("What the whole image shows", parts.PROMPT_WIDTH, prompt, prepared)
    return _finished(chain, made, note, sample, files[0], laid_over=(image, (prepared, "mask")))


def outpaint(made: Made, note: str) -> dict[str, Any]:
    canvas = Canvas(made.name)
    chain = Chain(canvas)
    image = parts.load_image(canvas)
    padded = canvas.add("ImagePadForOutpaint", 13, (parts.SOURCE_WIDTH, 200), 256, 0, 256, 0, 40, room=parts.TEXTS_PX)
    canvas.link(image, "IMAGE", padded, "image")
    files = parts.loader(canvas, made.files, made.limit_gb)
    prompt = parts.prompts(canvas, files[0], made.prompt)
    prepared = canvas.subgraph(30, (parts.PROMPT_WIDTH, 160), _image_and_margin(made.name), room=parts.TEXTS_PX)
    _feed(canvas, prepared, padded, padded, files)
    sample = parts.sampler(canvas, (prepared, "model"), prompt, (prepared, "latent"), made.steps)
    chain.place("Your image and its margin", parts.SOURCE_WIDTH, image, padded)
    chain.place("Model files", parts.FILES_WIDTH, *files)
    chain.place("What the larger image shows", parts.PROMPT_WIDTH, prompt, prepared)
    return _finished(chain, made, note, sample, files[0], laid_over=(padded, (padded, "MASK")))


def layers(made: Made, note: str) -> dict[str, Any]:
    canvas = Canvas(made.name)
    chain = Chain(canvas)
    image = parts.load_image(canvas)
    files = parts.loader(canvas, made.files, made.limit_gb)
    prompt = parts.prompts(canvas, files[0], made.prompt)
    prepared = canvas.subgraph(30, (parts.PROMPT_WIDTH, 210), _image_and_layers(made.name), room=parts.TEXTS_PX)
    canvas.link(image, "IMAGE", prepared, "image")
    canvas.link(files[0], "VAE", prepared, "vae")
    canvas.link(prompt, "positive", prepared, "positive")
    canvas.link(prompt, "negative", prepared, "negative")
    sample = parts.sampler(canvas, parts.model_of(files), prepared, (prepared, "latent"), made.steps)
    chain.place("Your image", parts.SOURCE_WIDTH, image)
    chain.place("Model files", parts.FILES_WIDTH, *files)
    chain.place("What the image shows, and layers", parts.PROMPT_WIDTH, prompt, prepared)
    return _finished(chain, made, note, sample, files[0])


def _finished(
    chain: Chain,
    made: Made,
    note: str,
    sample: Node,
    files: Node,
    *,
    laid_over: tuple[Node, tuple[Node, str]] | None = None,
) -> dict[str, Any]:
    """The last columns and the note. laid_over: an image that the result is laid over, and which output masks it."""
    canvas = chain.canvas
    decode = parts.decoder(canvas, sample, files)
    last, shown = [decode], decode
    if laid_over is not None:
        under, mask = laid_over
        shown = canvas.add("ImageCompositeMasked", 19, (parts.IMAGE_WIDTH, 170), 0, 0, True, room=parts.TEXTS_PX)
        canvas.link(under, "IMAGE", shown, "destination")
        canvas.link(decode, "IMAGE", shown, "source")
        canvas.link(*mask, shown, "mask")
        last.append(shown)
    saved = parts.save(canvas, shown, made.saved)
    parts.note(canvas, note)
    chain.place("Sample", parts.SAMPLE_WIDTH, sample)
    chain.place("The image", parts.IMAGE_WIDTH, *last, saved)
    return parts.seen(canvas)


def _feed(canvas: Canvas, prepared: Node, image: Node, mask: Node, files: Sequence[Node]) -> None:
    canvas.link(image, "IMAGE", prepared, "image")
    canvas.link(mask, "MASK", prepared, "mask")
    canvas.link(files[0], "VAE", prepared, "vae")
    canvas.link(*parts.model_of(list(files)), prepared, "model")


def _scaled(inside: Inside, number: int, method: str, step: int = 16, megapixels: float = AREA_MEGAPIXELS) -> Node:
    return inside.add("ImageScaleToTotalPixels", number, (SETTINGS_WIDTH, 140), method, megapixels, step)


def _masked(inside: Inside, image: Node) -> tuple[Node, Node, Node]:
    """Encode the image, put the mask to the latent, and let the model follow soft masks."""
    encode = inside.add("VAEEncode", 12, (SETTINGS_WIDTH, 60))
    masked = inside.add("SetLatentNoiseMask", 17, (SETTINGS_WIDTH, 60))
    soft = inside.add("DifferentialDiffusion", 18, (SETTINGS_WIDTH, 70), 1)
    inside.link(image, "IMAGE", encode, "pixels")
    inside.link(encode, "LATENT", masked, "samples")
    return encode, masked, soft


def _image_and_mask(of: str) -> Inside:
    """Scale image and mask alike, grow the mask, soften its edge."""
    inside = Inside("Prepare image and mask", of)
    image = _scaled(inside, 11, "lanczos")
    encode, masked, soft = _masked(inside, image)
    as_image = inside.add("MaskToImage", 14, (SETTINGS_WIDTH, 40))
    mask = _scaled(inside, 15, "bilinear")
    again = inside.add("ImageToMask", 21, (SETTINGS_WIDTH, 70), "red")
    grown = inside.add("GrowMask", 13, (SETTINGS_WIDTH, 90), 20, False)
    to_blur = inside.add("MaskToImage", 22, (SETTINGS_WIDTH, 40))
    blurred = inside.add("ImageBlur", 16, (SETTINGS_WIDTH, 90), 16, 0.5)
    edge = inside.add("ImageToMask", 20, (SETTINGS_WIDTH, 70), "red")
    for source, output, target, name in (
        (as_image, "IMAGE", mask, "image"),
        (mask, "IMAGE", again, "image"),
        (again, "MASK", grown, "mask"),
        (grown, "MASK", to_blur, "mask"),
        (to_blur, "IMAGE", blurred, "image"),
        (blurred, "IMAGE", edge, "image"),
        (edge, "MASK", masked, "mask"),
    ):
        inside.link(source, output, target, name)
    inside.enter("image", "IMAGE", (image, "image"))
    inside.enter("mask", "MASK", (as_image, "mask"))
    inside.enter("vae", "VAE", (encode, "vae"))
    inside.enter("model", "MODEL", (soft, "model"))
    inside.enter("megapixels", "FLOAT", (image, "megapixels"), (mask, "megapixels"), value=AREA_MEGAPIXELS)
    inside.enter("expand", "INT", (grown, "expand"), value=20)
    inside.enter("blur_radius", "INT", (blurred, "blur_radius"), value=16)
    inside.leave("model", soft, "MODEL")
    inside.leave("latent", masked, "LATENT")
    inside.leave("mask", edge, "MASK")
    column(0, image, as_image, mask)
    column(SETTINGS_WIDTH + parts.GAP, again, grown, to_blur, blurred)
    column(2 * (SETTINGS_WIDTH + parts.GAP), encode, edge, masked, soft)
    return inside


def _image_and_margin(of: str) -> Inside:
    """Scale the enlarged image; its mask is scaled by ComfyUI, with the latent."""
    inside = Inside("Prepare image and margin", of)
    image = _scaled(inside, 11, "lanczos")
    encode, masked, soft = _masked(inside, image)
    inside.enter("image", "IMAGE", (image, "image"))
    inside.enter("mask", "MASK", (masked, "mask"))
    inside.enter("vae", "VAE", (encode, "vae"))
    inside.enter("model", "MODEL", (soft, "model"))
    inside.enter("megapixels", "FLOAT", (image, "megapixels"), value=AREA_MEGAPIXELS)
    inside.leave("model", soft, "MODEL")
    inside.leave("latent", masked, "LATENT")
    column(0, image)
    column(SETTINGS_WIDTH + parts.GAP, encode, masked, soft)
    return inside


def _image_and_layers(of: str) -> Inside:
    """Scale the image, show it to both prompts, and make an empty latent of its shape."""
    inside = Inside("Prepare image and layers", of)
    image = _scaled(inside, 11, "lanczos", 32, LAYERED_MEGAPIXELS)
    size = inside.add("GetImageSize", 12, (SETTINGS_WIDTH, 140))
    encode = inside.add("VAEEncode", 13, (SETTINGS_WIDTH, 60))
    positive = inside.add("ReferenceLatent", 14, (SETTINGS_WIDTH, 60))
    negative = inside.add("ReferenceLatent", 15, (SETTINGS_WIDTH, 60))
    empty = inside.add("EmptyQwenImageLayeredLatentImage", 3, (SETTINGS_WIDTH, 160), 640, 640, 4, 1)
    inside.link(image, "IMAGE", size, "image")
    inside.link(image, "IMAGE", encode, "pixels")
    inside.link(encode, "LATENT", positive, "latent")
    inside.link(encode, "LATENT", negative, "latent")
    inside.link(size, "width", empty, "width")
    inside.link(size, "height", empty, "height")
    inside.enter("image", "IMAGE", (image, "image"))
    inside.enter("vae", "VAE", (encode, "vae"))
    inside.enter("positive", "CONDITIONING", (positive, "conditioning"))
    inside.enter("negative", "CONDITIONING", (negative, "conditioning"))
    inside.enter("megapixels", "FLOAT", (image, "megapixels"), value=LAYERED_MEGAPIXELS)
    inside.enter("layers", "INT", (empty, "layers"), value=4)
    inside.leave("positive", positive, "CONDITIONING")
    inside.leave("negative", negative, "CONDITIONING")
    inside.leave("latent", empty, "LATENT")
    column(0, image, size)
    column(SETTINGS_WIDTH + parts.GAP, encode, positive, negative, empty)
    return inside
