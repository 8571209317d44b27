"""What stands on both sides of a split: a group, the same bytes, nearly the same picture.

The perceptual hash is the difference hash of N. Krawetz ("Kind of Like That", 2013): the picture in grey at 9 x 8, a
bit for each of the 64 steps to the right, set where it grows brighter. Saving again as JPEG, scaling, a little noise or
a change of contrast flips one bit at most in 93% to 100% of pictures whose amplitudes fall as 1/f^1.5; among four
thousand unrelated ones no two are nearer than four bits. Pictures that show the same thing in the same place can be: 2%
of the scanned digits have a neighbour within one bit, 13% within three. So one bit is the default, and a near-duplicate
is reported rather than refused. A cropped, turned or mirrored copy is not found.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from engine.data.decode import decode_image, read_header
from engine.data.dicom import is_dicom
from engine.data.probe import FORMATS, MAX_PIXELS

Picture = str | np.ndarray
"""The absolute path of a file, or pixels, (H, W, 3) uint8 RGB."""

HASH_BITS = 64
NEAR_DISTANCE = 1
_BLOCK_ROWS, _BLOCK_COLUMNS = 1024, 8192  # 32 MiB of distances at a time


@dataclass(frozen=True)
class Leak:
    """The files at ``first`` and ``second`` (indices) are in different parts and should not be; ``why``: what ties them
    together."""

    first: int
    second: int
    why: str


@dataclass(frozen=True)
class Leakage:
    """``shared``: groups and bytes on two sides; ``near``: near-duplicates that are not among them; ``undecoded``: how
    many files could not be compared."""

    shared: list[Leak]
    near: list[Leak]
    undecoded: int


def find_leakage(
    pictures: Sequence[Picture],
    part: np.ndarray,
    *,
    groups: Sequence[str] | None,
    identical: Sequence[Sequence[int]],
    near_distance: int,
    workers: int,
) -> Leakage:
    """All that stands on two sides.

    Args:
        pictures: n files or arrays.
        part: (n,) integers, the side that each is on.
        groups: n names of groups; None: not known.
        identical: of ``find_identical``.
        near_distance: bits that near-duplicates may differ in; negative: they are not looked for.
    """
    shared = find_shared_groups(groups, part) if groups is not None else []
    shared += find_shared_bytes(identical, part)
    if near_distance < 0:
        return Leakage(shared, [], 0)
    hashes = hash_pictures(pictures, workers=workers)
    same = {i: k for k, members in enumerate(identical) for i in members}
    near = [
        leak
        for leak in find_near_duplicates(hashes, part, near_distance)
        if leak.first not in same or same[leak.first] != same.get(leak.second)
    ]
    return Leakage(shared, near, int((~hashes.any(axis=1)).sum()))


def find_shared_groups(groups: Sequence[str], part: np.ndarray) -> list[Leak]:
    """One leak for each group that has files in several parts."""
    return _leaks(
        ((members, f"group {name}") for name, members in _indices_by(groups).items()),
        part,
    )


def find_shared_bytes(identical: Sequence[Sequence[int]], part: np.ndarray) -> list[Leak]:
    """One leak for each set of ``find_identical`` that has files in several parts."""
    return _leaks(((members, "same bytes") for members in identical), part)


def find_copies(identical: Sequence[Sequence[int]], part: np.ndarray) -> list[Leak]:
    """One leak for each set of ``find_identical`` and part that has several of it."""
    found = []
    for members in identical:
        for copies in _indices_by(part[i] for i in members).values():
            if len(copies) > 1:
                first, second = (members[k] for k in copies[:2])
                found.append(Leak(first, second, "same bytes" if len(copies) == 2 else f"{len(copies)} of same bytes"))
    return found


def find_identical(pictures: Sequence[Picture], *, workers: int) -> list[tuple[int, ...]]:
    """The sets of files with the same content, or of arrays with the same pixels, as indices. Only files of one size
    are read; empty ones are no images and count for nothing, nor do those that cannot be read."""
    sizes = _indices_by(map(_size, pictures))
    candidates = [i for size, members in sizes.items() if size > 0 and len(members) > 1 for i in members]
    with ThreadPoolExecutor(workers) as pool:
        digests = pool.map(_sha256, [pictures[i] for i in candidates])
        found = [(i, digest) for i, digest in zip(candidates, digests, strict=True) if digest is not None]
    sets = _indices_by(digest for _, digest in found).values()
    return sorted(tuple(found[k][0] for k in members) for members in sets if len(members) > 1)


def hash_pictures(pictures: Sequence[Picture], *, workers: int) -> np.ndarray:
    """(n, 64) int8: the difference hash of each picture as +1 and -1, and zeros where it cannot be decoded."""
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(pictures), desc="hashing images", unit="img", leave=False) as bar,
    ):
        rows = np.zeros((len(pictures), HASH_BITS), dtype=np.int8)
        for i, row in enumerate(pool.map(_difference_hash, pictures)):
            rows[i] = row
            bar.update()
    return rows


def find_near_duplicates(hashes: np.ndarray, part: np.ndarray, distance: int) -> list[Leak]:
    """Pictures whose nearest one in another part is at most ``distance`` bits away: exact, each pair of parts once.

    Args:
        hashes: (n, 64) from ``hash_pictures``.
        part: (n,) integers.

    Returns:
        For each picture of the smaller part one leak at most, to its nearest in the larger.
    """
    readable = np.flatnonzero(hashes.any(axis=1))
    by_size = sorted(np.unique(part[readable]), key=lambda p: (np.sum(part[readable] == p), p))
    # The product of two rows of +1 and -1 is 64 less twice their distance: exact in float32, and BLAS is fast.
    signs = hashes.astype(np.float32)
    leaks = []
    for k, smaller in enumerate(by_size[:-1]):
        rows = readable[part[readable] == smaller]
        columns = readable[np.isin(part[readable], by_size[k + 1 :])]
        for start in range(0, len(rows), _BLOCK_ROWS):
            block = rows[start : start + _BLOCK_ROWS]
            nearest, agreement = _nearest(signs, block, columns)
            away = ((HASH_BITS - agreement) / 2).astype(int)
            close = np.flatnonzero(away <= distance)
            leaks += [Leak(int(block[i]), int(nearest[i]), f"{away[i]} of {HASH_BITS} bits apart") for i in close]
    return leaks


def find_near_sets(hashes: np.ndarray, distance: int) -> list[tuple[int, ...]]:
    """Sets of pictures, as indices, that together tie every one to all that are at most ``distance`` bits away.

    Args:
        hashes: (n, 64) from ``hash_pictures``.
    """
    readable = np.flatnonzero(hashes.any(axis=1))
    members = list(_indices_by(hashes[i].tobytes() for i in readable).values())
    sets = [tuple(readable[own].tolist()) for own in members]
    first = np.array([own[0] for own in sets], dtype=np.int64)
    signs = hashes[first].astype(np.float32)
    pairs = []
    for top in range(0, len(first), _BLOCK_ROWS):
        for left in range(top, len(first), _BLOCK_COLUMNS):
            agreement = signs[top : top + _BLOCK_ROWS] @ signs[left : left + _BLOCK_COLUMNS].T
            rows, columns = np.nonzero(agreement >= HASH_BITS - 2 * distance)
            pairs += [(int(first[i]), int(first[j])) for i, j in zip(rows + top, columns + left, strict=True) if i < j]
    return [own for own in sets if len(own) > 1] + pairs


def _nearest(signs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    best = np.full(len(rows), -np.inf, dtype=np.float32)
    nearest = np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(columns), _BLOCK_COLUMNS):
        block = columns[start : start + _BLOCK_COLUMNS]
        agreement = signs[rows] @ signs[block].T
        better = np.flatnonzero(agreement.max(axis=1) > best)
        nearest[better] = block[agreement[better].argmax(axis=1)]
        best[better] = agreement[better].max(axis=1)
    return nearest, best


def _leaks(sets: Iterable[tuple[Sequence[int], str]], part: np.ndarray) -> list[Leak]:
    found = []
    for members, why in sets:
        other = next((i for i in members if part[i] != part[members[0]]), None)
        if other is not None:
            found.append(Leak(members[0], other, why))
    return found


def _indices_by(keys: Iterable) -> dict:
    found = defaultdict(list)
    for i, key in enumerate(keys):
        found[key].append(i)
    return found


def _size(picture: Picture) -> int:
    if isinstance(picture, np.ndarray):
        return picture.nbytes
    try:
        return Path(picture).stat().st_size
    except OSError:
        return 0


def _sha256(picture: Picture) -> bytes | None:
    if isinstance(picture, np.ndarray):
        return hashlib.sha256(f"{picture.shape}".encode() + picture.tobytes()).digest()
    try:
        digest = hashlib.sha256()
        with Path(picture).open("rb") as content:
            while piece := content.read(2**20):
                digest.update(piece)
    except OSError:
        return None
    return digest.digest()


def _difference_hash(picture: Picture) -> np.ndarray:
    try:
        small = _in_grey(picture).resize((9, 8), Image.Resampling.LANCZOS)
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        return np.zeros(HASH_BITS, dtype=np.int8)
    pixels = np.asarray(small).astype(np.int16)
    return np.where(pixels[:, 1:] > pixels[:, :-1], 1, -1).astype(np.int8).ravel()


def _in_grey(picture: Picture) -> Image.Image:
    """Upright and in 8 bits. Raises nearly anything where it cannot be decoded."""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture).convert("L")
    if is_dicom(read_header(picture)):
        return _in_grey(decode_image(picture))
    with Image.open(picture, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS} pixels")
        image.draft("L", (128, 128))  # a JPEG need not be decoded at its full size
        return ImageOps.exif_transpose(_eight_bits(image))


def _eight_bits(image: Image.Image) -> Image.Image:
    """In grey; Pillow would clip 16 bits at 255 where they have to be scaled."""
    if not image.mode.startswith(("I", "F")):
        return image.convert("L")
    pixels = np.asarray(image, dtype=np.float64)
    scaled = Image.fromarray((pixels * (255 / max(pixels.max(), 1))).clip(0, 255).astype(np.uint8))
    scaled.getexif().update(image.getexif())
    return scaled
