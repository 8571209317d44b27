"""What stands in a folder beside images: links, and what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.data import open_samples, open_splits
from engine.data.selection import Selection
from engine.errors import UserError
from tests.data_helpers import make_folder, save_picture


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", {"a": 3, "b": 3})


def link_to_file(data: Path) -> Path:
    link = data / "a" / "link.png"
    link.symlink_to(save_picture(data.parent / "secret.png"))
    return link


def link_to_folder(data: Path) -> Path:
    save_picture(data.parent / "data_and_more" / "x.png")  # begins as the folder's name does
    link = data / "a" / "link"
    link.symlink_to(data.parent / "data_and_more")
    return link


def link_to_class(data: Path) -> Path:
    save_picture(data.parent / "elsewhere" / "x.png")
    link = data / "c"
    link.symlink_to(data.parent / "elsewhere")
    return link


@pytest.mark.parametrize("make", [link_to_file, link_to_folder, link_to_class])
def test_a_link_out_of_the_folder_is_refused_unless_allowed(data, make):
    link = make(data)
    for opened in (lambda: open_splits(data_dir=data), lambda: open_samples(("a", "b", "c"), data_dir=data)):
        with pytest.raises(UserError, match=rf"{link} is a link that leads out of {data}.*--allow-links"):
            opened()
    splits = open_splits(data_dir=data, allow_links=True)
    assert len(splits.train) + len(splits.val) == 7
    assert len(open_samples(("a", "b", "c"), data_dir=data, allow_links=True)) == 7


def test_links_within_the_folder_and_to_it_are_followed(data, tmp_path):
    save_picture(data / ".store" / "x.png")
    (data / "a" / "link.png").symlink_to(data / ".store" / "x.png")
    (data / "b" / "again").symlink_to(data / ".store")
    (data / "a" / "self.png").symlink_to(data / "a" / "self.png")  # the check names it
    (tmp_path / "door").symlink_to(data)
    splits = open_splits(data_dir=tmp_path / "door", val_fraction=0.3)
    files = {os.path.relpath(file, tmp_path / "door") for file in (*splits.train.files, *splits.val.files)}
    assert {"a/link.png", "b/again/x.png", "a/self.png"} < files
    assert len(files) == 9


def test_a_split_folder_may_be_a_link_within(data):
    make_folder(data / "store", {"a": 2, "b": 2})
    (data / "x").mkdir()
    (data / "x" / "train").symlink_to(data / "store")
    with pytest.raises(UserError, match="leads out of"):
        open_splits(data_dir=data / "x")
    (data / "x" / "train").unlink()
    (data / "store").rename(data / "x" / "store")
    (data / "x" / "train").symlink_to(data / "x" / "store")
    assert open_splits(data_dir=data / "x").train.class_names == ("a", "b")


def test_a_folder_that_may_not_be_read_is_named(data, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("data/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"cannot read the folder {data / 'b'}: Permission denied"):
        open_splits(data_dir=data)


def test_a_class_name_that_is_no_text_is_refused(data):
    save_picture(Path(os.fsdecode(os.fsencode(data) + b"/\xff")) / "x.png")
    with pytest.raises(UserError, match=r"its name is no text in UTF-8: rename it") as raised:
        open_splits(data_dir=data)
    str(raised.value).encode()


def test_a_folder_called_as_a_split_is_a_class_only_with_a_warning(data):
    make_folder(data, {"test": 2})
    splits = open_splits(data_dir=data)
    assert splits.train.class_names == ("a", "b", "test")
    told = f"{data / 'test'}: without a train/ read as a class; name the classes with --classes"
    assert [told in warning for warning in splits.warnings if "without a train/" in warning] == [True]
    named = open_splits(data_dir=data, selection=Selection(classes=("a", "b", "test")))
    assert not any("without a train/" in warning for warning in named.warnings)
    make_folder(data, {"train/a": 2, "train/b": 2})
    (data / "test").rename(data / "train" / "test")
    assert not any("without a train/" in warning for warning in open_splits(data_dir=data).warnings)
