"""Every mistake a user can make: one line that names it and says what to do, exit status 2, nothing written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import evaluate, train
from engine.cli import run
from tests.image_folders import COLOURS, write_folder, write_image

ROOT = Path(__file__).parent.parent
QUICK = ("--model", "seresnet18", "--img-size", "32", "-b", "4", "-j", "2", "--epochs", "1", "--warmup-epochs", "0")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("good"), {"blue": 6, "red": 4}, test=2)


@pytest.fixture(scope="module")
def finished(good, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    assert run(train.main, ["--data-dir", str(good), *QUICK, "--output", str(output)]) == 0
    return output


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def refused(capsys, argv: list[str], main=train.main) -> str:
    """The one line that the command ends with; checks the exit status and that it made no file in its output."""
    capsys.readouterr()
    assert run(main, argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def train_refused(capsys, tmp_path, *argv: str) -> str:
    output = tmp_path / "never"
    line = refused(capsys, [*QUICK, "--output", str(output), *argv])
    assert not output.exists()
    return line


def test_missing_folder(capsys, tmp_path):
    assert f"{tmp_path / 'nowhere'} does not exist" in train_refused(
        capsys, tmp_path, "--data-dir", str(tmp_path / "nowhere")
    )


def test_empty_folder(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in train_refused(capsys, tmp_path, "--data-dir", str(tmp_path / "empty"))


def test_class_without_an_image(capsys, tmp_path, copy):
    (copy / "train" / "green").mkdir()
    line = train_refused(capsys, tmp_path, "--data-dir", str(copy))
    assert str(copy / "train" / "green") in line


def test_unknown_label_in_a_csv(capsys, tmp_path, good):
    images = sorted((good / "train").rglob("*.png"))
    (tmp_path / "train.csv").write_text("filename,label\n" + "".join(f"{p},{p.parent.name}\n" for p in images))
    (tmp_path / "test.csv").write_text(f"filename,label\n{images[0]},purple\n")
    line = train_refused(
        capsys, tmp_path, "--csv", str(tmp_path / "train.csv"), "--test-csv", str(tmp_path / "test.csv")
    )
    assert "test.csv, line 2" in line
    assert "purple" in line
    assert "blue, red" in line


def test_file_listed_but_absent(capsys, tmp_path):
    (tmp_path / "train.csv").write_text("filename,label\nghost.png,blue\nghost2.png,red\n")
    assert "ghost.png" in train_refused(capsys, tmp_path, "--csv", str(tmp_path / "train.csv"))


def test_too_many_unreadable_images(capsys, tmp_path, copy):
    (copy / "train" / "blue" / "000.png").write_bytes(b"not a picture")
    line = train_refused(capsys, tmp_path, "--data-dir", str(copy))
    assert "000.png" in line
    assert "--max-bad-fraction" in line


def test_few_unreadable_images_are_named_and_left_out(capsys, tmp_path, copy):
    bad = copy / "train" / "blue" / "000.png"
    bad.write_bytes(bad.read_bytes()[:100])
    argv = [*QUICK, "--data-dir", str(copy), "--output", str(tmp_path / "run"), "--max-bad-fraction", "0.2"]
    assert run(train.main, argv) == 0
    assert f"left out: {bad}" in capsys.readouterr().err


def test_wrong_num_classes(capsys, tmp_path, good):
    line = train_refused(capsys, tmp_path, "--data-dir", str(good), "--num-classes", "5")
    assert "--num-classes 5, but the data has 2 classes (blue, red)" in line


def test_class_weights_for_another_number_of_classes(capsys, tmp_path, good):
    line = train_refused(capsys, tmp_path, "--data-dir", str(good), "--class-weights", "1", "2", "3")
    assert "--class-weights 1 2 3: 3 of them, but the data has 2 classes" in line


def test_weights_of_another_model(capsys, tmp_path, good):
    from torchvision.models import resnet34

    weights = tmp_path / "resnet34.pth"
    torch.save(resnet34().state_dict(), weights)
    line = train_refused(capsys, tmp_path, "--data-dir", str(good), "--pretrained-path", str(weights))
    assert str(weights) in line
    assert "resnet34" in line


def test_file_that_is_no_checkpoint(capsys, tmp_path, good):
    for noise in (b"noise", b"junk", b"hello", b""):  # each fails in its own way
        (tmp_path / "noise.pt").write_bytes(noise)
        assert "noise.pt: not readable" in refused(capsys, [str(tmp_path / "noise.pt")], evaluate.main)
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    assert "not a checkpoint of engine.train" in refused(capsys, [str(tmp_path / "other.pt")], evaluate.main)
    assert "no such checkpoint" in refused(capsys, [str(tmp_path / "none.pt")], evaluate.main)


def test_evaluating_classes_the_model_does_not_know(capsys, tmp_path, finished):
    write_image(tmp_path / "images" / "green" / "0.png", COLOURS["green"], seed=0)
    line = refused(capsys, [str(finished), "--data-dir", str(tmp_path / "images")], evaluate.main)
    assert "--data-dir is empty" in refused(capsys, [str(finished), "--data-dir", ""], evaluate.main)
    assert "'green'" in line
    assert "blue, red" in line


def test_epoch_that_was_not_kept(capsys, finished):
    assert "--keep-epochs" in refused(capsys, [str(finished), "--epoch", "3"], evaluate.main)


def test_metrics_file_is_not_overwritten(capsys, tmp_path, finished):
    (tmp_path / "mine.json").write_text("precious")
    line = refused(capsys, [str(finished), "--output", str(tmp_path / "mine.json")], evaluate.main)
    assert "mine.json: exists" in line
    assert (tmp_path / "mine.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (("--fuesd-se",), "--fuesd-se"),
        (("--recipe", "cifar"), "--recipe cifar: no such recipe; name a YAML file or one of: "),
        (("--lr", "fast"), "--lr"),
        (("--lr", "-1"), "--lr -1.0 does not work"),
        (("--epochs", "0"), "--epochs 0"),
        (("--model", "resnet9000"), "--model resnet9000"),
        (("--opt", "lion"), "--opt"),
        (("--eval-metric", "vibes"), "--eval-metric vibes"),
        (("--eval-metric", "f1", "--recipe", "digits"), "--eval-metric f1: only for two classes"),
        (("--val-fraction", "1.5"), "--val-fraction 1.5"),
        (("--data-dir", ""), "--data-dir is empty: name a file or folder"),
        (("--test-method", "first"), "--test-method first does nothing without --test-fraction"),
        (("--warmup-epochs", "9"), "--warmup-epochs 9"),
        (("--seed", str(2**64)), "--seed 18446744073709551616 does not work: it must be at least 0 and below 2^63"),
        (("--device", "tpu"), "--device tpu"),
        (("--loss", "hinge"), "--loss"),
        (("--focal-gamma", "-1"), "--focal-gamma -1.0 does not work"),
        (("--drop", "1"), "--drop 1.0 does not work"),
        (("--model-ema-decay", "1.5"), "--model-ema-decay 1.5 does not work"),
        (("--class-weights", "even"), "class_weights: ['even'] must be one of none, balanced, sqrt, effective"),
        (("--class-weights", "1", "0"), "--class-weights 1.0 0.0 does not work: it must be one of none"),
        (("--drw-epoch", "1"), "--drw-epoch 1 does nothing without --class-weights"),
        (
            ("--drw-epoch", "1", "--class-weights", "effective"),
            "--drw-epoch 1 does not work: it must be below --epochs",
        ),
        (("--loss", "ldam", "--mixup", "0.2"), "--loss ldam does not go with --mixup 0.2"),
        (("--loss", "ldam", "--smoothing", "0.1"), "--loss ldam does not go with --smoothing 0.1"),
    ),
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_flags(capsys, tmp_path, flags, message):
    assert message in train_refused(capsys, tmp_path, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_where_there_is_none(capsys, tmp_path, good):
    assert "--device cuda" in train_refused(capsys, tmp_path, "--data-dir", str(good), "--device", "cuda")


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("learning_rate: 1", "unknown option 'learning_rate'"),
        ("epoch: 3", "did you mean epochs?"),
        ("epochs: many", "epochs: 'many' must be of type int"),
        ("fused_se: 3", "fused_se: 3 must be true or false"),
        ("sched: step", "sched: 'step' must be one of cosine, constant"),
        ("- a list", "expected a mapping"),
        ("a: b: c", "not readable as YAML"),
    ),
)
def test_recipes(capsys, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    line = train_refused(capsys, tmp_path, "--recipe", str(tmp_path / "mine.yaml"))
    assert message in line
    assert "mine.yaml" in line


def test_directory_that_holds_a_run_is_never_overwritten(capsys, tmp_path, good, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    line = refused(capsys, [*QUICK, "--data-dir", str(good), "--output", str(finished)])
    assert f"--resume {finished}" in line
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_directory_that_holds_something_else_is_left_alone(capsys, tmp_path, good):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "not an empty directory" in refused(capsys, [*QUICK, "--data-dir", str(good), "--output", str(tmp_path)])
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_resuming_what_is_no_run(capsys, tmp_path):
    assert "no args.yaml there" in refused(capsys, ["--resume", str(tmp_path)])


def test_resuming_with_another_learning_rate(capsys, finished):
    assert "--lr 0.3 does not go with --resume" in refused(capsys, ["--resume", str(finished), "--lr", "0.3"])


@pytest.mark.parametrize("scope", ("block", "tail"))
def test_a_scope_of_a_fusion_that_was_not_asked_for(capsys, tmp_path, good, finished, scope):
    message = f"--fused-scope {scope} does nothing without --fused-se; add --fused-se or leave it out"
    assert message in train_refused(capsys, tmp_path, "--data-dir", str(good), "--fused-scope", scope)
    assert message in refused(capsys, ["--resume", str(finished), "--fused-scope", scope])
    assert message in refused(capsys, [str(finished), "--fused-scope", scope], evaluate.main)


def test_unknown_scope(capsys, tmp_path, good):
    line = train_refused(capsys, tmp_path, "--data-dir", str(good), "--fused-se", "--fused-scope", "wide")
    assert "--fused-scope" in line
    assert "block" in line
    assert "tail" in line


def test_resuming_on_other_images(capsys, tmp_path, copy):
    output = tmp_path / "run"
    assert run(train.main, [*QUICK, "--data-dir", str(copy), "--output", str(output)]) == 0
    write_image(copy / "train" / "red" / "new.png", COLOURS["red"], seed=99)
    assert "not those that the run began with" in refused(capsys, ["--resume", str(output)])


def test_the_command_itself_exits_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "engine.train", "--data-dir", str(tmp_path / "nowhere")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr
