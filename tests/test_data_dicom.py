"""DICOM files are shown as DICOM says: rescaled, windowed, inverted where white is low."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import JPEGBaseline8Bit

from engine import train
from engine.cli import run
from engine.data import Samples, check_images, open_splits
from engine.data.decode import BadImage, decode_image
from engine.errors import UserError
from tests.data_helpers import make_loader, picture, save
from tests.dicom_files import write_dicom

STORED = np.arange(-1000, 3096, dtype=np.int16).reshape(64, 64)


def shown(path: Path, stored: np.ndarray = STORED, **elements) -> np.ndarray:
    """(H, W) int: the one channel of grey, after it was seen to be the same as the others."""
    pixels = decode_image(write_dicom(path, stored, **elements))
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


def window(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """The pseudocode of DICOM PS3.3 C.11.2.1.2.1, for an output from 0 to 255."""
    out = np.empty(values.shape)
    for place, x in np.ndenumerate(values):
        if x <= center - 0.5 - (width - 1) / 2:
            out[place] = 0
        elif x > center - 0.5 + (width - 1) / 2:
            out[place] = 255
        else:
            out[place] = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
    return np.rint(out).astype(int)


def table(entries: list[int], first: int = 0, bits: int = 16, number: int | None = None) -> Dataset:
    """An item of a sequence of lookup tables."""
    item = Dataset()
    item.add_new(
        "LUTDescriptor", "SS" if first < 0 else "US", [len(entries) if number is None else number, first, bits]
    )
    item.add_new("LUTData", "US", entries)
    return item


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.dcm"


def test_without_a_window_the_smallest_value_is_black_and_the_largest_white(path):
    np.testing.assert_array_equal(shown(path), np.rint((STORED + 1000) / 4095 * 255))
    np.testing.assert_array_equal(shown(path, RescaleSlope="2", RescaleIntercept="-9"), shown(path))
    np.testing.assert_array_equal(shown(path, np.full((4, 4), 7, np.uint16)), 0)


@pytest.mark.parametrize(("center", "width"), [(40, 400), (300.5, 2), (0, 1), (1000, 9000)])
def test_a_window_is_applied_after_the_rescaling(path, center, width):
    told = {"WindowCenter": str(center), "WindowWidth": str(width)}
    np.testing.assert_array_equal(shown(path, **told), window(STORED, center, width))
    rescaled = shown(path, RescaleSlope="0.5", RescaleIntercept="-100", **told)
    np.testing.assert_array_equal(rescaled, window(STORED * 0.5 - 100, center, width))


def test_of_several_windows_the_first_counts(path):
    several = shown(path, WindowCenter=["40", "900"], WindowWidth=["400", "1800"])
    np.testing.assert_array_equal(several, window(STORED, 40, 400))


def test_sigmoid_and_exact_windows(path):
    told = {"WindowCenter": "100", "WindowWidth": "500"}
    sigmoid = shown(path, VOILUTFunction="SIGMOID", **told)
    np.testing.assert_array_equal(sigmoid, np.rint(255 / (1 + np.exp(-4 * (STORED.astype(float) - 100) / 500))))
    exact = shown(path, VOILUTFunction="LINEAR_EXACT", **told)
    np.testing.assert_array_equal(exact, np.rint(np.clip((STORED - 100.0) / 500 + 0.5, 0, 1) * 255))


def test_monochrome1_is_inverted(path):
    told = {"WindowCenter": "40", "WindowWidth": "400"}
    inverted = shown(path, PhotometricInterpretation="MONOCHROME1", **told)
    assert np.abs(inverted - (255 - shown(path, **told))).max() <= 1  # rounding of halves
    assert inverted[0, 0] == 255


def test_a_voi_table_counts_before_a_window_and_after_the_rescaling(path):
    """Values outside of it have its first and its last entry."""
    squares = [i * i for i in range(256)]
    stored = np.arange(-100, 300, dtype=np.int16).reshape(20, 20)
    values = np.clip(stored * 2.0 - 60, 0, 255)
    told = {"RescaleSlope": "2", "RescaleIntercept": "-60", "WindowCenter": "0", "WindowWidth": "9"}
    found = shown(path, stored, VOILUTSequence=[table(squares), table(squares[::-1])], **told)
    np.testing.assert_array_equal(found, np.rint(values**2 / 65535 * 255))
    for first in (-100, 2**16 - 100):  # the second as a reader gives it that takes it for unsigned
        shifted = shown(path, stored, VOILUTSequence=[table(squares, first=first)])
        np.testing.assert_array_equal(shifted, np.rint(np.clip(stored + 100.0, 0, 255) ** 2 / 65535 * 255))


def test_a_table_of_eight_bits_may_have_more_entries_than_that(path):
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    entries = [i // 16 for i in range(4096)]
    np.testing.assert_array_equal(shown(path, stored, VOILUTSequence=[table(entries, bits=8)]), stored // 16)
    packed = table([0], bits=8, number=4096)
    packed.add_new("LUTData", "OW", bytes(entries))
    np.testing.assert_array_equal(shown(path, stored, VOILUTSequence=[packed]), stored // 16)


def test_a_modality_table_stands_in_place_of_the_rescaling(path):
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    entries = [40000 - 100 * i for i in range(256)]
    told = {"ModalityLUTSequence": [table(entries)], "WindowCenter": "30000", "WindowWidth": "9000"}
    np.testing.assert_array_equal(shown(path, stored, **told), window(40000 - 100 * stored.astype(int), 30000, 9000))


@pytest.mark.parametrize("value", [-2000, 63536])  # the same sixteen bits, taken for unsigned
def test_padding_is_black_and_not_in_the_images_own_range(path, value):
    stored = STORED.copy()
    stored[:8] = -2000
    padding = Tag("PixelPaddingValue"), "SS" if value < 0 else "US", value
    expected = np.rint((STORED - STORED[8, 0]) / (STORED.max() - STORED[8, 0]) * 255)
    expected[:8] = 0
    np.testing.assert_array_equal(shown(path, stored, padding=padding), expected)
    inverted = shown(path, stored, padding=padding, PhotometricInterpretation="MONOCHROME1")
    assert (inverted[:8] == 0).all()
    assert inverted[8, 0] == 255
    limit = Tag("PixelPaddingRangeLimit"), "SS", int(STORED[9, -1])
    in_range = shown(path, stored, padding=padding, limit=limit)
    assert (in_range[:10] == 0).all()
    assert (in_range[10:] > 0).sum() > 50 * 64
    nothing_else = shown(path, np.full((4, 4), -2000, np.int16), padding=padding)
    assert (nothing_else == 0).all()


@pytest.mark.parametrize(("bits", "first"), [(8, 0), (16, 0), (16, 5)])
def test_a_palette_gives_the_colours_of_its_tables(path, bits, first):
    colours = np.random.default_rng(bits).integers(0, 256, (200, 3)).astype(np.uint8)
    stored = np.arange(255, dtype=np.uint8).reshape(15, 17)
    found = decode_image(write_dicom(path, stored, **palette(colours, bits, first)))
    np.testing.assert_array_equal(found, colours[np.clip(stored.astype(int) - first, 0, 199)])


def test_a_palette_in_segments_gives_the_same(path):
    """A discrete segment of two entries, then a linear one of 254 to the last."""
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    for i, colour in enumerate(("Red", "Green", "Blue")):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        segments = np.array([0, 2, 0, 257, 1, 254, 65535 if i else 257], dtype="<u2")
        elements[f"Segmented{colour}PaletteColorLookupTableData"] = segments.tobytes()
    found = decode_image(write_dicom(path, stored, **elements))
    np.testing.assert_allclose(found[..., 1], stored, atol=1)
    np.testing.assert_array_equal(found[..., 2], found[..., 1])
    np.testing.assert_array_equal(found[..., 0], np.minimum(stored, 1))


def palette(colours: np.ndarray, bits: int, first: int) -> dict[str, object]:
    """The elements of a palette, for ``write_dicom``."""
    elements: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for i, colour in enumerate(("Red", "Green", "Blue")):
        entries = colours[:, i] if bits == 8 else colours[:, i].astype("<u2") * 257
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [len(colours), first, bits]
        elements[f"{colour}PaletteColorLookupTableData"] = entries.tobytes()
    return elements


def test_colour_is_taken_as_it_is_or_by_its_full_range(path):
    rgb = picture(12, 10)
    np.testing.assert_array_equal(decode_image(write_dicom(path, rgb)), rgb)
    twelve = decode_image(write_dicom(path, np.rint(rgb / 255 * 4095).astype(np.uint16), bits=12))
    np.testing.assert_array_equal(twelve, rgb)


def test_colour_in_jpeg_is_turned_into_rgb(path):
    rgb = picture(32, 40)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="JPEG", quality=95, subsampling=0)
    file = write_dicom(path, rgb, PhotometricInterpretation="YBR_FULL")
    data = pydicom.dcmread(file)
    data.PixelData = encapsulate([buffer.getvalue()])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.save_as(path, enforce_file_format=True)
    assert np.abs(decode_image(file).astype(int) - np.asarray(Image.open(buffer))).max() <= 2


@pytest.mark.parametrize(
    ("stored", "elements", "message"),
    [
        (np.zeros((3, 4, 4), np.uint8), {"NumberOfFrames": "3"}, "DICOM of 3 frames: save each frame"),
        (STORED, {"PhotometricInterpretation": "HSV"}, "photometric interpretation HSV"),
        (STORED, {"PhotometricInterpretation": "PALETTE COLOR"}, "DICOM without RedPaletteColorLookupTableDescriptor"),
        (STORED, {"VOILUTSequence": [table([1, 2, 3], number=4)]}, "table of 3 entries, which should have 4"),
        (STORED, {"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels, not between 1 and"),
        (STORED, {"Rows": 65}, "less than expected"),
        (STORED, {"WindowCenter": "1", "WindowWidth": "0"}, "window of width 0"),
        (STORED, {"WindowCenter": "1", "WindowWidth": "9", "VOILUTFunction": "CUBIC"}, "function CUBIC"),
    ],
)
def test_what_cannot_be_shown_is_named_with_the_way_out(path, stored, elements, message):
    file = write_dicom(path, stored, **elements)
    with pytest.raises(BadImage, match=message) as raised:
        decode_image(file)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("size", [140, 300, 5000])
def test_a_truncated_file_is_named(path, size):
    whole = Path(write_dicom(path, STORED)).read_bytes()
    assert len(whole) > 8000
    path.write_bytes(whole[:size])
    bad = check_images(Samples((str(path),), np.zeros(1, np.int64), ("a", "b")), workers=1)
    assert [file.path for file in bad] == [str(path)]
    assert "\n" not in bad[0].reason


def test_missing_pydicom_is_said_with_the_way_out(path, monkeypatch):
    samples = Samples((write_dicom(path, STORED),), np.zeros(1, np.int64), ("a", "b"))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"x\.dcm is a DICOM file.*pip install 'fused-se-engine\[medical\]'"):
        check_images(samples, workers=1)


def test_files_are_found_by_extension_and_by_content(tmp_path):
    for name in ("a/1.dcm", "a/2.DICOM", "a/IM0001", "b/1.2.840.113619", "b/4.dcm"):
        write_dicom(tmp_path / name, STORED)
    for name in ("a/README", "a/1.2.840.999", "b/notes.txt", "b/DICOMDIR.txt"):
        (tmp_path / name).write_bytes(b"no picture" * 20)
    splits = open_splits(data_dir=tmp_path, val_fraction=0.3)
    files = {*splits.train.files, *splits.val.files}
    assert {str(Path(file).relative_to(tmp_path)) for file in files} == {
        *("a/1.dcm", "a/2.DICOM", "a/IM0001", "b/1.2.840.113619", "b/4.dcm")
    }


def test_the_loader_mixes_dicom_with_other_files(tmp_path):
    files = [
        write_dicom(tmp_path / "0.dcm", STORED),
        save(tmp_path / "1.png", picture(64, 64)),
        write_dicom(tmp_path / "2", picture(64, 64, seed=2)),
    ]
    images, _ = next(make_loader(Samples(tuple(files), np.arange(3), ("a", "b", "c")), img_size=64).epoch(0))
    for file, image in zip(files, images, strict=True):
        expected = torch.from_numpy(decode_image(file).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def test_a_folder_of_dicom_files_is_trained_on(tmp_path):
    for name in ("healthy", "ill"):
        for i in range(6):
            write_dicom(tmp_path / "data" / name / f"{i}.dcm", STORED[: 32 + i], WindowCenter="40", WindowWidth="400")
    argv = ["--data-dir", str(tmp_path / "data"), "--model", "seresnet18", "--img-size", "32", "-b", "4", "-j", "1"]
    argv += ["--epochs", "1", "--warmup-epochs", "0", "--output", str(tmp_path / "run")]
    assert run(train.main, argv) == 0
