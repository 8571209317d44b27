"""NVIDIA DALI and its decoder: the one place that imports it, and only when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine.data.decode import BadImage, dali_decodes, read_header
from engine.data.feed import encode_path
from engine.errors import UserError

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

HW_DECODER_LOAD = 0.65
"""DALI's own default of the share of JPEG files that a GPU's hardware decoder takes, where it has one."""


class Decoder:
    """Finds out whether DALI can decode a file, as the loader on the same device would.

    It decodes one file at a time on one thread: where DALI 2.4 meets a header that it does not understand while other
    threads work on the same batch, the process ends in a segmentation fault.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pipeline: Pipeline | None = None

    def failure(self, file: str) -> str | None:
        """Why it cannot be decoded; None: it can, or it is not DALI that decodes it."""
        try:
            if not dali_decodes(read_header(file)):
                return None
        except BadImage as error:
            return str(error)
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.run(path=[encode_path(file)])
        except RuntimeError as error:
            self._pipeline = None  # a DALI pipeline does not survive an error
            return _reason(error)
        return None

    def _build(self) -> Pipeline:
        dali, fn, types = import_dali()

        @dali.pipeline_def(batch_size=1, num_threads=1, device_id=device_id(self._device), prefetch_queue_depth=1)
        def pipeline() -> Any:
            path = fn.external_source(name="path", dtype=types.UINT8, ndim=1)
            return decode(fn, types, path, on_gpu=self._device.type == "cuda")

        return pipeline()


def import_dali() -> tuple[Any, Any, Any]:
    """The modules ``nvidia.dali``, its ``fn`` and its ``types``; raises UserError where they cannot be imported."""
    try:
        from nvidia import dali
        from nvidia.dali import fn, types
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI cannot be imported ({error}): pip install nvidia-dali-cuda130 (Linux, with or without a "
            "GPU), or name --data-backend resident or torchvision"
        ) from error
    return dali, fn, types


def dali_version() -> str | None:
    """None where it cannot be imported."""
    try:
        version: str = import_dali()[0].__version__
    except UserError:
        return None
    return version


def decode(
    fn: Any,
    types: Any,
    path: Any,
    on_gpu: bool,
    box: Mapping[str, Any] | None = None,
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> Any:
    """The file at ``path`` as (h, w, 3) uint8 RGB, read by DALI's own threads.

    ``box`` (``start``, ``shape`` and ``axis_names`` of DALI's operators) is the part of the upright image that is
    wanted; empty or None: all. The pixels are those of the whole, and most others are not decoded.
    """
    # A file that is mapped into memory and truncated meanwhile would end the process with a bus error.
    encoded = fn.io.file.read(path, dont_use_mmap=True)
    operator = fn.decoders.image_slice if box else fn.decoders.image
    return operator(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        # Else nvJPEG interpolates chroma in its own way, and a model would see other pixels on a GPU than on the CPU.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=hw_decoder_load,
        **(box or {}),
    )


def device_id(device: torch.device) -> int | None:
    """As DALI takes it: None is the CPU."""
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that says what went wrong."""
    _, _, told = str(error).partition("encountered:")
    lines = [line.strip() for line in (told or str(error)).splitlines() if line.strip()]
    return f"DALI: {lines[0].rstrip(' :')}" if lines else "DALI gave no reason"
