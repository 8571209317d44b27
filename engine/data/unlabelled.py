"""Images without labels, as a command line names them: files, and folders by what lies below them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data.check import BadFile, describe_link_out, find_odd_folders
from engine.data.folder import IMAGE_EXTENSIONS, images_below
from engine.data.listing import printable
from engine.errors import UserError


@dataclass(frozen=True)
class Unlabelled:
    """``names``: {absolute path: the path as it was named}, in order; ``bad``: those among them that cannot be opened
    as they are."""

    names: dict[str, str]
    bad: tuple[BadFile, ...]


def find_images(sources: Sequence[str], *, allow_links: bool = False) -> Unlabelled:
    """The files in the order given, and in place of each folder the images below it, sorted by their paths; each once.

    Bad are links that lead out of such a folder, which are not followed unless ``allow_links``, and folders below it
    that are named like an image.

    Raises:
        UserError: a path that does not exist, or a folder that holds no image or cannot be read.
    """
    names: dict[str, str] = {}
    bad: dict[str, BadFile] = {}
    for source in sources:
        path = Path(source)
        if _is_folder(path):
            images, odd = _below(path, allow_links)
            bad |= {file.path: file for file in odd}
            for file in sorted({*images, *(file.path for file in odd)}):
                names.setdefault(file, str(path / Path(file).relative_to(path.absolute())))
        elif os.path.lexists(path):
            names.setdefault(str(path.absolute()), source)
        else:
            raise UserError(f"{printable(source)} does not exist: name images, or folders of images")
    return Unlabelled(names, tuple(bad.values()))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise UserError(f"cannot read {printable(str(path))}: {error.strerror}") from error


def _below(folder: Path, allow_links: bool) -> tuple[list[str], list[BadFile]]:
    root = os.path.realpath(folder)
    images, links_out = images_below(folder, None if allow_links else root)
    odd = [*find_odd_folders(folder), *(describe_link_out(link, folder) for link in links_out)]
    if not images and not odd:
        known = " ".join(extension[1:] for extension in IMAGE_EXTENSIONS)
        raise UserError(f"{printable(str(folder))} holds no image ({known}): name another folder, or files")
    return images, odd
