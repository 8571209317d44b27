"""Fused Squeeze-and-Excitation for PyTorch: forward and backward, channels-last and NCHW, half precision."""

from kernels.backends import BackendUnavailable, available_backends
from kernels.modules import FusedSE, FusedSEBlock, fuse_se, se_modules, unfuse_se
from kernels.reference import SEBlock
from kernels.squeeze_excite import squeeze_excite

__all__ = [
    "BackendUnavailable",
    "FusedSE",
    "FusedSEBlock",
    "SEBlock",
    "available_backends",
    "fuse_se",
    "se_modules",
    "squeeze_excite",
    "unfuse_se",
]
