"""DICOM images of one frame, by pydicom (the extra ``medical``), as a viewer would show them.

Stored values go through the modality table or the rescale slope and intercept (DICOM PS3.3 C.11.1), then the VOI table
or else the window (C.11.2): the first where there are several, linear, linear-exact or sigmoid. With neither, the
image's own smallest and largest value become black and white. MONOCHROME1 is inverted. Pixel padding (C.7.5.1.1.2) is
black and counts for nothing. Colour is taken as RGB by its full range, palettes (C.7.6.3.1.5, C.7.9) by their tables.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
        from pydicom.pixels import apply_color_lut, pixel_array
    except ImportError as error:
        raise UserError(
            f"{file} is a DICOM file, and pydicom cannot be imported ({error}): pip install 'fused-se-engine[medical]'"
        ) from error
    try:
        data = pydicom.dcmread(file)
        _require_one_frame(data, max_pixels)
        photometric = str(data.PhotometricInterpretation)
        if photometric in ("MONOCHROME1", "MONOCHROME2"):
            stored = pixel_array(data)
            padding = _padding(data, stored)
            grey = _shown(data, stored, padding)
            grey = np.rint(255 * (1 - grey if photometric == "MONOCHROME1" else grey)).astype(np.uint8)
            grey[padding] = 0
            return np.repeat(grey[..., None], 3, axis=2), photometric
        if photometric == "PALETTE COLOR":
            if "SegmentedRedPaletteColorLookupTableData" in data:
                rgb = apply_color_lut(pixel_array(data), data)[..., :3]
                return _eight_bits(rgb, 8 * rgb.itemsize), photometric
            return _from_palette(data, pixel_array(data)), photometric
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


def _padding(data: Any, stored: np.ndarray) -> np.ndarray:
    """(H, W) bool: what stands for no pixel."""
    if data.get("PixelPaddingValue") in (None, ""):
        return np.zeros(stored.shape, dtype=bool)
    limits = (data.PixelPaddingValue, data.get("PixelPaddingRangeLimit", data.PixelPaddingValue))
    low, high = sorted(_sixteen_bits(limit, signed=stored.dtype.kind == "i") for limit in limits)
    return (stored >= low) & (stored <= high)


def _sixteen_bits(value: Any, *, signed: bool) -> int:
    """Whichever of the two the file took it for."""
    unsigned = int(value) % 2**16
    return unsigned - 2**16 if signed and unsigned >= 2**15 else unsigned


def _shown(data: Any, stored: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """(H, W) float64 in [0, 1]: rescaled, then windowed."""
    values = stored.astype(np.float64)
    if data.get("ModalityLUTSequence"):
        values = _table(data, data.ModalityLUTSequence[0]).look_up(values).astype(np.float64)
    else:
        values = values * float(data.get("RescaleSlope", 1) or 1) + float(data.get("RescaleIntercept", 0) or 0)
    if data.get("VOILUTSequence"):
        table = _table(data, data.VOILUTSequence[0])
        return table.look_up(values) / table.top
    center, width = (_first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        own = values[~padding]
        low, high = (own.min(), own.max()) if own.size else (0.0, 0.0)
        return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)

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


class _Table(NamedTuple):
    """``entries`` (n,) for the values from ``first`` on; ``top`` is the largest that they may hold."""

    first: int
    entries: np.ndarray
    top: int

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """Values before the first have its entry, those behind the last have that one's."""
        first = self.first
        if first >= 2**15 and values.min() < 0:  # read as unsigned from a file that does not say
            first -= 2**16
        return self.entries[np.clip(np.rint(values).astype(np.int64) - first, 0, len(self.entries) - 1)]


def _table(data: Any, item: Any, prefix: str = "LUT") -> _Table:
    """What DICOM describes by the number of entries (0 for 2^16), the first value and the bits of an entry."""
    for name in (f"{prefix}Descriptor", f"{prefix}Data"):
        if name not in item:
            raise ValueError(f"DICOM without {name}")
    number, first, bits = map(int, item[f"{prefix}Descriptor"].value)
    number = number % 2**16 or 2**16
    content = item[f"{prefix}Data"].value
    if isinstance(content, bytes):
        order = "<" if data.file_meta.TransferSyntaxUID.is_little_endian else ">"
        content = np.frombuffer(content, dtype=np.uint8 if len(content) < 2 * number else f"{order}u2")
    entries = np.atleast_1d(content).astype(np.int64)[:number] % 2**16
    if len(entries) < number:
        raise ValueError(f"DICOM lookup table of {len(entries)} entries, which should have {number}")
    top = 2**bits - 1
    return _Table(first, entries, top if entries.max() <= top else 2**16 - 1)


def _from_palette(data: Any, stored: np.ndarray) -> np.ndarray:
    tables = [_table(data, data, f"{colour}PaletteColorLookupTable") for colour in ("Red", "Green", "Blue")]
    channels = [table.look_up(stored) / table.top for table in tables]
    return np.rint(255 * np.stack(channels, axis=-1)).astype(np.uint8)
