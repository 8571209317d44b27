"""CIFAR-10 and CIFAR-100 as torchvision keeps them: a folder of pickles, or the archive that they come in.

(Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.) A pickle can run any code when it is read.
These are read by an unpickler that knows dictionaries, lists, numbers, text, bytes and arrays of bytes, and nothing
else.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.samples import Head, Samples
from engine.errors import UserError

_SIDE = 32
_MAX_FILE_BYTES = 2**28  # the largest, CIFAR-100's train, has 155 million


@dataclass(frozen=True)
class _Layout:
    folder: str
    archive: str
    meta: str
    train: tuple[str, ...]
    test: str
    labels: str
    names: str
    coarse: tuple[str, str] | None

    @property
    def files(self) -> tuple[str, ...]:
        return (self.meta, *self.train, self.test)


_LAYOUTS = (
    _Layout(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        "batches.meta",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "labels",
        "label_names",
        None,
    ),
    _Layout(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        "meta",
        ("train",),
        "test",
        "fine_labels",
        "fine_label_names",
        ("coarse_labels", "coarse_label_names"),
    ),
)


def find_cifar(path: Path) -> Path | None:
    """The folder of pickles or the archive that ``path`` is or holds; None: neither.

    Raises UserError where it holds both data sets.
    """
    if path.is_file():
        with path.open("rb") as file:
            return path if file.read(2) == b"\x1f\x8b" else None
    found = []
    for layout in _LAYOUTS:
        for folder in (path, path / layout.folder):
            if (folder / layout.meta).is_file() and any((folder / name).is_file() for name in layout.files[1:]):
                found.append(folder)
                break
        else:
            if (path / layout.archive).is_file():
                found.append(path / layout.archive)
    if len(found) > 1:
        raise UserError(f"{path} holds both {found[0].name} and {found[1].name}: name one of them with --data-dir")
    return found[0] if found else None


def read_cifar(path: Path) -> tuple[Samples, Samples]:
    """Train and test of what ``find_cifar`` found. CIFAR-100's coarse labels are the head ``coarse``.

    Raises UserError: a file is missing, cannot be read, is no plain pickle, or holds other keys or sizes.
    """
    layout, contents = _read_archive(path) if path.is_file() else _read_folder(path)
    parsed = {name: _parse(content, f"{path}: {name}") for name, content in contents.items()}
    for name in layout.files:
        if name not in parsed:
            raise UserError(f"{path} lacks {name}: download the whole archive {layout.archive} again")
    meta = f"{path}: {layout.meta}"
    class_names = _names(parsed[layout.meta], layout.names, meta)
    coarse_names = _names(parsed[layout.meta], layout.coarse[1], meta) if layout.coarse else ()

    def samples(names: tuple[str, ...]) -> Samples:
        files: list[str] = []
        pixels, labels, coarse = [], [], []
        for name in names:
            where = f"{path}: {name}"
            pixels.append(_pixels(parsed[name], where))
            n = len(pixels[-1])
            files += [f"{layout.folder}/{name}[{i}]" for i in range(n)]
            labels.append(_labels(parsed[name], layout.labels, n, len(class_names), where))
            if layout.coarse:
                coarse.append(_labels(parsed[name], layout.coarse[0], n, len(coarse_names), where))
        heads = {"coarse": Head(coarse_names, np.concatenate(coarse))} if coarse else {}
        return Samples(tuple(files), np.concatenate(labels), class_names, pixels=np.concatenate(pixels), heads=heads)

    return samples(layout.train), samples((layout.test,))


def _read_folder(path: Path) -> tuple[_Layout, dict[str, bytes]]:
    layout = next(layout for layout in _LAYOUTS if (path / layout.meta).is_file())
    contents = {}
    for name in layout.files:
        file = path / name
        try:
            if file.is_file():
                _require_size(file.stat().st_size, f"{path}: {name}")
                contents[name] = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error
    return layout, contents


def _read_archive(path: Path) -> tuple[_Layout, dict[str, bytes]]:
    """Nothing is unpacked to the disk."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            layout = None
            contents = {}
            for member in archive:
                folder, _, name = member.name.removeprefix("./").partition("/")
                layout = layout or next((layout for layout in _LAYOUTS if layout.folder == folder), None)
                if layout is not None and folder == layout.folder and name in layout.files and member.isfile():
                    _require_size(member.size, f"{path}: {name}")
                    opened = archive.extractfile(member)
                    contents[name] = opened.read() if opened is not None else b""
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path} is not a readable .tar.gz archive: {error}") from error
    if layout is None:
        raise UserError(f"{path} holds neither {' nor '.join(layout.folder for layout in _LAYOUTS)}")
    return layout, contents


def _require_size(size: int, where: str) -> None:
    if size > _MAX_FILE_BYTES:
        raise UserError(f"{where} has {size} bytes, more than any file of CIFAR")


def _names(parsed: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    names = _get(parsed, key, list, where)
    if len(names) < 2 or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UserError(f"{where}: {key} must be a list of different names, at least two")
    return tuple(names)


def _pixels(parsed: dict[str, Any], where: str) -> np.ndarray:
    """(n, 32, 32, 3) uint8; a row of a file holds all red values, then green, then blue."""
    data = _get(parsed, "data", _Bytes, where).array
    if data.ndim != 2 or data.shape[1] != 3 * _SIDE**2 or not len(data):
        raise UserError(f"{where}: data is {data.shape}, and must be (n, {3 * _SIDE**2})")
    return np.ascontiguousarray(data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))


def _labels(parsed: dict[str, Any], key: str, n: int, classes: int, where: str) -> np.ndarray:
    labels = _get(parsed, key, list, where)
    if len(labels) != n or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise UserError(f"{where}: {key} must be a list of {n} integers from 0 to {classes - 1}")
    return np.array(labels, dtype=np.int64)


def _get(parsed: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if not isinstance(parsed.get(key), kind):
        raise UserError(f"{where} holds no {key}")
    return parsed[key]


class _Bytes:
    """Stands in for a numpy array of bytes while a pickle is read: no code of numpy's is handed to it."""

    array = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self._fill(data, shape, dtype, "F" if fortran else "C")

    def _fill(self, data: Any, shape: Any, dtype: Any, order: Any) -> _Bytes:
        if not isinstance(dtype, _Uint8):
            raise pickle.UnpicklingError("an array of something other than bytes")
        raw = data.encode("latin1") if isinstance(data, str) else data
        self.array = np.frombuffer(raw, dtype=np.uint8).reshape(shape, order=order)
        return self


class _Uint8:
    """Stands in for numpy's dtype."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, of which a byte has none."""


class _Unused:
    """Stands in for numpy's class of arrays, which a pickle names and need not have."""


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Uint8,
    ("numpy", "ndarray"): _Unused,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Bytes() for core in ("core", "_core")},
    **{
        (f"numpy.{core}.numeric", "_frombuffer"): lambda data, dtype, shape, order: _Bytes()._fill(
            data, shape, dtype, order
        )
        for core in ("core", "_core")
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of CIFAR does not")
        return _KNOWN[module, name]


def _parse(content: bytes, where: str) -> dict[str, Any]:
    """The dictionary that a file holds, its keys as text. The original files are Python 2's."""
    try:
        parsed = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} is not a pickle of CIFAR: {reason}") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{where} holds no dictionary")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in parsed.items()}
