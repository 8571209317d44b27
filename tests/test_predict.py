"""``engine.predict``: what evaluation's model says of each image, a row for each, bad ones with the reason."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import predict
from engine.build import make_eval_loader
from engine.checkpoint import load_checkpoint
from engine.cli import run
from engine.config import Config
from engine.data import IMAGENET_MEAN, IMAGENET_STD, Samples, decoded, open_samples
from engine.data.check import probe_files
from engine.data.decode import decode_image
from engine.data.decoded import open_decoded
from engine.data.listing import printable
from engine.data.probe import Probe
from engine.data.unlabelled import find_images
from engine.device import Precision
from engine.errors import UserError
from engine.models import create_model
from tests.checkpoints import NAMES, write_checkpoint
from tests.data_helpers import CPU, picture, save
from tests.image_corpus import WIDTH, make_bad, make_good
from tests.image_folders import write_folder


def model_of(checkpoint: Path) -> torch.nn.Module:
    model = create_model("seresnet18", num_classes=len(NAMES))
    model.load_state_dict(load_checkpoint(checkpoint)["model"])
    return model.eval()


def predicted(*argv: str | Path, status: int = 0) -> list[dict[str, str]]:
    """The rows of what the command writes, after its exit status was seen to be ``status``."""
    arguments = [str(argument) for argument in argv]
    assert run(predict.main, arguments) == status
    output = Path(arguments[arguments.index("--output") + 1])
    assert [path for path in output.parent.iterdir() if "unfinished" in path.name] == []
    with output.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def probabilities(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([[row[f"prob_{name}"] for name in NAMES] for row in rows], dtype=np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.pt", img_size=16, batch_size=4)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate(("b.png", "a.jpg", "sub/c.bmp", "sub/a/d.png", "notes.txt")):
        save(tmp_path / "images" / name, picture(20, 24, seed=i), format="PNG")
    return tmp_path / "images"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")  # Pillow's, of a file made so
def test_the_whole_corpus_is_predicted_or_listed(tmp_path, capsys):
    """The images are shown at their own size, so that the reference decoder's pixels are what the model sees."""
    good, bad = make_good(tmp_path / "x" / "good"), make_bad(tmp_path / "x" / "bad")
    checkpoint = write_checkpoint(tmp_path / "best.pt", img_size=WIDTH)
    rows = predicted(checkpoint, tmp_path / "x", "--output", tmp_path / "new" / "p.csv", status=1)
    assert list(rows[0]) == ["filename", "prediction", *(f"prob_{name}" for name in NAMES), "error"]
    expected = sorted(file.path for file in [*good, *bad])
    assert [row["filename"] for row in rows] == [printable(path) for path in expected]

    of = {row["filename"]: row for row in rows}
    told = capsys.readouterr().err
    for file in bad:
        row = of[file.path]
        reason = "named like an image" if file.path.endswith("folder.png") else file.reason
        assert reason in row["error"], file.path
        assert row["error"]
        assert f"not predicted: {file.path}: {row['error']}\n" in told
        assert {value for key, value in row.items() if key not in ("filename", "error")} == {""}

    model = model_of(checkpoint)
    for file in good:
        row = of[printable(file.path)]
        shown = torch.from_numpy(decode_image(file.path).copy()).permute(2, 0, 1) / 255
        shown = (shown - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
        with torch.inference_mode():
            wanted = model(shown[None]).softmax(dim=1)[0].numpy()
        found = probabilities([row])[0]
        tolerance = 1e-4 if file.pixels is not None else 0.02  # JPEG decoders differ by two levels
        np.testing.assert_allclose(found, wanted, atol=tolerance, err_msg=file.path)
        assert row["prediction"] == NAMES[found.argmax()]
        assert row["error"] == ""
    exact = probabilities([of[printable(file.path)] for file in good if file.pixels is not None])
    assert np.ptp(exact, axis=0).max() > 0.01  # not the same answer whatever is shown


def test_probabilities_are_those_that_evaluation_scores(tmp_path):
    """Bit for bit, with a central crop, fused tails, half precision and a last batch that is not full."""
    options = {"img_size": 16, "batch_size": 4, "crop_pct": 0.7, "fused_se": True, "amp": True}
    folder = write_folder(tmp_path / "data", {"blue": 1, "red": 1}, test=3)
    checkpoint = write_checkpoint(tmp_path / "run" / "best.pt", **options)
    rows = predicted(checkpoint.parent, folder / "test", "--output", tmp_path / "p.csv")

    config = Config.from_mapping(load_checkpoint(checkpoint)["args"], "it")
    samples = open_samples(NAMES, data_dir=folder)
    precision = Precision(CPU, config.amp, config.amp_dtype)
    loader = make_eval_loader(samples, config, CPU, precision)
    model, _ = predict.restore(load_checkpoint(checkpoint), config, CPU)
    with torch.inference_mode(), precision.autocast():
        logits = torch.cat([model(images).float() for images, _ in loader.epoch(0)])
    assert [row["filename"] for row in rows] == list(samples.files)
    assert len(rows) == 6
    np.testing.assert_array_equal(probabilities(rows), logits.softmax(dim=1).numpy())


def test_what_is_predicted_leaves_nothing_in_the_cache_of_a_runs_pixels(images, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "cache_folder", lambda: tmp_path / "cache")
    found = find_images([str(images)])
    own = Samples(tuple(found.names)[:2], np.zeros(2, dtype=np.int64), ("a",))
    open_decoded(own, workers=1, admit=lambda *_: None)
    of_runs = list((tmp_path / "cache" / "decoded").iterdir())
    model = create_model("seresnet18", num_classes=len(NAMES)).eval()
    config = Config(img_size=16, amp=False, workers=1, data_backend="resident")
    assert not predict.predict(model, NAMES, found, config, CPU).reasons
    assert list((tmp_path / "cache" / "decoded").iterdir()) == of_runs != []


def test_files_come_as_given_and_folders_sorted(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["images/sub/c.bmp", "images", str(images / "notes.txt"), "images/sub/../b.png"]
    found = find_images(given)
    assert list(found.names.values()) == [
        *("images/sub/c.bmp", "images/a.jpg", "images/b.png", "images/sub/a/d.png"),  # c.bmp once
        *(str(images / "notes.txt"), "images/sub/../b.png"),
    ]
    assert [Path(file).resolve() for file in found.names] == [
        images / name for name in ("sub/c.bmp", "a.jpg", "b.png", "sub/a/d.png", "notes.txt", "b.png")
    ]
    monkeypatch.chdir(images)
    assert list(find_images(["."]).names.values()) == ["a.jpg", "b.png", "sub/a/d.png", "sub/c.bmp"]


def test_links_out_of_a_folder_are_not_followed_unless_allowed(images, tmp_path):
    outside = save(tmp_path / "outside" / "x.png", picture(9, 9))
    (images / "link.png").symlink_to(outside)
    (images / "sub" / "linked").symlink_to(tmp_path / "outside")
    (images / "loop").symlink_to(images)
    (images / "inside.png").symlink_to("b.png")
    found = find_images([str(images)])
    assert {Path(file.path).name: file.reason for file in found.bad} == {
        "link.png": f"link to {outside}, outside of {images}",
        "linked": f"link to {tmp_path / 'outside'}, outside of {images}",
    }
    assert len(found.names) == 7
    allowed = find_images([str(images)], allow_links=True)
    assert allowed.bad == ()
    assert str(images / "sub" / "linked" / "x.png") in allowed.names
    assert find_images([str(images / "link.png")]).bad == ()  # named by the user


def test_a_file_that_goes_bad_after_the_check_is_listed(images, tmp_path, checkpoint, monkeypatch):
    (images / "b.png").write_bytes(b"no image")
    probed = probe_files

    def before_it_went_bad(files, *, workers):
        found = probed(files, workers=workers)
        return [Probe(None) if file.endswith("b.png") else found[i] for i, file in enumerate(files)]

    monkeypatch.setattr(predict, "probe_files", before_it_went_bad)
    rows = predicted(checkpoint, images, "--output", tmp_path / "p.csv", status=1)
    assert [row["error"].partition(" (")[0] for row in rows] == ["", "not an image of a known kind", "", ""]
    assert [row["prediction"] == "" for row in rows] == [False, True, False, False]


def test_nothing_that_can_be_read_is_still_a_table(tmp_path, checkpoint, capsys):
    (tmp_path / "x.png").touch()
    rows = predicted(checkpoint, tmp_path / "x.png", "--output", tmp_path / "p.csv", status=1)
    assert [row["error"] for row in rows] == ["empty file"]
    assert "(not predicted)       1" in capsys.readouterr().out


def refused(capsys, *argv: str | Path) -> str:
    capsys.readouterr()
    assert run(predict.main, [str(argument) for argument in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_mistakes_are_named_in_one_line(images, tmp_path, checkpoint, capsys):
    output = ("--output", tmp_path / "p.csv")
    assert "nowhere.png does not exist: name images" in refused(capsys, checkpoint, "nowhere.png", *output)
    (tmp_path / "empty").mkdir()
    assert "empty holds no image (jpg " in refused(capsys, checkpoint, images, tmp_path / "empty", *output)
    assert "holds no best.pt" in refused(capsys, images, images, *output)
    assert "a.jpg: not readable as a checkpoint" in refused(capsys, images / "a.jpg", images, *output)
    assert "required: --output" in refused(capsys, checkpoint, images)
    assert "images: is a folder" in refused(capsys, checkpoint, images, "--output", images)
    assert "cannot make its folder (File exists" in refused(
        capsys, checkpoint, images, "--output", images / "a.jpg" / "p.csv"
    )
    assert not output[1].exists()


def test_a_table_is_replaced_by_force_alone(images, tmp_path, checkpoint, capsys):
    table = tmp_path / "p.csv"
    table.write_text("precious")
    assert "p.csv: exists; name another file, or add --force" in refused(capsys, checkpoint, images, "--output", table)
    assert table.read_text() == "precious"
    assert len(predicted(checkpoint, images, "--output", table, "--force")) == 4


def test_what_is_not_a_number_is_no_prediction(images, tmp_path, checkpoint):
    model = model_of(checkpoint)
    torch.nn.init.constant_(model.fc.bias, float("nan"))
    config = Config(img_size=16, amp=False, workers=1)
    with pytest.raises(UserError, match=r"a\.jpg is not a number"):
        predict.predict(model, NAMES, find_images([str(images)]), config, CPU)
