"""Where a run computes, and in which precision."""

from __future__ import annotations

import contextlib

import torch

from engine.errors import UserError


def pick_device(name: str | None) -> torch.device:
    """The device of that name, by default the GPU where there is one; UserError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such kind of device; use cuda, cuda:1 or cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cuda and cpu are served")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch sees no CUDA device on this machine; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from cuda:0")
    return device


class Precision:
    """Mixed precision as asked for, or, where nothing was asked, where the hardware has the half type.

    Without native bfloat16 arithmetic a CPU is slower in it than in float32.
    """

    def __init__(self, device: torch.device, amp: bool | None, amp_dtype: str) -> None:
        self.device_type = device.type
        self.dtype = getattr(torch, amp_dtype)
        self.amp = _computes_natively(device, self.dtype) if amp is None else amp

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device_type, self.dtype, enabled=self.amp)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the gradients of float16, whose exponent is too short for them; a no-op otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.amp and self.dtype == torch.float16)

    @property
    def input_dtype(self) -> torch.dtype:
        """What the input pipeline delivers; DALI has float16 and no bfloat16, and autocast turns one into the other."""
        return torch.float16 if self.amp else torch.float32

    def __str__(self) -> str:
        return f"amp {str(self.dtype).removeprefix('torch.')}" if self.amp else "float32"


def _computes_natively(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cuda":
        return True
    # torch tells what the CPU can do from 2.12 on; float32 is the safe answer before
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    instructions = ("amx_bf16", "avx512_bf16") if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16")
    return any(capabilities.get(name, False) for name in instructions)
