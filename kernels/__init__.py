"""Fused Squeeze-and-Excitation and residual tails for PyTorch, forward and backward, channels-last and NCHW."""

from kernels.backends import BackendUnavailable, available_backends
from kernels.images import pack_edits, prepare_images
from kernels.modules import FusedSE, FusedSEBlock, fuse_se, se_modules, unfuse_se
from kernels.norm_pool import norm_relu_pool
from kernels.norms import Norm
from kernels.reference import SEBlock
from kernels.residual_tail import SE, residual_tail
from kernels.squeeze_excite import squeeze_excite
from kernels.tail_swaps import fuse_tails, tail_modules, unfuse_tails
from kernels.tails import FusedTail

__all__ = [
    "SE",
    "BackendUnavailable",
    "FusedSE",
    "FusedSEBlock",
    "FusedTail",
    "Norm",
    "SEBlock",
    "available_backends",
    "fuse_se",
    "fuse_tails",
    "norm_relu_pool",
    "pack_edits",
    "prepare_images",
    "residual_tail",
    "se_modules",
    "squeeze_excite",
    "tail_modules",
    "unfuse_se",
    "unfuse_tails",
]
