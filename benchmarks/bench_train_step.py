"""One training step of SE-ResNet50, optimizer and all: this project's, SE fused, against timm's, eager and compiled.

On a GPU 224 px, batch 256, bfloat16; on a CPU 64 px, batch 16, float32. The input is one batch that stays on the
device.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.race import Entrant, race
from engine.models import create_model
from kernels import fuse_se

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, SIDE, AMP = (256, 224, True) if DEVICE == "cuda" else (16, 64, False)


def training_step(model: nn.Module, *, compiled: bool = False) -> Entrant:
    torch.manual_seed(0)
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (BATCH,), device=DEVICE)
    forward = torch.compile(model) if compiled else model

    def step(_: object) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=AMP):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Entrant(run=step)


def test_train_step(benchmark):
    timm = pytest.importorskip("timm")
    ours = create_model("seresnet50", num_classes=1000)
    assert fuse_se(ours) == 16
    peers = {
        "eager": training_step(timm.create_model("seresnet50")),
        "torch.compile": training_step(timm.create_model("seresnet50"), compiled=True),
    }
    label = {
        "stage": "SE-ResNet50",
        "shape": f"({BATCH}, 3, {SIDE}, {SIDE})",
        "dtype": "bfloat16" if AMP else "float32",
        "pass": "train step",
    }
    race(benchmark, training_step(ours), peers, label=label, rounds=10)
