from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def decode_image(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
