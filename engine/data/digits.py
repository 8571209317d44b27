"""The embedded data set: scikit-learn's scanned digits (1797 real images of 8 x 8 grey levels).

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
Both splits are balanced, train with as many images of each class as the smallest can give; ``engine.data.long_tail``
makes it long-tailed where that is asked for.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.cache import cache_folder
from engine.errors import UserError

TEST_PER_CLASS = 40
SPLIT_SEED = 0
GREY_LEVELS = 16
"""The scans' white; 0 is their black."""


def write_digits(root: str | os.PathLike[str] | None = None) -> Path:
    """Writes ``root/train/CLASS/*.png`` and ``root/test/CLASS/*.png`` once and returns ``root``.

    The PNG files are 8 x 8, grey, with the scans' 0..16 stretched to 0..255. Every file appears whole or not at all,
    and the list of files, ``digits.json``, comes last: after a crash, or beside another process that does the same, a
    call adds what is missing and nothing else.

    Args:
        root: by default ``fused-se-engine/balanced-digits`` in ``$XDG_CACHE_HOME``, or else in ``~/.cache``.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(root) if root is not None else cache_folder() / "balanced-digits"
    try:
        if not _is_complete(folder):
            _write(folder)
    except OSError as error:
        raise UserError(
            f"cannot write the embedded digits to {folder} ({error.strerror}): set XDG_CACHE_HOME to a folder that can "
            "be written, or name your own images with --data-dir"
        ) from error
    return folder


def dealt_order(folder: Path) -> list[str]:
    """The training images that ``write_digits`` wrote to ``folder``, those of a class in the order of chance."""
    names = json.loads((folder / "digits.json").read_text())
    return [str(folder.absolute() / name) for name in names if name.startswith("train/")]


def _is_complete(folder: Path) -> bool:
    try:
        names = json.loads((folder / "digits.json").read_text())
        return all((folder / name).stat().st_size > 0 for name in names)
    except (FileNotFoundError, ValueError):
        return False


def _write(folder: Path) -> None:
    images = _split_digits()
    for name, image in images.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0:
            _write_atomically(path, image)
    _write_atomically(folder / "digits.json", list(images))


def _split_digits() -> dict[str, Image.Image]:
    """{relative file name: image}, the same on every machine, those of a class in the order that chance gave them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / GREY_LEVELS)).astype(np.uint8)
    classes = len(digits.target_names)
    each = int(np.bincount(digits.target).min())
    rng = np.random.Generator(np.random.Philox(key=SPLIT_SEED))
    images = {}
    for label in range(classes):
        members = rng.permutation(np.flatnonzero(digits.target == label))[:each]
        parts = {"test": members[:TEST_PER_CLASS], "train": members[TEST_PER_CLASS:]}
        for split, chosen in parts.items():
            for i in chosen:
                images[f"{split}/{label}/{i:04d}.png"] = Image.fromarray(grey[i])
    return images


def _write_atomically(path: Path, content: Image.Image | list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            if isinstance(content, Image.Image):
                content.save(file, format="PNG")
            else:
                file.write(json.dumps(content).encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
