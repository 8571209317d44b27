"""Labelled files from class folders: ``FOLDER/CLASS/**/image``.

Files are sorted by their paths, so that their order never depends on the file system. Hidden files and folders are
passed over. A file is taken for an image by its extension; one without, or with a number in its place as DICOM's names
have, where its content is DICOM.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.data.decode import BadImage, read_header
from engine.data.dicom import is_dicom
from engine.data.samples import Samples, shorten, sort_class_names
from engine.data.selection import Selection, first_groups
from engine.errors import UserError

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2"),
    *(".dcm", ".dicom"),
)
_KNOWN = " ".join(extension[1:] for extension in IMAGE_EXTENSIONS)
VAL_NAMES = ("val", "valid", "validation")


def read_splits_folder(
    root: Path, *, allow_links: bool = False, selection: Selection | None = None
) -> tuple[Samples, Samples | None, Samples | None]:
    """Train, validation and test of a folder, the last two where it has them.

    ``root/train/CLASS/*`` with optional ``root/val/CLASS/*`` and ``root/test/CLASS/*``; or ``root/CLASS/*``, all train.
    Of that what ``selection`` says counts; folders of other classes are not looked at, whatever they hold.

    Raises UserError: a class is empty or unknown, or a link leads out of ``root`` and ``allow_links`` is not set.
    """
    require_folder(root)
    reader = _Reader(root, allow_links, selection or Selection())
    if not (root / "train").is_dir():
        folders = [folder.name for folder in _visible_folders(root)]
        if folders and set(folders) <= {*VAL_NAMES, "test"}:
            raise UserError(f"{root} has {'/ and '.join(folders)}/ but no train/: add {root / 'train'}/CLASS/*")
        return reader.train(root), None, None

    train = reader.train(root / "train")
    val_folders = [root / name for name in VAL_NAMES if (root / name).is_dir()]
    if len(val_folders) > 1:
        raise UserError(f"{root} has both {val_folders[0].name}/ and {val_folders[1].name}/: keep one of them")
    val = reader.known_classes(val_folders[0], train.class_names) if val_folders else None
    test = reader.known_classes(root / "test", train.class_names) if (root / "test").is_dir() else None
    return train, val, test


def find_split_names(root: Path, train: Samples, selection: Selection) -> str | None:
    """A warning where class folders of ``root``, all of which is ``train``, are called as a split is.

    None where there are none, and where ``--classes`` names them.
    """
    if selection.classes or selection.label_regex or (root / "train").is_dir():
        return None
    names = [name for name in train.class_names if name in (*VAL_NAMES, "test") and (root / name).is_dir()]
    if not names:
        return None
    folders = " and ".join(str(root / name) for name in names)
    return (
        f"{folders}: without a train/ read as {'a class' if len(names) == 1 else 'classes'}; name the classes with "
        f"--classes, or put their folders into {root / 'train'}"
    )


def read_test_folder(
    root: Path, class_names: tuple[str, ...], *, allow_links: bool = False, selection: Selection | None = None
) -> Samples:
    """``root/test/CLASS/*`` where there is such a folder, else ``root/CLASS/*``, labelled by ``class_names``.

    The selection's ``label_regex`` is passed over where it matches no name: a model that was trained on labels in names
    may be scored on class folders.

    Raises UserError as ``read_splits_folder``, and at a class that is not one of the names.
    """
    require_folder(root)
    selection = selection or Selection()
    if selection.label_regex is not None and not _labels_any(root, selection.label_regex, allow_links):
        selection = replace(selection, label_regex=None)
    reader = _Reader(root, allow_links, selection)
    test = root / "test"
    if "test" not in class_names and test.is_dir() and (reader.selection.label_regex or _visible_folders(test)):
        return reader.known_classes(test, class_names)
    if (root / "train").is_dir() and "train" not in class_names:
        raise UserError(f"{root} has train/ but no test/: name the folder whose class folders are to be scored")
    return reader.known_classes(root, class_names)


def _labels_any(root: Path, label_regex: str, allow_links: bool) -> bool:
    regex = re.compile(label_regex)
    images, _ = images_below(root, None if allow_links else os.path.realpath(root))
    top = f"{root.absolute()}{os.sep}"
    return any(regex.search(image.removeprefix(top).replace(os.sep, "/")) for image in images)


def require_folder(root: Path) -> None:
    if not root.exists():
        raise UserError(f"--data-dir {root} does not exist")
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is not a folder; for a manifest use --csv")


class _Reader:
    """Reads the class folders of one source."""

    def __init__(self, root: Path, allow_links: bool, selection: Selection) -> None:
        self.root = root
        self.real_root = None if allow_links else os.path.realpath(root)
        self.selection = selection

    def train(self, folder: Path) -> Samples:
        files = self._files_by_class(folder)
        names = sort_class_names(files)
        if len(names) < 2:
            raise UserError(f"{folder} has one class only ({names[0]}): classification needs at least two")
        return _label(folder, files, names)

    def known_classes(self, folder: Path, class_names: tuple[str, ...]) -> Samples:
        files = self._files_by_class(folder, partly=True)
        if not files:
            raise UserError(f"{folder} has no image of {shorten(self.selection.classes)}: remove it, or fill it")
        return _label(folder, files, class_names)

    def _files_by_class(self, folder: Path, *, partly: bool = False) -> dict[str, list[str]]:
        """Of each class that counts its images; ``partly``: of those that there are."""
        _require_within(str(folder), self.real_root)
        if self.selection.label_regex is not None:
            files = self._files_by_name(folder, self.selection.label_regex)
            return self.selection.of_known(files, folder, partly=partly)
        folders = {class_folder.name: class_folder for class_folder in _visible_folders(folder)}
        if not folders:
            if any(_is_image(str(path)) for path in folder.iterdir()):
                raise UserError(
                    f"{folder} holds images but no class folders: put each in {folder}/CLASS/, or use --csv"
                )
            raise UserError(f"{folder} is empty: it needs one folder of images for each class")
        counting = self.selection.of_known(folders, folder, partly=partly)
        files = {name: self._images_within(class_folder) for name, class_folder in counting.items()}
        for name, images in files.items():
            if any("\udc80" <= letter <= "\udcff" for letter in name):
                raise UserError(f"class folder {str(folder / name)!a}: its name is no text in UTF-8: rename it")
            if not images:
                what = "but what --exclude leaves out" if self.selection.exclude else f"({_KNOWN})"
                raise UserError(f"class folder {folder / name} holds no image {what}: fill it or remove it")
        return files

    def _files_by_name(self, folder: Path, label_regex: str) -> dict[str, list[str]]:
        images = self._images_within(folder)
        if not images:
            raise UserError(f"{folder} holds no image ({_KNOWN}): name another folder")
        top = f"{self.root.absolute()}{os.sep}"
        names = [image.removeprefix(top).replace(os.sep, "/") for image in images]
        files: dict[str, list[str]] = {}
        for image, label in zip(images, first_groups(label_regex, names, "--label-regex"), strict=True):
            files.setdefault(label, []).append(image)
        return files

    def _images_within(self, folder: Path) -> list[str]:
        """Raises UserError at a link that leads out of the source."""
        _require_within(str(folder), self.real_root)
        images, links_out = images_below(folder, self.real_root)
        for link in links_out:
            _require_within(link, self.real_root)
        return self.selection.kept(images)


def _label(folder: Path, files: Mapping[str, list[str]], class_names: tuple[str, ...]) -> Samples:
    index = {name: i for i, name in enumerate(class_names)}
    for name in files:
        if name not in index:
            raise UserError(f"{folder / name}: training has no class {name!r} (it has {shorten(class_names)})")
    ordered = sorted(files, key=index.__getitem__)
    labels = np.repeat([index[name] for name in ordered], [len(files[name]) for name in ordered])
    return Samples(tuple(file for name in ordered for file in files[name]), labels.astype(np.int64), class_names)


def images_below(folder: Path, root: str | None) -> tuple[list[str], list[str]]:
    """Absolute paths, sorted: the images below ``folder``, and the links that lead out of ``root`` (a real path).

    Links are followed, those that lead out only where ``root`` is None. Raises UserError at a folder that cannot be
    read.
    """
    images: list[str] = []
    links_out: list[str] = []
    seen: set[str] = set()
    waiting = [str(folder.absolute())]
    while waiting:
        parent = waiting.pop()
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above would be walked for ever
            continue
        seen.add(real)
        for entry in _entries(parent):
            if entry.name.startswith("."):
                continue
            is_folder = _is_folder(entry)
            if not is_folder and not _is_image(entry.path):
                continue
            if root is not None and entry.is_symlink() and target_outside(entry.path, root) is not None:
                links_out.append(entry.path)
            else:
                (waiting if is_folder else images).append(entry.path)
    return sorted(images), sorted(links_out)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """By name, so that of two ways to one folder it is always the same that is gone."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def target_outside(path: str, root: str) -> str | None:
    """What a path leads to, if that is not inside of the folder ``root`` (a real path); None: it is."""
    target = os.path.realpath(path)
    return None if target == root or target.startswith(root.rstrip(os.sep) + os.sep) else target


def _require_within(link: str, root: str | None) -> None:
    target = target_outside(link, root) if root is not None else None
    if target is not None:
        raise UserError(
            f"{link} is a link that leads out of {root}, to {target}: "
            "copy what it leads to, or allow it with --allow-links"
        )


def _visible_folders(folder: Path) -> list[Path]:
    return [Path(e.path) for e in _entries(str(folder)) if _is_folder(e) and not e.name.startswith(".")]


def _is_image(path: str) -> bool:
    name = path.rpartition(os.sep)[2]
    if name.startswith("."):
        return False
    _, _, extension = name.rpartition(".")
    if extension != name and not extension.isdigit():
        return f".{extension.lower()}" in IMAGE_EXTENSIONS
    try:
        return is_dicom(read_header(path))
    except BadImage:
        return False
