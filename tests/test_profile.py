"""``engine.profile``: what it counts is right, what it times is what runs, and the file holds what is printed."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import profile
from engine.cli import run
from engine.config import Config
from engine.data_profile import _CpuTime
from engine.device import Precision
from engine.model_profile import count_arithmetic, saved_storages, time_training
from engine.models import create_model
from kernels import fuse_tails
from tests.data_helpers import CPU, make_folder

SMALL = ("--img-size", "32", "-b", "2", "-j", "2", "--device", "cpu", "--no-amp", "--seconds", "0.01")


def profiled(tmp_path: Path, *argv: str | Path) -> dict:
    output = tmp_path / "new" / "figures.json"
    assert run(profile.main, [*SMALL, *map(str, argv), "--output", str(output)]) == 0
    return json.loads(output.read_text())


def refused(capsys, *argv: str | Path) -> str:
    capsys.readouterr()
    assert run(profile.main, [*SMALL, *map(str, argv)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def test_arithmetic_of_resnet50_is_what_a_hand_counts():
    counted = count_arithmetic("resnet50", 2, 224)
    stem = 2 * 112 * 112 * 64 * 3 * 7 * 7
    assert counted.by_layer["conv1"] == stem
    assert counted.by_layer["fc"] == 2 * 2048 * 2
    assert counted.by_layer["maxpool"] == 0
    # three 1x1 and 3x3 convolutions a block, and the first block's shortcut
    at_56 = 56 * 56 * (64 * 64 + 2 * 256 * 64 + 3 * (9 * 64 * 64) + 3 * 64 * 256 + 64 * 256)
    assert counted.by_layer["layer1"] == 2 * at_56
    assert counted.forward == sum(counted.by_layer.values()) == 2 * 4_087_140_352
    # gradients of input and weight cost a forward pass each, and images need none
    assert counted.training == 3 * counted.forward - stem


def test_fusing_changes_no_count():
    with torch.device("meta"):
        model, images = create_model("seresnet18", num_classes=3), torch.empty(2, 3, 32, 32)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        fuse_tails(model, backend="eager")
        model(images).sum().backward()
    assert counter.get_total_flops() == 2 * count_arithmetic("seresnet18", 3, 32).training


def test_seed_parameters():
    with torch.device("meta"):
        assert profile._parameters(create_model("resnet50", num_classes=2)) == 23_512_130


def test_kept_bytes_are_those_of_inputs_and_relu():
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    kept = saved_storages(lambda: layers(torch.randn(5, 8)), layers.parameters())
    assert sorted(kept.values()) == [4 * 5 * 8, 4 * 5 * 16]  # ReLU's output is the next layer's input


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x


class Net(nn.Module):
    """Two calls of one child, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.quick, self.idle = Slow(), nn.Linear(3 * 4 * 4, 2), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quick(self.slow(self.slow(x)).flatten(1))


def test_time_goes_to_the_layer_and_the_phase_that_take_it():
    model, config = Net(), Config(img_size=4, batch_size=3)
    before = model.quick.weight.detach().clone()
    times = time_training(model, 2, config, CPU, Precision(CPU, False, "bfloat16"), seconds=0.01)
    assert times.forward_by_layer["slow"] >= 40
    assert times.forward_by_layer["slow"] + times.forward_by_layer["quick"] <= 1.01 * times.phases["forward"].p80
    assert times.forward_by_layer["idle"] == 0
    assert times.step.p20 >= times.phases["forward"].p20 > times.phases["backward"].p20 > 0
    assert not torch.equal(model.quick.weight, before)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.children())


def test_model_and_pipeline_of_a_fused_run(tmp_path, capsys):
    folder = make_folder(tmp_path / "images", {"a": 8, "b": 3})
    with pytest.warns(UserWarning, match="eager") if not _has_kernel() else _nothing():
        figures = profiled(tmp_path, "--data-dir", folder, "--model", "seresnet18", "--fused-se")
    printed = capsys.readouterr().out
    model = figures["model"]
    expected = count_arithmetic("seresnet18", 2, 32)
    assert (model["forward_flops"], model["training_flops"]) == (expected.forward, expected.training)
    assert model["forward_macs"] == expected.forward // 2
    assert sum(layer["parameters"] for layer in model["layers"].values()) == model["parameters"]
    assert f"{model['parameters']:,}" in printed
    assert "8 tails with SE" in printed or "tails fused, 8 of them with SE" in printed
    step = model["milliseconds"]["step"]
    assert step["p20"] <= step["p50"] <= step["p80"]
    assert model["images_per_second"]["step"] == pytest.approx(1000 * 2 / step["p50"])

    names = [stage["name"] for stage in figures["data"]["stages"]]
    assert names == [
        "draws, in Python",
        "reading",
        "reading and decoding, by Pillow",
        "dali, without augmentation",
        "dali",
    ]
    found = figures["data"]["pipelines"]["dali"]
    assert found["images_per_second"] == figures["data"]["stages"][-1]["images_per_second"] > 0
    assert found["waited"] == max(0, 1 - found["images_per_second"] / model["images_per_second"]["step"])
    assert figures["args"]["fused_se"]
    assert figures["machine"]["torch"] == torch.__version__.partition("+")[0]
