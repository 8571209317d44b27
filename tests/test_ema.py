"""The average of the weights: timm's rules, fused networks, and a run that scores, keeps and resumes it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from engine import evaluate, train
from engine.checkpoint import load_checkpoint
from engine.cli import run
from engine.config import Config
from engine.device import Precision
from engine.ema import ModelEma
from engine.fusion import fuse
from engine.models import create_model
from engine.run import RunDirectory
from engine.step import make_training
from tests.image_folders import write_folder


def step(model: nn.Module, seed: int) -> None:
    """Moves every weight, and the running statistics by a forward pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.train()(torch.randn(2, 3, 16, 16, generator=generator))


@pytest.mark.parametrize("warmup", (False, True))
def test_the_average_is_timms(warmup):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    config = Config(model_ema=True, model_ema_decay=0.6, model_ema_warmup=warmup)
    ours = make_training(model, config, Precision(torch.device("cpu"), False, "bfloat16"), steps_per_epoch=1).ema
    timms = ModelEmaV3(model, decay=0.6, use_warmup=warmup)
    for update in range(1, 7):
        step(model, update)
        ours.update(model)
        timms.update(model, step=update)
        for (name, average), expected in zip(
            ours.module.state_dict().items(), timms.module.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(average, expected, msg=name)
    assert ours.module[1].num_batches_tracked == 6
    assert not ours.module.training


def test_a_fused_network_is_averaged_as_an_eager_one():
    """And apart from it: the average shares no tensor with what it follows."""
    torch.manual_seed(0)
    eager, fused = (create_model("seresnet18", num_classes=3) for _ in range(2))
    fused.load_state_dict(eager.state_dict())
    fuse(fused, Config(model="seresnet18"))
    averages = [ModelEma(model, 0.7) for model in (eager, fused)]
    for update in range(3):
        step(eager, update)
        fused.load_state_dict(eager.state_dict())
        for average, model in zip(averages, (eager, fused), strict=True):
            average.update(model)
    expected, got = (average.module for average in averages)
    assert got.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(got.state_dict()[name], t) for name, t in expected.state_dict().items())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(got(images), expected(images), rtol=1e-4, atol=1e-4)
    assert (got(images) - fused.eval()(images)).abs().max() > 1e-2


FLAGS = (
    *("--model", "resnet18", "--img-size", "16", "-b", "6", "-j", "1", "--warmup-epochs", "0", "--epochs", "2"),
    *("--opt", "adam", "--lr", "1e-3", "--drop", "0.5", "--loss", "ldam", "--class-weights", "effective"),
    *("--drw-epoch", "1", "--l2-loss", "1e-3", "--model-ema", "--model-ema-decay", "0.8", "--fused-se"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), {"blue": 14, "green": 6}, test=0)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert run(train.main, ["--data-dir", str(folder), *FLAGS, "--output", str(output)]) == 0
    return output


def test_a_run_of_an_average_resumes_to_the_very_same_end(folder, finished, tmp_path, monkeypatch, capsys):
    """With dropout, deferred weights and all: interrupted after its first epoch."""
    output = tmp_path / "interrupted"
    write = RunDirectory.write_history

    def written_and_interrupted(*args):
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_history", written_and_interrupted)
        assert run(train.main, ["--data-dir", str(folder), *FLAGS, "--output", str(output)]) == 130
    assert "warning: --sampling inverse and --class-weights effective" in capsys.readouterr().err
    assert run(train.main, ["--resume", str(output)]) == 0
    for name in ("best.pt", "last.pt"):
        expected, got = load_checkpoint(finished / name), load_checkpoint(output / name)
        for key in {"model", "raw_model"} & expected.keys():
            assert [k for k, t in expected[key].items() if not torch.equal(t, got[key][k])] == [], (name, key)


def test_the_average_is_what_is_scored_and_kept(finished, tmp_path):
    last = load_checkpoint(finished / "last.pt")
    assert any(not torch.equal(average, last["raw_model"][name]) for name, average in last["model"].items())
    assert "raw_model" not in load_checkpoint(finished / "best.pt")
    with (finished / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = json.loads((finished / "metrics.json").read_text())
    assert best["split"] == "validation"
    kept = (("last.pt", float(rows[-1]["val_loss"]), None), ("best.pt", best["loss"], "validation"))
    for name, expected, selected_on in kept:
        output = tmp_path / f"{name}.json"
        assert run(evaluate.main, [str(finished / name), "--output", str(output)]) == 0
        metrics = json.loads(output.read_text())
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5), name
        assert metrics["selected_on"] == selected_on
