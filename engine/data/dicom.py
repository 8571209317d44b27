"""DICOM images of one frame, by pydicom (the extra ``medical``), as a viewer would show them.

Stored values go through the rescale slope and intercept (DICOM PS3.3 C.11.1), then the window (C.11.2): the first
where there are several, linear, linear-exact or sigmoid. Without a window the image's own smallest and largest value
become black and white. MONOCHROME1 is inverted. Colour is taken as RGB by its full range.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import UserError


def is_dicom(header: bytes) -> bool:
    """Whether a file that begins so is DICOM: 128 bytes of anything, then DICM."""
    return header[128:132] == b"DICM"


def decode_dicom(file: str, max_pixels: int) -> tuple[np.ndarray, str]:
    """(H, W, 3) uint8 RGB, and the photometric interpretation.

    Raises:
        ValueError: it cannot be decoded, has several frames, or more than ``max_pixels`` pixels.
        UserError: pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels import pixel_array
    except ImportError as error:
        raise UserError(
            f"{file} is a DICOM file, and pydicom cannot be imported ({error}): pip install 'fused-se-engine[medical]'"
        ) from error
    try:
        data = pydicom.dcmread(file)
        _require_one_frame(data, max_pixels)
        photometric = str(data.PhotometricInterpretation)
        if photometric in ("MONOCHROME1", "MONOCHROME2"):
            grey = _shown(data, pixel_array(data).astype(np.float64))
            grey = np.rint(255 * (1 - grey if photometric == "MONOCHROME1" else grey)).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2), photometric
        if photometric == "RGB" or photometric.startswith("YBR"):  # which pixel_array turns into RGB
            return _eight_bits(pixel_array(data), int(data.BitsStored)), photometric
    except ValueError:
        raise
    except Exception as error:  # pydicom and its decoders raise nearly anything at a damaged file
        raise ValueError(f"DICOM: {str(error) or type(error).__name__}") from error
    raise ValueError(f"DICOM of photometric interpretation {photometric}: save it as PNG")


def _require_one_frame(data: Any, max_pixels: int) -> None:
    if "PixelData" not in data:
        raise ValueError("DICOM without an image")
    frames = int(data.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise ValueError(f"DICOM of {frames} frames: save each frame, or the one to classify, as a file of its own")
    if not 0 < data.Rows * data.Columns <= max_pixels:
        raise ValueError(f"{data.Columns} x {data.Rows} pixels, not between 1 and {max_pixels}")


def _shown(data: Any, stored: np.ndarray) -> np.ndarray:
    """(H, W) float64 in [0, 1]: rescaled, then windowed."""
    values = stored * float(data.get("RescaleSlope", 1) or 1) + float(data.get("RescaleIntercept", 0) or 0)
    center, width = (_first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        low, high = values.min(), values.max()
        return (values - low) / (high - low) if high > low else np.zeros_like(values)

    function = str(data.get("VOILUTFunction", "LINEAR") or "LINEAR")
    if function == "SIGMOID" and width > 0:
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR_EXACT" and width > 0:
        return np.clip((values - center) / width + 0.5, 0, 1)
    if function != "LINEAR" or width < 1:
        raise ValueError(f"DICOM window of width {width:g} and function {function}: not one that DICOM knows")
    if width == 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def _first(value: Any) -> float | None:
    """Windows come as one number or as a list of them."""
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)


def _eight_bits(rgb: np.ndarray, bits: int) -> np.ndarray:
    if rgb.dtype == np.uint8 and bits == 8:
        return rgb
    return np.rint(np.clip(rgb / (2.0**bits - 1), 0, 1) * 255).astype(np.uint8)
