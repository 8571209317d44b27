"""`engine.train` and `engine.evaluate` from end to end on small image folders."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.metrics import f1_score

from engine import evaluate, train
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.cli import run
from engine.models import create_model
from engine.run import RunDirectory
from tests.image_folders import write_folder

FLAGS = ("--model", "seresnet18", "--img-size", "32", "-b", "8", "-j", "2", "--warmup-epochs", "0", "--lr", "2e-3")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), {"blue": 24, "green": 12, "red": 6})


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """A run of three epochs with fused tails."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    flags = (*FLAGS, "--epochs", "3", "--fused-se", "--keep-epochs")
    assert run(train.main, ["--data-dir", str(folder), *flags, "--output", str(output)]) == 0
    return output


def rows(run_dir: Path) -> list[dict[str, str]]:
    """summary.csv without what a clock says."""
    with (run_dir / "summary.csv").open() as file:
        timed = ("images_per_second", "data_wait", "seconds")
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoint)["model"]


def assert_equal_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_run_directory_is_complete_and_the_network_has_learnt(finished):
    for name in (
        "args.yaml",
        "about.json",
        "summary.csv",
        "metrics.json",
        "last.pt",
        "best.pt",
        "curves.png",
        "confusion_matrix.png",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert not list(finished.rglob("*.unfinished"))
    assert [row["epoch"] for row in rows(finished)] == ["0", "1", "2"]
    assert len(list((finished / "epochs").iterdir())) == 3
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["split"] == "test"
    assert metrics["macro_f1"] > 0.9
    assert sum(map(sum, metrics["confusion_matrix"])) == 12


def test_best_epoch_is_chosen_on_validation_never_on_test(finished):
    scores = [(float(row["val_macro_f1"]), -float(row["val_loss"])) for row in rows(finished)]
    assert load_checkpoint(finished / "best.pt")["epoch"] == scores.index(max(scores))


def test_fused_and_eager_make_the_same_checkpoint(finished):
    expected = {name: t.shape for name, t in create_model("seresnet18", num_classes=3).state_dict().items()}
    assert {name: t.shape for name, t in weights(finished / "best.pt").items()} == expected


@pytest.mark.parametrize(
    ("flags", "line"),
    (
        ((), None),
        (("--fused-se",), "9 tails fused, 8 of them with SE"),
        (("--fused-se", "--fused-scope", "block"), "8 SE modules fused"),
    ),
    ids=("eager", "tail", "block"),
)
def test_evaluate_gives_the_figures_of_the_run(finished, tmp_path, capsys, flags, line):
    output = tmp_path / "metrics.json"
    # without the flag the module is whatever the run had, so the eager one needs a run that never had it
    checkpoint = load_checkpoint(finished / "best.pt")
    checkpoint["args"]["fused_se"] = False
    save_checkpoint(tmp_path / "best.pt", {k: v for k, v in checkpoint.items() if k != "format"})
    assert run(evaluate.main, [str(tmp_path / "best.pt"), *flags, "--output", str(output)]) == 0
    expected = json.loads((finished / "metrics.json").read_text())
    got = json.loads(output.read_text())
    assert got["confusion_matrix"] == expected["confusion_matrix"]
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    printed = capsys.readouterr().out
    assert line is None or line in printed.splitlines()
    assert ("fused" in printed) == (line is not None)
    assert "Confusion matrix" in printed
    assert all(name in printed for name in ("blue", "green", "red"))


def test_evaluate_on_another_folder_a_csv_and_a_kept_epoch(finished, folder, tmp_path):
    manifest = tmp_path / "some.csv"
    files = sorted((folder / "test").rglob("*.jpg"))[2:]
    manifest.write_text("filename,label\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
    output = tmp_path / "csv.json"
    assert run(evaluate.main, [str(finished), "--csv", str(manifest), "--epoch", "0", "--output", str(output)]) == 0
    got = json.loads(output.read_text())
    truth = [label for label, row in enumerate(got["confusion_matrix"]) for _ in range(sum(row))]
    predicted = [column for row in got["confusion_matrix"] for column, n in enumerate(row) for _ in range(n)]
    assert len(truth) == len(files)
    assert got["epoch"] == 0
    assert got["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))


def test_args_yaml_is_a_recipe_that_repeats_the_run(finished, tmp_path):
    again = tmp_path / "again"
    assert run(train.main, ["--recipe", str(finished / "args.yaml"), "--output", str(again)]) == 0
    assert rows(again) == rows(finished)
    assert_equal_weights(again / "last.pt", finished / "last.pt")


def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "engine.train", *argv],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", ("while the second checkpoint is written", "between two checkpoints"))
def test_killed_run_resumes_to_the_very_same_end(folder, finished, tmp_path, moment):
    killed = tmp_path / "killed"
    process = start(
        "--data-dir", str(folder), *FLAGS, "--epochs", "3", "--fused-se", "--keep-epochs", "--output", str(killed)
    )
    unfinished = killed / ".last.pt.unfinished"
    try:
        while not (killed / "last.pt").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        while moment.startswith("while") and not unfinished.exists() and process.poll() is None:
            time.sleep(0.0005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    epochs_done = load_checkpoint(killed / "last.pt")["epoch"] + 1
    assert epochs_done < 3, "the run was over before it was killed"
    assert run(train.main, ["--resume", str(killed)]) == 0
    assert rows(killed) == rows(finished)
    assert_equal_weights(killed / "last.pt", finished / "last.pt")
    assert_equal_weights(killed / "best.pt", finished / "best.pt")


def test_run_killed_before_its_first_checkpoint_says_how_to_start_again(finished, tmp_path, capsys):
    """What such a kill leaves: args.yaml, and perhaps a part of a checkpoint under its unfinished name."""
    (tmp_path / "args.yaml").write_bytes((finished / "args.yaml").read_bytes())
    (tmp_path / ".last.pt.unfinished").write_bytes((finished / "last.pt").read_bytes()[:1000])
    assert run(train.main, ["--resume", str(tmp_path)]) == 2
    assert f"--recipe {tmp_path / 'args.yaml'}" in capsys.readouterr().err


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.ones(3)}, "epoch": 1})

    def half_a_write(state, target, *args):
        Path(target).write_bytes(b"PK half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half_a_write)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"model": {"w": torch.zeros(3)}, "epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1


def stop_after_one_epoch(argv: list[str], monkeypatch) -> None:
    """Runs ``argv`` as far as the end of its next epoch, and there it is interrupted."""
    write = RunDirectory.write_history

    def written_and_interrupted(*args):
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_history", written_and_interrupted)
        assert run(train.main, argv) == 130


FUSED, EAGER = ("--fused-se",), ("--no-fused-se",)
# SGD, whose steps a rounding does not turn round, as it does those of Adam where a gradient is nearly zero
STEADY = (*FLAGS, "--opt", "sgd", "--sched", "constant", "--epochs", "3")


@pytest.fixture(scope="module")
def eager_throughout(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "eager"
    assert run(train.main, ["--data-dir", str(folder), *STEADY, "--output", str(output)]) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages", ((EAGER, FUSED, EAGER), (FUSED, EAGER, (*FUSED, "--fused-scope", "block"))), ids=("eager", "fused")
)
def test_a_run_goes_on_eager_or_fused_from_the_checkpoint_of_the_other(
    folder, eager_throughout, tmp_path, monkeypatch, stages
):
    """Each epoch in another way than the one before: the losses are those of a run that is eager throughout."""
    mixed = tmp_path / "mixed"
    stop_after_one_epoch(["--data-dir", str(folder), *STEADY, *stages[0], "--output", str(mixed)], monkeypatch)
    stop_after_one_epoch(["--resume", str(mixed), *stages[1]], monkeypatch)
    assert run(train.main, ["--resume", str(mixed), *stages[2]]) == 0
    for eager_row, mixed_row in zip(rows(eager_throughout), rows(mixed), strict=True):
        for loss in ("train_loss", "val_loss"):
            assert float(mixed_row[loss]) == pytest.approx(float(eager_row[loss]), rel=1e-3), (eager_row, mixed_row)


@pytest.mark.slow
def test_digits_are_the_data_when_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "digits"
    flags = ("--model", "seresnet18", "--epochs", "2", "--warmup-epochs", "0", "--fused-se")
    assert run(train.main, [*flags, "--output", str(output)]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert [metrics["per_class"][str(digit)]["support"] for digit in range(10)] == [40] * 10
    assert metrics["auroc_macro_ovr"] > 0.75  # at random it would be 0.5
    assert yaml.safe_load((output / "args.yaml").read_text())["img_size"] == 32


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_mixed_precision_trains(folder, tmp_path, dtype):
    output = tmp_path / dtype
    flags = ("--amp", "--amp-dtype", dtype, "--epochs", "1", "--opt", "sgd", "--clip-grad", "1", "--fused-se")
    assert run(train.main, ["--data-dir", str(folder), *FLAGS, *flags, "--output", str(output)]) == 0
    assert 0 < float(rows(output)[0]["train_loss"]) < 3
    scale = load_checkpoint(output / "last.pt")["scaler"].get("scale")
    assert (scale is not None) == (dtype == "float16")


def test_early_stopping_ends_the_run(folder, tmp_path):
    output = tmp_path / "stopped"
    # a step this small changes no prediction; the running statistics still move, and with them the loss
    flags = ("--epochs", "30", "--early-stopping-patience", "2", "--eval-metric", "accuracy", "--opt", "sgd")
    argv = ["--data-dir", str(folder), *FLAGS[:-2], *flags, "--lr", "1", "--output", str(output)]
    assert run(train.main, argv) == 0
    done = rows(output)
    assert len(done) < 30
    scores = [(float(row["val_accuracy"]), -float(row["val_loss"])) for row in done]
    assert len(done) - 1 - scores.index(max(scores)) == 2
