"""Fused tails whose BatchNorms are converted to synchronised ones, before or after."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kernels import fuse_tails, unfuse_tails
from kernels.tails import FusedNormAct
from tests.tail_models import NORMS, PLACES, SMALL, assert_alike, images, norms, stem_and_blocks


def convert(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def fuse(model: nn.Module) -> nn.Module:
    assert fuse_tails(model, backend="cpu") == PLACES
    return model


ORDERS = {"converted first": (convert, fuse), "fused first": (fuse, convert)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_conversion_keeps_parameters_activations_and_the_way_back(order):
    model = stem_and_blocks().double()
    twin, parameters, keys = copy.deepcopy(model), dict(model.named_parameters()), list(model.state_dict())
    for step in order:
        model = step(model)
    assert {type(norm) for norm in norms(model)} == {nn.SyncBatchNorm}
    assert len(norms(model)) == NORMS
    assert dict(model.named_parameters()) == parameters
    assert list(model.state_dict()) == keys
    assert isinstance(model[1], FusedNormAct)
    torch.testing.assert_close(model(images(*SMALL)), twin(images(*SMALL)))
    assert_alike(model.state_dict(), twin.state_dict())
    assert unfuse_tails(model) == PLACES
    assert type(model[1]) is nn.SyncBatchNorm
    assert type(model[2]) is nn.SiLU
    assert {type(norm) for norm in norms(model)} == {nn.SyncBatchNorm}
    torch.testing.assert_close(model(images(*SMALL)), twin(images(*SMALL)))
