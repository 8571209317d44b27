"""What a fused network keeps for the backward pass, against the same network in eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.network_traffic import make_network
from benchmarks.saved_memory import SavedBytes, per_image, saved_bytes
from engine.models import create_model
from kernels import fuse_tails

UNIT = 8 * 256 * 16 * 16 * 2  # bytes of the activation between two blocks below


def network(name: str, *, fused: bool) -> nn.Module:
    model = create_model(name, num_classes=10).bfloat16().to(memory_format=torch.channels_last).train()
    if fused:
        fuse_tails(model, backend="cpu")
    return model


def kept_by_two_blocks(name: str, *, fused: bool) -> SavedBytes:
    """Of layer1, whose shortcuts are the identity; what stands after them is a convolution, as in the network."""
    _, first, second = network(name, fused=fused).layer1
    layers = nn.Sequential(first, second, nn.Conv2d(256, 8, 1, dtype=torch.bfloat16))
    x = torch.randn(8, 256, 16, 16).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    return saved_bytes(lambda: layers(x), layers.parameters())


# of a tail: y and, in eager, what SE scales; the two inner BatchNorms' inputs are a quarter each; the bits a sixteenth
@pytest.mark.parametrize(("name", "fused", "tails"), (("seresnet50", False, 2.5), ("seresnet50", True, 1.5625)))
def test_a_tail_keeps_what_the_count_says(name, fused, tails):
    kept = kept_by_two_blocks(name, fused=fused)
    assert kept.convolutions == pytest.approx((2 * 1.5 + 1) * UNIT, rel=0.05)  # and weights of three kinds
    assert 2 * tails * UNIT <= kept.others <= 1.03 * 2 * tails * UNIT  # besides, (N, C) tensors and statistics


def test_fused_tails_keep_at_most_two_thirds_of_what_convolutions_do_not():
    eager, fused = (kept_by_two_blocks("seresnet50", fused=fused) for fused in (False, True))
    assert fused.others <= 0.65 * eager.others


def test_a_whole_network_keeps_the_same_for_its_convolutions_and_less_besides():
    """Of 224 px; the downsample branches' BatchNorms keep what they kept."""
    eager, fused = (per_image(make_network(fused=fused)) for fused in (False, True))
    assert fused.convolutions == pytest.approx(eager.convolutions, rel=0.01)
    assert fused.others <= 0.65 * eager.others
