"""``engine.load``: from Python, the answers that ``engine.predict`` writes."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import engine
from engine import load, predict
from engine.cli import run
from engine.errors import UserError
from kernels import tail_modules
from tests.checkpoints import NAMES, write_checkpoint
from tests.data_helpers import picture, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write_checkpoint(folder / "best.pt", img_size=16, batch_size=2, fused_se=True, crop_pct=0.9)


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return load(checkpoint.parent, device="cpu")


@pytest.fixture
def images(tmp_path) -> Path:
    """Three of one size, one of another and one that is none."""
    for i, name in enumerate(("b.png", "a.png", "sub/c.png", "sub/d.png")):
        save(tmp_path / "images" / name, picture(30 if name.endswith("d.png") else 20, 24, seed=i))
    (tmp_path / "images" / "sub" / "e.png").write_bytes(b"no image")
    return tmp_path / "images"


def test_files_are_predicted_as_by_the_command(images, checkpoint, classifier, tmp_path):
    """Bit for bit, fused tails and all."""
    table = tmp_path / "p.csv"
    assert run(predict.main, [str(checkpoint), str(images), "--output", str(table)]) == 1
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = classifier.predict(images)
    assert found.class_names == NAMES
    assert list(found.names) == [row["filename"] for row in rows]
    assert [name or "" for name in found.predictions] == [row["prediction"] for row in rows]
    assert [name if i >= 0 else None for i, name in zip(found.labels, found.predictions, strict=True)] == list(
        found.predictions
    )
    written = [[float(row[f"prob_{name}"] or "nan") for name in NAMES] for row in rows]
    np.testing.assert_array_equal(found.probabilities, np.float32(written))
    assert found.probabilities.dtype == np.float32
    assert np.nanmax(np.ptp(found.probabilities[:4], axis=0)) > 0.05  # not the same answer whatever is shown
    assert found.reasons == {4: rows[4]["error"]}
    assert found.labels[4] == -1


def test_files_arrays_and_pillow_images_are_seen_alike(images, classifier):
    """In the order given, each as often as it is given, whatever stands beside it."""
    paths = [images / "a.png", images / "b.png", images / "sub" / "c.png", images / "sub" / "d.png"]
    of_paths = classifier.predict(paths)
    assert of_paths.names == tuple(map(str, paths))
    a, b, c, d = (np.array(Image.open(path)) for path in paths)

    mixed = [d, str(paths[1]), Image.fromarray(a), images / "sub", b, paths[1], c]
    found = classifier.predict(mixed)
    order = [3, 1, 0, 2, 3, None, 1, 1, 2]
    assert found.names[:3] == ("images[0]", str(paths[1]), "images[2]")
    assert list(found.reasons) == [5]
    assert np.isnan(found.probabilities[5]).all()
    shown = [i for i, which in enumerate(order) if which is not None]
    wanted = of_paths.probabilities[[order[i] for i in shown]]
    np.testing.assert_allclose(found.probabilities[shown], wanted, atol=1e-6)
    assert found.labels[shown].tolist() == [of_paths.labels[order[i]] for i in shown]

    for one in (c, Image.fromarray(c), str(paths[2])):
        np.testing.assert_allclose(classifier.predict(one).probabilities, of_paths.probabilities[2:3], atol=1e-6)
    stacked = classifier.predict(np.stack([a, b, c]))
    np.testing.assert_allclose(stacked.probabilities, of_paths.probabilities[:3], atol=1e-6)
    nothing = classifier.predict([])
    assert (nothing.probabilities.shape, nothing.labels.shape, nothing.predictions) == ((0, 3), (0,), ())


def test_pillow_images_are_read_as_files_are(classifier, tmp_path):
    """Turned as EXIF says, grey of 16 bits by its full range; one that breaks off is listed."""
    turned = Image.Exif()
    turned[0x0112] = 6
    save(tmp_path / "turned.png", picture(20, 24), exif=turned)
    Image.fromarray(picture(20, 24)[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    whole = io.BytesIO()
    Image.fromarray(picture(20, 24)).save(whole, "PNG")
    paths = [tmp_path / "turned.png", tmp_path / "deep.png"]
    broken = Image.open(io.BytesIO(whole.getvalue()[:200]))
    found = classifier.predict([*map(Image.open, paths), broken])
    np.testing.assert_allclose(found.probabilities[:2], classifier.predict(paths).probabilities, atol=1e-6)
    assert list(found.reasons) == [2]
    assert "truncated" in found.reasons[2]
    assert found.predictions[2] is None


def test_fused_or_not_is_as_the_run_was_unless_told(checkpoint, classifier, images, capsys):
    assert "fused" in tail_modules(classifier.model).values()
    plain = load(checkpoint, device="cpu", fused_se=False)
    assert "fused" not in tail_modules(plain.model).values()
    assert capsys.readouterr().out == ""
    both = [either.predict(images / "a.png").probabilities for either in (plain, classifier)]
    np.testing.assert_allclose(*both, atol=1e-5)


def test_mistakes_are_named_in_one_line(classifier, images, checkpoint):
    array = picture(20, 24)
    for given, told in (
        ([array, array / 255], r"images\[1\] is an array \(20, 24, 3\) float64: give a path, a Pillow image or an"),
        (array[..., 0], r"images\[0\] is an array \(20, 24\) uint8"),
        ([array, None], r"images\[1\] is of type NoneType: give"),
        (7, r"images\[0\] is of type int"),
        ("nowhere.png", "nowhere.png does not exist"),
    ):
        with pytest.raises(UserError, match=told):
            classifier.predict(given)
    with pytest.raises(UserError, match=r"holds no best\.pt"):
        load(images)
    with pytest.raises(UserError, match="no such kind of device"):
        load(checkpoint, device="abacus")
    with pytest.raises(AttributeError, match="has no attribute 'save'"):
        _ = engine.save
