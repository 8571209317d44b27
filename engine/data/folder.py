"""Labelled files from class folders: ``FOLDER/CLASS/**/image``.

Files are sorted by their paths, so that their order never depends on the file system. Hidden files and folders are
passed over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.data.samples import Samples, shorten, sort_class_names
from engine.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm", ".jp2")
VAL_NAMES = ("val", "valid", "validation")


def read_splits_folder(root: Path) -> tuple[Samples, Samples | None, Samples | None]:
    """Train, validation and test of a folder, the last two where it has them.

    ``root/train/CLASS/*`` with optional ``root/val/CLASS/*`` and ``root/test/CLASS/*``; or ``root/CLASS/*``, all train.
    """
    require_folder(root)
    if not (root / "train").is_dir():
        folders = [folder.name for folder in _visible_folders(root)]
        if folders and set(folders) <= {*VAL_NAMES, "test"}:
            raise UserError(f"{root} has {'/ and '.join(folders)}/ but no train/: add {root / 'train'}/CLASS/*")
        return _read_train(root), None, None

    train = _read_train(root / "train")
    val_folders = [root / name for name in VAL_NAMES if (root / name).is_dir()]
    if len(val_folders) > 1:
        raise UserError(f"{root} has both {val_folders[0].name}/ and {val_folders[1].name}/: keep one of them")
    val = read_known_classes(val_folders[0], train.class_names) if val_folders else None
    test = read_known_classes(root / "test", train.class_names) if (root / "test").is_dir() else None
    return train, val, test


def read_known_classes(folder: Path, class_names: tuple[str, ...]) -> Samples:
    """``folder/CLASS/*`` labelled by ``class_names``; raises UserError at a class that is not one of them."""
    return _label(folder, _files_by_class(folder), class_names)


def require_folder(root: Path) -> None:
    if not root.exists():
        raise UserError(f"--data-dir {root} does not exist")
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is not a folder; for a manifest use --csv")


def _read_train(folder: Path) -> Samples:
    files = _files_by_class(folder)
    names = sort_class_names(files)
    if len(names) < 2:
        raise UserError(f"{folder} has one class folder only ({names[0]}): classification needs at least two")
    return _label(folder, files, names)


def _files_by_class(folder: Path) -> dict[str, list[str]]:
    files = {class_folder.name: _images_below(class_folder) for class_folder in _visible_folders(folder)}
    if not files:
        if any(_is_image(path.name) for path in folder.iterdir()):
            raise UserError(f"{folder} holds images but no class folders: put each in {folder}/CLASS/, or use --csv")
        raise UserError(f"{folder} is empty: it needs one folder of images for each class")
    for name, images in files.items():
        if not images:
            known = " ".join(extension[1:] for extension in IMAGE_EXTENSIONS)
            raise UserError(f"class folder {folder / name} holds no image ({known}): fill it or remove it")
    return files


def _label(folder: Path, files: Mapping[str, list[str]], class_names: tuple[str, ...]) -> Samples:
    index = {name: i for i, name in enumerate(class_names)}
    for name in files:
        if name not in index:
            raise UserError(f"{folder / name}: training has no class {name!r} (it has {shorten(class_names)})")
    ordered = sorted(files, key=index.__getitem__)
    labels = np.repeat([index[name] for name in ordered], [len(files[name]) for name in ordered])
    return Samples(tuple(file for name in ordered for file in files[name]), labels.astype(np.int64), class_names)


def _images_below(folder: Path) -> list[str]:
    found: list[str] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder.absolute(), followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above would be walked for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [f"{parent}{os.sep}{name}" for name in names if _is_image(name)]
    return sorted(found)


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")
