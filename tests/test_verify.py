"""``engine.verify`` names what is wrong with every file; what has been seen to decode is not decoded again."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import pytest
from matplotlib.figure import Figure
from PIL import Image

import engine.data.check as check
from engine import split, verify
from engine.class_picture import save_class_counts
from engine.cli import run
from engine.data import Samples, check_images, verdicts
from engine.data.check import find_links_out
from tests.data_helpers import make_folder, make_samples, picture, save
from tests.odd_files import write_bad, write_good


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """The cache's folder, empty at the start of each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(verdicts, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def decoded(monkeypatch) -> Iterator[list[str]]:
    """The files that have been decoded, in the order of their names; clear it to count anew."""
    names: list[str] = []
    original = check.probe

    def counting(file: str) -> check.Probe:
        names.append(Path(file).name)
        names.sort()
        return original(file)

    monkeypatch.setattr(check, "probe", counting)
    return names


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "good", {"a": 4, "b": 2})


def verified(capsys, *argv: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    status = run(verify.main, [*map(str, argv), "-j", "2"])
    return status, capsys.readouterr().out


def refused(capsys, *argv: str | Path) -> str:
    capsys.readouterr()
    assert run(verify.main, [*map(str, argv)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def reasons(folder: Path) -> dict[str, str]:
    with (folder / "bad_files.csv").open(encoding="utf-8", newline="") as lines:
        return {Path(row["filename"]).name: row["reason"] for row in csv.DictReader(lines)}


# What it finds


def test_good_images_are_counted(good, tmp_path, capsys):
    save(good / "a" / "wide.jpg", picture(30, 50))
    save(good / "a" / "named_otherwise.png", picture(20, 20), format="BMP")
    save(good / "b" / "grey.png", picture(20, 20)[..., 0])
    status, printed = verified(capsys, good, "--output", tmp_path / "out")
    assert status == 0
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["9", "images,", "0", "bad"]
    assert ["a", "6", "6", "66.7%"] in lines
    assert ["total", "9", "9"] in lines
    assert ["width", "10", "10", "50"] in lines
    assert ["height", "12", "12", "30"] in lines
    assert "formats  PNG 7, BMP 1, JPEG 1 (1 named as another)" in printed
    assert "modes    RGB 8, L 1" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["classes"] == {"all": {"a": 6, "b": 3}}
    assert summary["width"] == [10, 10, 50]
    assert reasons(tmp_path / "out") == {}
    with Image.open(tmp_path / "out" / "classes.png") as drawn:
        drawn.load()
        assert drawn.width > 600


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_corpus_of_odd_files(tmp_path, capsys, monkeypatch):
    """More than forty good ones and thirty bad ones in one folder: each bad one is named, and no other."""
    good = write_good(tmp_path / "x" / "good")
    bad = write_bad(tmp_path / "x" / "bad")
    bad["secret.png"] = (save(tmp_path / "x" / "bad" / "secret.png", picture(9, 9)), "Permission denied")
    refuse_to_open(monkeypatch, "secret.png")
    assert len(good) >= 40
    assert len(bad) >= 34
    bad["folder.png"] = (bad["folder.png"][0], "folder that is named like an image")
    del bad["absent.png"]

    status, printed = verified(capsys, tmp_path / "x", "--output", tmp_path / "out")
    assert status == 1
    found = reasons(tmp_path / "out")
    assert found.keys() == bad.keys()
    for name, (_, reason) in bad.items():
        assert reason in found[name], name
        assert found[name]
    images = len(good) + len(bad) - 1  # a folder is no image
    assert f"{images} images, {len(bad)} bad" in printed
    assert f"and {len(bad) - 10} more" in printed
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["bad"] == len(bad)


def test_a_bad_file_whose_name_is_not_utf8_can_be_printed(good, tmp_path, capsys):
    (good / "a" / os.fsdecode(b"caf\xe9.png")).touch()
    status, printed = verified(capsys, good, "--output", tmp_path / "out")
    assert status == 1
    assert r"caf\xe9.png  empty file" in printed
    assert reasons(tmp_path / "out") == {r"caf\xe9.png": "empty file"}


def refuse_to_open(monkeypatch, name: str) -> None:
    """The tests may run as a user whom no permission stops."""
    original = Image.open

    def opened(file, *args, **kwargs):
        if Path(file).name == name:
            raise PermissionError(13, "Permission denied", file)
        return original(file, *args, **kwargs)

    monkeypatch.setattr(Image, "open", opened)


def test_a_folder_that_cannot_be_read_is_named(good, capsys, monkeypatch):
    """A listing passes over it in silence, images and all."""
    save(good / "a" / "closed" / "x.png", picture(9, 9))
    original = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return original(path)

    with monkeypatch.context() as patch:  # pytest lists the folder too when it removes it
        patch.setattr(os, "scandir", scandir)
        assert "a/closed: Permission denied" in refused(capsys, good)


def test_links_out_of_the_folder_are_refused_unless_allowed(good, tmp_path, capsys):
    outside = [save(tmp_path / name / "x.png", picture(9, 9, seed=i)) for i, name in enumerate(("one", "two"))]
    (good / "a" / "link.png").symlink_to(outside[0])
    (good / "a" / "inside.png").symlink_to(good / "a" / "000.png")
    (good / "c").symlink_to(tmp_path / "two")
    status, printed = verified(capsys, good)
    assert status == 1
    assert "bad files: 2" in printed
    assert f"link.png  link to {outside[0]}, outside of {good}" in printed
    assert f"c/x.png     link to {outside[1]}, outside of {good}" in printed
    assert verified(capsys, good, "--allow-links")[0] == 0
    (tmp_path / "alias").symlink_to(good)
    assert find_links_out([str(tmp_path / "alias" / "b" / "000.png")], tmp_path / "alias") == []
    (tmp_path / "two" / "back.png").symlink_to(good / "a" / "000.png")
    assert find_links_out([str(good / "c" / "back.png")], good) == []


def test_parts_that_share_something_fail(tmp_path, capsys):
    folder = make_folder(tmp_path / "x", {"a": 4, "b": 4})
    files = sorted(folder.rglob("*.png"))
    (folder / "b" / "copy.png").write_bytes(files[4].read_bytes())
    save(folder / "b" / "near.bmp", picture(12, 10, seed=1))
    header = "filename,label,group"
    train = "".join(f"{file},{file.parent.name},{file.stem}\n" for file in files[::2])
    test = "".join(f"{file},{file.parent.name},other{file.stem}\n" for file in files[1::2])
    manifests = [tmp_path / "train.csv", tmp_path / "test.csv"]
    manifests[0].write_text(f"{header}\n{train}")
    manifests[1].write_text(f"{header}\n{test}")
    status, printed = verified(capsys, *manifests)
    assert status == 0
    assert "two sides" not in printed
    assert ["a", "2", "2", "4", "50.0%"] in [line.split() for line in printed.splitlines()]

    manifests[1].write_text(f"{header}\n{test}{folder / 'b' / 'copy.png'},b,002\n{folder / 'b' / 'near.bmp'},b,z\n")
    status, printed = verified(capsys, *manifests, "--output", tmp_path / "out")
    assert status == 1
    assert "on two sides: 2" in printed
    assert "(group 002)" in printed
    assert "(same bytes)" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sorted(leak["why"] for leak in summary["shared"]) == ["group 002", "same bytes"]
    assert summary["classes"]["test"] == {"a": 2, "b": 4}


def test_one_image_under_two_labels_fails(good, tmp_path, capsys):
    (good / "a" / "again.png").write_bytes((good / "a" / "000.png").read_bytes())
    assert verified(capsys, good)[0] == 0
    (good / "b" / "else.png").write_bytes((good / "a" / "000.png").read_bytes())
    status, printed = verified(capsys, good, "--output", tmp_path / "out")
    assert status == 1
    assert "same image under two labels: 1\n  all a/000.png, all b/else.png  (same bytes)" in printed
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["contradictions"]) == 1


def test_near_duplicates_are_told_and_pass(tmp_path, capsys):
    folder = make_folder(tmp_path / "x" / "train", {"a": 3, "b": 3})
    for name in "ab":
        save(tmp_path / "x" / "test" / name / "0.bmp", picture(12, 10, seed=1000 * (name == "b")))
    status, printed = verified(capsys, folder.parent)
    assert status == 0
    assert "near-duplicates on two sides: 2" in printed
    assert "test test/a/0.bmp, train train/a/000.png  (0 of 64 bits apart)" in printed
    assert "near" not in verified(capsys, folder.parent, "--near-distance", "-1")[1]


def test_what_split_writes_verifies(tmp_path, capsys):
    folder = make_folder(tmp_path / "x", {"a": 12, "b": 9})
    assert run(split.main, [str(folder), "--output", str(tmp_path), "--group-regex", r"(\w/\d+)"]) == 0
    status, printed = verified(capsys, *(tmp_path / f"{part}.csv" for part in ("train", "val", "test")))
    assert status == 0
    assert printed.splitlines()[2].split() == ["class", "train", "val", "test", "total", "share"]


def test_mistakes_are_named_in_one_line(good, tmp_path, capsys):
    assert "nowhere does not exist" in refused(capsys, tmp_path / "nowhere")
    assert "is a folder: name it alone" in refused(capsys, good, good)
    assert "from 1 to 1024" in refused(capsys, good, "-j", "many")
    (tmp_path / "absent.csv").write_text("filename,label\nx.png,a\ny.png,b\n")
    assert "2 of 2 files that do not exist" in refused(capsys, tmp_path / "absent.csv")
    (tmp_path / "nolabel.csv").write_text("filename\nx.png\n")
    assert "no column 'label'" in refused(capsys, tmp_path / "nolabel.csv")
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refused(capsys, good, "--output", tmp_path / "file" / "out")


# What it remembers


def old_samples(folder: Path) -> Samples:
    return make_samples(folder, (3, 3))


def test_a_second_check_decodes_nothing(tmp_path, decoded):
    samples = old_samples(tmp_path)
    assert check_images(samples, workers=2) == []
    assert len(decoded) == 6
    decoded.clear()
    assert check_images(samples, workers=2) == []
    assert decoded == []


def test_what_is_remembered_is_what_was_found(good, capsys, decoded):
    save(good / "a" / "wide.jpg", picture(30, 50))
    first = verified(capsys, good)
    decoded.clear()
    assert verified(capsys, good) == first
    assert decoded == []


def test_changed_and_new_files_are_decoded_again(tmp_path, decoded):
    samples = old_samples(tmp_path)
    check_images(samples, workers=1)
    decoded.clear()
    content = Path(samples.files[1]).read_bytes()
    Path(samples.files[1]).write_bytes(content[:-20] + bytes(20))  # the same size
    os.utime(samples.files[1], ns=(0, time.time_ns() + 10**9))
    Path(samples.files[2]).write_bytes(content[:-1])
    new = Samples((*samples.files, save(tmp_path / "new.png", picture(9, 9))), np.append(samples.labels, 0), ("0", "1"))
    bad = check_images(new, workers=1)
    assert decoded == ["001.png", "002.png", "new.png"]
    assert [Path(file.path).name for file in bad] == ["001.png", "002.png"]


def test_bad_files_are_decoded_every_time(tmp_path, decoded):
    samples = old_samples(tmp_path)
    Path(samples.files[4]).write_bytes(b"")
    for _ in range(3):
        decoded.clear()
        assert [file.reason for file in check_images(samples, workers=1)] == ["empty file"]
    assert decoded == ["004.png"]


def test_other_versions_judge_anew(tmp_path, decoded, monkeypatch):
    samples = old_samples(tmp_path)
    check_images(samples, workers=1)
    for change in ((PIL, "__version__", "0.0"), (check, "MAX_PIXELS", 1000)):
        monkeypatch.setattr(*change)
        decoded.clear()
        check_images(samples, workers=1)
        assert len(decoded) == 6


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b'{"judges": 1}', b"\xff\xfe", b'{"judges": null, "files": []}', "cut",
    "entries",
])  # fmt: skip
def test_a_broken_cache_is_ignored_and_written_anew(tmp_path, cache, decoded, content):
    samples = old_samples(tmp_path)
    check_images(samples, workers=1)
    [kept] = cache.rglob("*.json")
    whole = kept.read_bytes()
    if content == "cut":
        content = whole[:-40]
    elif content == "entries":
        text = json.loads(whole)
        content = json.dumps(text | {"files": dict.fromkeys(text["files"], 7)}).encode()
    kept.write_bytes(content)
    decoded.clear()
    assert check_images(samples, workers=1) == []
    assert len(decoded) == 6
    assert kept.read_bytes() == whole
    assert [path for path in kept.parent.iterdir() if path != kept] == []


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, cache, decoded, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setattr(verdicts, "cache_folder", lambda: cache / "file")
    samples = old_samples(tmp_path)
    assert check_images(samples, workers=1) == []
    assert check_images(samples, workers=1) == []
    assert len(decoded) == 12


def test_a_disk_that_fills_leaves_no_half_a_cache(tmp_path, cache, monkeypatch):
    samples = old_samples(tmp_path)

    def full(self, text, **kwargs):
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert check_images(samples, workers=1) == []
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_an_interrupted_check_goes_on_where_it_was(tmp_path, decoded, monkeypatch):
    samples = old_samples(tmp_path)
    counting = check.probe

    def interrupted(file: str) -> check.Probe:
        if file == samples.files[3]:
            raise KeyboardInterrupt
        return counting(file)

    monkeypatch.setattr(check, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_images(samples, workers=1)
    monkeypatch.setattr(check, "probe", counting)
    done = list(decoded)
    assert done[:3] == ["000.png", "001.png", "002.png"]
    decoded.clear()
    assert check_images(samples, workers=1) == []
    assert sorted(done + decoded) == [f"{i:03d}.png" for i in range(6)]


def test_two_sets_below_one_folder_keep_each_other(tmp_path, decoded):
    samples = old_samples(tmp_path)
    halves = [samples.subset(range(3)), samples.subset(range(3, 6))]
    for half in halves:
        check_images(half, workers=1)
    decoded.clear()
    for half in halves:
        check_images(half, workers=1)
    assert decoded == []


# What it draws


def test_the_picture_shows_every_class_and_total(monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **kwargs: drawn.append(figure))
    names = [*(f"class {i}" for i in range(60)), "$x_{$", "a" * 99, "empty"]
    counts = {part: {name: (i + 1) * 10**k for i, name in enumerate(names)} for k, part in enumerate(("train", "test"))}
    for part in counts.values():
        part["empty"] = 0
    save_class_counts(counts, io.BytesIO())
    axes = drawn[0].axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown[:61] == names[:61]
    assert len(shown[61]) < 30
    assert [text.get_text() for text in axes.texts][:3] == ["11", "22", "33"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "test"]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths[:3] == [1, 2, 3]
    assert widths[63:66] == [10, 20, 30]
    assert "an empty class" in axes.get_title("left")
