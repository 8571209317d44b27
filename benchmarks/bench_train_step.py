"""One training step of SE-ResNet50, optimizer and all: ours with fused tails against timm's, eager and compiled.

Beside it ResNet50 without SE, fused as well: the inverse of its ratio is what SE costs. On a GPU 224 px, batch 256,
bfloat16 autocast, and timm's ResNet50 both ways too; on a CPU 64 px, batch 32, in bfloat16 where the processor has it,
else in float32. The input is one batch that stays on the device. With REHEARSAL set in the environment it is a small
network, and nothing is compiled.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.race import Entrant, race
from engine.models import create_model
from kernels import fuse_tails

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REHEARSAL = "REHEARSAL" in os.environ
DEPTH, BLOCKS = (18, 8) if REHEARSAL else (50, 16)
BATCH, SIDE, ROUNDS = (4, 32, 3) if REHEARSAL else (256, 224, 10) if DEVICE == "cuda" else (32, 64, 5)
AMP = DEVICE == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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


def fused_step(name: str) -> Entrant:
    model = create_model(name, num_classes=1000)
    assert fuse_tails(model) == BLOCKS + 1  # and the BatchNorm and ReLU of the stem
    return training_step(model)


# The compilations take minutes on a CPU
@pytest.mark.timeout(1800)
def test_train_step(benchmark):
    timm = pytest.importorskip("timm")

    plain, with_se = f"resnet{DEPTH}", f"seresnet{DEPTH}"

    def peers_of(name: str, suffix: str) -> dict[str, Entrant]:
        eager = {f"eager{suffix}": training_step(timm.create_model(name))}
        if REHEARSAL:
            return eager
        return eager | {f"torch.compile{suffix}": training_step(timm.create_model(name), compiled=True)}

    ours = fused_step(with_se)
    peers = {**peers_of(with_se, ""), f"fused {plain}": fused_step(plain)}
    if DEVICE == "cuda":
        peers |= peers_of(plain, f" {plain}")
    label = {
        "stage": with_se,
        "shape": f"({BATCH}, 3, {SIDE}, {SIDE})",
        "dtype": "bfloat16" if AMP else "float32",
        "pass": "train step",
    }
    race(benchmark, ours, peers, label=label, rounds=ROUNDS)
    rows = benchmark.extra_info["rows"]
    rows[0] |= {"backend": "fused", "img/s": images_a_second(ours)}
    for name, peer in peers.items():
        way, _, model = name.partition(" ")
        of_peer = {"stage": model or label["stage"], "backend": way, "ms": peer.milliseconds()}
        rows.append({**label, **of_peer, "img/s": images_a_second(peer)})


def images_a_second(entrant: Entrant) -> str:
    return f"{1e3 * BATCH / entrant.milliseconds()[1]:.1f}"
