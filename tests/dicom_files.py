"""Small DICOM files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid


def write_dicom(path: Path, stored: np.ndarray, *, bits: int | None = None, **elements: Any) -> str:
    """``stored``: integers as in the file, (H, W), or (H, W, 3) for colour; ``elements`` by their keywords,
    or (tag, VR, value) under any."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    frames = stored[0] if "NumberOfFrames" in elements else stored
    data.Rows, data.Columns = frames.shape[:2]
    data.SamplesPerPixel = 3 if frames.ndim == 3 else 1
    data.PhotometricInterpretation = "RGB" if frames.ndim == 3 else "MONOCHROME2"
    if frames.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = 8 * stored.dtype.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PixelData = stored.tobytes() + bytes(stored.nbytes % 2)
    for name, value in elements.items():
        if isinstance(value, tuple):
            data.add_new(*value)
        else:
            setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return str(path)
