"""Every image is decoded once before training, so that a bad one is named and left out instead of ending the run.

DALI cannot skip an image: one that fails takes the whole pipeline with it. Each file is first decoded by Pillow, which
says best what is wrong with it, then by DALI, if that is installed and would decode it itself: it refuses a little more
(a PNG without its last chunk). Files that decoded and have not changed since are not decoded again
(``engine.data.verdicts``).
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from tqdm import tqdm

from engine.data import probe as pillow
from engine.data.dali_decoder import Decoder, dali_version
from engine.data.folder import IMAGE_EXTENSIONS, target_outside
from engine.data.probe import Probe
from engine.data.samples import Samples, Splits, shorten
from engine.data.verdicts import Verdicts, stamp
from engine.errors import UserError

ARRAY = "array"
_FILES_AT_ONCE = 1024


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be trained on, and why, in a few words."""

    path: str
    reason: str


def probe_files(files: Sequence[str], *, workers: int) -> list[Probe]:
    """Decodes every file (absolute paths) on ``workers`` threads, with a progress bar on stderr; a Probe for each."""
    if not files:
        return []
    dali = dali_version()
    judges = f"Pillow {PIL.__version__}, DALI {dali}, {' '.join(pillow.FORMATS)}, {pillow.MAX_PIXELS} pixels"
    verdicts = Verdicts(files, judges)
    own = threading.local()

    def start_worker() -> None:
        own.decoder = Decoder(torch.device("cpu"))

    def judge(file: str) -> Probe:
        now = stamp(file)
        found = verdicts.find(file, now)
        if found is None:
            found = pillow.probe(file)
            if found.reason is None and dali is not None:
                found = dataclasses.replace(found, reason=own.decoder.failure(file))
            verdicts.add(file, now, found)
        return found

    probes: list[Probe] = []
    try:
        with (
            ThreadPoolExecutor(workers, initializer=start_worker) as pool,
            tqdm(total=len(files), desc="checking images", unit="img", leave=False) as bar,
        ):
            for start in range(0, len(files), _FILES_AT_ONCE):
                for found in pool.map(judge, files[start : start + _FILES_AT_ONCE]):
                    probes.append(found)
                    bar.update()
    finally:
        verdicts.save()  # an interrupted check goes on where it was
    return probes


def probe_samples(samples: Samples, *, workers: int) -> list[Probe]:
    """``probe_files``, or of arrays the same facts under the format ``ARRAY``: there is nothing to decode."""
    if samples.pixels is None:
        return probe_files(samples.files, workers=workers)
    _, height, width, _ = samples.pixels.shape
    is_grey = samples.pixels.strides[3] == 0
    return [Probe(None, ARRAY, "L" if is_grey else "RGB", width, height)] * len(samples)


def check_images(samples: Samples, *, workers: int) -> list[BadFile]:
    """The files that fail ``probe_files``, in order.

    Arrays have nothing to decode; that they are (H, W, 3) uint8 is seen to where they are read.
    """
    if samples.pixels is not None:
        return []
    probes = probe_files(samples.files, workers=workers)
    return [BadFile(file, found.reason) for file, found in zip(samples.files, probes, strict=True) if found.reason]


def find_links_out(files: Sequence[str], root: Path) -> list[BadFile]:
    """The files below ``root`` that are links, or lie behind links, to somewhere outside of it.

    Whoever may write into the folder could otherwise have any image of the machine read and shown in a report.
    """
    top = os.path.realpath(root)
    return [describe_link_out(file, root) for file in files if target_outside(file, top) is not None]


def describe_link_out(link: str, root: Path) -> BadFile:
    return BadFile(link, f"link to {os.path.realpath(link)}, outside of {root}")


def find_odd_folders(root: Path) -> list[BadFile]:
    """Folders below ``root`` that are named like an image: a listing of images passes over them."""
    odd: list[BadFile] = []
    for parent, folders, _ in os.walk(root.absolute()):
        folders[:] = [name for name in folders if not name.startswith(".")]
        odd += [
            BadFile(f"{parent}{os.sep}{name}", "folder that is named like an image")
            for name in folders
            if name.lower().endswith(IMAGE_EXTENSIONS)
        ]
    return odd


def drop_bad(splits: Splits, *, workers: int, max_bad_fraction: float = 0.01) -> tuple[Splits, list[BadFile]]:
    """The splits without the files that cannot be decoded, and those files.

    Raises:
        UserError: more than ``max_bad_fraction`` of all the files are bad, or a class would lose the last file that it
            has in one of the splits.
    """
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    given = {name: part for name, part in parts.items() if part is not None}
    kept, bad = drop_bad_samples(given, workers=workers, max_bad_fraction=max_bad_fraction)
    return dataclasses.replace(splits, train=kept["train"], val=kept.get("val"), test=kept.get("test")), bad


def drop_bad_samples(
    parts: Mapping[str, Samples], *, workers: int, max_bad_fraction: float = 0.01
) -> tuple[dict[str, Samples], list[BadFile]]:
    """``drop_bad`` for any sets of samples by name; the fraction is that of all of them together."""
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"--max-bad-fraction {max_bad_fraction}: give a part between 0 and 1, such as 0.01")
    found = {name: check_images(samples, workers=workers) for name, samples in parts.items()}

    bad = [file for files in found.values() for file in files]
    total = sum(len(samples) for samples in parts.values())
    if len(bad) > max_bad_fraction * total:
        first = shorten([f"{file.path} ({file.reason})" for file in bad], limit=3)
        raise UserError(
            f"{len(bad)} of {total} images cannot be read: {first}; save them again as PNG or JPEG, remove them, "
            f"or raise --max-bad-fraction (now {max_bad_fraction:g}) to have them left out"
        )
    return {name: _without(samples, name, found[name]) for name, samples in parts.items()}, bad


def _without(samples: Samples, split: str, bad: Sequence[BadFile]) -> Samples:
    if not bad:
        return samples
    paths = {file.path for file in bad}
    kept = samples.subset(i for i, file in enumerate(samples.files) if file not in paths)
    for label in np.flatnonzero((samples.class_counts() > 0) & (kept.class_counts() == 0)):
        gone = [file for file in bad if file.path in samples.subset(np.flatnonzero(samples.labels == label)).files]
        first = shorten([f"{file.path} ({file.reason})" for file in gone], limit=3)
        raise UserError(f"class {samples.class_names[label]!r} has no readable image left in {split}: {first}")
    return kept
