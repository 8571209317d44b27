"""Sets of images decoded once, to raw pixels in one file that is mapped into memory.

The file holds a header, the images as ``engine.data.decode`` gives them, (H, W, 3) uint8 RGB one behind the other, then
the height, the width and a CRC-32 of each. It stands in ``decoded`` in the user's cache, one for each list of files,
and counts for as long as the files (by size and time of change) and the decoder are those that it was made from.
Of the lists of one folder the ``KEPT`` last used are kept.

It is written under another name and takes its place when it is whole and on the disk; of two processes that make the
same one at once, each maps its own, and the later one's stays. Every start compares all pixels with their checksums
before the first is used, which takes no longer than to bring them into memory from a fast disk. A damaged file is made
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import inspect
import os
import shutil
import struct
import sys
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import PIL
from tqdm import tqdm

from engine.data import decode, dicom
from engine.data.cache import cache_folder
from engine.data.decode import BadImage, decode_image, read_area
from engine.data.failure import Failure
from engine.data.samples import Samples
from engine.data.verdicts import stamp
from engine.errors import UserError

KEPT = 6
"""Lists of files of one folder whose pixels are kept: training and validation images of three ways to divide it."""

_HEADER = struct.Struct("<8s32sqqI4x")
"""What it is, what it was made from, images, bytes of pixels, CRC-32 of the index."""
_MAGIC = b"RGBset\0\1"
_ENTRY = np.dtype([("size", "<i4", 2), ("sum", "<u4")])
_SUFFIX = ".rgb"
_AT_ONCE = 256
_ABANDONED_SECONDS = 3600

Admit = Callable[[int, bool], None]
"""Is told how many bytes the pixels take, and whether they stand in memory already; raises where they may not."""
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, eq=False)
class DecodedSet:
    """n images.

    Attributes:
        pixels: (bytes,) uint8, the images one behind the other, each (H, W, 3) RGB.
        starts: (n,) int64, where in ``pixels`` each begins.
        sizes: (n, 2) int32, height and width of each; zeros for those that could not be decoded.
        failures: the images that could not be decoded.
    """

    pixels: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    failures: tuple[Failure, ...] = ()


def open_decoded(samples: Samples, *, workers: int, admit: Admit, keep: bool = True) -> DecodedSet:
    """The images of ``samples``: arrays as they are, files out of the cache or decoded now, with a progress bar.

    Args:
        workers: threads.
        admit: is asked before anything is decoded or brought into memory.
        keep: leave what is decoded now in the cache, in the place of the sets that it keeps no longer.

    Raises:
        UserError: the cache cannot be written, or a package is missing that would decode a file.
    """
    if samples.pixels is not None:
        return _of_arrays(samples.pixels, admit)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        files = _DecodedFiles(samples.files, pool, workers, keep)
        return files.read(admit) or files.make(admit)
    finally:
        pool.shutdown(cancel_futures=True)


def _of_arrays(images: np.ndarray, admit: Admit) -> DecodedSet:
    admit(images.nbytes, images.flags.c_contiguous)  # which grey arrays are not: they show one channel three times
    sizes = np.tile(np.array(images.shape[1:3], dtype=np.int32), (len(images), 1))
    return DecodedSet(np.ascontiguousarray(images).reshape(-1), _starts(sizes), sizes)


class _DecodedFiles:
    """The cache's file for a list of image files."""

    def __init__(self, files: tuple[str, ...], pool: ThreadPoolExecutor, workers: int, keep: bool) -> None:
        self._files = files
        self._keep = keep
        self._pool = pool
        self._ahead = 4 * workers
        root = os.path.commonpath([Path(file).parent for file in files])
        self._root = _digest([root]).hex()[:16]
        self._path = cache_folder() / "decoded" / f"{self._root}-{_digest(files).hex()[:32]}{_SUFFIX}"
        self._made_from = _digest([_decoder(), *map(str, self._map(stamp, files))])

    def read(self, admit: Admit) -> DecodedSet | None:
        """What was made before, where it is whole and still counts; says so on stderr where it does not."""
        try:
            with self._path.open("rb") as file:
                return self._read(file, admit)
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror or str(error)
        except _Unusable as error:
            reason = str(error)
        print(f"{self._path}: {reason}; decoding the images again", file=sys.stderr)
        return None

    def make(self, admit: Admit) -> DecodedSet:
        """Decodes all files into the cache, of which, where nothing is to be kept, the mapping alone is left."""
        total = 3 * sum(_shown("reading sizes", self._map(_area, self._files), len(self._files)))
        admit(total, False)
        unfinished = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        try:
            try:
                self._make_room(total)
                with unfinished.open("xb+") as file:
                    decoded = self._write(file)
                if self._keep:
                    unfinished.replace(self._path)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise self._cannot_write(error, total) from error
        return decoded

    def _read(self, file: BinaryIO, admit: Admit) -> DecodedSet:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise _Unusable("not a file of decoded images")
        _, made_from, n, total, index_sum = _HEADER.unpack(head)
        if made_from != self._made_from:
            raise _Unusable("the images, or what decodes them, have changed")
        file.seek(_HEADER.size + total)
        index = file.read()
        if n != len(self._files) or len(index) != n * _ENTRY.itemsize or zlib.crc32(index) != index_sum:
            raise _Unusable("damaged")
        entries = np.frombuffer(index, dtype=_ENTRY)
        admit(total, False)
        found = _decoded(file, entries)
        self._compare(found, entries["sum"])
        failures = self._failing(np.flatnonzero(found.sizes[:, 0] == 0))
        with contextlib.suppress(OSError):
            os.utime(self._path)  # by which the last used are known
        return dataclasses.replace(found, failures=failures)

    def _compare(self, found: DecodedSet, sums: np.ndarray) -> None:
        stops = found.starts + 3 * found.sizes.prod(axis=1, dtype=np.int64)

        def is_whole(i: int) -> bool:
            return zlib.crc32(found.pixels[found.starts[i] : stops[i]].data) == sums[i]

        checks = self._map(is_whole, range(len(sums)))
        for i, whole in enumerate(_shown("checking decoded images", checks, len(sums))):
            if not whole:
                raise _Unusable(f"damaged where it holds {self._files[i]}")

    def _failing(self, indices: np.ndarray) -> tuple[Failure, ...]:
        """Files that failed before are tried again: it may not be by their size or time that they have become good."""
        failures = []
        for i, found in zip(indices, self._map(_decode, [self._files[i] for i in indices]), strict=True):
            if not isinstance(found, BadImage):
                raise _Unusable(f"{self._files[i]} can be decoded now")
            failures.append(Failure(int(i), str(found)))
        return tuple(failures)

    def _write(self, file: BinaryIO) -> DecodedSet:
        entries = np.zeros(len(self._files), dtype=_ENTRY)
        failures = []
        file.write(bytes(_HEADER.size))
        for i, found in enumerate(_shown("decoding images", self._decode_in_order(), len(entries))):
            if isinstance(found, BadImage):
                failures.append(Failure(i, str(found)))
                continue
            pixels, checksum = found
            entries[i] = pixels.shape[:2], checksum
            file.write(pixels.data)
        total, index = file.tell() - _HEADER.size, entries.tobytes()
        file.write(index)
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, self._made_from, len(entries), total, zlib.crc32(index)))
        file.flush()
        os.fsync(file.fileno())
        return dataclasses.replace(_decoded(file, entries), failures=tuple(failures))

    def _decode_in_order(self) -> Iterator[tuple[np.ndarray, int] | BadImage]:
        """No further ahead of the disk than memory holds."""
        begun: deque[Future[tuple[np.ndarray, int] | BadImage]] = deque()
        for file in self._files:
            begun.append(self._pool.submit(_decode, file))
            if len(begun) > self._ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    def _make_room(self, total: int) -> None:
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if self._keep:
            self._evict()
        if shutil.disk_usage(folder).free < total + len(self._files) * _ENTRY.itemsize + _HEADER.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _evict(self) -> None:
        """What the new file stands in for, the longest unused of too many sets, and what other processes left."""
        folder = self._path.parent
        self._path.unlink(missing_ok=True)
        others = sorted(folder.glob(f"{self._root}-*{_SUFFIX}"), key=_changed, reverse=True)
        abandoned = [
            path for path in folder.glob(f".*{_SUFFIX}.*") if _changed(path) < time.time() - _ABANDONED_SECONDS
        ]
        for path in (*others[KEPT - 1 :], *abandoned):
            path.unlink(missing_ok=True)

    def _cannot_write(self, error: OSError, total: int) -> UserError:
        folder = self._path.parent
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return UserError(
                f"cannot write the decoded images to {folder} ({error.strerror or error}): set XDG_CACHE_HOME to a "
                "folder that can be written, or use --data-backend dali"
            )
        return UserError(
            f"no room for the decoded images in {folder}: they take {mebibytes(total)}, and "
            f"{mebibytes(shutil.disk_usage(folder).free)} are free: make room, set XDG_CACHE_HOME to a folder that has "
            "it, or use --data-backend dali"
        )

    def _map(self, call: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
        """On the threads, many at a time, in order."""
        some = (items[first : first + _AT_ONCE] for first in range(0, len(items), _AT_ONCE))
        for results in self._pool.map(lambda part: [call(item) for item in part], some):
            yield from results


class _Unusable(Exception):
    """Why what the cache holds does not count."""


def _decoded(file: BinaryIO, entries: np.ndarray) -> DecodedSet:
    """Maps a whole file; the mapping outlives the file's being closed, replaced or removed."""
    sizes = entries["size"].astype(np.int32)
    starts = _starts(sizes)
    total = int(3 * sizes.prod(axis=1, dtype=np.int64).sum())
    pixels = np.memmap(file, mode="r", offset=_HEADER.size, shape=(total,)) if total else np.zeros(0, dtype=np.uint8)
    return DecodedSet(pixels, starts, sizes)


def _starts(sizes: np.ndarray) -> np.ndarray:
    lengths = 3 * sizes.prod(axis=1, dtype=np.int64)
    return np.cumsum(lengths) - lengths


def _decode(file: str) -> tuple[np.ndarray, int] | BadImage:
    """The pixels and their checksum, or why there are none."""
    try:
        pixels = np.ascontiguousarray(decode_image(file))
    except BadImage as error:
        return error
    return pixels, zlib.crc32(pixels.data)


def _area(file: str) -> int:
    try:
        return read_area(file)
    except BadImage:  # which is said where it is decoded
        return 0


def _decoder() -> str:
    """What the pixels depend on beside the files."""
    try:
        pydicom = metadata.version("pydicom")
    except metadata.PackageNotFoundError:
        pydicom = "none"
    return f"Pillow {PIL.__version__}, pydicom {pydicom}\n{inspect.getsource(decode)}\n{inspect.getsource(dicom)}"


def _digest(texts: Iterable[str]) -> bytes:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(os.fsencode(text) + b"\0")
    return digest.digest()


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _shown(what: str, items: Iterable[Out], total: int) -> Iterable[Out]:
    """With a progress bar, where stderr is a terminal."""
    return tqdm(items, desc=what, total=total, unit="img", leave=False, disable=None)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
