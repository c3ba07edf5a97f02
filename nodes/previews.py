"""Drawn images as ComfyUI's IMAGE, and as previews on the node that drew them."""

from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from PIL import Image

PREFIX = "qwen_lowvram"


def as_image(image: Image.Image) -> torch.Tensor:
    """(1, H, W, 3), fp32 in 0..1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).unsqueeze(0)


def preview(image: Image.Image) -> list[dict[str, Any]]:
    """Saved to ComfyUI's folder of temporary files; what a node returns as "images" of its ui."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        PREFIX, folder_paths.get_temp_directory(), image.width, image.height
    )
    file = f"{name}_{counter:05}_.png"
    image.save(Path(folder) / file, compress_level=1)
    return [{"filename": file, "subfolder": subfolder, "type": "temp"}]
