"""``engine.preview``: its tiles are the pixels that a run trains on, its figures those of the sampler."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from engine import preview
from engine.build import make_augmentation, make_eval_loader, make_sampler, make_train_loader, open_data
from engine.cli import run
from engine.command_line import parse_args
from engine.data import Loader, decoded
from engine.device import Precision
from engine.preview_picture import PAIRS, Balance, Row, draw_preview
from tests.array_files import write_npz
from tests.data_helpers import CPU, make_folder

SMALL = ("--img-size", "16", "-b", "4", "-j", "2", "--device", "cpu", "--no-amp")


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that were saved; coarsely, since that takes less time."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def remember(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, dpi=20, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


@pytest.fixture
def skewed(tmp_path) -> Path:
    return make_folder(tmp_path / "skewed", {"common": 15, "rare": 3})


def refused(capsys, *argv: str | Path) -> str:
    capsys.readouterr()
    assert run(preview.main, [*SMALL, *map(str, argv)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def pixels(loader: Loader, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """All images of an epoch, (n, H, W, 3) in [0, 1], and their labels."""
    batches = [(images.numpy().copy(), labels.numpy().copy()) for images, labels in loader.epoch(epoch)]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return np.clip(images.transpose(0, 2, 3, 1) * np.float32(loader.std) + np.float32(loader.mean), 0, 1), labels


def tiles(figure: Figure) -> np.ndarray:
    """(n, 2, H, W, 3): the pairs of a picture in the order of its lines."""
    shown = [np.asarray(image.get_array()) for image in figure.axes[1].images]
    return np.stack(shown).reshape(-1, 2, *shown[0].shape)


def table(printed: str) -> dict[str, list[float]]:
    lines = [line.split() for line in printed.splitlines() if line.count("  ") >= 3]
    return {name: [float(value) for value in values[:3]] for name, *values in lines[1:]}


def test_tiles_are_the_pixels_of_the_run(tmp_path, saved):
    folder = make_folder(tmp_path / "images", {"common": 15, "rare": 3, "some": 7})
    drawing = ("--minority-aug", "0.8", "--scale", "0.5", "1", "--reprob", "0.5", "--sampling", "sqrt", "--seed", "3")
    output = tmp_path / "new" / "preview.png"
    assert run(preview.main, [str(folder), *SMALL, *drawing, "--epoch", "1", "--output", str(output)]) == 0
    with Image.open(output) as picture:
        picture.load()
    assert round(saved[0].get_figwidth() * saved[0].dpi) == 1820

    config, _ = parse_args(["--data-dir", str(folder), *SMALL, *drawing])
    train, precision = open_data(config).train, Precision(CPU, False, "bfloat16")
    sampler, augmentation = make_sampler(train, config), make_augmentation(config)
    loader = make_train_loader(train, config, CPU, precision, sampler=sampler, augmentation=augmentation)
    drawn, labels = pixels(loader, epoch=1)
    plain, _ = pixels(make_eval_loader(train, config, CPU, precision), epoch=0)
    order = sampler.draw(1)
    places = [place for label in (0, 2, 1) for place in np.flatnonzero(labels == label)[:PAIRS]]
    shown = tiles(saved[0])
    assert len(shown) == len(places)
    np.testing.assert_allclose(shown[:, 0], plain[order[places]], atol=1e-6)
    np.testing.assert_allclose(shown[:, 1], drawn[places], atol=1e-6)
    assert np.abs(shown[:, 0] - shown[:, 1]).mean() > 0.02


def test_a_file_of_arrays_needs_no_flag(tmp_path, saved, capsys):
    file = write_npz(tmp_path / "arrays.npz", {"train": 12, "val": 6})
    assert run(preview.main, [str(file), *SMALL, "--output", str(tmp_path / "a.png")]) == 0
    assert table(capsys.readouterr().out).keys() == {"0", "1", "2", "total"}


def test_of_a_run_on_resident_images_no_set_is_left_in_the_cache(skewed, tmp_path, saved, monkeypatch):
    monkeypatch.setattr(decoded, "cache_folder", lambda: tmp_path / "cache")
    argv = [str(skewed), *SMALL, "--data-backend", "resident", "--output", str(tmp_path / "a.png")]
    assert run(preview.main, argv) == 0
    assert len(tiles(saved[0])) > PAIRS
    assert list((tmp_path / "cache" / "decoded").iterdir()) == []


def test_without_data_the_digits_and_their_balance(tmp_path, saved, capsys):
    assert run(preview.main, ["--output", str(tmp_path / "a.jpg"), "-j", "2", "--device", "cpu"]) == 0
    config, _ = parse_args([])
    train = open_data(config).train
    sampler = make_sampler(train, config)
    expected = np.stack([train.class_counts(), sampler.expected().round(1), sampler.histogram(0)], axis=1)
    found = table(capsys.readouterr().out)
    total = found.pop("total")
    np.testing.assert_allclose(list(found.values()), expected)
    assert total == [len(train), len(sampler), len(sampler)]

    bars, _ = saved[0].axes
    heights = [[bar.get_height() for bar in group] for group in bars.containers]
    np.testing.assert_array_equal(heights, expected[:, [0, 2]].T)
    assert [label.get_text() for label in bars.get_xticklabels()] == list(train.class_names)


def test_of_many_classes_the_largest_the_smallest_and_some_between(tmp_path, saved):
    folder = make_folder(tmp_path / "many", {f"c{i:02d}": count for i, count in enumerate([2] * 11 + [4, 1])})
    drawing = ("--epoch-size", "over", "--no-replacement")
    assert run(preview.main, [str(folder), *SMALL, *drawing, "--output", str(tmp_path / "a.png")]) == 0
    bars, rows = saved[0].axes
    assert len(bars.get_xticklabels()) == 13
    names = [text.get_text() for text in rows.texts if text.get_text().startswith("c")]
    assert len(names) == 10
    assert (names[0], names[-1]) == ("c11", "c12")


def test_a_bad_file_is_named_and_not_shown(skewed, tmp_path, saved, capsys):
    config, _ = parse_args(["--data-dir", str(skewed), *SMALL])
    train = open_data(config).train
    order = make_sampler(train, config).draw(0)[: len(train) // 4 * 4]
    bad = int(order[train.labels[order] == 1][0])
    Path(train.files[bad]).write_bytes(b"no image")
    assert run(preview.main, [str(skewed), *SMALL, "--output", str(tmp_path / "a.png")]) == 0
    assert f"left out: {train.files[bad]}: not an image" in capsys.readouterr().err
    common, rare = (np.sum((train.labels[order] == label) & (order != bad)) for label in (0, 1))
    assert len(tiles(saved[0])) == min(2 * PAIRS, common) + min(2 * PAIRS, rare)


def test_a_class_that_is_never_drawn_says_so(tmp_path, saved):
    folder = make_folder(tmp_path / "images", {"a": 4, "b": 4})
    rows = [
        f"{c}/{i:03d}.png,{c},{1 if c == 'a' else 0},{'val' if i == 3 else 'train'}" for c in "ab" for i in range(4)
    ]
    manifest = folder / "all.csv"
    manifest.write_text("\n".join(["filename,label,weight,split", *rows]))
    assert run(preview.main, [str(manifest), *SMALL, "--sampling", "column", "--output", str(tmp_path / "a.png")]) == 0
    texts = [text.get_text() for text in saved[0].axes[1].texts]
    assert "none of it is drawn in this epoch" in texts
    assert saved[0].texts[0].get_text().endswith("1 never drawn")
    assert {"3 images\n0 draws", "3 images\n6 draws, 2.0 of each"} <= set(texts)


def test_the_names_of_a_hundred_classes_do_not_overlap():
    counts = np.arange(100, 0, -1)
    balance = Balance(tuple(f"a class ${i}_{'x' * (i % 30)}" for i in range(100)), counts, counts / 2, counts // 2)
    figure = draw_preview(balance, [Row(0, *np.zeros((2, 1, 4, 4, 3)))], "")
    figure.draw_without_rendering()
    names = figure.axes[0].get_xticklabels()
    boxes = [name.get_window_extent() for name in names]
    assert len(boxes) == 100
    assert all(left.x1 <= right.x0 + 1 for left, right in pairwise(boxes))
    below = figure.axes[1].texts[0].get_window_extent()
    assert min(box.y0 for box in boxes) > below.y1


def test_mistakes_are_named(skewed, tmp_path, capsys):
    old = tmp_path / "old.png"
    old.write_text("kept")
    new = tmp_path / "new.png"
    assert f"--output {old}: exists; name another file, or add --force" in refused(capsys, skewed, "--output", old)
    assert "is a folder" in refused(capsys, skewed, "--output", tmp_path)
    assert "ends in one of .png" in refused(capsys, skewed, "--output", tmp_path / "folder" / "new.gif")
    assert "nowhere does not exist" in refused(capsys, tmp_path / "nowhere", "--output", new)
    assert "are two sources" in refused(capsys, skewed, "--data-dir", skewed, "--output", new)
    assert "by --data-dir" in refused(capsys, skewed, "--csv", "a.csv", "--output", new)
    assert "'-1' must be a whole number" in refused(capsys, skewed, "--epoch", "-1", "--output", new)
    assert "--num-classes 7" in refused(capsys, skewed, "--num-classes", "7", "--output", new)
    assert "--resume" in refused(capsys, skewed, "--resume", "run", "--output", new)
    assert "lr: 'much'" in refused(capsys, skewed, "--recipe", _recipe(tmp_path, "lr: much"), "--output", new)
    assert old.read_text() == "kept"
    assert not new.exists()
    assert not (tmp_path / "folder").exists()
    for image in skewed.rglob("*.png"):
        image.write_bytes(b"no image")
    assert "no image that an epoch draws can be read" in refused(capsys, skewed, "--output", new)


def _recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path
