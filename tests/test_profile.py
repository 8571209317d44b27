"""``engine.profile``: what it counts is right, what it times is what runs, and the file holds what is printed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine import profile
from engine.cli import run
from engine.config import Config
from engine.data_profile import _worker_seconds
from engine.device import Precision
from engine.ema import ModelEma
from engine.head_specs import plain_specs, read_head_specs
from engine.heads import restore_heads
from engine.mixing import Mixing
from engine.model_profile import count_arithmetic, saved_storages, time_training
from engine.models import create_model
from tests.data_helpers import CPU, make_folder, make_samples

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
    counted = count_arithmetic(Config(model="resnet50"), 2)
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


def test_arithmetic_is_that_of_the_heads_and_of_what_is_not_frozen():
    specs = {"diagnosis": {"hidden": 16}, "kind": {}}
    heads = restore_heads(Config(heads=specs), {"diagnosis": ("a", "b"), "kind": ("c", "d", "e")})
    config = Config(model="resnet18", img_size=32, heads=specs, freeze_until="layer4")
    counted = count_arithmetic(config, 4, heads)
    assert counted.by_layer["heads.diagnosis"] == 2 * (512 * 16 + 16 * 2)
    assert counted.by_layer["heads.kind"] == 2 * 512 * 3
    assert counted.forward == sum(counted.by_layer.values())
    # of weights, and of a hidden layer's output; what lies below is frozen
    backward = 2 * (512 * 16 + 512 * 3) + 2 * 2 * 16 * 2
    assert counted.training == counted.forward + backward


def test_a_step_is_timed_with_all_that_a_run_does_in_one(monkeypatch):
    averaged, mixed = [], []
    monkeypatch.setattr(ModelEma, "update", lambda self, model: averaged.append(model))
    mix = Mixing.__call__
    monkeypatch.setattr(Mixing, "__call__", lambda self, *batch: mixed.append(batch) or mix(self, *batch))
    options = {"model_ema": True, "mixup": 0.2, "l2_loss": 0.5, "opt": "sgd", "weight_decay": 0.0}
    config = Config(img_size=4, batch_size=3, warmup_epochs=0, **options)
    model = Net()
    model.unread = nn.Parameter(torch.ones(2))
    time_training(model, nn.CrossEntropyLoss(), 2, config, CPU, Precision(CPU, False, "bfloat16"), seconds=0.01)
    assert len(averaged) >= 5
    assert len(mixed) == len(averaged) + 1  # once for the bytes that are kept
    assert (model.unread < 1).all()  # by the gradient of its square alone


def test_a_model_with_heads_is_profiled(tmp_path, capsys):
    specs = {"first": {"classes": {"a": ["a"], "other": ["b", "c"]}}, "second": {"when": {"first": "other"}}}
    config = Config(heads=plain_specs(read_head_specs(specs)), model="resnet18", img_size=32, batch_size=2, mixup=0.2)
    samples = make_samples(tmp_path, [3, 3, 3])
    samples = dataclasses.replace(samples, class_names=("a", "b", "c"))
    figures = profile._profile_model(config, samples, CPU, Precision(CPU, False, "bfloat16"), seconds=0.01)
    assert figures["layers"]["heads.second"]["parameters"] == 513 * 3
    assert figures["layers"]["heads.second"]["forward_milliseconds"] > 0
    assert "resnet18, heads first, second, on cpu" in capsys.readouterr().out


def test_parameters_of_resnet50_with_two_classes():
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
    precision = Precision(CPU, False, "bfloat16")
    times = time_training(model, nn.CrossEntropyLoss(), 2, config, CPU, precision, seconds=0.01)
    assert times.forward_by_layer["slow"] >= 40
    assert times.forward_by_layer["idle"] == 0
    assert times.step.p20 >= times.phases["forward"].p20 >= 40
    assert times.phases["backward"].p20 > 0
    assert not torch.equal(model.quick.weight, before)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.children())


def test_model_and_pipeline_of_a_fused_run(tmp_path, capsys):
    folder = make_folder(tmp_path / "images", {"a": 30, "b": 10})
    figures = profiled(tmp_path, "--data-dir", folder, "--model", "seresnet18", "--fused-se")
    printed = capsys.readouterr().out
    model = figures["model"]
    expected = count_arithmetic(Config(model="seresnet18", img_size=32), 2)
    assert (model["forward_flops"], model["training_flops"]) == (expected.forward, expected.training)
    assert model["forward_macs"] == expected.forward // 2
    assert sum(layer["parameters"] for layer in model["layers"].values()) == model["parameters"]
    assert f"{model['parameters']:,}" in printed
    assert "9 tails fused, 8 of them with SE" in printed
    assert "the two share the CPU" in printed
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


def test_the_model_alone_without_data(tmp_path, capsys):
    figures = profiled(tmp_path, "--num-classes", "3", "--model", "resnet18", "--no-channels-last")
    assert figures["model"]["parameters"] == 11_178_051
    assert "data" not in figures
    assert figures["args"]["hflip"] == 0.3  # not the digits' recipe
    printed = capsys.readouterr().out
    assert "resnet18, 3 classes" in printed
    assert "NCHW" in printed
    assert "would wait" not in printed


def test_the_pipeline_alone_of_arrays(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {f"{part}_images": rng.integers(0, 256, (32, 6, 6, 3), dtype=np.uint8) for part in ("train", "val")}
    labels = {f"{part}_labels": np.arange(32)[:, None] % 2 for part in ("train", "val")}
    np.savez(tmp_path / "set.npz", **arrays, **labels)
    figures = profiled(tmp_path, "--data-only", "--data-dir", tmp_path / "set.npz", "--data-backend", "dali", "dali")
    stages = {stage["name"]: stage for stage in figures["data"]["stages"]}
    assert list(stages) == ["draws, in Python", "dali, without augmentation", "dali"]
    assert all(stage["images_per_second"] > 0 for stage in stages.values())
    assert "waited" not in figures["data"]["pipelines"]["dali"]
    assert "model" not in figures
    printed = capsys.readouterr().out
    assert "batches of 2 images of 32 px, 2 workers, for cpu" in printed
    assert f"{stages['dali']['images_per_second']:,.0f}" in printed


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell")
def test_cpu_time_of_workers_counts():
    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    try:
        deadline = time.monotonic() + 30
        while _worker_seconds() < 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        worker.kill()
        worker.join()
    assert _worker_seconds() == 0


def work() -> None:
    while True:
        pass


def test_mistakes_are_named(tmp_path, capsys):
    folder = make_folder(tmp_path / "images", {"a": 3, "b": 3})
    old = tmp_path / "old.json"
    old.write_text("kept")
    assert f"--output {old}: exists; name another file, or add --force" in refused(capsys, "--output", old)
    assert "--seconds 0 does not work" in refused(capsys, "--seconds", "0")
    assert "--data-backend: invalid choice: 'fast'" in refused(capsys, "--data-backend", "fast")
    assert "--num-classes 7, but the data has 2" in refused(capsys, "--data-dir", folder, "--num-classes", "7")
    assert "nowhere does not exist" in refused(capsys, "--data-dir", tmp_path / "nowhere", "--data-only")
    assert "--model alexnet" in refused(capsys, "--model", "alexnet", "--num-classes", "2")
    assert "--num-classes 0" in refused(capsys, "--num-classes", "0")
    assert "--fused-scope block does nothing" in refused(capsys, "--num-classes", "2", "--fused-scope", "block")
    assert old.read_text() == "kept"
