"""How a workflow's note and its nodes name the model files that the pack knows."""

from qwenimage_lowvram.engine.files.known_files import EDIT_2511_GGUF, ENCODER_21, SMALL_ENCODER_21, KnownFile


def link(file: KnownFile) -> str:
    return f"[{file.name}]({file.url})"


_ABOUT = {
    EDIT_2511_GGUF: "; the page shows no download button for GGUF, so follow the link",
    SMALL_ENCODER_21: (
        "; needs comfy-kitchen 0.2.27 or newer (ComfyUI 0.33 has it, 0.30 does not); without it, choose "
        f"{link(ENCODER_21)}, {ENCODER_21.size}, which takes as little VRAM"
    ),
}


def entry(file: KnownFile) -> dict[str, str]:
    """As the page reads it for its download button."""
    return {"name": file.name, "url": file.url, "directory": file.folder}


def line(file: KnownFile) -> str:
    """As a note lists it."""
    size = f", {file.size}" if file.size else ""
    return f"- models/{file.folder}/ {link(file)}{size}{_ABOUT.get(file, '')}"
